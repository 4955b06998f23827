"""Tests that need an NVIDIA GPU and nothing else: on it the kit draws, searches, learns, resumes and fits in memory as
on the CPU, which all other tests run on."""

import pytest
import torch
from torch.testing import assert_close

import ppo
from baselines import COLLECTORS
from config import TINY, Config, LearningConfig, SearchConfig, TreeConfig
from mcts import plant, search
from ppo import gradients, make_batches, make_optimizer
from runtime import memory
from runtime.loading import load_policy
from runtime.micro_batches import MicroBatches
from runtime.run_folder import read_metrics
from runtime.torch_sampler import TorchSampler
from runtime.weights import set_weights, trained_weights
from sampling import SamplingParams, complete

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]
EVERY = COLLECTORS | ppo.COLLECTORS


def pair(model, rank=0, **options):
    """The same policy twice, its value head too: on the CPU and on the GPU."""
    torch.manual_seed(0)
    here = load_policy(model, rank, "cpu", **options)
    there = load_policy(model, rank, "cuda", **options)
    set_weights(there, trained_weights(here))
    return here, there


@pytest.mark.parametrize("rank", [0, 8])
def test_samples_are_the_policys(qwen, problems, rank):
    """Prevents log-probabilities on a GPU that are not those of the weights, and steps that end elsewhere."""
    here, there = pair(qwen, rank)
    prompts = [there.encode(problem) for problem in problems]
    params = SamplingParams(4, 32, temperature=0.7, stop_at_step=True)
    rows, usage = TorchSampler(there).sample(prompts, [1, 2, 3, 4], params)
    assert usage.generated == sum(len(s.tokens) for row in rows for s in row)
    samples = [(prompt, s) for prompt, row in zip(prompts, rows, strict=True) for s in row]
    batch = here.batch([prompt for prompt, _ in samples], [s.tokens for _, s in samples])
    with torch.no_grad():
        logprobs = here.logprobs(*here.states(batch), 0.7)[0]
    for row, (_, sample) in zip(logprobs, samples, strict=True):
        assert_close(torch.tensor(sample.logprobs), row[-len(sample.tokens) :], atol=1e-3, rtol=1e-3)
        if sample.ended == "step":
            assert "</step>" in here.tokenizer.decode(sample.tokens)


def test_a_search_keeps_its_books(problems):
    """Prevents a tree on a GPU whose priors, values or cached states are not its policy's."""
    here, there = pair(TINY)
    torch.nn.init.normal_(there.value_head.layers[-1].weight, std=0.05)
    here.value_head.load_state_dict(there.value_head.state_dict())
    trees = plant(there, problems, [1, 2, 3, 4])
    usage = search(trees, TorchSampler(there), there.grade, SearchConfig(simulations=24, children=3))
    assert usage.generated and all(tree.root.visits == 24 for tree in trees)
    for tree in trees:
        assert all(node.pending == 0 for node in tree.nodes())
        inner = [node for node in tree.nodes() if node.children and node is not tree.root]
        states = [tree.prompt + node.completion() for node in inner]
        for node, value in zip(inner, here.values(states), strict=True):
            assert node.value == pytest.approx(value, abs=1e-3)


@pytest.mark.parametrize("rank", [0, 8])
def test_gradients_are_the_cpus(qwen, problems, rank):
    """Prevents a loss that differs on a GPU."""
    here, there = pair(qwen, rank)
    rows, _ = complete(here, TorchSampler(here), problems, [1, 2, 3, 4], SamplingParams(4, 24), here.grade)
    trajectories, learning, found = [t for row in rows for t in row], LearningConfig(failures=True), []
    for policy in here, there:
        micro, optimizer = MicroBatches(256), make_optimizer(policy, Config(learning=learning))
        batches = make_batches(policy, trajectories, learning, micro)
        gradients(policy, optimizer, batches, learning, micro)
        found.append({name: p.grad.cpu() for name, p in policy.named_parameters() if p.grad is not None})
    assert found[0].keys() == found[1].keys()
    for name, gradient in found[0].items():
        assert (found[1][name] - gradient).norm() <= 2e-3 * gradient.norm() + 1e-8, name


@pytest.mark.parametrize("method", EVERY)
def test_a_run_learns_is_resumed_and_tells_its_memory(tiny_config, method):
    """Prevents a run that fails in its first step on a GPU, or can't go on after it."""
    config = tiny_config(
        method, device="cuda", model=TINY, max_tokens=64, tokens=6_000,
        **({"tree": TreeConfig(simulations=24, children=2)} if method == "mcts" else {}),
    )  # fmt: skip
    scores = ppo.train(config, EVERY[method])
    assert scores["after"].problems == config.measuring.test_problems
    steps = [row for row in read_metrics(config.folder) if "update_seconds" in row]
    assert steps and all(0 < row["gpu_peak_gb"] < 8 for row in steps)
    assert max(row["disagreement_mean"] for row in steps) < 0.01
    ppo.train(config.change(tokens=9_000), EVERY[method], resume=True)
    assert read_metrics(config.folder)[-1]["generated"] >= 9_000


@pytest.mark.parametrize("method", ["mcts", "best-of-n"])
def test_the_memory_estimate_holds(tiny_config, method):
    """Prevents an estimate below what a run takes, which would then die in its third hour."""
    config = tiny_config(
        method, device="cuda", model=TINY, max_tokens=64, problems=64, tokens=60_000, gpu_memory=4.0, evaluations=0,
        **({"tree": TreeConfig(simulations=32, children=4)} if method == "mcts" else {"samples": 16}),
    )  # fmt: skip
    try:
        plan = memory.plan(config, "cuda", 16)
        ppo.train(config, EVERY[method])
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    peaks = [row["gpu_peak_gb"] for row in read_metrics(config.folder) if "gpu_peak_gb" in row]
    assert 0 < max(peaks) + memory.CONTEXT_GB <= plan.need
