"""Tree search over whole reasoning steps: pUCT with a language model as prior and a value head as critic.

A node is a token sequence (prompt + steps), an edge one sampled step, a terminal node an ended answer. All trees
move together in waves:

    select    every tree walks down to up to `workers` leaves, kept apart by virtual loss
    expand    one sampler call draws K steps for every leaf of every tree
    evaluate  one critic call values those leaves, V(s) in [-1, 1]; terminal nodes get the verifier's reward instead
    backup    visits and values flow back to the roots

Equation (Silver et al. 2017, AlphaGo Zero, with c * sqrt(N) as in the post):
    a* = argmax_a Q(s, a) + c P(a | s) sqrt(N(s)) / (1 + N(s, a))

Deviations from the post, each a named choice: identical children are merged, or (`distinct`) never drawn; priors use
the mean log-probability a token (`sum` is the post's, which favours short steps, and preset tiny's, whose steps are
distinct); an unvisited child counts as its parent (`zero` is the post's); a pending visit counts as a loss (`visit` is
the post's, which attracts workers when Q < 0). Not choices: a leaf is counted once, a terminal node is never expanded
nor given to the critic, no virtual visit outlives a wave.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache

import numpy as np

from checks import check, check_choices
from countdown import Problem, Reward
from sampling import Distinct, Sample, Sampler, Usage

PRIORS = ("mean", "sum", "count", "uniform")
UNVISITED = ("parent", "zero")
VIRTUAL_LOSSES = ("value", "visit")
SELECTIONS = ("puct", "uct", "gumbel")
GUMBEL_VISITS, GUMBEL_SCALE = 50, 0.1  # c_visit and c_scale of mctx


@dataclass(frozen=True)
class SearchConfig:
    """How one tree is searched."""

    simulations: int = 64  # visits a tree, the root's own included
    children: int = 4  # steps sampled at a node, K
    distinct: bool = False  # drawn without replacement, at most K (not with vLLM)
    min_p: float = 0.0  # of distinct steps: those less likely, token by token, than this share of the likeliest are not
    workers: int = 4  # leaves a tree selects in one wave
    c_puct: float = 0.5  # exploration constant c
    selection: str = "puct"  # puct, uct, gumbel (sequential halving at the root, improved policy below)
    prior: str = "mean"  # mean, sum, count, uniform
    unvisited: str = "parent"  # value of an unvisited child: parent, zero
    virtual_loss: str = "value"  # value, visit (where Q < 0 a wave has little more than one leaf a tree)
    temperature: float = 1.0  # at which steps are sampled
    step_tokens: int = 64  # an edge's tokens at most
    max_tokens: int = 512  # a completion's tokens at most; a node at the cap is terminal
    max_depth: int = 16  # steps
    until_right: bool = False  # end a tree with its first right answer (at test time, where a verifier is at hand)
    # tokens a tree may sample, 0: no limit; the root's steps may exceed it, the last a little; what distinct steps have
    # in common counts for each
    token_budget: int = 0

    def __post_init__(self):
        check(self, "at least", 1, "simulations children workers step_tokens max_tokens max_depth")
        check(self, "at least", 0, "c_puct token_budget min_p")
        check(self, "at most", 1, "min_p")
        check(self, "above", 0, "temperature")
        check_choices(self, selection=SELECTIONS, prior=PRIORS, unvisited=UNVISITED, virtual_loss=VIRTUAL_LOSSES)
        if self.selection == "gumbel" and self.token_budget:
            raise ValueError("sequential halving plans its simulations: gumbel takes no token_budget")
        if self.min_p and not self.distinct:
            raise ValueError("min_p is for distinct steps: set distinct too, or min_p to 0")

    @property
    def drawn_tokens(self) -> int:
        """Tokens of a completion, before its last step is cut to the cap."""
        return self.max_tokens + self.step_tokens - 1


@dataclass(eq=False)
class Node:
    """A state. The tokens are those of the edge that leads here; `value` is its own evaluation, V(s) or the reward."""

    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    parent: "Node | None" = None
    depth: int = 0  # steps from the root
    length: int = 0  # completion tokens from the root
    ended: bool = False  # the model ended its answer, or a cap was reached
    count: int = 1  # samples merged into this child
    prior: float = 1.0
    children: list["Node"] = field(default_factory=list)
    visits: int = 0  # N(s)
    total: float = 0.0  # W(s), the sum of the values backed up through here
    pending: int = 0  # virtual visits of the running wave
    value: float | None = None
    reward: Reward | None = None  # the verifier's, on terminal nodes once visited
    gumbel: float = 0.0  # root children only

    @property
    def q(self) -> float:
        """Mean value Q in [-1, 1]; 0 before the first visit."""
        return self.total / self.visits if self.visits else 0.0

    def path(self) -> list["Node"]:
        """The nodes from the root to here."""
        above = self.parent.path() if self.parent else []
        return [*above, self]

    def completion(self) -> list[int]:
        return [token for node in self.path() for token in node.tokens]


@dataclass(eq=False)
class Tree:
    problem: Problem
    prompt: list[int]
    rng: np.random.Generator  # decides the samples of this tree alone
    root: Node = field(default_factory=Node)
    expansions: int = 0
    generated: int = 0  # tokens of its sampled steps
    merged: int = 0  # sampled steps that repeated a sibling
    solved: bool = False  # it has a right answer

    def room(self, config: SearchConfig) -> int:
        """The simulations that the next wave may do: no more than workers, simulations and token budget allow."""
        if config.until_right and self.solved:
            return 0
        room = min(config.workers, config.simulations - self.root.visits)
        if config.token_budget and self.expansions:
            room = min(room, int((config.token_budget - self.generated) * self.expansions / max(self.generated, 1)))
        return max(room, 0)

    def state(self, node: Node) -> list[int]:
        """The tokens from the prompt's first to the node's last."""
        return self.prompt + node.completion()

    def nodes(self) -> list[Node]:
        found = [self.root]
        for node in found:
            found.extend(node.children)
        return found

    def answers(self) -> list[Node]:
        """The graded terminal nodes."""
        return [node for node in self.nodes() if node.reward is not None]

    def statistics(self) -> dict[str, float]:
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


Leaves = list[tuple[Tree, Node]]  # what a wave has selected, each with its tree

# ------------------------------------------------------------------------------------------------ select


def puct(q: np.ndarray, prior: np.ndarray, visits: np.ndarray, parent_visits: int, c: float) -> np.ndarray:
    """Q(s, a) + c P(a | s) sqrt(N(s)) / (1 + N(s, a)) for each child, all arrays [K]."""
    return q + c * prior * math.sqrt(parent_visits) / (1 + visits)


def uct(q: np.ndarray, visits: np.ndarray, parent_visits: int, c: float) -> np.ndarray:
    """UCB1 (Kocsis & Szepesvári 2006): Q + c sqrt(ln N(s) / N(s, a)); an unvisited child comes first."""
    bonus = np.sqrt(math.log(max(parent_visits, 1)) / np.maximum(visits, 1))
    return np.where(visits == 0, np.inf, q + c * bonus)


def child_statistics(node: Node, config: SearchConfig) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Q, P and N of the children as a worker sees them, pending visits included. Arrays [K]."""
    visits = np.array([child.visits + child.pending for child in node.children])
    totals = np.array([child.total for child in node.children])
    if config.virtual_loss == "value":  # a pending visit is one that lost
        totals = totals - np.array([child.pending for child in node.children])
    unvisited = node.q if config.unvisited == "parent" else 0.0
    q = np.where(visits > 0, totals / np.maximum(visits, 1), unvisited)
    return q, np.array([child.prior for child in node.children]), visits


def choose_child(node: Node, config: SearchConfig) -> Node:
    """The child that a simulation descends to."""
    q, prior, visits = child_statistics(node, config)
    parent_visits = node.visits + node.pending
    if config.selection == "gumbel" and node.parent is None:
        scores = gumbel_root(node, q, prior, visits, config.simulations)
    elif config.selection == "gumbel":
        scores = gumbel_inner(node, q, prior, visits)
    elif config.selection == "uct":
        scores = uct(q, visits, parent_visits, config.c_puct)
    else:
        scores = puct(q, prior, visits, parent_visits, config.c_puct)
    return node.children[int(np.argmax(scores))]


def select(tree: Tree, config: SearchConfig) -> Node:
    """Walk down from the root to a leaf: a node without children, or a terminal one."""
    node = tree.root
    while node.children:
        node = choose_child(node, config)
    return node


# ------------------------------------------------------------------------------------------------ Gumbel


def completed_q(node: Node, q: np.ndarray, prior: np.ndarray, visits: np.ndarray) -> np.ndarray:
    """sigma(completed Q) as in mctx `qtransform_completed_by_mix_value` (Danihelka et al. 2022, eq. 8 and appendix D):
    unvisited children get a mix of V(s) and the visited Qs; all are rescaled to [0, 1] and weighted by visits. [K]"""
    raw = node.value if node.value is not None else 0.0
    weight = prior * (visits > 0)
    mixed = (raw + visits.sum() * (weight @ q) / max(weight.sum(), 1e-8)) / (1 + visits.sum())
    q = np.where(visits > 0, q, mixed)
    q = (q - q.min()) / max(q.max() - q.min(), 1e-8)
    return (GUMBEL_VISITS + visits.max(initial=0)) * GUMBEL_SCALE * q


@cache
def considered_visits(actions: int, simulations: int) -> list[int]:
    """Sequential halving (Danihelka et al. 2022, as in mctx `get_sequence_of_considered_visits`): the visit count
    that the child chosen at each simulation must have."""
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


def gumbel_scores(node: Node, q: np.ndarray, prior: np.ndarray, visits: np.ndarray) -> np.ndarray:
    """g(a) + log P(a) + sigma(completed Q) of the root's children, [K]. g is drawn anew, where Gumbel MuZero keeps the
    noise that drew the children: likely ones are favoured twice, unless they are independent and the prior `count`."""
    gumbel = np.array([child.gumbel for child in node.children])
    return gumbel + np.log(np.maximum(prior, 1e-9)) + completed_q(node, q, prior, visits)


def gumbel_root(node: Node, q: np.ndarray, prior: np.ndarray, visits: np.ndarray, simulations: int) -> np.ndarray:
    """Sequential halving: the best score among the children with the visit count whose turn it is. [K]"""
    turns = considered_visits(len(visits), max(simulations - 1, 1))
    turn = turns[min(int(visits.sum()), len(turns) - 1)]
    return np.where(visits == turn, gumbel_scores(node, q, prior, visits), -np.inf)


def gumbel_inner(node: Node, q: np.ndarray, prior: np.ndarray, visits: np.ndarray) -> np.ndarray:
    """Below the root: pi'(a) - N(a) / (1 + sum N), pi' = softmax(log P + sigma(completed Q)) (eq. 14). [K]"""
    logits = np.log(np.maximum(prior, 1e-9)) + completed_q(node, q, prior, visits)
    improved = np.exp(logits - logits.max())
    return improved / improved.sum() - visits / (1 + visits.sum())


# ------------------------------------------------------------------------------------------------ expand


def priors(children: list[Node], how: str) -> np.ndarray:
    """P(a | s) over the sampled children [K]: softmax of the mean or summed log-probability, sample counts, or 1/K.
    Independent children are drawn from the policy already, so that counts estimate it without bias (Sampled MuZero,
    Hubert et al. 2021), and log-probabilities favour likely steps once more; of distinct ones the sum is the policy."""
    if how == "uniform":
        scores = np.zeros(len(children))
    elif how == "count":
        scores = np.log([child.count for child in children])
    else:
        scores = np.array([sum(c.logprobs) / (len(c.logprobs) if how == "mean" else 1) for c in children])
    weights = np.exp(scores - scores.max())
    return weights / weights.sum()


def expand(leaves: Leaves, sampler: Sampler, config: SearchConfig) -> Usage:
    """Sample K steps for each leaf that is no answer yet, all in one call."""
    fresh = [(tree, leaf) for tree, leaf in leaves if not leaf.ended]
    if not fresh:
        return Usage()
    states = [tree.state(leaf) for tree, leaf in fresh]
    seeds = [int(tree.rng.integers(2**63)) for tree, _ in fresh]
    distinct = Distinct(config.min_p) if config.distinct else None
    drawn, usage = sampler.sample(
        states, config.children, seeds, config.step_tokens, config.temperature, stop_at_step=True, distinct=distinct
    )
    for (tree, leaf), samples in zip(fresh, drawn, strict=True):
        tree.expansions += 1
        tree.generated += sum(len(sample.tokens) for sample in samples)
        hang(tree, leaf, samples, config)
    return usage


def hang(tree: Tree, node: Node, samples: list[Sample], config: SearchConfig) -> None:
    """Hang the sampled steps below `node`, identical ones merged. A node that gets no step ends here."""
    children: dict[tuple[int, ...], Node] = {}
    room = config.max_tokens - node.length
    for sample in samples:
        tokens, logprobs = sample.tokens[:room], sample.logprobs[:room]
        if not tokens:
            continue
        if (key := tuple(tokens)) in children:
            children[key].count += 1
            tree.merged += 1
            continue
        child = Node(tokens, logprobs, node, node.depth + 1, node.length + len(tokens))
        capped = child.length == config.max_tokens or child.depth == config.max_depth
        child.ended = sample.ended == "end" or capped
        children[key] = child
    if not children:
        node.ended = True
        return
    node.children = list(children.values())
    for child, prior in zip(node.children, priors(node.children, config.prior), strict=True):
        child.prior = float(prior)
        if node.parent is None:
            child.gumbel = float(tree.rng.gumbel())


# ------------------------------------------------------------------------------------------------ evaluate, backup


def evaluate(leaves: Leaves, critic, grade) -> Usage:
    """Value each leaf: an ended answer by the verifier, once; the others by the critic, all in one call."""
    fresh, usage = [(tree, leaf) for tree, leaf in leaves if not leaf.ended], Usage()
    if fresh:
        values, usage = critic([tree.state(leaf) for tree, leaf in fresh])
        for (_, leaf), value in zip(fresh, values, strict=True):
            leaf.value = value
    for tree, leaf in leaves:
        if leaf.ended and leaf.reward is None:
            leaf.reward = grade(tree.problem, leaf.completion())
            leaf.value = leaf.reward.value
            tree.solved |= leaf.reward.correct
    return usage


def backup(leaf: Node, value: float) -> None:
    """Add one visit and `value` to every node from `leaf` to the root (one player: no sign flips)."""
    for node in leaf.path():
        node.visits += 1
        node.total += value


# ------------------------------------------------------------------------------------------------ search


def search(
    problems: list[Problem],
    prompts: list[list[int]],
    sampler: Sampler,
    critic: Callable[[list[list[int]]], tuple[list[float], Usage]],
    grade: Callable[[Problem, list[int]], Reward],
    config: SearchConfig,
    seeds: list[int],
) -> tuple[list[Tree], Usage]:
    """Search all problems together until every tree has had `config.simulations` visits, spent its tokens or, if that
    is asked, found a right answer.

    critic(states) -> values in [-1, 1] and their cost; grade(problem, completion ids) -> Reward. Tree i depends on
    seeds[i] alone, not on the other trees. Usage tells the critic's cost apart from the sampler's.
    """
    trees = [Tree(*item) for item in zip(problems, prompts, map(np.random.default_rng, seeds), strict=True)]
    usage = Usage()
    while running := [tree for tree in trees if tree.room(config)]:
        usage += wave(running, sampler, critic, grade, config)
    return trees, usage


def wave(trees: list[Tree], sampler, critic, grade, config: SearchConfig) -> Usage:
    """One wave over all trees. Whatever happens in it, no virtual visit stays behind."""
    selected: Leaves = []
    try:
        for tree in trees:
            for _ in range(tree.room(config)):
                leaf = select(tree, config)
                if leaf.pending and not leaf.ended:  # already taken in this wave, and still the most attractive
                    break
                for node in leaf.path():
                    node.pending += 1
                selected.append((tree, leaf))
        usage = expand(selected, sampler, config)
        usage += evaluate(selected, critic, grade)
        for _, leaf in selected:
            backup(leaf, leaf.value)
        return usage
    finally:
        for _, leaf in selected:
            for node in leaf.path():
                node.pending -= 1
