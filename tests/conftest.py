"""What the tests share: a small random policy, made here, and a fake sampler with a known distribution."""

import runtime.threads

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test downloads anything

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, settings

from benchmarks.random_qwen import THIN, Shape, make_checkpoint
from config import TreeConfig, flatten, preset_for
from countdown import Problem
from experiments.pretrain import PretrainConfig, build_model, build_tokenizer
from runtime.loading import load_policy
from sampling import Sample, Usage

settings.register_profile("kit", deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
settings.load_profile("kit")  # a test that changes its fixtures must not use hypothesis


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    """A folder with a random network of 2 layers and the embedded tokenizer, as save_pretrained writes it."""
    folder = tmp_path_factory.mktemp("random-tiny")
    torch.manual_seed(0)
    tokenizer = build_tokenizer()
    build_model(PretrainConfig(hidden=64, layers=2), len(tokenizer)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def qwen(tmp_path_factory):
    """A folder with a thin Qwen2.5: its tokenizer's kind, chat format, padded vocabulary, two stop tokens and shape of
    attention, and weights that know the tags but no arithmetic."""
    return make_checkpoint(Shape(tmp_path_factory.mktemp("thin-qwen"), **THIN, lessons=60))


@pytest.fixture
def policy(checkpoint):
    """A fresh policy from the random checkpoint, all weights trained."""
    torch.manual_seed(0)
    return load_policy(checkpoint)


@pytest.fixture(params=[0, 4], ids=["full", "lora"])
def moved(request, checkpoint):
    """A policy whose every trainable weight, the value head's too, has left its start; the reference stayed there."""
    torch.manual_seed(1)
    policy = load_policy(checkpoint, lora_rank=request.param)
    for parameter in policy.parameters():
        if parameter.requires_grad:
            parameter.data += 0.05 * torch.randn_like(parameter)
    return policy


@pytest.fixture
def problems():
    """Problems whose prompts differ in length."""
    return [Problem((2, 3), 5), Problem((2, 3, 5, 10), 25), Problem((13, 1, 12), 999), Problem((7, 7, 1, 4, 9), 1)]


@pytest.fixture
def tiny_config(checkpoint, tmp_path):
    """Configurations of training runs of a second or two; any setting can be given by its name, and topics too."""

    def make(method="mcts", **changes):
        config = preset_for("tiny", method)
        if method == "mcts":
            changes.setdefault("tree", TreeConfig(simulations=8, step_tokens=4))
        topics = {name: changes.pop(name) for name in ("tree", "group", "learning", "machine") if name in changes}
        small = dict(
            model=str(checkpoint), out=tmp_path / "run", device="cpu", train_problems=50, tokens=2_000, problems=4,
            samples=4, max_tokens=8, warmup=0, learning_rate=3e-4, evaluations=1, eval_problems=4, eval_samples=2,
            test_problems=4, test_samples=2, failures=True, reward="dense",
        )  # fmt: skip
        own = {name: value for name, value in small.items() if name in flatten(config)}
        return replace(config, **topics).change(**(own | changes))

    return make


class FakeSampler:
    """Draws whole steps from `steps(prefix) -> [(tokens, probability, ended), ...]`: a policy that is known exactly."""

    def __init__(self, steps):
        self.steps = steps
        self.calls = []  # the prefixes of each call

    def sample(self, prefixes, seeds, params):
        self.calls.append([list(prefix) for prefix in prefixes])
        rows = []
        for prefix, seed in zip(prefixes, seeds):
            choices = self.steps(tuple(prefix))
            if not choices:
                rows.append([Sample() for _ in range(params.n)])
                continue
            distinct, odds = params.cutoff is not None, [p for _, p, _ in choices]
            size = min(params.n, len(choices)) if distinct else params.n
            picks = np.random.default_rng(seed).choice(len(choices), size, replace=not distinct, p=odds)
            rows.append([])
            for pick in picks:
                tokens, probability, ended = choices[pick]
                share = float(np.log(probability)) / len(tokens)
                rows[-1].append(Sample(list(tokens), [share] * len(tokens), ended))
        generated = sum(len(sample.tokens) for row in rows for sample in row)
        return rows, Usage(generated, sum(map(len, prefixes)), 0.0)

    def values(self, states):
        return [0.0] * len(states), Usage(valued=sum(map(len, states)))


@pytest.fixture
def fake_sampler():
    return FakeSampler
