"""The checks of exercises.ipynb: each says in words what is wrong with a student's function, or "Right"."""

import math
from functools import wraps
from itertools import combinations

import numpy as np
import torch

import ppo
import selection
from countdown import Problem, verify
from distill import group_advantages

RIGHT = "Right."
NOT_YET = "Not yet: the function returns None."


def attempt(function, *arguments) -> tuple[object, str]:
    """What a student's function returns, and why that is no answer (empty if it is one)."""
    try:
        result = function(*arguments)
    except Exception as error:
        return None, f"The function stops with {type(error).__name__}: {error}"
    return result, NOT_YET if result is None else ""


def in_words(check):
    """A check that has words, too, for a result of another kind: a number where a list is asked for."""

    @wraps(check)
    def told(function) -> str:
        try:
            return check(function)
        except Exception as error:
            return f"The result is not of the kind that the exercise asks for: {error}"

    return told


@in_words
def puct(function) -> str:
    """function(q, prior, visits, parent_visits, c) -> scores [K]"""
    rng = np.random.default_rng(0)
    for _ in range(20):
        q, prior, visits = rng.uniform(-1, 1, 4), rng.dirichlet(np.ones(4)), rng.integers(0, 9, 4)
        arguments = q, prior, visits, int(visits.sum()) + 1, 0.5
        scores, why = attempt(function, *arguments)
        if why:
            return why
        wanted = selection.puct(*arguments)
        if np.shape(scores) != (4,):
            return f"The result has the shape {np.shape(scores)}: a score for each of the 4 children is wanted."
        if np.allclose(scores, wanted):
            continue
        if np.allclose(scores, q + 0.5 * prior * math.sqrt(arguments[3]) / np.maximum(visits, 1)):
            return "The divisor is 1 + N, also for a child with visits."
        if np.allclose(scores, q + 0.5 * prior * arguments[3] / (1 + visits)):
            return "The visits of the parent stand under a square root."
        return f"For Q = {q.round(2)}, P = {prior.round(2)}, N = {visits} the scores are {wanted.round(3)}."
    return RIGHT


class PlainNode:
    """A node of a tree in which a student's backup counts."""

    def __init__(self, parent=None):
        self.parent, self.visits, self.total = parent, 0, 0.0

    def __setattr__(self, name, value):
        if name == "visits" and value > 100:
            raise RuntimeError("the loop does not end; go on to the parent")
        super().__setattr__(name, value)


@in_words
def backup(function) -> str:
    """function(leaf, value): changes `visits` and `total` of the nodes from the leaf to the root."""
    root = PlainNode()
    child, sibling = PlainNode(root), PlainNode(root)
    leaf = PlainNode(child)
    for value in (0.5, -1.0):
        _, why = attempt(function, leaf, value)
        if why and why != NOT_YET:
            return why
    if not any(node.visits for node in (root, child, leaf)):
        return "Not yet: no node has a visit more."
    if sibling.visits:
        return "A node that is not on the path got a visit."
    for name, node in (("leaf", leaf), ("node between", child), ("root", root)):
        if node.visits != 2:
            return f"After two simulations the {name} has {node.visits} visits, not 2."
        if not math.isclose(node.total, -0.5):
            return f"The values 0.5 and -1 add up to -0.5; the {name} has {node.total}. One player: no sign changes."
    return RIGHT


@in_words
def best_path(function) -> str:
    """function(tree) -> the texts of the most visited path. A tree is a dict with `text`, `visits`, `q`, `children`."""

    def node(text, visits, q, *children):
        return {"text": text, "visits": visits, "q": q, "children": list(children)}

    tree = node(
        "", 10, 0.1, node("a", 6, -0.2, node("c", 2, -0.9), node("d", 3, 0.1, node("e", 2, 0.3))), node("b", 3, 0.9)
    )
    path, why = attempt(function, tree)
    if why:
        return why
    if list(path) == ["b"]:
        return "The path follows the highest Q. A single lucky visit makes Q high: follow the visits."
    if list(path) == ["", "a", "d", "e"]:
        return "Leave out the root: it has no step."
    if list(path) != ["a", "d", "e"]:
        return f"The path of most visits is a, d, e. The function gives {path!r}."
    tied = node("", 4, 0.0, node("a", 2, 0.1), node("b", 2, 0.5))
    if list(function(tied)) != ["b"]:
        return "Of children with equal visits take the one with the higher Q."
    return RIGHT


@in_words
def verifier(function) -> str:
    """function(text, numbers, target) -> whether the expression reaches the target."""
    numbers, target = (3, 5, 7, 9), 44
    cases = {
        "5 * 7 + 9": "a right answer",
        "(5 * 7) + 9": "a right answer with parentheses",
        "5 * 7 + 3": "a wrong value",
        "44": "a number that is not given",
        "5 * 7 + 9 + 9 - 9": "a number that is used too often",
        "__import__('os').getpid()": "a text that is a program",
        "9 ** 9 ** 9": "a text that takes for ever when it is evaluated",
        "5 * 7 + ": "a text that is no expression",
        "": "an empty text",
    }
    for text, name in cases.items():
        found, why = attempt(function, text, numbers, target)
        if why:
            return f"{why} (for {name}: {text!r})"
        wanted = verify(f"<answer> {text} </answer>", Problem(numbers, target)).correct
        if bool(found) != wanted:
            return f"{text!r} is {name}: the answer is {wanted}, not {found!r}."
    return RIGHT


@in_words
def advantages(function) -> str:
    """function(rewards) -> (R - mean) / (std + 1e-4) of a group, [n]"""
    for rewards in ([1.0, -1.0, -1.0, -1.0], [0.5, 0.7, -0.9]):
        found, why = attempt(function, rewards)
        if why:
            return why
        if np.shape(found) != (len(rewards),):
            return f"The result has the shape {np.shape(found)}: an advantage for each of the rewards is wanted."
        wanted = group_advantages(rewards)
        if np.allclose(found, wanted):
            continue
        if np.allclose(found, np.array(rewards) - np.mean(rewards)):
            return "Divide by the standard deviation, too."
        if np.allclose(found, (np.array(rewards) - np.mean(rewards)) / (np.std(rewards) + 1e-4)):
            return "Divide by n - 1 in the deviation: it is estimated from a sample (ddof=1)."
        return f"For {rewards} the advantages are {wanted.round(3)}."
    equal, why = attempt(function, [0.3, 0.3, 0.3])
    if why or not np.allclose(equal, 0):
        return "A group with equal rewards teaches nothing: its advantages are 0."
    return RIGHT


@in_words
def cispo_loss(function) -> str:
    """function(logprobs, old, advantage, clip) -> loss [B, T]"""
    torch.manual_seed(0)
    old, advantage = torch.randn(2, 3) - 1, torch.randn(2, 3)
    now = (old + 2 * torch.randn(2, 3)).requires_grad_()
    loss, why = attempt(function, now, old, advantage, 2.0)
    if why:
        return why
    if np.shape(loss) != (2, 3):
        return f"The result has the shape {tuple(np.shape(loss))}: a loss for each token is wanted, (2, 3)."
    if not loss.requires_grad:
        return "The loss has no gradient: detach the ratio alone."
    wanted = ppo.cispo_loss(now, old, advantage, 2.0)
    if not torch.allclose(loss, wanted):
        if torch.allclose(loss, -wanted):
            return "The sign: an optimiser makes the loss small, and a good token should become likely."
        if torch.allclose(loss, -(now - old).exp().detach() * advantage * now):
            return "The ratio is capped at clip."
        return f"The first loss should be {wanted[0, 0].item():.4f}, not {loss[0, 0].item():.4f}."
    found, should = (torch.autograd.grad(x.sum(), now, retain_graph=True)[0] for x in (loss, wanted))
    if not torch.allclose(found, should):
        return "The value is right, the gradient is not: no gradient flows through the ratio (detach)."
    return RIGHT


@in_words
def workers(function) -> str:
    """function(q, visits, count) -> which child each of `count` workers selects; a pending visit is a loss."""
    q, visits = np.array([-0.40, -0.45, -0.50]), np.array([4, 4, 4])
    chosen, why = attempt(function, q.copy(), visits.copy(), 6)
    if why:
        return why
    total, pending, wanted = q * visits, np.zeros(3), []
    for _ in range(6):
        scores = (total - pending) / (visits + pending)
        wanted.append(int(np.argmax(scores)))
        pending[wanted[-1]] += 1
    if len(set(chosen)) == 1:
        if len(set(function(-q, visits.copy(), 6))) > 1:  # positive Q
            return "All workers crowd at one child: a pending visit that adds 0 raises a negative Q. Count -1."
        return "All workers select one child: a worker must leave a mark for the next one."
    if list(chosen) != wanted:
        return f"The workers should select {wanted}, not {list(chosen)}: compare (W - pending) / (N + pending)."
    return RIGHT


@in_words
def pass_at_k(function) -> str:
    """function(n, right, k) -> the chance that at least one of k samples, drawn of n without replacement, is right."""
    for n, right, k in ((4, 1, 1), (4, 1, 2), (6, 2, 3), (5, 0, 5), (5, 5, 1), (6, 4, 3)):
        found, why = attempt(function, n, right, k)
        if why:
            return why
        draws = list(combinations([True] * right + [False] * (n - right), k))
        wanted = sum(any(draw) for draw in draws) / len(draws)  # every way to draw
        if not math.isclose(found, wanted, abs_tol=1e-9):
            if math.isclose(found, 1 - (1 - right / n) ** k, abs_tol=1e-9):
                return "This draws with replacement, which is too low: the k samples are different ones."
            return f"Of {n} samples {right} are right; with k = {k} the chance is {wanted:.4f}, not {found:.4f}."
    return RIGHT
