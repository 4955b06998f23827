"""Sampling, search and update against what a user would write without this kit, side by side in one run.

    python -m benchmarks.speed                 # prints a table of ratios, writes runs/speed.json
    python -m benchmarks.speed --rows 64 512 2048 --repeats 5

Every figure is the median of `--repeats` runs of both sides, taken in turn. The floor is arithmetic: the weights' matrix
products of the tokens that must be run, at this machine's measured rate for such products; attention, norms, sampling
and Python come on top. A peer that isn't installed is left out with a line saying so.
"""

import json
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median

import numpy as np
import torch

import runs
from config import Config
from countdown import make_problems
from loading import TINY, load_policy
from mcts import search
from policy import Policy, left_pad
from ppo import collect_mcts


@dataclass
class Bench:
    """Time the kit beside its peers on the embedded policy."""

    rows: tuple[int, ...] = (64, 512, 2048)  # sequences sampled together
    problems: int = 64  # trees
    children: int = 4
    simulations: int = 128
    repeats: int = 3
    threads: int = 2
    out: Path = Path("runs/speed.json")


def compare(ours: Callable[[], float], other: Callable[[], float], repeats: int) -> tuple[float, float]:
    """Median results of two measurements, taken in turn after a warm-up of each."""
    found = [(ours(), other()) for _ in range(repeats + 1)][1:]
    return median(a for a, _ in found), median(b for _, b in found)


def products_rate(hidden: int, wide: int, rows: int) -> float:
    """FLOP/s of the matrix products of an MLP layer with this many rows."""
    x, up, down = torch.randn(rows, hidden), torch.randn(hidden, wide), torch.randn(wide, hidden)
    times = []
    for _ in range(20):
        began = time.perf_counter()
        x @ up @ down
        times.append(time.perf_counter() - began)
    return 4 * rows * hidden * wide / median(times)


def steps_of(policy: Policy, rows: int) -> list[list[int]]:
    """Prompts, 8 rows of each."""
    return [policy.encode(problem) for problem in make_problems(rows // 8, "train")]


def our_rate(policy: Policy, prompts: list[list[int]], seed: int) -> float:
    """Tokens a second of TorchSampler, whole ragged completions of at most 64 tokens."""
    _, usage = TorchSampler(policy, 4096).sample(prompts, 8, list(range(seed, seed + len(prompts))), 64)
    return usage.generated / usage.seconds


def generate_rate(policy: Policy, prompts: list[list[int]], seed: int) -> float:
    """Tokens a second of transformers' `generate` on the same rows, counted up to each row's end."""
    torch.manual_seed(seed)
    ids, attention = left_pad([p for p in prompts for _ in range(8)], policy.tokenizer.pad_token_id)
    began = time.perf_counter()
    with torch.inference_mode():
        out = policy.lm.generate(
            input_ids=ids, attention_mask=attention, do_sample=True, top_k=0, top_p=1.0, temperature=1.0,
            max_new_tokens=64, pad_token_id=policy.tokenizer.pad_token_id,
        )  # fmt: skip
    seconds = time.perf_counter() - began
    return float((out[:, ids.shape[1] :] != policy.tokenizer.pad_token_id).sum()) / seconds


class PlainSampler:
    """What one writes first: a `generate`-like loop for each expansion alone, its prefix run again every time."""

    def __init__(self, policy: Policy):
        self.policy = policy

    @torch.inference_mode()
    def sample(self, prefixes, n, seeds, max_tokens, temperature=1.0, stop_at_step=False):
        began, rows = time.perf_counter(), []
        one = TorchSampler(self.policy, kept=0)
        for prefix, seed in zip(prefixes, seeds):
            rows += one.sample([prefix], n, [seed], max_tokens, temperature, stop_at_step)[0]
        generated = sum(len(s.tokens) for row in rows for s in row)
        return rows, Usage(generated, sum(map(len, prefixes)), time.perf_counter() - began)

    def values(self, states):
        return [self.policy.values([state])[0] for state in states], Usage(valued=sum(map(len, states)))
