"""Tests of experiments/oracle.py: which states a completion passes through, what is true of them, the statistics."""

import json
from itertools import product

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from config import TINY
from countdown import Problem
from experiments import oracle
from runtime import cli
from runtime.loading import load_policy


def test_states_end_where_steps_do_and_stop_at_the_first_broken_one():
    """Prevents a critic judged on another state than the numbers say, or on states that break the rules."""
    policy = load_policy(TINY, train=False)
    steps = "<step> 5 * 7 = 35 left 3 9 35 </step> <step> 35 + 9 = 44 left 3 44 </step> <answer> 5 * 7 + 9 </answer>"
    tokens = policy.tokenizer(steps)["input_ids"]
    (one, left), (two, last) = oracle.states_of(policy, Problem((3, 5, 7, 9), 44), tokens)
    assert (left, last) == ((3, 9, 35), (3, 44)) and two[: len(one)] == one
    assert policy.decode(one).endswith("35 </step>") and policy.decode(two).endswith("44 </step>")
    broken = policy.tokenizer("<step> 5 * 7 = 36 left 3 9 36 </step> <step> 36 + 9 = 45 left 3 45 </step>")["input_ids"]
    assert oracle.states_of(policy, Problem((3, 5, 7, 9), 44), broken) == []


def test_the_best_reward_in_reach():
    """Prevents a truth that is only solvability: from 3 and 9, 27 is nearest to 30."""
    assert oracle.best_reward((3, 9), 27) == 1.0
    assert oracle.best_reward((3, 9), 30) == pytest.approx(1 - 2 * 3 / 30)
    assert oracle.best_reward((3, 9), 1000) == pytest.approx(1 - 2 * 973 / 1000)


@given(st.lists(st.tuples(st.integers(0, 5), st.booleans()), min_size=1, max_size=30))
def test_area_under_the_curve_counts_pairs(rows):
    """Prevents ties counted as wins or losses: against a count of all pairs."""
    scores, labels = np.array([s for s, _ in rows], float), np.array([x for _, x in rows])
    pairs = [(a > b) + 0.5 * (a == b) for a in scores[labels] for b in scores[~labels]]
    found = oracle.area_under_curve(scores, labels)
    assert found is None if not pairs else found == pytest.approx(np.mean(pairs))


def test_the_perfect_critic_knows_each_state():
    """Prevents a ceiling measured with another problem's truth, or with states that break the rules."""
    policy = load_policy(TINY, train=False)
    problems = [Problem((3, 5, 7, 9), 44), Problem((2, 3), 7)]
    steps = (
        "",
        "<step> 5 * 7 = 35 left 3 9 35 </step>",
        "<step> 5 + 7 = 12 left 3 9 12 </step>",
        "<step> 5 * 7 = 36 </step>",
    )
    states = [policy.encode(problems[0]) + policy.tokenizer(step)["input_ids"] for step in steps]
    values, _ = oracle.perfect_critic(policy, problems)([*states, policy.encode(problems[1])])
    assert values == [1, 1, -1, -1, -1]  # 3 9 12 and 2 3 can't reach 44 and 7; 5 * 7 is not 36


def test_critics_are_judged_from_the_command_line(tmp_path, monkeypatch, capsys):
    """Prevents a file without its states, and an untrained critic that seems to know something."""
    out = tmp_path / "critic.json"
    args = f"--problems 10 --samples 4 --out {out} --simulations 8 32 --children 2 4".split()
    monkeypatch.setattr("sys.argv", ["oracle.py", str(TINY), *args])
    oracle.main()
    (row,) = json.loads(out.read_text(encoding="utf-8"))["critics"]
    assert row["states"] == len(row["value"]) == len(row["in_reach"]) == len(row["best"]) > 5
    assert set(row["value"]) == {0.0} and row["auc"] == 0.5
    assert all((best == 1) == bool(reach) for best, reach in zip(row["best"], row["in_reach"]))
    assert "area under the curve" in capsys.readouterr().out
    searches = {(s["critic"], s["children"], s["simulations"]): s for s in row["searches"]}
    assert set(searches) == set(product(("learned", "none", "perfect"), (2, 4), (8, 32)))
    for k, n in product((2, 4), (8, 32)):  # untrained, the critic says 0
        learned, none, perfect = (searches[critic, k, n] for critic in ("learned", "none", "perfect"))
        assert {**learned, "critic": ""} == {**none, "critic": ""} and 0 < learned["tokens"] < 32 * k * n
        assert perfect["path_right"] <= perfect["solved"]
    assert searches["none", 2, 32]["tokens"] < searches["none", 4, 32]["tokens"]


@pytest.mark.parametrize(("args", "message"), [([], "at least one model"), (["x", "--samples", "0"], "at least 1"),
                                               (["x", "--temperature", "nan"], "finite")])  # fmt: skip
def test_nonsense_is_told_before_a_model_is_loaded(args, message, monkeypatch, capsys, tmp_path):
    """Prevents a file overwritten with nothing, or a traceback after the sampling."""
    monkeypatch.setattr("sys.argv", ["oracle.py", *args, "--out", str(tmp_path / "critic.json")])
    monkeypatch.setattr(oracle, "load_policy", lambda *_, **__: pytest.fail("loaded"))
    with pytest.raises(SystemExit) as stop:
        cli.command(oracle.main)
    assert stop.value.code == 2 and message in capsys.readouterr().err and not list(tmp_path.iterdir())


def test_what_was_judged_is_kept_when_the_next_model_fails(tmp_path, monkeypatch):
    """Prevents hours of searches lost to the last of several models."""
    judged = []

    def judge(model, config):
        if judged:
            raise ValueError("no luck")
        return judged.append(model) or {"model": model}

    monkeypatch.setattr(oracle, "judge", judge)
    monkeypatch.setattr("sys.argv", ["oracle.py", str(TINY), str(TINY), "--out", str(tmp_path / "critic.json")])
    with pytest.raises(ValueError, match="no luck"):
        oracle.main()
    assert json.loads((tmp_path / "critic.json").read_text(encoding="utf-8"))["critics"] == [{"model": str(TINY)}]


def test_a_policy_without_legal_steps_is_named(checkpoint, tmp_path, monkeypatch):
    """Prevents statistics of nothing."""
    monkeypatch.setattr("sys.argv", ["oracle.py", str(checkpoint), "--problems", "2", "--samples", "1",
                                      "--out", str(tmp_path / "new" / "critic.json")])  # fmt: skip
    with pytest.raises(ValueError, match="no state to judge"):
        oracle.main()
