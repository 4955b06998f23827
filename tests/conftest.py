"""What the tests share: a small random policy, made here, and a fake sampler with a known distribution."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test downloads anything
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import numpy as np
import pytest
import torch

from policy import load_policy
from pretrain import PretrainConfig, build_model, build_tokenizer
from sampling import Sample, Usage

torch.set_num_threads(2)


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    """A folder with a random Qwen2 of 2 layers and the embedded tokenizer, as save_pretrained writes it."""
    folder = tmp_path_factory.mktemp("random-qwen2")
    torch.manual_seed(0)
    tokenizer = build_tokenizer()
    build_model(PretrainConfig(hidden=64, layers=2), len(tokenizer)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def policy(checkpoint):
    """A fresh policy from the random checkpoint, all weights trained."""
    torch.manual_seed(0)
    return load_policy(checkpoint)


class FakeSampler:
    """Draws whole steps from `steps(prefix) -> [(tokens, probability, ended), ...]`: a policy that is known exactly."""

    def __init__(self, steps):
        self.steps = steps
        self.calls = []  # the prefixes of each call

    def sample(self, prefixes, n, seeds, max_tokens, temperature=1.0, stop_at_step=False):
        self.calls.append([list(prefix) for prefix in prefixes])
        rows = []
        for prefix, seed in zip(prefixes, seeds):
            choices = self.steps(tuple(prefix))
            if not choices:
                rows.append([Sample() for _ in range(n)])
                continue
            picks = np.random.default_rng(seed).choice(len(choices), size=n, p=[p for _, p, _ in choices])
            rows.append([])
            for pick in picks:
                tokens, probability, ended = choices[pick]
                share = float(np.log(probability)) / len(tokens)
                rows[-1].append(Sample(list(tokens), [share] * len(tokens), ended))
        generated = sum(len(sample.tokens) for row in rows for sample in row)
        return rows, Usage(generated, sum(map(len, prefixes)), 0.0)


@pytest.fixture
def fake_sampler():
    return FakeSampler
