"""The search of notebook 00 grows the same tree as mcts.py."""

import hashlib
import math
import re
from pathlib import Path

import nbformat
import numpy as np
import pytest

from config import SearchConfig
from distill import most_visited_path
from mcts import Tree, search
from sampling import Reward, Sample, Usage

NOTEBOOK = Path(__file__).parents[1] / "notebooks" / "00_from_scratch.ipynb"
END, STEP_END = 1, 6


@pytest.fixture(scope="module")
def scratch():
    """The names of the notebook's cells with the tag `search`, without its model."""
    cells = nbformat.read(NOTEBOOK, as_version=4).cells
    names = {"math": math, "END": END, "LIMIT": 64, "ask": lambda problem: [100, problem]}
    for cell in cells:
        if "search" in cell.metadata.get("tags", []):
            exec(cell.source, names)  # noqa: S102, our own text
    return names


def random_of(*keys):
    """A random stream that depends on the keys alone."""
    return np.random.default_rng(list(hashlib.sha256(repr(keys).encode()).digest()[:8]))


def scripted_draw(seed, states):
    """Four continuations of each state, (tokens, log-probabilities, ended); siblings may be equal."""
    rows = []
    for state in states:
        choices = []
        for number in range(5):
            rng = random_of(seed, tuple(state), number)
            tokens = [number + 10, *rng.integers(20, 30, rng.integers(1, 4)).tolist()]
            ended = len(state) > 5 and rng.random() < 0.5
            choices.append(([*tokens, END if ended else STEP_END], -rng.random(len(tokens) + 1), ended))
        picks = random_of(seed, tuple(state), "picks").integers(0, 5, 4)
        rows.append([choices[pick] for pick in picks])
    return rows


def scripted_value(seed, state):
    return float(random_of(seed, tuple(state), "value").uniform(-1, 1))


def scripted_reward(seed, completion):
    return float(random_of(seed, tuple(completion), "reward").choice([-1.0, 1.0]))


class ScriptedSampler:
    def __init__(self, seed):
        self.seed = seed

    def sample(self, prefixes, seeds, params):
        rows = scripted_draw(self.seed, prefixes)
        assert params.n == 4 and params.stop_at_step
        return [[Sample(t, p.tolist(), "end" if e else "step") for t, p, e in row] for row in rows], Usage()

    def values(self, states):
        return [scripted_value(self.seed, state) for state in states], Usage()


@pytest.mark.parametrize("seed", range(6))
def test_the_notebooks_search_is_that_of_mcts(seed, scratch):
    """Prevents a notebook that teaches another search: with the same draws, values and rewards N, Q, P of every node
    and the chosen path are equal, for several trees at once."""
    count = 3
    trees = [Tree(i, [100, i], np.random.default_rng(i)) for i in range(count)]
    config = SearchConfig(40, children=4, workers=1, c_puct=scratch["C"], prior="sum", max_tokens=64, answers="visited")
    search(
        trees,
        ScriptedSampler(seed),
        lambda problem, completion: Reward(scripted_reward(seed, completion), False, True, ""),
        config,
    )
    roots = scratch["search"](
        list(range(count)),
        40,
        lambda states: [[(t, float(sum(p))) for t, p, _ in row] for row in scripted_draw(seed, states)],
        lambda states: [scripted_value(seed, state) for state in states],
        lambda problem, completion: scripted_reward(seed, completion),
    )
    compared = 0
    for tree, root in zip(trees, roots, strict=True):
        pairs = [(tree.root, root)]
        for theirs, ours in pairs:
            assert (theirs.tokens, theirs.visits) == (ours.tokens, ours.N)
            assert math.isclose(theirs.prior, ours.prior, rel_tol=1e-9)
            assert not ours.N or math.isclose(theirs.q, ours.Q, abs_tol=1e-12)
            pairs += zip(theirs.children, ours.children, strict=True)
        compared += len(pairs)
        chosen, best = most_visited_path(tree, config), scratch["choose"](root)
        assert (chosen and chosen.completion()) == (best and best.completion())
    assert compared > 50 and any(tree.merged for tree in trees)


def test_the_text_claims_what_the_committed_run_shows():
    """Prevents a text that promises more than the outputs beside it: the counts before and after training are those of
    the run, and at least three times as many answers are right."""
    cells = nbformat.read(NOTEBOOK, as_version=4).cells
    text = "".join(cell.source for cell in cells if cell.cell_type == "markdown")
    outputs = [output for cell in cells if cell.cell_type == "code" for output in cell.outputs]
    printed = "".join(output.get("text", "") for output in outputs)
    shares = re.search(r"before: ([0-9.]+)%.*step 60: ([0-9.]+)%", printed, re.S).groups()
    counts = re.search(r"from ([0-9]+) to ([0-9]+) of 400", text).groups()
    assert [float(share) * 4 for share in shares] == [int(count) for count in counts]
    assert int(counts[1]) >= 3 * int(counts[0]) > 0
