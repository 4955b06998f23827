"""Tests of mcts.py, on games whose policy, values and rewards are known. Each docstring says which failure it prevents;
the maths of selection is in test_selection.py."""

import math
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import mcts
from config import SearchConfig
from countdown import Problem, Reward, legal_moves, reachable, solvable
from distill import LESSONS, best_answer, most_visited_path
from mcts import Node, Tree
from sampling import Sample, SamplingParams, Usage

pytestmark = pytest.mark.filterwarnings("error::RuntimeWarning")  # a division by zero visits is a failure

END, STEP = 8, 9  # the last token of a random or endless step
SELECTIONS = ("puct", "uct", "gumbel")
SEEDS = st.integers(0, 2**32 - 1)
DEPTHS = st.sampled_from([99, 6, 2])  # of MAX_DEPTH
CONFIGS = st.builds(  # hypothesis prefers what comes first: a large tree
    SearchConfig,
    simulations=st.sampled_from([60, 40, 25, 9, 1]),
    children=st.sampled_from([6, 4, 3, 1]),
    cutoff=st.sampled_from([None, 0.0]),
    workers=st.sampled_from([4, 1, 2, 3, 5, 6, 7, 8]),
    c_puct=st.floats(0, 3),
    selection=st.sampled_from(SELECTIONS),
    prior=st.sampled_from(["mean", "sum", "count", "uniform"]),
    unvisited=st.sampled_from(["parent", "zero"]),
    virtual_loss=st.sampled_from(["value", "visit"]),
    max_tokens=st.sampled_from([999, 40, 7]),
    answers=st.sampled_from(["all", "visited"]),
)


def examples(count):
    stateless = [HealthCheck.function_scoped_fixture]  # the fixtures below are only factories
    return settings(deadline=None, max_examples=count, suppress_health_check=stateless)


class World:
    """Policy, sampler, critic and verifier of a known game; records what each of them is asked."""

    def __init__(self, fake_sampler, steps, value=lambda state: 0.0, reward=lambda completion: 0.0):
        self.fake, self.value, self.reward = fake_sampler(steps), value, reward
        self.sampled, self.valued, self.graded = [], [], []  # states of each call, states of each call, answers
        self.generated, self.params = [], []  # tokens drawn by each call, its other arguments

    def encode(self, problem):
        return [problem.target]

    def sample(self, prefixes, seeds, params):
        rows, usage = self.fake.sample(prefixes, seeds, params)
        self.sampled.append([tuple(prefix) for prefix in prefixes])
        self.generated.append(usage.generated)
        self.params.append(params)
        return rows, usage

    def critic(self, states):
        self.valued.append([tuple(state) for state in states])
        return [self.value(state) for state in self.valued[-1]], Usage(valued=sum(map(len, states)), critic_seconds=0.5)

    def grade(self, problem, completion):
        self.graded.append((problem.target, *completion))
        value = self.reward(tuple(completion))
        return Reward(value, value == 1, True, "")

    def search(self, config, names=(100,), seed=0, max_depth=mcts.MAX_DEPTH):
        """One tree for each name, which is its prompt, its problem's target and part of its seed."""
        trees = mcts.plant(self, [Problem((1,), name) for name in names], [seed * 1000 + name for name in names])
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(mcts, "MAX_DEPTH", max_depth)
            usage = mcts.search(trees, self, self.grade, config, self.critic)
        return trees, usage


@pytest.fixture
def world(fake_sampler):
    return partial(World, fake_sampler)


@pytest.fixture
def random_world(world):
    """Up to 5 steps of 1 to 3 tokens a state, some of which end, and dead ends; no step begins another."""

    def build(seed):
        def steps(state):
            rng = np.random.default_rng([seed, *state])
            bodies = {tuple(map(int, rng.integers(1, 5, rng.integers(3)))) for _ in range(rng.binomial(5, 0.5))}
            chances = rng.dirichlet(np.ones(len(bodies))) if bodies else []
            ends = rng.random(len(bodies)) < 0.15
            return [
                ((*body, END if end else STEP), float(chance), "end" if end else "step")
                for body, chance, end in zip(sorted(bodies), chances, ends)
            ]

        def value(state):
            return np.random.default_rng([seed, 0, *state]).uniform(-1, 1)

        return world(steps, value, value)

    return build


def endless(state):
    return [((token, STEP), chance, "step") for token, chance in ((1, 0.5), (2, 0.3), (3, 0.2))]


def node(visits=0, q=0.0, children=(), reward=None, **fields):
    """A node of a tree made by hand."""
    made = Node(visits=visits, total=visits * q, children=list(children), **fields)
    for child in children:
        child.parent = made
    if reward is not None:
        made.ended, made.reward = True, Reward(reward, reward == 1, True, "")
    return made


def tree_of(root):
    return Tree(Problem((1,), 1), [], np.random.default_rng(0), root)


# ------------------------------------------------------------------------------------------------ select


@pytest.mark.parametrize("unvisited, expected", [("parent", -0.5), ("zero", 0.0)])
def test_value_of_an_unvisited_child(unvisited, expected):
    """First-play urgency 0 drags visits over hopeless children; the choice must be the one that is named."""
    parent = node(3, -0.5, [node(2, -0.9, prior=0.7), node(prior=0.3)])
    found = mcts.child_arrays(parent, SearchConfig(unvisited=unvisited))
    assert (found.q.tolist(), found.prior.tolist(), found.visits.tolist()) == ([-0.9, expected], [0.7, 0.3], [2, 0])


@pytest.mark.parametrize("unvisited", ["parent", "zero"])
def test_value_of_an_unvisited_answer(unvisited):
    """Prevents a simulation that is spent on a wrong answer because its reward, which is known, is not read."""
    parent = node(3, -0.5, [node(2, -0.9, prior=0.7), node(reward=1.0, value=1.0), node(reward=-1.0, value=-1.0)])
    assert mcts.child_arrays(parent, SearchConfig(unvisited=unvisited)).q.tolist() == [-0.9, 1.0, -1.0]
    assert [child.q for child in parent.children] == [-0.9, 1.0, -1.0]


@pytest.mark.parametrize("virtual_loss, expected", [("value", [-0.75, -1.0]), ("visit", [-0.25, 0.0])])
def test_virtual_loss_by_hand(virtual_loss, expected):
    """A virtual loss that is none: with W = -1, N = 2 and 2 pending, `value` repels (-3/4), `visit` attracts (-1/4)."""
    parent = node(3, -0.5, [node(2, -0.5, pending=2), node(pending=1)])
    found = mcts.child_arrays(parent, SearchConfig(virtual_loss=virtual_loss))
    assert (found.q.tolist(), found.visits.tolist()) == (expected, [4, 1])


@pytest.mark.parametrize("selection, pending, chosen", [("puct", 0, 0), ("puct", 4, 1), ("uct", 0, 1)])
def test_choice_by_hand(selection, pending, chosen):
    """A named selection that is another one, or pending visits that don't count in sqrt(N). With c = 2, pUCT compares
    0.5 + 0.2 sqrt(N) with -0.5 + 0.6 sqrt(N): 0.947 > 0.842 for N = 5, 1.1 < 1.3 for N = 9; UCT has 1.965 < 2.037."""
    parent = node(5, 0.3, [node(3, 0.5, prior=0.4), node(1, -0.5, prior=0.6)], pending=pending)
    assert int(mcts.child_scores(parent, SearchConfig(selection=selection, c_puct=2.0)).argmax()) == chosen


# ------------------------------------------------------------------------------------------------ Gumbel


def arms(probabilities):
    return lambda state: [((i,), p, "end") for i, p in enumerate(probabilities)]


@pytest.mark.parametrize("workers", [1, 2, 5])
@pytest.mark.parametrize(
    "count, simulations, planned",
    [
        (2, 9, [4, 4]),
        (3, 13, [2, 5, 5]),
        (4, 9, [1, 1, 3, 3]),
        (4, 16, [1, 1, 6, 7]),
        (8, 25, [1, 1, 1, 1, 3, 3, 7, 7]),
    ],
)
def test_sequential_halving_visits(world, count, simulations, planned, workers):
    """A Gumbel search that leaves its plan, with workers too."""
    game = world(arms(np.full(count, 1 / count)), reward=lambda completion: -completion[0] / 10)
    config = SearchConfig(simulations=simulations, children=200, workers=workers, selection="gumbel")
    ((tree,), _) = game.search(config)
    assert sorted(child.visits for child in tree.root.children) == planned


@given(SEEDS)
@examples(30)
def test_sequential_halving_keeps_the_best(world, seed):
    """A halving that drops the wrong arms: replayed here with g + log P + (50 + max N) / 10 * rescaled Q."""
    chances, rewards = np.array([0.1, 0.15, 0.2, 0.25, 0.3]), np.random.default_rng(seed).uniform(-1, 1, 5)
    game = world(arms(chances), reward=lambda completion: float(rewards[completion[0]]))
    config = SearchConfig(simulations=31, children=200, workers=1, selection="gumbel", prior="sum")
    ((tree,), _) = game.search(config, seed=seed)
    children = sorted(tree.root.children, key=lambda child: child.tokens)
    gumbel = np.array([child.gumbel for child in children])
    rescaled, visits = (rewards - rewards.min()) / np.ptp(rewards), np.full(5, 2)  # 30 = 5 * 2 + 2 * 5 + 2 * 5

    def best(count):
        score = gumbel + np.log(chances) + (50 + visits.max()) / 10 * rescaled
        return int(np.argmax(np.where(visits == count, score, -np.inf)))

    for turn in [count for count in range(2, 12) for _ in range(2)]:
        visits[best(turn)] += 1
    assert [child.visits for child in children] == visits.tolist()
    assert most_visited_path(tree, config) is children[best(12)]


@pytest.mark.parametrize("gumbel, kept", [(4.0, 1), (2.0, 0)])
def test_gumbel_choice_by_hand(gumbel, kept):
    """The last arm chosen by Q or by noise alone. Q rescaled: 1/1.4, 0, 1; sigma: * 5.3 = 3.786, 0, 5.3; + log P:
    2.176, -0.511, 3.690; the third arm has fewer visits, the second wins with g = 4 but not with g = 2."""
    children = [
        node(3, 0.5, prior=0.2, reward=0.5),
        node(3, -0.5, prior=0.6, reward=-0.5, gumbel=gumbel),
        node(1, 0.9, prior=0.2, reward=0.9),
    ]
    tree = tree_of(node(8, 0.1, children, value=0.0))
    assert most_visited_path(tree, SearchConfig(selection="gumbel")) is children[kept]
    assert most_visited_path(tree, SearchConfig()) is children[0]


# ------------------------------------------------------------------------------------------------ expand


def test_priors_by_hand():
    """The post's bias: at 0.35 nats a token, `sum` gives the shortest of four equally likely steps nearly all."""
    children = [Node(logprobs=[-0.35] * length) for length in (12, 20, 40, 64)]
    assert mcts.priors(children, "mean") == pytest.approx([0.25] * 4)
    assert mcts.priors(children, "sum").round(4).tolist() == [0.9426, 0.0573, 0.0001, 0.0]


@pytest.mark.parametrize(
    "kind, expected",
    [("mean", [2 / 3, 1 / 3]), ("sum", [10 / 11, 1 / 11]), ("count", [1 / 4, 3 / 4]), ("uniform", [1 / 2, 1 / 2])],
)
def test_prior_choices_by_hand(kind, expected):
    """A named prior that is another one: p = 0.4 in one token, drawn once, against 0.2 * 0.2, drawn three times."""
    children = [Node(logprobs=[math.log(0.4)]), Node(logprobs=[math.log(0.2)] * 2, count=3)]
    assert mcts.priors(children, kind) == pytest.approx(expected)


def test_duplicates_are_merged():
    """Siblings with the same tokens that split their visits, a child for an empty sample, lost counts."""
    tree = tree_of(Node())
    drawn = [Sample(tokens, [-1.0] * len(tokens), "step") for tokens in ([1, 2], [3], [1, 2], [])]
    mcts.add_children(tree, tree.root, drawn, None, SearchConfig(prior="count"))
    first, second = tree.root.children
    assert (first.tokens, first.count, second.tokens, second.count, tree.merged) == ([1, 2], 2, [3], 1, 1)
    assert [first.prior, second.prior] == pytest.approx([2 / 3, 1 / 3])


def test_gumbel_noise():
    """No noise, or another one: the Gumbel distribution has mean 0.5772 and variance pi^2 / 6 (here at 5 sigma)."""
    tree, count = tree_of(Node()), 4000
    mcts.add_children(tree, tree.root, [Sample([i], [-1.0], "step") for i in range(count)], None, SearchConfig())
    gumbel = np.array([child.gumbel for child in tree.root.children])
    assert gumbel.mean() == pytest.approx(0.5772, abs=5 * math.pi / math.sqrt(6 * count))
    assert gumbel.var() == pytest.approx(math.pi**2 / 6, rel=5 * math.sqrt(4.4 / count))  # 4.4: kurtosis - 1


# ------------------------------------------------------------------------------------------------ whole searches


VISITED = {  # node: visits, total, prior
    (): (8, 3.0, 1.0),
    (1,): (6, 3.5, 0.8),
    (2,): (1, -0.5, 0.2),
    (1, 3): (1, -1.0, 0.6),
    (1, 4): (4, 4.0, 0.4),
    (2, 4): (0, 0.0, 1.0),
}
ALL = VISITED | {(): (8, 5.0, 1.0), (1,): (6, 5.5, 0.8), (1, 3): (0, 0.0, 0.6), (1, 4): (5, 5.0, 0.4)}


@pytest.mark.parametrize("answers, expected, count", [("visited", VISITED, 2), ("all", ALL, 3)])
def test_golden_tree(world, answers, expected, count):
    """Any change to the order or the sums of a search, which would change every result without an error.

    By hand, c = 1, P(A) = 0.8, P(B) = 0.2, below A: P(C) = 0.6, P(D) = 0.4. Scores of the siblings at each visit, where
    answers are graded when visited:
    1 root (0). 2 A .8, B .2: A (.5). 3 A 1.066, B .533; C first by its prior (-1). 4 A .443, B .180; C -.576, D .316:
    D (1). 5 A .567, B .525; C -.480, D 1.346: D. 6 A .733, B .747: B (-.5). 7 A .767, B -.255; C -.4, D 1.267: D.
    8 A .853, B -.235; D again.

    Where all answers are graded, C is known to be wrong and D to be right from visit 2 on:
    2 A .8, B .2: A (.5). 3 A 1.066, B .533; C -.4, D 1.4: D (1). 4 A 1.212, B .846; D. 5 A 1.233, B 1.025; D.
    6 A 1.233, B 1.147; D. 7 A 1.227, B 1.240: B (-.5). 8 A 1.253, B -.235; D.
    """
    a, b, c, d = 1, 2, 3, 4
    tree_below = {(): {a: 0.8, b: 0.2}, (a,): {c: 0.6, d: 0.4}, (b,): {d: 1.0}}
    values = {(): 0.0, (a,): 0.5, (b,): -0.5, (a, c): -1.0, (a, d): 1.0, (b, d): 0.0}
    game = world(
        lambda state: [((token,), p, "end" if state[1:] else "step") for token, p in tree_below[state[1:]].items()],
        lambda state: values[state[1:]],
        values.__getitem__,
    )
    config = SearchConfig(simulations=8, children=64, workers=1, c_puct=1.0, prior="sum", answers=answers)
    ((tree,), usage) = game.search(config)
    assert {tuple(n.completion()): (n.visits, n.total, round(n.prior, 9)) for n in tree.nodes()} == expected
    assert (tree.expansions, tree.generated, tree.merged) == (3, 3 * 64, 3 * 64 - 5)
    assert (usage.generated, usage.prefilled, usage.valued) == (3 * 64, 1 + 2 + 2, 1 + 2 + 2)
    (best,) = best_answer(tree, config)
    assert most_visited_path(tree, config).completion() == best.completion == [a, d]
    assert tree.statistics() == dict(
        visits=8,
        nodes=6,
        merged=187,
        depth=2,
        root_q=expected[()][1] / 8,
        root_value=0.0,
        answers=count,
        solved=1.0,
    )


@given(CONFIGS, SEEDS, DEPTHS)
@examples(300)
def test_invariants(random_world, config, seed, max_depth):
    """A visit counted twice or lost, a virtual visit left, a terminal node that is expanded, valued by the critic or
    graded twice, tokens that nobody counts: over random games, in every combination of choices."""
    game = random_world(seed)
    trees, usage = game.search(config, (100, 101), seed, max_depth)
    expanded, valued, ended = [], [], []
    for tree in trees:
        assert tree.root.visits == config.simulations
        for n in tree.nodes():
            assert n.pending == 0 and abs(n.q) <= 1 + 1e-12
            below = n.children
            if below:
                assert sum(child.visits for child in below) == n.visits - 1  # the other one is its own evaluation
                assert n.total == pytest.approx(n.value + sum(child.total for child in below))
                assert sum(child.prior for child in below) == pytest.approx(1)
                drawn = sum(child.count for child in below)
                assert drawn == config.children or (config.cutoff is not None and drawn < config.children)
            else:
                assert n.total == pytest.approx(n.visits * n.value if n.ended and n.visits else 0)
                assert n.ended or n.visits == 0
            completion = tuple(n.completion())
            assert n.length == len(completion) <= config.max_tokens and n.depth <= max_depth
            capped = n.length == config.max_tokens or n.depth == max_depth
            if n.visits and not (capped or completion[-1:] == (END,)):
                expanded.append((*tree.prompt, *completion))
                valued += expanded[-1:] * bool(below)  # what got no step ended there
            if n.ended and (n.visits or config.answers == "all"):
                ended.append((tree.problem.target, *completion))
    assert sorted(sum(game.sampled, [])) == sorted(expanded)
    assert sorted(sum(game.valued, [])) == sorted(valued)
    assert sorted(game.graded) == sorted(ended)
    assert usage.generated == sum(tree.generated for tree in trees) == sum(game.generated)
    assert (usage.prefilled, usage.valued) == (sum(map(len, expanded)), sum(map(len, valued)))


def snapshot(tree):
    fields = "tokens logprobs ended count prior visits total value reward gumbel".split()
    nodes = [[getattr(n, field) for field in fields] for n in tree.nodes()]
    return nodes, tree.root.visits, tree.expansions, tree.generated, tree.merged


@given(CONFIGS, SEEDS, DEPTHS, st.integers(0, 60))
@examples(100)
def test_batched_search_equals_single_searches(random_world, config, seed, max_depth, budget):
    """A result that depends on what else is in the batch, such as a shared random stream."""
    budget = 0 if config.selection == "gumbel" else budget
    config, names = replace(config, token_budget=budget), (100, 101, 102, 103)
    together, _ = random_world(seed).search(config, names, seed, max_depth)
    single = [random_world(seed).search(config, (name,), seed, max_depth)[0][0] for name in names]
    assert [snapshot(tree) for tree in together] == [snapshot(tree) for tree in single]


def test_a_wave_is_one_call(world):
    """Model calls for each leaf or each tree, which would be slow; a setting that doesn't reach the sampler."""
    settings = dict(simulations=13, children=6, step_tokens=5, temperature=0.8, cutoff=0.25)
    game, config = world(endless), SearchConfig(**settings)
    game.search(config, range(100, 105))
    assert game.sampled == game.valued and len(game.sampled[0]) == 5
    assert len(game.sampled) < sum(map(len, game.sampled)) / 5 == 13
    singles = [world(endless) for _ in range(5)]
    for name, single in enumerate(singles, 100):
        single.search(config, [name])
    assert len(game.sampled) == max(len(single.sampled) for single in singles)
    assert set(game.params) == {SamplingParams(6, 5, 0.8, stop_at_step=True, cutoff=0.25)}


def test_the_critic_is_the_samplers_if_no_other_is_given(world):
    """Prevents a search by hand, as in the notebooks, that has no values or asks another critic than the policy's."""
    game, config = world(endless), SearchConfig(simulations=9)
    game.values = lambda states: ([0.25] * len(states), Usage(valued=7))
    (tree,) = trees = mcts.plant(game, [Problem((1,), 100)], [0])
    usage = mcts.search(trees, game, game.grade, config)
    assert tree.root.q == 0.25 and usage.valued == 7 * len(game.sampled) and not game.valued


def test_answers_fill_a_wave(world):
    """Waves cut short by a leaf that costs nothing: every worker may visit the same answer."""
    game, tree = world(arms([1.0])), tree_of(Node())
    for visits in (1, 5, 9):
        mcts.wave([tree], game, game.grade, SearchConfig(workers=4), game.critic)
        assert tree.root.visits == visits


@pytest.mark.parametrize("part", ["sample", "critic", "grade"])
def test_interrupted_wave_leaves_no_virtual_visit(random_world, part):
    """Virtual visits that outlive an interrupted wave and spoil the tree's statistics for good."""
    game, config = random_world(4), SearchConfig(workers=4)
    trees = [Tree(Problem((1,), name), [name], np.random.default_rng(name)) for name in range(100, 104)]
    mcts.wave(trees, game, game.grade, config, game.critic)
    pending = []

    def interrupt(*_, **__):
        pending.extend(tree.root.pending for tree in trees)
        raise KeyboardInterrupt

    setattr(game, part, interrupt)
    with pytest.raises(KeyboardInterrupt):
        for _ in range(20):
            mcts.wave(trees, game, game.grade, config, game.critic)
    assert min(pending) > 0
    assert not any(n.pending for tree in trees for n in tree.nodes())


def countdown_world(world, problem):
    """Countdown with one token a step, the number of the position that it leads to, and the exact oracle as critic."""

    def positions(state):
        return sorted({left for *_, left in legal_moves(state)})

    def state_of(completion):
        state = problem.numbers
        for token in completion:
            state = positions(state)[token]
        return state

    def steps(prefix):
        following = positions(state_of(prefix[1:]))
        ends = [problem.target in state or len(state) == 1 for state in following]
        return [((i,), 1 / len(ends), "end" if end else "step") for i, end in enumerate(ends)]

    def value(completion):
        return 1.0 if solvable(state_of(completion), problem.target) else -1.0

    def reward(completion):
        return 1.0 if problem.target in state_of(completion) else -1.0

    return world(steps, lambda prefix: value(prefix[1:]), reward), reward


def targets(numbers):
    """Any number, or one that can be reached."""
    return st.integers(1, 60) | st.sampled_from(sorted(reachable(numbers)))


GAMES = st.lists(st.integers(1, 13), min_size=3, max_size=3).map(sorted).map(tuple)
GAMES = GAMES.flatmap(lambda numbers: st.builds(Problem, st.just(numbers), targets(numbers)))
GAMES = GAMES.filter(lambda problem: problem.target not in problem.numbers)


@given(GAMES, SEEDS)
@examples(100)
def test_oracle_finds_every_solution(world, problem, seed):
    """A search that can't use its critic: with a perfect one and all moves as children, it never leaves the solvable
    positions, so it needs at most one visit a sibling of a level; without a solution, it claims none."""
    game, _ = countdown_world(world, problem)
    levels = 1 + 18 + 6  # the root, at most 3 pairs in 6 ways, at most 1 pair in 6 ways
    config = SearchConfig(simulations=levels, children=400, workers=1, c_puct=0.0)
    ((tree,), _) = game.search(config, seed=seed)
    found = any(answer.reward.correct for answer in best_answer(tree, config))
    assert found == tree.statistics()["solved"] == solvable(problem.numbers, problem.target)


@pytest.mark.parametrize("selection", SELECTIONS)
@given(problem=GAMES, seed=SEEDS)
@examples(40)
def test_oracle_finds_the_sampled_solution(world, selection, problem, seed):
    """A sampled solution that stays unseen: with few children the tree may hold none, but if it does, it is found."""
    game, reward = countdown_world(world, problem)
    config = SearchConfig(simulations=100, children=3, selection=selection)
    ((tree,), _) = game.search(config, seed=seed)
    sampled = any(reward(n.completion()) == 1 for n in tree.nodes() if n.ended)
    assert tree.statistics()["solved"] == sampled


# ------------------------------------------------------------------------------------------------ edge cases


@pytest.mark.parametrize("selection", SELECTIONS)
def test_all_terminal_at_the_first_step(world, selection):
    """Answers in one step: one expansion, each answer graded once, though visited again and again."""
    game = world(arms([0.5, 0.3, 0.2]), lambda state: 0.25, lambda completion: completion[0] / 2)
    ((tree,), _) = game.search(SearchConfig(simulations=20, children=50, selection=selection))
    assert game.sampled == game.valued == [[(100,)]]
    assert sorted(game.graded) == [(100, 0), (100, 1), (100, 2)]
    assert sum(child.visits for child in tree.root.children) == 19
    assert tree.root.total == 0.25 + sum(child.visits * child.tokens[0] / 2 for child in tree.root.children)


@pytest.mark.parametrize("workers", [1, 4])
@pytest.mark.parametrize("selection", SELECTIONS)
def test_single_child(world, selection, workers):
    """A chain, where a wave has one leaf to offer: no leaf is expanded twice and the visits are those of a chain."""
    game = world(lambda state: [((1,), 1.0, "end" if len(state) == 4 else "step")])
    config = SearchConfig(simulations=10, selection=selection, workers=workers)
    ((tree,), _) = game.search(config)
    assert [n.visits for n in tree.nodes()] == [10, 9, 8, 7, 6]
    assert game.sampled == [[(100, *[1] * depth)] for depth in range(4)]
    assert {n.prior for n in tree.nodes()} == {1.0} and tree.merged == 4 * 3


@pytest.mark.parametrize("budget", [0, 10])
def test_root_without_a_step(world, budget):
    """A sampler that returns nothing: the root is a dead end and takes the verifier's reward, not the critic's value;
    with a token budget too, though nothing was spent."""
    game = world(lambda state: [], lambda state: 0.9, lambda completion: -1.0)
    config = SearchConfig(simulations=6, token_budget=budget)
    ((tree,), usage) = game.search(config)
    assert (tree.root.visits, tree.root.q, tree.root.ended, usage.generated) == (6, -1.0, True, 0)
    assert (len(game.sampled), game.graded) == (1, [(100,)])
    (best,) = best_answer(tree, config)
    assert most_visited_path(tree, config) is tree.root and (best.completion, best.reward.value) == ([], -1.0)


def test_dead_end_below_the_root(world):
    """A dead end that keeps the critic's optimism, or is sampled again at every visit."""
    game = world(lambda state: [] if state[1:] else [((1,), 1.0, "step")], lambda state: 0.5, lambda completion: -1.0)
    ((tree,), _) = game.search(SearchConfig(simulations=6))
    (dead,) = tree.root.children
    assert (dead.visits, dead.total, dead.value, tree.root.total) == (5, -5.0, -1.0, 0.5 - 5.0)
    assert (game.sampled, game.graded) == ([[(100,)], [(100, 1)]], [(100, 1)])


def test_max_tokens_truncates(world):
    """A completion beyond max_tokens, which the trainer would cut and the verifier would not have seen so."""
    game = world(lambda state: [((1, 2, 3), 1.0, "step")])
    ((tree,), usage) = game.search(SearchConfig(simulations=6, children=1, max_tokens=7))
    last = tree.nodes()[-1]
    assert [n.length for n in tree.nodes()] == [0, 3, 6, 7]
    assert (last.tokens, last.logprobs, last.ended, last.visits) == ([1], [0.0], True, 3)
    assert (game.graded, len(game.sampled)) == ([(100, 1, 2, 3, 1, 2, 3, 1)], 3)
    assert usage.generated == 9  # what was cut was paid for


def test_max_depth(world):
    """A tree deeper than MAX_DEPTH, or a node at the cap that is never graded."""
    game, config = world(endless), SearchConfig(simulations=60, children=20)
    ((tree,), _) = game.search(config, max_depth=2)
    at_cap = [n for n in tree.nodes() if n.depth == 2]
    assert all(n.ended and not n.children for n in at_cap) and max(n.depth for n in tree.nodes()) == 2
    assert len(at_cap) == 9 and len(game.graded) == sum(n.visits > 0 for n in at_cap)
    assert sum(map(len, game.sampled)) == 1 + 3


@pytest.mark.parametrize("workers", [1, 3, 8])
def test_token_budget_is_spent_exactly(world, workers):
    """Unequal compute: where every step costs 2 tokens and every expansion 8, 50 tokens pay for 6 expansions and one
    more step, whatever the workers."""
    game = world(endless)
    ((tree,), _) = game.search(SearchConfig(simulations=999, children=4, workers=workers, token_budget=50))
    assert (tree.generated, sum(n.count for n in tree.nodes()) - 1) == (50, 6 * 4 + 1)


@given(SEEDS, st.integers(1, 300), st.integers(1, 8))
@examples(50)
def test_token_budget(world, seed, budget, workers):
    """Unequal compute: a tree that spends more than its budget, or that stops although its next step fits. The first
    step is always taken, as best-of-N takes its first sample."""

    def steps(state):
        lengths = np.random.default_rng([seed, *state]).integers(1, 20, 2)
        return [((i, *[STEP] * int(length)), 0.5, "step") for i, length in enumerate(lengths)]

    game, config = world(steps), SearchConfig(simulations=999, workers=workers, token_budget=budget)
    ((tree,), usage) = game.search(replace(config, max_tokens=9999), seed=seed, max_depth=999)
    first, *others = [len(n.tokens) for n in tree.nodes()[1:] for _ in range(n.count)]
    assert tree.generated == first + sum(others) and (tree.generated <= budget or not others)
    assert tree.spent or tree.generated == budget
    assert sum(game.generated[:-1]) < budget or not others  # no wave starts when the budget is spent


@given(GAMES, SEEDS, st.integers(1, 4))
@examples(50)
def test_a_tree_ends_with_its_first_right_answer(world, problem, seed, workers):
    """Prevents tokens that are spent or counted after the answer is known, a tree that ends before, and another search
    on the way there."""
    config = SearchConfig(simulations=100, children=3, workers=workers)
    game, _ = countdown_world(world, problem)
    (whole,), _ = game.search(config, seed=seed)
    (tree,), usage = game.search(replace(config, until_right=True), seed=seed)
    graded = game.graded[len(whole.answers()) :]
    assert graded == game.graded[: len(graded)] and tree.solved == whole.solved
    assert (tree.root.visits < whole.root.visits) or not tree.solved or tree.root.visits > 100 - workers
    right = [answer for answer in tree.answers() if answer.reward.correct]
    assert [(100, *answer.completion()) for answer in right] == graded[-1:] * tree.solved
    assert tree.generated == sum(len(n.tokens) * n.count for n in tree.nodes()) <= usage.generated


# ------------------------------------------------------------------------------------------------ settings


@pytest.mark.parametrize("selection", SELECTIONS)
def test_no_answer(world, selection):
    """A choice that invents an answer, or crashes, where the tree holds none."""
    config = SearchConfig(simulations=9, selection=selection)
    ((tree,), _) = world(endless).search(config)
    assert tree.answers() == [] and tree.statistics()["solved"] == 0
    assert [teach(tree, config) for teach in LESSONS.values()] == [[]] * len(LESSONS)


@pytest.mark.parametrize(
    "bad",
    [{name: 0} for name in ("simulations", "children", "workers", "step_tokens", "max_tokens")]
    + [{name: "best"} for name in ("selection", "prior", "unvisited", "virtual_loss")]
    + [{"temperature": 0.0}, {"temperature": math.nan}, {"c_puct": -0.1}, {"c_puct": math.nan}, {"token_budget": -1}]
    + [{"cutoff": -0.1}, {"cutoff": 1.5}, {"cutoff": math.nan}],
)
def test_config_refuses(bad):
    """A bad setting that is found only after hours, or never."""
    with pytest.raises(ValueError, match=next(iter(bad))):
        SearchConfig(**bad)
