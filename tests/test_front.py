"""The picture of README.md shows what really happened."""

import re
from pathlib import Path

import pytest

from config import TINY
from countdown import make_problems, verify
from experiments import front
from runtime.loading import load_policy

ROOT = Path(__file__).parents[1]
ANSWERS = front.before_and_after(ROOT / "results/make-run/mcts-tiny-seed0")


@pytest.fixture(scope="module")
def policy():
    return load_policy(ROOT / TINY, train=False, seed=0)


@pytest.fixture(scope="module")
def tree(policy):
    return front.example(front.searched(policy), ANSWERS)


def test_the_example_of_the_readme_is_solved(tree):
    """Prevents a showcase that the trained policy does not solve: its answer after `make run`, without a search, is
    right, the one before is wrong, and the search before training ends right."""
    before, after = ANSWERS[str(tree.problem)]
    assert not verify(before["text"], tree.problem).correct and verify(after["text"], tree.problem).correct
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    numbers = " ".join(map(str, tree.problem.numbers))
    assert f"play.py {numbers} {tree.problem.target}" in readme
    expression = re.search(r"<answer> (.*) </answer>", after["text"])[1].replace("( ", "(").replace(" )", ")")
    assert expression in readme


def test_the_answers_are_those_of_the_watched_problems():
    """Prevents an example that was chosen from another set: the watched problems are the first of validation."""
    problems = {str(problem): problem for problem in make_problems(len(ANSWERS), "validation")}
    assert problems.keys() == ANSWERS.keys()
    for problem, samples in ANSWERS.items():
        assert all(verify(sample["text"], problems[problem]).correct == sample["right"] for sample in samples)


def test_the_picture_marks_the_path_to_a_right_answer(tree, policy):
    """Prevents a marked path that ends nowhere, and dots on each other."""
    answer = front.right_answer(tree, None)
    assert answer.reward.correct and answer.path()[0] is tree.root
    rows: dict = {}
    front.rows_of(tree.root, 0, rows)
    places = {(node.depth, rows[node]) for node in tree.nodes()}
    assert len(places) == len(tree.nodes())
    before, after = ANSWERS[str(tree.problem)]
    left, right = front.draw(tree, policy, before, after).axes
    assert len(left.collections) == len(tree.nodes()) and len(left.texts) == answer.depth
    assert any("✓ right" in text.get_text() for text in right.texts)


def test_a_run_without_an_example_is_one_line(policy):
    """Prevents a picture of something else."""
    with pytest.raises(ValueError, match="no problem that the search solves"):
        front.example(front.searched(policy), {})
