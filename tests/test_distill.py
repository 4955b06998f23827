"""Tests of distill.py on trees made by hand: which answers are taught, with which advantages and returns a token."""

from itertools import permutations, product

import numpy as np
import pytest
import torch
from test_mcts import node, tree_of
from torch.testing import assert_close

from config import LESSON_NAMES, LearningConfig, SearchConfig
from countdown import Problem, Reward
from distill import LESSONS, best_answer, group_advantages, most_visited_path, tree_values
from mcts import priors
from ppo import batch_loss, make_batches
from runtime.micro_batches import MicroBatches
from sampling import Trajectory


def test_every_lesson_has_its_name():
    """Prevents a setting that no lesson answers to, and a lesson that no setting names."""
    assert tuple(LESSONS) == LESSON_NAMES


# ------------------------------------------------------------------------------------------------ one answer


def test_best_path_ends_in_an_answer():
    """A path to a most-visited child that never ends (the post's), ties broken by order instead of Q."""
    worse, better = node(2, -0.2, reward=-0.2), node(2, 0.4, reward=0.4)
    open_end, low, high = node(5, 0.9, [node(4, 0.9)]), node(3, 0.0, reward=0.0), node(3, 0.1, [worse, better])
    tree = tree_of(node(12, 0.2, [open_end, low, high]))
    assert most_visited_path(tree, SearchConfig()) is better


def test_best_answer_is_the_maximum():
    """The most-visited answer instead of the best; ties go to the more visited one."""
    rare, often = node(1, 1.0, reward=1.0, tokens=[1]), node(4, 1.0, reward=1.0, tokens=[2])
    best = node(9, 0.5, reward=0.5, tokens=[3])
    tree = tree_of(node(15, 0.7, [best, rare, node(5, 1.0, [often])]))
    (taught,) = best_answer(tree, SearchConfig())
    assert (taught.completion, taught.reward) == ([2], often.reward)
    assert most_visited_path(tree, SearchConfig()) is best


# ------------------------------------------------------------------------------------------------ all answers


@pytest.fixture
def tree():
    """root (8 visits, Q 0.25) -> a (6, 0.5; 3) -> right (3, 1.0), wrong (2, -0.5), open; -> late (2, -0.5; 1)."""
    right = node(3, 1.0, reward=1.0, tokens=[5, 6], length=5, count=1)
    wrong = node(2, -0.5, reward=-0.5, tokens=[7], length=4, count=2)
    a = node(6, 0.5, [right, wrong, node(1, 0.0, tokens=[9], length=4, count=1)], tokens=[1, 2, 3], length=3, count=3)
    late = node(2, -0.5, reward=-0.5, tokens=[4], length=1, count=1)
    return tree_of(node(8, 0.25, [a, late]))


def lessons(tree, name, settings=None):
    """(completion, advantages, returns) of each lesson, the shortest completion first."""
    taught = LESSONS[name](tree, settings or SearchConfig())
    return sorted(((x.completion, x.advantages, x.returns) for x in taught), key=lambda x: len(x[0]))


LATE, WRONG, RIGHT = [4], [1, 2, 3, 7], [1, 2, 3, 5, 6]
RETURNS = [[0.25], [0.25, 0.5, 0.5, 0.5], [0.25, 0.5, 0.5, 0.5, 1.0]]


def test_returns_are_the_values_of_the_states_before_each_token(tree):
    """Prevents a critic trained on the value after a token, where the search asks for that of a state's end."""
    assert [tree_values(answer) for answer in sorted(tree.answers(), key=lambda n: n.length)] == RETURNS


def test_steps_are_judged_by_what_they_change(tree):
    """Prevents tokens judged by a neighbour's step, or by the outcome: Q(child) - Q(parent), by hand."""
    assert lessons(tree, "steps") == [
        (LATE, [-0.75], RETURNS[0]),
        (WRONG, [0.25, 0.25, 0.25, -1.0], RETURNS[1]),
        (RIGHT, [0.25, 0.25, 0.25, 0.5, 0.5], RETURNS[2]),
    ]


def test_visits_pull_from_the_policy_to_the_visits(tree):
    """Prevents steps that are rewarded for being likely or often sampled. With prior count the policy's shares are
    those of the samples: at the root 6/8 - 3/4 and 2/8 - 1/4, below 3/6 - 1/4 and 2/6 - 2/4. Else they are exp(log pi),
    renormalised: at the root 6/8 - 0.1/0.5 and 2/8 - 0.4/0.5, below 3/6 - 0.3/0.4 and 2/6 - 0.1/0.4."""
    (_, late, _), (_, wrong, _), (_, right, returns) = lessons(tree, "visits", SearchConfig(prior="count"))
    assert late == [0.0] and right == [0.0, 0.0, 0.0, 0.25, 0.25] and returns == RETURNS[2]
    assert wrong == pytest.approx([0.0, 0.0, 0.0, -1 / 6])
    a, last = tree.root.children
    for step, probability in ((a, 0.1), (last, 0.4), *zip(a.children, (0.3, 0.1, 1e-30))):
        step.logprobs = [np.log(probability) / len(step.tokens)] * len(step.tokens)
    for settings in SearchConfig(prior="sum"), SearchConfig(prior="count", cutoff=0.0):
        (_, late, _), (_, wrong, _), (_, right, _) = lessons(tree, "visits", settings)
        assert late == pytest.approx([0.25 - 0.8])
        assert right == pytest.approx([0.55] * 3 + [0.5 - 0.75] * 2)
        assert wrong == pytest.approx([0.55] * 3 + [2 / 6 - 0.25])


@pytest.mark.parametrize("draw, settings", [
    (permutations, SearchConfig(prior="sum", cutoff=0.0)),
    (lambda actions, count: product(actions, repeat=count), SearchConfig(prior="sum")),
    (lambda actions, count: product(actions, repeat=count), SearchConfig(prior="count")),
])  # fmt: skip
@pytest.mark.parametrize("count", [1, 2, 3])
def test_visits_teach_nothing_where_the_search_prefers_nothing(draw, settings, count):
    """Prevents a lesson that makes likely steps likelier by itself. Where all rewards are equal, visits follow the
    prior. The expected gradient over all draws of `count` of 4 steps must vanish. With 1/K as the policy's share it is
    (0.31, -0.17, -0.10, -0.05) for two distinct ones."""
    policy, gradient = np.array([0.7, 0.2, 0.07, 0.03]), np.zeros(4)
    for drawn in draw(range(4), count):
        left, chance = 1.0, 1.0
        for step in drawn:
            chance *= policy[step] / left
            left -= policy[step] if settings.cutoff is not None else 0.0
        steps = sorted(set(drawn))
        children = [
            node(reward=1.0, tokens=[step], logprobs=[np.log(policy[step])], length=1, count=drawn.count(step))
            for step in steps
        ]
        for child, share in zip(children, priors(children, settings.prior)):
            child.visits = 1000 * share
        for completion, advantages, _ in lessons(tree_of(node(1001, 1.0, children)), "visits", settings):
            gradient += chance * advantages[0] * (np.eye(4)[completion[0]] - policy)  # of log pi, by the logits
    assert gradient == pytest.approx(np.zeros(4), abs=1e-12)


def test_answers_are_a_group(tree):
    """Prevents advantages across trees, and noise for trees whose answers are all alike."""
    expected = group_advantages([-0.5, -0.5, 1.0])
    found = lessons(tree, "answers")
    assert [completion for completion, _, _ in found] == [LATE, WRONG, RIGHT]
    for (completion, advantages, returns), advantage, target in zip(found, expected, RETURNS):
        assert advantages == pytest.approx([advantage] * len(completion)) and returns == target
    for answer in tree.answers():
        answer.reward = Reward(-0.5, False, True, "")
    assert lessons(tree, "answers") == []


def test_one_answer_is_taught_with_the_critics_advantage(tree):
    """Prevents the post's method with another advantage or target than R - V and R."""
    assert lessons(tree, "best-path") == lessons(tree, "best-answer") == [(RIGHT, None, None)]
    assert lessons(tree, "best-path-q") == [(RIGHT, None, RETURNS[2])]


def test_best_path_tree_teaches_the_policy_one_answer_and_the_critic_all(tree):
    """Prevents a policy that imitates the tree's poor answers, and a critic that never sees them."""
    assert lessons(tree, "every-answer") == lessons(tree, "best-path-tree")
    assert not any(lesson.critic_only for lesson in LESSONS["every-answer"](tree, SearchConfig()))
    assert lessons(tree, "best-path-tree") == list(zip([LATE, WRONG, RIGHT], [None] * 3, RETURNS))
    found = LESSONS["best-path-tree"](tree, SearchConfig())
    assert [x.completion for x in found if not x.critic_only] == [RIGHT]
    assert LESSONS["best-path-tree"](tree_of(node(1, 0.0)), SearchConfig()) == []


@pytest.mark.parametrize("name", LESSONS)
def test_a_trajectory_is_the_answer_of_its_tree(name):
    """Prevents log-probabilities of another step, and answers taught with another problem, prompt or reward."""
    right = node(1, 1.0, reward=1.0, tokens=[3], logprobs=[-0.25], length=3)
    step = node(2, 0.5, [right], tokens=[1, 2], logprobs=[-1.0, -2.0], length=2)
    wrong = node(1, -1.0, reward=-1.0, tokens=[4], logprobs=[-3.0], length=1)
    tree = tree_of(node(4, 0.0, [step, wrong]))
    tree.prompt = [7, 8]
    taught = {tuple(x.completion): x for x in LESSONS[name](tree, SearchConfig())}
    for answer in (right, wrong) if len(taught) == 2 else (right,):
        made = taught.pop(tuple(answer.completion()))
        assert (made.problem, made.prompt, made.reward) == (tree.problem, [7, 8], answer.reward)
        assert made.logprobs == ([-1.0, -2.0, -0.25] if answer is right else [-3.0])
    assert not taught


# ------------------------------------------------------------------------------------------------ in the loss


@pytest.mark.parametrize("fixed", [True, False])
def test_the_critic_learns_the_returns_that_it_is_given(moved, fixed):
    """Prevents tree values that never reach the critic, or reach the wrong token."""
    returns, rng = [[0.5, -0.25, 1.0], [0.75]], np.random.default_rng(0)
    right, made = Reward(1.0, True, True, ""), []
    for r in returns:
        tokens, advantages = rng.integers(2, 99, len(r)).tolist(), [2.0] * len(r) if fixed else None
        made.append(Trajectory(Problem((1, 2), 3), [7, 8], tokens, [-1.0] * len(r), right, advantages, r))
    states = [moved.states(moved.batch([t.prompt], [t.completion]))[0] for t in made]  # [1, T, H] each
    values = [moved.value_head(hidden)[0].detach() for hidden in states]
    expected = sum(((v - torch.tensor(r)) ** 2).sum() for v, r in zip(values, returns)) / 4
    batches = make_batches(moved, made, learning := LearningConfig(normalize="token"), MicroBatches())
    assert_close(sum(batch_loss(moved, batch, learning)[1]["value_loss"] for batch in batches), expected)
