"""Countdown, the numbers game: reach the target from a few numbers with + - * /, each number at most once.

Holds the whole task and no model: problems and leak-free splits, an exact solver, the prompt, and the verifier
with its rewards. Model output is hostile input: it is parsed, never evaluated, and time and size are bounded.

Deviations from the post (Tambde 2026): the distribution over plays is enumerated instead of simulated (same
distribution, proven in the tests); train, validation and test share no multiset of numbers; the verifier reads
only the completion, wants exactly one answer and checks intermediate results.
"""

import hashlib
import math
import re
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from functools import cache, lru_cache
from itertools import combinations

import numpy as np

from config import check_ranges
from sampling import Reward

SHARES = {"test": 0.25, "validation": 0.10, "train": 0.65}  # of the number multisets
PLAYS = 10_000  # random plays behind one target
SOLVER_NUMBERS = 5  # in a problem at most; with 5 the solver takes 10 ms, with each more a dozen times as long
MAX_COMPLETION = 50_000  # characters; a longer completion is not read
MAX_EXPRESSION = 200  # characters inside <answer>


@dataclass(frozen=True)
class Problem:
    """Reach `target` (a positive integer) from `numbers` (positive integers, in the order shown to the model)."""

    numbers: tuple[int, ...]
    target: int

    def __str__(self) -> str:
        return f"{' '.join(map(str, self.numbers))} → {self.target}"


# ------------------------------------------------------------------------------------------------ playing the game


def legal_moves(numbers: tuple[int, ...]) -> Iterator[tuple[int, str, int, int, tuple[int, ...]]]:
    """Every move of the random play as (a, operator, b, result, sorted numbers left), of every ordered pair.

    a - b needs a > b; a * b needs both factors above 1; a / b needs an exact division and b above 1. Equal numbers
    yield the same move several times, so a uniform choice among the moves is the post's, which redraws illegal ones.
    """
    for i, a in enumerate(numbers):
        for j, b in enumerate(numbers):
            if i == j:
                continue
            rest = [n for k, n in enumerate(numbers) if k != i and k != j]
            yield a, "+", b, a + b, tuple(sorted([*rest, a + b]))
            if a > b:
                yield a, "-", b, a - b, tuple(sorted([*rest, a - b]))
            if a > 1 and b > 1:
                yield a, "*", b, a * b, tuple(sorted([*rest, a * b]))
            if b > 1 and a % b == 0:
                yield a, "/", b, a // b, tuple(sorted([*rest, a // b]))


@lru_cache(2**16)  # states: the default game has 16,837, five numbers up to 999 have no end
def play_distribution(state: tuple[int, ...]) -> dict[int, float]:
    """The exact probability of each final result of one uniformly random play from `state` (sorted)."""
    if len(state) == 1:
        return {state[0]: 1.0}
    following: dict[tuple[int, ...], int] = {}
    for *_, left in legal_moves(state):
        following[left] = following.get(left, 0) + 1
    total = sum(following.values())
    distribution: dict[int, float] = {}
    for left, count in following.items():
        for result, probability in play_distribution(left).items():
            distribution[result] = distribution.get(result, 0.0) + probability * count / total
    return distribution


def rarest_result(numbers: tuple[int, ...], rng: np.random.Generator, plays: int = PLAYS) -> int:
    """The result seen least often in `plays` random plays (ties broken at random): the post's target."""
    distribution = play_distribution(tuple(sorted(numbers)))
    counts = rng.multinomial(plays, list(distribution.values()))  # [results]
    seen = np.flatnonzero(counts)
    rarest = seen[counts[seen] == counts[seen].min()]
    return list(distribution)[rng.choice(rarest)]


@cache
def reachable(state: tuple[int, ...]) -> frozenset[int]:
    """All values of `state` (sorted) reachable with each number used at most once and positive whole steps."""
    values = set(state)
    for *_, left in legal_moves(state):
        values |= reachable(left)
    return frozenset(values)


def solvable(state: tuple[int, ...], target: int) -> bool:
    """Whether `target` can still be reached from the numbers left: the oracle that measures the critic."""
    return target in reachable(tuple(sorted(state)))


def solve(numbers: tuple[int, ...]) -> dict[int, str]:
    """One expression for every reachable value, e.g. solve((2, 3))[6] == "2 * 3"."""
    found: dict[int, str] = {}
    seen: set[tuple[int, ...]] = set()

    def visit(items: list[tuple[int, str]]) -> None:
        state = tuple(value for value, _ in items)
        if state in seen:
            return
        seen.add(state)
        for value, expression in items:
            found.setdefault(value, expression)
        for i, j in combinations(range(len(items)), 2):
            rest = [item for k, item in enumerate(items) if k not in (i, j)]
            for (a, left), (b, right) in ((items[i], items[j]), (items[j], items[i])):
                for x, operator, y, result, _ in legal_moves((a, b)):
                    if (x, y) == (a, b):
                        visit(sorted([*rest, (result, f"{enclose(left)} {operator} {enclose(right)}")]))

    visit(sorted((n, str(n)) for n in numbers))
    return found


def enclose(expression: str) -> str:
    """`expression` as an operand: in parentheses unless it is a lone number."""
    return expression if expression.isdigit() else f"({expression})"


STEP = re.compile(r"([0-9]{1,6}) ?([-+*/]) ?([0-9]{1,6}) ?= ?([0-9]{1,9})(?![0-9])")
CUT = re.compile(r"[0-9)] ?[-+*/] ?$|[0-9.]$")  # before a step: it is the tail of a longer equation or number


def follow(state: tuple[int, ...], step: str) -> tuple[int, ...] | None:
    """The numbers left after a step such as "3 * 4 = 12 left 5 7 12", or None if it is illegal or miscalculated.

    Reads the equation and, if the step lists what is left, checks that too; tags around it do not matter. `state` need
    not be sorted.
    """
    if not (match := STEP.search(step[:MAX_EXPRESSION])):
        return None
    if CUT.search(step[: match.start()]):
        return None
    a, operator, b, c = int(match[1]), match[2], int(match[3]), int(match[4])
    rest = list(state)
    if a not in rest or b not in rest or (a == b and rest.count(a) < 2):
        return None
    rest.remove(a)
    rest.remove(b)
    result = {"+": a + b, "-": a - b, "*": a * b, "/": a // b if b and a % b == 0 else 0}[operator]
    if result != c or result <= 0:
        return None
    left = tuple(sorted([*rest, result]))
    listed = re.findall(r"[0-9]+", step[match.end() : MAX_EXPRESSION])
    return left if not listed or tuple(sorted(map(int, listed))) == left else None


# ------------------------------------------------------------------------------------------------ data sets


def split_of(numbers: tuple[int, ...]) -> str:
    """The split that a multiset of numbers belongs to, by a hash of it, without a seed. A policy pretrained
    on the training multisets has seen no test multiset."""
    digest = hashlib.sha256(" ".join(map(str, sorted(numbers))).encode()).digest()
    point = int.from_bytes(digest[:8], "big") / 2**64
    for name, share in SHARES.items():
        point -= share
        if point < 0:
            return name
    return "train"


def make_problems(
    count: int, split: str, *, size: int = 4, highest: int = 13, plays: int = PLAYS, seed: int = 0
) -> list[Problem]:
    """`count` problems of one split: `size` numbers uniform in 1..highest, target = rarest of `plays` plays.

    split: "train" (distinct number sequence and target), "validation" or "test" (distinct multiset and target), or
    "post" (the original's way: any multiset, duplicates kept; a test set made so leaks into the training set).
    Raises ValueError for a game outside config.RANGES, or for more problems than the split has.
    """
    check_ranges(size=size, highest=highest, plays=plays, seed=seed)
    if split not in (*SHARES, "post"):
        raise ValueError(f"split must be one of {', '.join(SHARES)} or post, not {split!r}")
    rng = np.random.default_rng([seed, *split.encode()])
    problems: list[Problem] = []
    seen: set[tuple[tuple[int, ...], int]] = set()
    misses = 0  # draws in a row without a new problem of this split, which a small game may leave empty
    while len(problems) < count:
        misses += 1
        if misses > 20_000:
            raise ValueError(f"found only {len(problems)} distinct {split} problems of size {size}; ask for fewer")
        numbers = tuple(int(n) for n in rng.integers(1, highest + 1, size))
        if split != "post" and split_of(numbers) != split:
            continue
        problem = Problem(numbers, rarest_result(numbers, rng, plays))
        key = (numbers if split == "train" else tuple(sorted(numbers)), problem.target)
        if split != "post" and key in seen:
            continue
        misses = 0
        seen.add(key)
        problems.append(problem)
    return problems


def make_splits(
    split: str = "multiset", *, train: int = 20_000, validation: int = 200, test: int = 820, **game
) -> dict[str, list[Problem]]:
    """The data sets by name. split="multiset" shares no multiset between them; split="post" leaks on purpose."""
    counts = {"train": train, "validation": validation, "test": test}
    if split == "multiset":
        return {name: make_problems(count, name, **game) for name, count in counts.items()}
    warnings.warn("split=post leaks: nearly every test problem is a training problem in another order", stacklevel=2)
    pool = make_problems(sum(counts.values()), "post", **game)
    return {name: [pool.pop() for _ in range(count)] for name, count in counts.items()}


# ------------------------------------------------------------------------------------------------ prompt

RULES = """\
You play Countdown. Combine the given numbers with + - * / and reach the target exactly.
Each number may be used at most once, and every intermediate result must be a positive whole number.
Work in steps, one operation a step: <step> a * b = c left d e c </step>, where the numbers after "left" are those \
that remain. Finish with one expression made of the given numbers: <answer> (a * b + d) / e </answer>"""


def prompt(problem: Problem) -> list[dict[str, str]]:
    """The chat messages of a problem: the rules as system text, numbers and target as user text."""
    numbers = " ".join(map(str, problem.numbers))
    return [
        {"role": "system", "content": RULES},
        {"role": "user", "content": f"Numbers: {numbers} Target: {problem.target}"},
    ]


# ------------------------------------------------------------------------------------------------ verifier


class Refused(Exception):
    """An answer that breaks the rules; the message is the reason."""


def verify(completion: str, problem: Problem, strict: bool = True) -> Reward:
    """Grade a completion (the prompt is never looked at). Takes under 1 ms for any input.

    Of a completion of at most 50,000 characters, what follows the last </think> is read. It has an answer if </answer>
    follows <answer>. It keeps the rules if there is exactly one of each, and between them an expression of at most 200
    characters: the given numbers (each at most once, in plain digits), + - * /, parentheses, blanks, tabs and newlines.
    With strict=True intermediate results must be positive integers, as the prompt asks; else any rational (the post).

    Dense reward (post): -1 without an answer, -0.9 for one that breaks the rule, else
    1 - 2 min(|value - target| / target, 1).
    """
    if len(completion) > MAX_COMPLETION:
        return Reward(-1.0, False, False, "too long")
    completion = completion.rpartition("</think>")[2]  # a model may draft answers before it
    start = completion.find("<answer>")
    end = completion.find("</answer>", start)
    if start < 0 or end < 0:
        return Reward(-1.0, False, False, "no answer")
    try:
        if completion.count("<answer>") > 1 or completion.count("</answer>") > 1:
            raise Refused("several answers")
        value = evaluate_expression(completion[start + len("<answer>") : end], problem.numbers, strict)
    except Refused as refusal:
        return Reward(-0.9, False, False, str(refusal))
    if value == problem.target:
        return Reward(1.0, True, True, "correct")
    error = min(abs(value - problem.target) / problem.target, 1)
    below_1 = math.nextafter(1.0, 0.0)  # a near miss of a target above 1e16 would round to 1
    return Reward(min(float(1 - 2 * error), below_1), False, True, "wrong value")


TOKEN = re.compile(r"[ \t\n]*([1-9][0-9]*|[-+*/()])")
PRECEDENCE = {"+": 1, "-": 1, "*": 2, "/": 2}


def evaluate_expression(text: str, numbers: tuple[int, ...], strict: bool = True) -> int | Fraction:
    """The exact value of an arithmetic expression over `numbers`; raises Refused with the reason.

    Precedence climbing: at most two Python frames for each opening parenthesis, and at most 200 characters.
    """
    if len(text) > MAX_EXPRESSION:
        raise Refused("expression too long")
    text = text.strip(" \t\n")
    tokens, at = [], 0
    while at < len(text):
        if not (match := TOKEN.match(text, at)):
            raise Refused("syntax")
        tokens.append(match[1])
        at = match.end()
    tokens.append("end")
    tokens.reverse()  # a stack: the next token is the last
    unused = [str(n) for n in numbers]

    def operand() -> int | Fraction:
        token = tokens.pop()
        if token == "(":
            value = expression(1)
            if tokens.pop() != ")":
                raise Refused("syntax")
            return value
        if not token.isdigit():
            raise Refused("syntax")
        if token not in unused:
            raise Refused("numbers")
        unused.remove(token)
        return int(token)

    def expression(lowest: int) -> int | Fraction:
        value = operand()
        while PRECEDENCE.get(tokens[-1], 0) >= lowest:
            operator = tokens.pop()
            value = apply(operator, value, expression(PRECEDENCE[operator] + 1), strict)
        return value

    value = expression(1)
    if tokens != ["end"]:
        raise Refused("syntax")
    return value


def apply(operator: str, a: int | Fraction, b: int | Fraction, strict: bool) -> int | Fraction:
    """a operator b, exactly; raises Refused for a division by zero and, if strict, for a result outside 1, 2, …"""
    if operator == "+":
        return a + b
    if operator == "*":
        return a * b
    if operator == "-":
        value = a - b
    elif b == 0:
        raise Refused("division by zero")
    else:
        value = Fraction(a) / b
        value = value.numerator if value.denominator == 1 else value
    if strict and (value <= 0 or type(value) is not int):
        raise Refused("intermediate")
    return value


# ------------------------------------------------------------------------------------------------ task


@dataclass(frozen=True)
class Countdown:
    """The game as a task (`sampling.Task`), with all the optional methods."""

    size: int = 4  # numbers in a problem that the task makes

    def problems(self, split: str, count: int) -> list[Problem]:
        return make_problems(count, split, size=self.size)

    def prompt(self, problem: Problem) -> list[dict[str, str]]:
        return prompt(problem)

    def grade(self, problem: Problem, text: str) -> Reward:
        return verify(text, problem)

    def parse(self, text: str) -> Problem:
        words = re.sub("[,→]", " ", text).split()
        if len(words) < 2 or not all(re.fullmatch("[1-9][0-9]{0,8}", word) for word in words):
            raise ValueError(f"a problem is numbers from 1 to 999,999,999, the target last (3 5 7 9 44), not {text!r}")
        *numbers, target = map(int, words)
        return Problem(tuple(numbers), target)

    def solution(self, problem: Problem) -> str | None:
        """None, too, for a problem that has more numbers than the solver takes."""
        return solve(problem.numbers).get(problem.target) if len(problem.numbers) <= SOLVER_NUMBERS else None

    def reachable(self, problem: Problem, steps: list[str]) -> bool | None:
        """None after an illegal step, and for more numbers than the solver takes."""
        left: tuple[int, ...] | None = problem.numbers
        for step in steps:
            left = follow(left, step) if left else None
        return solvable(left, problem.target) if left and len(left) <= SOLVER_NUMBERS else None
