"""Which child a simulation descends to: pUCT, UCT and Gumbel as functions of arrays, one item a child.

    puct     Q + c P sqrt(N(s)) / (1 + N(s, a))                                     AlphaGo Zero, Silver et al. 2017
    uct      Q + c sqrt(ln N(s) / N(s, a))                                          Kocsis & Szepesvári 2006
    gumbel   sequential halving at the root, the improved policy below              Danihelka et al. 2022

Q is a mean value in [-1, 1], P a prior that sums to 1, N a number of visits. All arrays have shape [K].
"""

import math
from dataclasses import dataclass
from functools import cache

import numpy as np

GUMBEL_VISITS, GUMBEL_SCALE = 50, 0.1  # c_visit and c_scale of mctx


@dataclass
class ChildArrays:
    """What selection knows of a node's K children. Pending visits are included."""

    q: np.ndarray  # [K] mean value
    prior: np.ndarray  # [K] P(a | s)
    visits: np.ndarray  # [K] N(s, a)
    gumbel: np.ndarray  # [K] noise of the root's children, else 0


def puct(q: np.ndarray, prior: np.ndarray, visits: np.ndarray, parent_visits: int, c: float) -> np.ndarray:
    """Q(s, a) + c P(a | s) sqrt(N(s)) / (1 + N(s, a)). [K]"""
    return q + c * prior * math.sqrt(parent_visits) / (1 + visits)


def uct(q: np.ndarray, visits: np.ndarray, parent_visits: int, c: float) -> np.ndarray:
    """Q(s, a) + c sqrt(ln N(s) / N(s, a)); infinite for an unvisited child. [K]"""
    bonus = np.sqrt(math.log(max(parent_visits, 1)) / np.maximum(visits, 1))
    return np.where(visits == 0, np.inf, q + c * bonus)


# ------------------------------------------------------------------------------------------------ Gumbel


def completed_q(children: ChildArrays, value: float) -> np.ndarray:
    """sigma(completed Q), as in mctx `qtransform_completed_by_mix_value` (Danihelka et al. 2022, eq. 8, appendix D).

    An unvisited child gets a mix of the node's own `value` V(s) and the Q of visited children. All are rescaled to
    [0, 1] and multiplied by (c_visit + max N) c_scale. [K]
    """
    q, prior, visits = children.q, children.prior, children.visits
    weight = prior * (visits > 0)
    mixed = (value + visits.sum() * (weight @ q) / max(weight.sum(), 1e-8)) / (1 + visits.sum())
    q = np.where(visits > 0, q, mixed)
    q = (q - q.min()) / max(q.max() - q.min(), 1e-8)
    return (GUMBEL_VISITS + visits.max(initial=0)) * GUMBEL_SCALE * q


@cache
def considered_visits(actions: int, simulations: int) -> list[int]:
    """Sequential halving: item i is the number of visits that a child must have to be chosen at simulation i (Danihelka
    et al. 2022; mctx `get_sequence_of_considered_visits`). [simulations]"""
    if actions <= 1:
        return list(range(simulations))
    rounds, sequence = math.ceil(math.log2(actions)), []
    visits, considered = [0] * actions, actions
    while len(sequence) < simulations:
        for _ in range(max(1, simulations // (rounds * considered))):
            sequence.extend(visits[:considered])
            visits[:considered] = [v + 1 for v in visits[:considered]]
        considered = max(2, considered // 2)
    return sequence[:simulations]


def gumbel_scores(children: ChildArrays, value: float) -> np.ndarray:
    """g(a) + log P(a) + sigma(completed Q) of the root's children. [K]

    Gumbel MuZero draws and scores the children with the same noise. Here g is new, so likely children are favoured
    twice, except with independent draws and prior `count`.
    """
    return children.gumbel + np.log(np.maximum(children.prior, 1e-9)) + completed_q(children, value)


def gumbel_root(children: ChildArrays, value: float, simulations: int) -> np.ndarray:
    """Sequential halving: `gumbel_scores` of the children with the number of visits that its plan asks for next, -inf
    for the others. [K]"""
    sequence = considered_visits(len(children.visits), max(simulations - 1, 1))
    wanted = sequence[min(int(children.visits.sum()), len(sequence) - 1)]
    return np.where(children.visits == wanted, gumbel_scores(children, value), -np.inf)


def gumbel_inner(children: ChildArrays, value: float) -> np.ndarray:
    """Below the root: pi'(a) - N(a) / (1 + sum N), with pi' = softmax(log P + sigma(completed Q)) (eq. 14). [K]"""
    logits = np.log(np.maximum(children.prior, 1e-9)) + completed_q(children, value)
    improved = np.exp(logits - logits.max())
    return improved / improved.sum() - children.visits / (1 + children.visits.sum())
