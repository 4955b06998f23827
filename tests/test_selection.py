"""Tests of selection.py. Each docstring says which failure it prevents; the maths is compared with numbers computed by
hand, sequential halving with the published plans of mctx."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from selection import ChildArrays, completed_q, considered_visits, gumbel_inner, gumbel_root, gumbel_scores, puct, uct

pytestmark = pytest.mark.filterwarnings("error::RuntimeWarning")  # a division by zero visits is a failure


def children(q, prior, visits, gumbel=None):
    """A node's children as arrays, without noise if none is given."""
    return ChildArrays(np.array(q), np.array(prior), np.array(visits), np.array(gumbel or [0.0] * len(visits)))


def test_puct_by_hand():
    """A wrong exploration term: Q + 2 P 3 / (1 + N)."""
    q, prior, visits = np.array([0.5, -0.25, 0.0]), np.array([0.2, 0.5, 0.3]), np.array([3, 1, 0])
    assert puct(q, prior, visits, 9, 2.0) == pytest.approx([0.8, 1.25, 1.8])


def test_uct_by_hand():
    """A wrong bonus, or 0 / 0 where nothing was visited: ln 8 = 2.079442."""
    q, visits = np.array([0.5, 0.0, -1.0]), np.array([4, 1, 0])
    assert uct(q, visits, 8, 1.5) == pytest.approx([1.581520, 2.163040, math.inf], abs=1e-6)
    assert uct(q, visits, 8, 0.0) == pytest.approx([0.5, 0.0, math.inf])
    assert uct(q, np.zeros(3, int), 1, 1.5).tolist() == [math.inf] * 3


# ------------------------------------------------------------------------------------------------ Gumbel


def test_completed_q_by_hand():
    """A wrong sigma: v_mix = (0.2 + 3 (0.5 * 0.4 - 0.3 * 0.2) / 0.8) / 4 = 0.18125, rescaled (v + 0.2) / 0.6, times
    (50 + 2) * 0.1; without visits all children count alike."""
    prior = [0.5, 0.3, 0.2]
    sigma = completed_q(children([0.4, -0.2, 9.0], prior, [2, 1, 0]), 0.2)
    assert sigma == pytest.approx([5.2, 0.0, 5.2 * 0.38125 / 0.6])
    assert completed_q(children([9.0] * 3, prior, [0, 0, 0]), 0.2).tolist() == [0, 0, 0]


def test_gumbel_scores_by_hand():
    """A root that forgets its noise or its prior: g + log P + sigma, with sigma = 5.3 / 1.4, 0, 5.3 as Q rescaled."""
    root = children([0.5, -0.5, 0.9], [0.2, 0.6, 0.2], [3, 3, 1], [0.0, 4.0, -1.0])
    expected = [math.log(0.2) + 5.3 / 1.4, 4 + math.log(0.6), -1 + math.log(0.2) + 5.3]
    assert gumbel_scores(root, 0.0) == pytest.approx(expected)


def test_gumbel_root_by_hand():
    """A visit to a child that is not due. The plan of 8 - 1 simulations and 4 children is 0 0 0 0 1 1 2: after 5 visits
    a child with one visit is due, after the last a child with 2."""
    chances = [0.4, 0.3, 0.2, 0.1]
    for visits, due in (
        ([0] * 4, [0, 1, 2, 3]),
        ([2, 1, 1, 1], [1, 2, 3]),
        ([2, 2, 1, 1], [0, 1]),
        ([3, 2, 1, 1], [1]),
    ):
        root = children([0.1, 0.2, 0.3, 0.4], chances, visits)
        scores, expected = gumbel_root(root, 0.0, 8), gumbel_scores(root, 0.0)
        assert np.flatnonzero(scores > -math.inf).tolist() == due
        assert scores[due].tolist() == expected[due].tolist()


def test_gumbel_inner_by_hand():
    """Inner nodes that ignore the visits: with equal Q, pi' is the prior and 0.6 - 1/2 < 0.4 - 0/2."""
    assert gumbel_inner(children([0.3, 0.0], [0.6, 0.4], [1, 0]), 0.3) == pytest.approx([0.1, 0.4])


@pytest.mark.parametrize(
    "actions, simulations, halvings",  # halvings: (children considered, visits that each of them gets)
    [
        (4, 8, [(4, 1), (2, 2)]),
        (4, 16, [(4, 2), (2, 4)]),
        (2, 7, [(2, 3), (1, 1)]),
        (3, 12, [(3, 2), (2, 3)]),
        (8, 24, [(8, 1), (4, 2), (2, 4)]),  # this and the rest: as in the tests of mctx
        (8, 47, [(8, 1), (4, 3), (2, 13), (1, 1)]),  # 8 + 12 + 26 + 1; the 2 are considered again in the end
        (8, 13, [(8, 1), (4, 1), (1, 1)]),
        (7, 24, [(7, 1), (3, 2), (2, 5), (1, 1)]),
        (8, 2, [(2, 1)]),
        (1, 16, [(1, 16)]),
    ],
)
def test_considered_visits(actions, simulations, halvings):
    """A plan that halves too early or too late."""
    planned, visits = [], 0
    for considered, more in halvings:
        planned += [visits + i for i in range(more) for _ in range(considered)]
        visits += more
    assert considered_visits(actions, simulations) == planned


@given(st.integers(1, 40), st.integers(1, 200))
@settings(deadline=None, max_examples=100)
def test_considered_visits_can_be_played(actions, simulations):
    """A plan whose turn no child has, which would send every later visit to the first child."""
    visits = [0] * actions
    for turn in considered_visits(actions, simulations):
        visits[visits.index(turn)] += 1
    assert sum(visits) == simulations
    assert simulations < actions or min(visits) > 0
