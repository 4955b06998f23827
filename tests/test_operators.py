"""Tests of experiments/operators.py: critics of a known error, and tokens until the first right answer."""

import json

import numpy as np
import pytest

from config import TINY, SearchConfig
from countdown import Countdown, Problem, make_problems, solvable
from experiments import figures, operators
from experiments.operators import OperatorsConfig, erring_critic, numbers_left
from runtime.loading import load_policy
from runtime.torch_sampler import TorchSampler


@pytest.fixture(scope="module")
def tiny():
    return load_policy(TINY, train=False)


def states_of(policy, count):
    """Problems, and a state of each: the prompt and a legal or an illegal first step."""
    problems = make_problems(count, "validation")
    steps = []
    for problem in problems:
        a, b, *rest = problem.numbers
        steps.append(f"<step> {a} + {b} = {a + b} left {' '.join(map(str, sorted([a + b, *rest])))} </step>")
    tokens = [policy.tokenizer(step)["input_ids"] for step in steps]
    return problems, [policy.encode(problem) + step for problem, step in zip(problems, tokens)]


def test_the_truth_is_that_of_the_solver(tiny):
    """Prevents a map of critics whose best one is not perfect, and a step that is read wrongly."""
    problems, states = states_of(tiny, 60)
    values, _ = erring_critic(tiny, problems, 0.0, False, 0)(states)
    for problem, value in zip(problems, values):
        a, b, *rest = problem.numbers
        assert value == (1.0 if solvable((a + b, *rest), problem.target) else -1.0)
    assert set(values) == {1.0, -1.0}
    broken = tiny.tokenizer("<step> 3 + 3 = 7 left 5 </step>")["input_ids"]
    assert numbers_left(tiny, Problem((3, 3, 5), 9), broken) is None


@pytest.mark.parametrize("error", [0.1, 0.4])
def test_a_critic_errs_as_often_as_it_should(tiny, error):
    """Prevents a map whose axis is wrong, and errors that change when a state is asked twice."""
    problems, states = states_of(tiny, 400)
    right, _ = erring_critic(tiny, problems, 0.0, False, 0)(states)
    for shared in (False, True):
        critic = erring_critic(tiny, problems, error, shared, 0)
        values, _ = critic(states)
        assert np.mean(np.not_equal(values, right)) == pytest.approx(error, abs=0.07) and critic(states)[0] == values


def test_shared_errors_are_those_of_the_numbers_left(tiny):
    """Prevents errors that are called shared and are independent: two orders of a step lead to the same numbers."""
    problem = Problem((3, 5, 7, 9), 44)
    ways = ("<step> 7 * 5 = 35 left 3 9 35 </step>", "<step> 5 * 7 = 35 left 3 9 35 </step>")
    states = [tiny.encode(problem) + tiny.tokenizer(way)["input_ids"] for way in ways]
    agree = {shared: 0 for shared in (False, True)}
    for shared in agree:
        for seed in range(40):
            first, second = erring_critic(tiny, [problem], 0.5, shared, seed)(states)[0]
            agree[shared] += first == second
    assert agree[True] == 40 and 8 < agree[False] < 32


def test_tokens_until_the_first_right_answer(tiny):
    """Prevents a solved share at a budget that was not spent: within the budget, and the same for every larger one."""
    problems, seeds = make_problems(12, "validation"), list(range(12))
    sampler, critic = TorchSampler(tiny), erring_critic(tiny, make_problems(12, "validation"), 0.0, False, 0)
    usual = SearchConfig(256, 16, 0.05, 1, prior="sum", max_tokens=64, until_right=True)
    found = {}
    for budget in (600, 1_500):
        settings = SearchConfig(**vars(usual) | {"token_budget": budget})
        found[budget] = operators.by_tree(tiny, sampler, settings, critic, problems, seeds)
        assert all(tokens is None or 0 < tokens <= budget for tokens in found[budget])
    assert any(tokens for tokens in found[600])
    for small, large in zip(found[600], found[1_500]):
        assert small is None or small == large


def test_the_program_writes_each_operator_as_it_ends(tmp_path, monkeypatch, capsys):
    """Prevents hours that are lost at the last operator, and tokens of other problems."""
    out = tmp_path / "map.json"
    options = "--problems 3 --budget 300 --beams 4 --trees 4 --cutoffs 0.3 --errors 0 --out"
    monkeypatch.setattr("sys.argv", ["operators.py", *options.split(), str(out)])
    operators.main()
    saved = json.loads(out.read_text(encoding="utf-8"))
    assert list(saved["tokens"]) == ["samples", "beam 4", "tree 4, none", "tree 4, learned", "tree 4, error 0"]
    assert all(len(tokens) == 3 for tokens in saved["tokens"].values())
    assert len(capsys.readouterr().out.splitlines()) == 5
    with pytest.raises(ValueError, match="each tree needs a cutoff"):
        OperatorsConfig(trees=(4,))
    assert Countdown(4).problems("validation", 3) == make_problems(3, "validation")


def test_a_share_at_a_budget_counts_what_was_solved_within_it():
    """Prevents a curve that counts problems which took more, or that falls."""
    shares = figures.solved_within([10, None, 30, 30], np.array([9, 10, 29, 30, 100]))
    assert shares.tolist() == [0, 0.25, 0.25, 0.75, 0.75]


def test_the_map_has_a_panel_for_each_width(tmp_path):
    """Prevents a critic's curve in the panel of another tree."""
    names = ("samples", "beam 4", "tree 4, none", "tree 4, error 0", "tree 16, none", "tree 16, error 0.1")
    file = tmp_path / "map.json"
    file.write_text(json.dumps({"tokens": {name: [50, None] for name in names}}), encoding="utf-8")
    narrow, wide = figures.operator_map([file]).axes
    assert [axis.get_title() for axis in (narrow, wide)] == [f"trees with up to {k} children" for k in (4, 16)]
    labels = [[line.get_label() for line in axis.lines] for axis in (narrow, wide)]
    assert "tree, critic wrong in 0 % of states" in labels[0] and "tree, critic wrong in 10 % of states" in labels[1]
    assert "tree, critic wrong in 10 % of states" not in labels[0]
