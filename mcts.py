"""Tree search over whole reasoning steps: pUCT with a language model as prior and a value head as critic.

A node is a token sequence (prompt + steps). An edge is one sampled step. A terminal node is an ended answer. All trees
move together, in waves:

    select     each tree picks up to `workers` leaves; virtual loss keeps them apart
    expand     one sampler call draws K steps for every leaf of every tree; the verifier grades those that are answers
    evaluate   one critic call gives V(s) in [-1, 1] of those leaves; a terminal node has the verifier's reward instead
    backup     visits and values are added on the way back to the root

Equation (Silver et al. 2017, AlphaGo Zero; c sqrt(N) as in the post):

    a* = argmax_a Q(s, a) + c P(a | s) sqrt(N(s)) / (1 + N(s, a))

Where this differs from the post:

    identical children    merged, or with `cutoff` never drawn; the post keeps them
    prior                 `mean` log-probability a token; the post's `sum` favours short steps
    unvisited child       Q of its parent, an answer its reward; the post's is 0 (`zero`)
    answers               graded when they are drawn; the post's when a simulation reaches them (`visited`)
    virtual loss          a pending visit counts as a loss; the post's (`visit`) attracts workers where Q < 0
    always                a leaf is counted once, a terminal node is never expanded nor given to the critic, no virtual
                          visit outlives a wave
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from config import SearchConfig
from sampling import Grade, Problem, Reward, Sample, Sampler, SamplingParams, Usage
from selection import ChildArrays, gumbel_inner, gumbel_root, puct, uct

MAX_DEPTH = 16  # steps; a node at this depth is terminal
Critic = Callable[[list[list[int]]], tuple[list[float], Usage]]  # states -> V(s) in [-1, 1], and their cost


@dataclass(eq=False)
class Node:
    """A state. Its tokens are those of the step that leads here. `value` is its own evaluation, V(s) or the reward."""

    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    parent: "Node | None" = None
    depth: int = 0  # steps from the root
    length: int = 0  # completion tokens from the root
    ended: bool = False  # the model ended its answer, or a limit was reached
    count: int = 1  # samples merged into this child
    prior: float = 1.0
    children: list["Node"] = field(default_factory=list)
    visits: int = 0  # N(s)
    total: float = 0.0  # W(s), the sum of the values backed up through here
    pending: int = 0  # virtual visits of the running wave
    value: float | None = None
    reward: Reward | None = None  # the verifier's, of a terminal node that is graded
    gumbel: float = 0.0  # noise, of the root's children only

    @property
    def q(self) -> float:
        """Mean value Q in [-1, 1]. Before the first visit it is the node's own value, or 0 if it has none."""
        return self.total / self.visits if self.visits else self.value or 0.0

    def path(self) -> list["Node"]:
        """The nodes from the root to here."""
        above = self.parent.path() if self.parent else []
        return [*above, self]

    def completion(self) -> list[int]:
        """The tokens from the end of the prompt to here."""
        return [token for node in self.path() for token in node.tokens]


@dataclass(eq=False)
class Tree:
    """A search of one problem."""

    problem: Problem
    prompt: list[int]
    rng: np.random.Generator  # decides what this tree draws
    root: Node = field(default_factory=Node)
    expansions: int = 0
    generated: int = 0  # tokens of its sampled steps
    spent: bool = False  # a sampled step did not fit into the token budget
    merged: int = 0  # sampled steps that repeated a sibling
    solved: bool = False  # it has a right answer
    simulations: list[tuple[int, Node]] = field(default_factory=list)  # root's visits before the wave, selected leaf

    def state(self, node: Node) -> list[int]:
        """The tokens from the prompt's first to the node's last."""
        return self.prompt + node.completion()

    def nodes(self) -> list[Node]:
        """All nodes, a parent before its children."""
        nodes = [self.root]
        for node in nodes:
            nodes.extend(node.children)
        return nodes

    def answers(self) -> list[Node]:
        """The graded terminal nodes."""
        return [node for node in self.nodes() if node.reward is not None]

    def simulations_left(self, config: SearchConfig) -> int:
        """How many simulations the next wave may do: workers, simulations and token budget limit it."""
        if self.spent or (config.until_right and self.solved):
            return 0
        left = min(config.workers, config.simulations - self.root.visits)
        if config.token_budget and self.expansions:
            tokens_left = config.token_budget - self.generated
            affordable = tokens_left * self.expansions / max(self.generated, 1)  # at the mean cost of an expansion
            left = min(left, math.ceil(affordable))
        return max(left, 0)

    def statistics(self) -> dict[str, float]:
        """What metrics.jsonl says of a tree."""
        nodes, answers = self.nodes(), self.answers()
        return {
            "visits": self.root.visits,
            "nodes": len(nodes),
            "merged": self.merged,
            "depth": max(node.depth for node in nodes),
            "root_q": self.root.q,
            "root_value": self.root.value if self.root.value is not None else 0.0,
            "answers": len(answers),
            "solved": float(self.solved),
        }


def plant(policy, problems: list[Problem], seeds: list[int]) -> list[Tree]:
    """A tree for each problem, its root the problem's prompt. Tree i draws from the random stream seeds[i] alone."""
    rngs = map(np.random.default_rng, seeds)
    return [Tree(problem, policy.encode(problem), rng) for problem, rng in zip(problems, rngs, strict=True)]


Leaves = list[tuple[Tree, Node]]  # the leaves that a wave has selected, each with its tree

# ------------------------------------------------------------------------------------------------ search


def search(
    trees: list[Tree], sampler: Sampler, grade: Grade, config: SearchConfig, critic: Critic | None = None
) -> Usage:
    """Run waves until each tree is done: it has `simulations` visits, has spent its `token_budget`, or (`until_right`)
    has a right answer. The trees do not depend on each other. `critic`: the sampler's if not given."""
    usage = Usage()
    while running := [tree for tree in trees if tree.simulations_left(config)]:
        usage += wave(running, sampler, grade, config, critic or sampler.values)
    return usage


def wave(trees: list[Tree], sampler: Sampler, grade: Grade, config: SearchConfig, critic: Critic) -> Usage:
    """One wave over all trees. Pending visits are removed at its end, also after Ctrl-C."""
    leaves: Leaves = []
    try:
        for tree in trees:
            for _ in range(tree.simulations_left(config)):
                leaf = select(tree, config)
                if leaf.pending and not leaf.ended:  # selected in this wave already, and still the best
                    break
                for node in leaf.path():
                    node.pending += 1
                leaves.append((tree, leaf))
                tree.simulations.append((tree.root.visits, leaf))
        usage = expand(leaves, sampler, grade, config) + evaluate(leaves, critic, grade)
        for _, leaf in leaves:
            backup(leaf, leaf.value)
        return usage
    finally:
        for _, leaf in leaves:
            for node in leaf.path():
                node.pending -= 1


# ------------------------------------------------------------------------------------------------ select


def select(tree: Tree, config: SearchConfig) -> Node:
    """Walk down from the root to a leaf: a node without children, or a terminal one."""
    node = tree.root
    while node.children:
        node = node.children[int(np.argmax(child_scores(node, config)))]
    return node


def child_scores(node: Node, config: SearchConfig) -> np.ndarray:
    """The score of each child; a simulation descends to the highest. [K]"""
    children = child_arrays(node, config)
    value = node.value if node.value is not None else 0.0
    parent_visits = node.visits + node.pending
    if config.selection == "gumbel" and node.parent is None:
        return gumbel_root(children, value, config.simulations)
    if config.selection == "gumbel":
        return gumbel_inner(children, value)
    if config.selection == "uct":
        return uct(children.q, children.visits, parent_visits, config.c_puct)
    return puct(children.q, children.prior, children.visits, parent_visits, config.c_puct)


def child_arrays(node: Node, config: SearchConfig) -> ChildArrays:
    """Q, P and N of the children, pending visits included."""
    pending = np.array([child.pending for child in node.children])  # [K]
    visits = np.array([child.visits for child in node.children]) + pending  # [K]
    totals = np.array([child.total for child in node.children])  # [K]
    if config.virtual_loss == "value":  # a pending visit is a loss, -1
        totals = totals - pending
    first = node.q if config.unvisited == "parent" else 0.0
    unvisited = np.array([first if child.value is None else child.value for child in node.children])  # [K]
    return ChildArrays(
        q=np.where(visits > 0, totals / np.maximum(visits, 1), unvisited),
        prior=np.array([child.prior for child in node.children]),
        visits=visits,
        gumbel=np.array([child.gumbel for child in node.children]),
    )


# ------------------------------------------------------------------------------------------------ expand


def expand(leaves: Leaves, sampler: Sampler, grade: Grade, config: SearchConfig) -> Usage:
    """Draw K steps for each leaf that is not an answer, all in one call."""
    open_leaves = [(tree, leaf) for tree, leaf in leaves if not leaf.ended]
    if not open_leaves:
        return Usage()
    states = [tree.state(leaf) for tree, leaf in open_leaves]
    seeds = [int(tree.rng.integers(2**63)) for tree, _ in open_leaves]
    params = SamplingParams(config.children, config.step_tokens, config.temperature, True, config.cutoff)
    rows, usage = sampler.sample(states, seeds, params)
    for (tree, leaf), samples in zip(open_leaves, rows, strict=True):
        tree.expansions += 1
        add_children(tree, leaf, samples, grade, config)
    return usage


def add_children(tree: Tree, node: Node, samples: list[Sample], grade: Grade, config: SearchConfig) -> None:
    """Make the sampled steps children of `node`, identical ones merged, and grade those that are answers. A node
    without a step becomes terminal.

    A step that does not fit into the token budget ends the tree, and so does a right answer with `until_right`: the
    steps after it are neither used nor counted, as with best-of-N."""
    children: dict[tuple[int, ...], Node] = {}  # by their tokens
    tokens_left = config.max_tokens - node.length
    for sample in samples:
        if config.until_right and tree.solved:
            break
        if tree.generated and 0 < config.token_budget < tree.generated + len(sample.tokens):
            tree.spent = True
            break
        tree.generated += len(sample.tokens)
        tokens, logprobs = sample.tokens[:tokens_left], sample.logprobs[:tokens_left]
        if not tokens:
            continue
        if (key := tuple(tokens)) in children:
            children[key].count += 1
            tree.merged += 1
            continue
        child = Node(tokens, logprobs, node, node.depth + 1, node.length + len(tokens))
        at_limit = child.length == config.max_tokens or child.depth == MAX_DEPTH
        child.ended = sample.ended == "end" or at_limit
        children[key] = child
        if child.ended and config.answers == "all":
            grade_answer(tree, child, grade)
    if not children:
        node.ended = not any(sample.tokens for sample in samples)
        return
    node.children = list(children.values())
    for child, prior in zip(node.children, priors(node.children, config.prior), strict=True):
        child.prior = float(prior)
        if node.parent is None:
            child.gumbel = float(tree.rng.gumbel())


def priors(children: list[Node], kind: str) -> np.ndarray:
    """P(a | s) over the children: softmax of the `mean` or `sum` of a step's log-probabilities, sample `count`, or
    `uniform`. [K]

    Independent draws follow the policy already: `count` estimates it without bias (Sampled MuZero, Hubert et al. 2021),
    `mean` and `sum` favour likely steps twice. Distinct steps are drawn once each: there `sum` is the policy itself.
    """
    if kind == "uniform":
        scores = np.zeros(len(children))
    elif kind == "count":
        scores = np.log([child.count for child in children])
    else:
        scores = np.array([sum(c.logprobs) / (len(c.logprobs) if kind == "mean" else 1) for c in children])
    weights = np.exp(scores - scores.max())
    return weights / weights.sum()


# ------------------------------------------------------------------------------------------------ evaluate, backup


def evaluate(leaves: Leaves, critic: Critic, grade: Grade) -> Usage:
    """Set the value of each leaf. An answer has its reward, the others get V(s) from one critic call."""
    open_leaves, usage = [(tree, leaf) for tree, leaf in leaves if not leaf.ended], Usage()
    if open_leaves:
        values, usage = critic([tree.state(leaf) for tree, leaf in open_leaves])
        for (_, leaf), value in zip(open_leaves, values, strict=True):
            leaf.value = value
    for tree, leaf in leaves:
        if leaf.ended and leaf.reward is None:
            grade_answer(tree, leaf, grade)
    return usage


def grade_answer(tree: Tree, node: Node, grade: Grade) -> None:
    """Give a terminal node the verifier's reward."""
    node.reward = grade(tree.problem, node.completion())
    node.value = node.reward.value
    tree.solved |= node.reward.correct


def backup(leaf: Node, value: float) -> None:
    """Add one visit and `value` to every node from `leaf` to the root. One player: no sign flips."""
    for node in leaf.path():
        node.visits += 1
        node.total += value
