"""Tests of baselines.py: what each rival hands to the shared trainer. Whole runs are in test_ppo.py."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import baselines
from baselines import collect_best_of_n, collect_groups
from distill import group_advantages
from ppo import sample_answers
from runtime.launch import Trainer
from runtime.torch_sampler import TorchSampler

REWARDS = st.lists(st.floats(-1, 1, width=32), min_size=2, max_size=16)


@pytest.fixture
def answers(policy, fake_sampler):
    """A sampler whose answers to 2 3 -> 5 are right, close or missing, and to any other problem break the rules."""
    texts = [("<answer> 2 + 3 </answer>", 0.3), ("<answer> 3 </answer>", 0.4), ("", 0.3), ("<answer> </answer>", 1.0)]
    rows = [(policy.tokenizer(f"{text} <|end|>")["input_ids"], p, "end") for text, p in texts]
    easy = policy.tokenizer("Numbers: 2 3 Target: 5")["input_ids"]
    return fake_sampler(lambda prefix: rows[:3] if easy == list(prefix[1:-1]) else rows[3:])


# ------------------------------------------------------------------------------------------------ advantages


def test_group_advantages_by_hand():
    """Prevents a deviation of the population (n) in place of the sample's (n - 1)."""
    assert group_advantages([1.0, 0.0, -1.0]) == pytest.approx([1 / 1.0001, 0, -1 / 1.0001])
    assert group_advantages([1.0, -0.5]) == pytest.approx([0.75 / 1.06076, -0.75 / 1.06076], abs=1e-5)


@given(REWARDS)
def test_group_advantages_are_those_of_trl(rewards):
    """Prevents a baseline of another scale (expression of TRL 1.16, GRPOTrainer, scale_rewards="group")."""
    values = torch.tensor(rewards, dtype=torch.float64)
    expected = (values - values.mean()) / (values.std() + 1e-4)
    found = group_advantages(rewards)
    assert found == pytest.approx(expected.tolist(), abs=1e-9)
    assert found.sum() == pytest.approx(0, abs=1e-6)


@given(st.floats(-1, 1), st.integers(2, 16))
def test_equal_rewards_have_no_advantage(reward, count):
    """Prevents noise of rounding, divided by next to nothing, from being an advantage: exactly none, so that such a
    group can be told apart."""
    assert not group_advantages([reward] * count).any()


# ------------------------------------------------------------------------------------------------ collectors


def test_best_of_n_keeps_the_best_sample_and_pays_for_all(policy, answers, problems, tiny_config):
    """Prevents the wrong sample from being distilled, and a method that looks cheaper than it is."""
    config = tiny_config("best-of-n", samples=12)
    best, usage, info = collect_best_of_n(policy, answers, problems, config, np.random.default_rng(0))
    assert [t.problem for t in best] == problems
    assert [t.reward.value for t in best] == [1.0, -0.9, -0.9, -0.9]
    assert {t.advantages for t in best} == {None}
    assert info == {"solved": 0.25}
    rows, _ = sample_answers(policy, answers, problems, 12, config, np.random.default_rng(0))
    assert usage.generated == sum(len(t.completion) for row in rows for t in row)
    assert best[0] == next(t for t in rows[0] if t.reward.correct), "the first of equals"


def test_groups_of_equal_rewards_are_left_out_and_the_others_are_whole(policy, answers, problems, tiny_config):
    """Prevents groups without a lesson (the mean of 13 times -0.9 is not -0.9) that dilute the step, or cut groups."""
    config = tiny_config("cispo", samples=13)
    found, usage, info = collect_groups(policy, answers, problems, config, np.random.default_rng(0))
    assert [t.problem for t in found] == [problems[0]] * 13
    rewards = [t.reward.value for t in found]
    assert sorted(set(rewards)) == pytest.approx([-1.0, 0.2, 1.0])
    assert [t.advantages[-1] for t in found] == pytest.approx(group_advantages(rewards).tolist())
    assert all(t.advantages == t.advantages[-1:] * len(t.completion) for t in found)
    parsed = sum(t.reward.parsed for t in found) / 52  # of all samples: the guard sees groups that are all wrong too
    sampled = pytest.approx((sum(rewards) - 0.9 * 39) / 52)
    assert info == {"sample_reward": sampled, "parsed": pytest.approx(parsed), "solved": 0.25}
    assert usage.prefilled == sum(len(policy.encode(p)) for p in problems)


@pytest.mark.parametrize(
    ("cutoff", "samples", "fewest", "most"), [(None, 6, 1, 6), (0.0, 6, 6, 6), (1e-30, 6, 6, 6), (1.0, 1, 1, 1)]
)
def test_distinct_samples_are_those_that_the_cutoff_leaves(moved, problems, tiny_config, cutoff, samples, fewest, most):
    """Prevents samples that are paid for twice where --cutoff asks for different ones, and unlikely ones among them."""
    config, sampler = tiny_config("best-of-n", cutoff=cutoff), TorchSampler(moved)
    rows, _ = sample_answers(moved, sampler, problems, 6, config, np.random.default_rng(0))
    for row in rows:
        assert fewest <= len({tuple(t.completion) for t in row}) <= most
        assert len(row) == samples


# ------------------------------------------------------------------------------------------------ command line


@pytest.mark.parametrize("method", ["best-of-n", "cispo", "grpo"])
def test_the_named_method_runs_with_all_options_and_can_be_resumed(method, monkeypatch):
    """Prevents a method under another's name, and options or --resume that are lost on the way."""
    seen = []
    monkeypatch.setattr(baselines, "launch", lambda *args: seen.append(args))
    commands = (["--method", method, "--seed", "2"], ["--seed=2", f"--method={method}"], ["--resume", "runs/x"])
    for args in commands:
        baselines.main(args)
    assert [args for args, *_ in seen] == list(commands)
    trainer = Trainer(baselines.train, baselines.update, baselines.make_optimizer, baselines.set_rate)
    assert all(rest[1:] == [baselines.COLLECTORS, trainer] for _, *rest in seen)


@pytest.mark.parametrize("args", [[], ["--seed", "2"], ["--method", "mcts"], ["--method"], ["--method=none"]])
def test_a_program_of_several_methods_asks_for_one(args, capsys):
    """Prevents best-of-n from running where another method, or none, was named."""
    with pytest.raises(SystemExit) as stop:
        baselines.main(args)
    assert stop.value.code == 2
    assert capsys.readouterr().err == "error: pass --method best-of-n | cispo | grpo, and options of ppo.py\n"
