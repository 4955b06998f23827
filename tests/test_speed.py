"""Tests of benchmarks/speed.py: the peer is a real one, and the counts that no machine's noise can hide stay small."""

import json
import time

import numpy as np
import pytest

from benchmarks import speed
from config import TINY, SearchConfig, TaskConfig
from countdown import make_problems
from mcts import plant, search
from runtime.loading import load_policy
from runtime.torch_sampler import TorchSampler
from sampling import SamplingParams


@pytest.fixture(scope="module")
def policy():
    return load_policy(TINY, train=False)


def test_the_peer_draws_from_the_same_distribution_and_says_why_it_ended(policy):
    """Prevents a ratio to a peer that does less: other stops, other lengths, no priors."""
    prompts = [policy.encode(problem) for problem in make_problems(40, "train")]
    lengths = []
    for sampler in (TorchSampler(policy), speed.GenerateSampler(policy, together=True)):
        rows, usage = sampler.sample(prompts, list(range(40)), SamplingParams(4, 64, stop_at_step=True))
        samples = [s for row in rows for s in row]
        assert usage.generated == sum(len(s.tokens) for s in samples)
        assert {s.ended for s in samples} == {"step"} and all(s.logprobs[0] < 0 for s in samples)
        assert all("</step>" in policy.decode(s.tokens) for s in samples)
        lengths.append(np.mean([sum(s.logprobs) for s in samples]))
    assert lengths[0] == pytest.approx(lengths[1], rel=0.15)


def test_a_search_runs_hardly_more_than_its_distinct_tokens(policy, monkeypatch):
    """Prevents a slower search that only a quiet machine would show.

    Beside the generated tokens it runs each prompt once, and the last token of each expanded node. A wave costs one
    prefill, and one pass for each token of its longest step.
    """
    passes, plain = [], policy.hidden

    def hidden(ids, *rest, **cache):
        passes.append(ids.shape)
        return plain(ids, *rest, **cache)

    monkeypatch.setattr(policy, "hidden", hidden)
    config = SearchConfig(simulations=48, children=4, max_tokens=TaskConfig().max_tokens)
    trees = plant(policy, make_problems(8, "train"), list(range(8)))
    usage = search(trees, TorchSampler(policy), policy.grade, config)
    expansions = sum(tree.expansions for tree in trees)
    assert usage.valued == 0
    assert usage.prefilled == sum(len(tree.prompt) for tree in trees) + expansions - len(trees)
    waves = -(-config.simulations // config.workers) + 1
    assert sum(length > 1 for _, length in passes) == 1 and len(passes) <= waves * (config.step_tokens + 1)
    distinct = sum(len(tree.prompt) + sum(len(node.tokens) for node in tree.nodes()) for tree in trees)
    assert sum(rows * length for rows, length in passes) <= 1.1 * distinct < 0.6 * usage.generated


def test_the_command_prints_ratios_and_keeps_them(tmp_path, monkeypatch, capsys):
    """Prevents a benchmark that fails after its minutes."""
    args = "--rows 8 --trees 2 --peer-trees 1 --simulations 6 --repeats 1 --threads 1 --vllm nowhere".split()
    monkeypatch.setattr("sys.argv", ["speed.py", *args, "--out", str(tmp_path / "deep" / "speed.json")])
    monkeypatch.setattr("time.perf_counter", time.perf_counter)  # given back afterwards
    speed.main()
    results, printed = (
        json.loads((tmp_path / "deep" / "speed.json").read_text(encoding="utf-8")),
        capsys.readouterr().out,
    )
    assert results["sampling"][0]["ratio"] > 0 and results["search"]["ratio"] > 0 and results["torch"]
    assert 0 < results["search"]["prefilled"] < 1.1 and "simulations/s" in printed
    assert "vLLM: nowhere is not there" in printed
