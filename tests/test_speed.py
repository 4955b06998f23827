"""Tests of benchmarks/speed.py: the peer is a real one, and the counts that no machine's noise can hide stay small."""

import json
import time

import numpy as np
import pytest

from benchmarks import speed
from config import Config
from countdown import make_problems
from config import TINY
from runtime.loading import load_policy
from config import SearchConfig
from mcts import search
from runtime.torch_sampler import TorchSampler


@pytest.fixture(scope="module")
def policy():
    return load_policy(TINY, train=False)


def test_the_peer_draws_from_the_same_distribution_and_says_why_it_ended(policy):
    """Prevents a ratio to a peer that does less: other stops, other lengths, no priors."""
    prompts = [policy.encode(problem) for problem in make_problems(40, "train")]
    lengths = []
    for sampler in (TorchSampler(policy), speed.GenerateSampler(policy, together=True)):
        rows, usage = sampler.sample(prompts, 4, list(range(40)), 64, 1.0, stop_at_step=True)
        samples = [s for row in rows for s in row]
        assert usage.generated == sum(len(s.tokens) for s in samples)
        assert {s.ended for s in samples} == {"step"} and all(s.logprobs[0] < 0 for s in samples)
        assert all("</step>" in policy.decode(s.tokens) for s in samples)
        lengths.append(np.mean([sum(s.logprobs) for s in samples]))
    assert lengths[0] == pytest.approx(lengths[1], rel=0.15)


def test_a_search_runs_hardly_more_than_its_distinct_tokens(policy):
    """Prevents a slower search that only a quiet machine would show: what is run beside the generated tokens is the
    prompts once and each expanded node's last token; a wave costs one prefill and one pass a token of its longest
    step."""
    passes, plain = [], policy.hidden
    policy.hidden = lambda ids, *rest, **cache: (passes.append(ids.shape), plain(ids, *rest, **cache))[1]
    sampler, problems = TorchSampler(policy), make_problems(8, "train")
    config = SearchConfig(simulations=48, children=4, max_tokens=Config().max_tokens)
    prompts = [policy.encode(problem) for problem in problems]
    trees, usage = search(problems, prompts, sampler, sampler.values, policy.grade, config, list(range(8)))
    del policy.hidden
    expansions = sum(tree.expansions for tree in trees)
    assert usage.valued == 0
    assert usage.prefilled == sum(map(len, prompts)) + expansions - len(trees)
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
    found = json.loads((tmp_path / "deep" / "speed.json").read_text())
    assert found["sampling"][0]["ratio"] > 0 and found["search"]["ratio"] > 0 and found["torch"]
    assert 0 < found["search"]["prefilled"] < 1.1 and "simulations/s" in (out := capsys.readouterr().out)
    assert "vLLM: nowhere is not there" in out
