"""Hostile answers for the verifier, each judged a second time by an oracle that shares no code with it.

    make fuzz                                    # a million answers, a few minutes
    make fuzz ARGS="--count 5000 --seed 1"

The oracle follows the docstring of `countdown.verify` by other means: a regular expression splits the tags off, and
Dijkstra's shunting yard computes in exact fractions. Every kind of answer is a function of a random generator, so a
seed repeats a run. An exception of the verifier counts as a disagreement.
"""

import operator
import re
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from random import Random

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # for `python tests/fuzz.py`

import runtime.threads

import countdown
from countdown import Problem, prompt
from runtime import cli

# ------------------------------------------------------------------------------------------------ the oracle

LEVEL = {"+": 1, "-": 1, "*": 2, "/": 2}
ARITHMETIC = {"+": operator.add, "-": operator.sub, "*": operator.mul, "/": operator.truediv}


def judge(completion: str, problem: Problem, strict: bool = True) -> tuple[float, bool, bool]:
    """What a completion deserves: dense reward, whether it is correct, whether it keeps the rules."""
    completion, size = completion.split("</think>")[-1], len(completion)
    if size > 50_000 or "</answer>" not in completion.partition("<answer>")[2]:
        return -1.0, False, False
    _, *parts = re.split("(</?answer>)", completion)  # tag, text, tag, text …
    one = parts[::2] == ["<answer>", "</answer>"]
    value = calculator(parts[1], problem.numbers, strict) if one else None
    if value is None:
        return -0.9, False, False
    return float(max(1 - 2 * abs(value - problem.target) / problem.target, -1)), value == problem.target, True


def calculator(text: str, numbers: tuple[int, ...], strict: bool) -> Fraction | None:
    """The value of an infix expression by Dijkstra's shunting yard, or None if it breaks a rule of the task."""
    values, signs, unused, after_operand = [], [], Counter(numbers), False

    def reduce():
        right, left = values.pop(), values.pop()
        values.append(ARITHMETIC[signs.pop()](left, right))
        if strict and (values[-1] <= 0 or values[-1].denominator > 1):
            raise ValueError("not a positive whole number")

    if len(text) > 200 or set(text) - set("0123456789+-*/() \t\n"):
        return None
    try:
        for token in re.findall(r"[0-9]+|\S", text):
            if after_operand == (token == "(" or token.isdigit()):
                raise ValueError("an operand where an operator belongs, or the reverse")
            if token == "(":
                signs.append(token)
            elif token == ")":
                while signs[-1] != "(":
                    reduce()
                signs.pop()
            elif token in LEVEL:
                while signs and LEVEL.get(signs[-1], 0) >= LEVEL[token]:
                    reduce()
                signs.append(token)
                after_operand = False
            else:
                if not unused[int(token)] or token[0] == "0":
                    raise ValueError("not a number of the problem")
                unused[int(token)] -= 1
                values.append(Fraction(token))
                after_operand = True
        while signs:
            reduce()
        (value,) = values if after_operand else ()
    except (ValueError, ArithmeticError, LookupError):
        return None
    return value


# ------------------------------------------------------------------------------------------------ the answers


def play(rng: Random, numbers: list[int], legal: bool = True, careful: bool = True) -> tuple[Fraction, str]:
    """The value and the text of a random expression over some of `numbers`.

    legal: every intermediate result is positive and whole. careful: brackets stand where the value needs them, and now
    and then elsewhere; otherwise they stand anywhere, and the text may have another value or none.
    """

    def bracket(text, needed):
        return f"({text})" if rng.random() < (needed or 0.1 if careful else 0.4) else text

    items = [(Fraction(n), str(n), 3) for n in rng.sample(numbers, rng.randint(1, len(numbers)))]  # value, text, level
    while len(items) > 1:
        (a, left, level_a), (b, right, level_b), *rest = rng.sample(items, len(items))
        results = {sign: ARITHMETIC[sign](a, b) for sign in "+-*/" if sign != "/" or b}
        sign = rng.choice([s for s, x in results.items() if not legal or x > 0 and x.denominator == 1])
        level, gap = LEVEL[sign], rng.choice(("", "", " ", "\n", "\t "))
        text = gap.join((bracket(left, level_a < level), sign, bracket(right, level_b <= level)))
        items = [(results[sign], text, level), *rest]
    return items[0][:2]


def game(rng: Random, numbers: list[int] | None = None, **how) -> tuple[str, Problem]:
    """An expression and a problem, which it solves if it is legal and careful."""
    if not numbers:
        highest = rng.choice((2, 13, 13, 13, 100, 10**9))
        numbers = [rng.randint(1, highest) for _ in range(rng.randint(1, 6))]
    value, text = play(rng, numbers, **how)
    whole = value > 0 and value.denominator == 1
    return text, Problem(tuple(numbers), int(value) if whole else rng.randint(1, 99))


def answer(text: str) -> str:
    return f"<step> 2 + 3 = 5 left 5 5 10 </step>\n<answer> {text} </answer>"


def right(rng):
    text, problem = game(rng)
    return answer(text), problem


def grammar(rng):
    """Well-formed, right or wrong: another target, brackets elsewhere, a number missing, illegal intermediates."""
    text, problem = game(rng, legal=rng.random() < 0.5, careful=rng.random() < 0.5)
    target = max(1, problem.target + rng.choice((0, 0, 0, 1, -1)))
    return answer(text), Problem(problem.numbers[rng.choice((0, 0, 0, 1)) :], target)


def soup(rng):
    """The right alphabet in any order."""
    numbers = tuple(rng.randint(1, 13) for _ in range(rng.randint(1, 4)))
    words = [*"+-*/+-*/()(). 0", *map(str, numbers * 4)]
    return answer("".join(rng.choices(words, k=rng.randint(0, 9)))), Problem(numbers, rng.choice(numbers))


def mutated(rng):
    """A right answer with one to three slips of the pen, in its tags too."""
    completion, problem = right(rng)
    for _ in range(rng.randint(1, 3)):
        at = rng.randrange(len(completion) + 1)
        end = at + rng.choice((0, 1, 1, 5))
        piece = rng.choice(("", "", completion[at:end][::-1], 2 * completion[at:end], *"0123456789+-*/()<>. \n="))
        completion = completion[:at] + piece + completion[end:]
    return completion, problem


def noise(rng):
    """Random bytes, read as some encoding, in place of the answer, inside it or around it."""
    text, problem = game(rng)
    encoding = rng.choice((("latin-1",), ("ascii", "ignore"), ("utf-8", "surrogateescape"), ("utf-16", "replace")))
    junk = rng.randbytes(rng.randint(1, 60)).decode(*encoding)
    return rng.choice((junk, answer(junk), answer(text + junk), junk + answer(text), answer(text) + junk)), problem


LOOKALIKES = str.maketrans({
    **{digit: "".join(chr(zero + int(digit)) for zero in (0xFF10, 0x0660, 0x1D7CE)) for digit in "0123456789"},
    "+": "＋﬩➕", "-": "−–‐－", "*": "×∗＊⋅", "/": "÷∕／⁄", "(": "（❨[", ")": "）❩]", "<": "＜‹〈", ">": "＞›〉",
    "a": "аａ", "e": "еｅ", " ": "\u00a0\u2003\u3000",
})  # fmt: skip
INVISIBLE = "\u200b\u200d\u200e\u200f\u202e\u2066\u2060\ufeff\u00ad\u0301\u20e3\ufe0f\u2028\u2029\x85\0\r\v\f\ud800"


def unicode(rng):
    """A right answer with lookalikes of its characters, or with marks that can't be seen."""
    completion, problem = right(rng)
    characters = list(completion)
    for _ in range(rng.randint(1, 3)):
        at = rng.randrange(len(characters))
        if rng.random() < 0.5:
            characters[at] = rng.choice(characters[at].translate(LOOKALIKES))
        else:
            characters.insert(at, rng.choice(INVISIBLE))
    return "".join(characters), problem


def huge(rng):
    """Numbers far above what floats and machine words hold, targets missed by one, and digits that were not given."""
    numbers = [rng.randint(1, 10 ** rng.randint(1, 60)) for _ in range(rng.randint(1, 4))]
    text, problem = game(rng, numbers, legal=rng.random() < 0.7)
    text = rng.choice((text, text, text, f"{text}{rng.choice('+-*/')}{rng.randrange(10**190)}", f"0{text}", f"{text}0"))
    return answer(text), Problem(problem.numbers, max(1, problem.target + rng.choice((0, 0, 0, 1, -1))))


def deep(rng):
    """Brackets to the limit of the length, closed or not, around a right answer or between its operations."""
    text, problem = game(rng)
    depth = rng.randint(1, 105)
    if rng.random() < 0.5:
        return answer("(" * depth + text + ")" * (depth + rng.choice((0, 0, 0, 1, -1)))), problem
    ones = rng.randint(1, 60)
    sign, first, last = rng.choice(("*", "/", "+", "-")), rng.choice(("(1{}", "1{}(")), rng.choice(("", ")"))
    stairs = "".join(first.format(sign) for _ in range(ones)) + "1" + ")" * ones + last
    return answer(stairs), Problem((1,) * (ones + rng.randint(0, 1)), rng.choice((1, ones + 1)))


def long(rng):
    """As many operations as fit, in whole numbers and in fractions."""
    text, problem = game(rng, [rng.randint(1, 9) for _ in range(rng.randint(7, 99))], legal=rng.random() < 0.5)
    return answer("".join(text.split())), problem


def tags(rng):
    """Up to thousands of tags and near tags, alone or around a right answer."""
    completion, problem = right(rng)
    near = [
        "<answer",
        "answer>",
        "</answer",
        "< answer>",
        "<ANSWER>",
        "<answer/>",
        "<step>",
        "</",
        "<",
        "<think>",
        "</think>",
    ]
    block = "".join(rng.choices(near + rng.choice(([], ["<answer>", "</answer>"])), k=rng.randint(1, 8)))
    block *= int(10 ** rng.uniform(0, 4))
    shapes = (block, block + completion, completion + block, answer(block))
    return rng.choice(shapes)[: rng.randint(49_000, 51_000)], problem


def echo(rng):
    """The prompt, or a part of it, with or without a right answer: the prompt holds an example of one."""
    text, problem = game(rng)
    system, user = (message["content"] for message in prompt(problem))
    marked = f"<|im_start|>system\n{system}<|im_end|>\n<|im_start|>user\n{user}<|im_end|>\n<|im_start|>assistant\n"
    echoed = rng.choice((system, user, marked, system[: rng.randrange(len(system))]))
    return rng.choice((echoed, echoed + answer(text), answer(text) + echoed, answer(echoed))), problem


def in_steps(rng):
    """Answers inside steps, and steps inside answers."""
    text, problem = game(rng)
    shapes = (
        "<step>{}</step>",
        "<step>{}</answer></step>",
        "<step><answer>{}</answer></step>",
        "<step> 1 + 1 = 2 left <answer>{}</answer>",
        "<answer>{}</answer></step>",
        "<answer>{}</step></answer>",
        "<answer><step>{}</step></answer>",
    )
    return rng.choice(shapes).format(text), problem


def repeated(rng):
    """More than one answer, the right one among them: none of these may count."""
    text, problem = game(rng)
    once, wrong = answer(text), answer(rng.choice((*map(str, problem.numbers), "")))
    shapes = (once + once, once + wrong, wrong + once, once + "<answer>", "<answer>" + once, once + "</answer>")
    shapes += ("</answer>" + once, answer(f"{text} = {text}"), answer(f"{text}, {text}"), answer(once), once * 99)
    return rng.choice(shapes), problem


def limits(rng):
    """A right answer of about 200 characters in a completion of about 50,000."""
    text, problem = game(rng)
    if rng.random() < 0.5:
        text += " " * (rng.randint(198, 202) - len(text))
    completion = f"<answer>{text}</answer>"
    if rng.random() < 0.5:
        completion += "." * (rng.randint(49_998, 50_002) - len(completion))
    return completion, problem


MAKERS = (right, grammar, soup, mutated, noise, unicode, huge, deep, long, tags, echo, in_steps, repeated, limits)
KINDS: dict[str, Callable[[Random], tuple[str, Problem]]] = {make.__name__.replace("_", " "): make for make in MAKERS}

# ------------------------------------------------------------------------------------------------ the run


@dataclass
class Row:
    """What became of the answers of one kind."""

    kind: str
    answers: int = 0
    accepts: int = 0  # by the oracle
    disagreements: list[str] = field(default_factory=list)
    worst: float = 0.0  # seconds of this thread for the slowest answer, the least of ten

    def line(self) -> str:
        wrong, microseconds = len(self.disagreements), 1e6 * self.worst
        return f"{self.kind:10s} {self.answers:9,} {self.accepts:9,} {wrong:14,} {microseconds:10.0f}"


def timed(*arguments):
    """What the verifier says, or its exception, and the seconds it took."""
    began = time.thread_time()
    try:
        reward = countdown.verify(*arguments)
    except Exception as error:  # none is expected: any is a finding
        reward = error
    return reward, time.thread_time() - began


def agree(reward, judged: tuple[float, bool, bool]) -> bool:
    """Whether the verifier found what the oracle found, and its reward fits its own verdict."""
    if isinstance(reward, Exception):
        return False
    fits = -1 <= reward.value <= 1 and reward.correct == (reward.value == 1)
    return fits and (reward.correct, reward.parsed) == judged[1:] and abs(reward.value - judged[0]) < 1e-9


def fuzz(kind: str, count: int, seed: int) -> Row:
    """Let verifier and oracle judge `count` answers of a kind."""
    rng, row = Random(f"{seed} {kind}"), Row(kind)
    for _ in range(count):
        case = *KINDS[kind](rng), rng.random() < 0.5
        reward, seconds = timed(*case)
        if seconds > row.worst:  # another process may have had the core: only a repeatable time counts
            row.worst = max(row.worst, min(seconds, *(timed(*case)[1] for _ in range(9))))
        judged = judge(*case)
        row.answers += 1
        row.accepts += judged[1]
        if not agree(reward, judged):
            row.disagreements.append(f"{kind}: {reward!r}, the oracle {judged}: verify{case}"[:1000])
    return row


@dataclass
class FuzzConfig:
    """Judge hostile answers twice, by the verifier and by an independent oracle."""

    count: int = 1_000_000  # answers, spread evenly over the kinds
    seed: int = 0

    def __post_init__(self):
        if self.count < 1:
            raise ValueError("count must be at least 1")


def main(config: FuzzConfig) -> None:
    print(f"{'kind':10s} {'answers':>9s} {'accepts':>9s} {'disagreements':>14s} {'worst (µs)':>10s}")
    rows = []
    for kind in KINDS:
        rows.append(fuzz(kind, -(-config.count // len(KINDS)), config.seed))
        print(rows[-1].line(), flush=True)
    found = [line for row in rows for line in row.disagreements]
    print(f"{sum(row.answers for row in rows):,} answers, {len(found):,} disagreements", *found[:20], sep="\n")
    sys.exit(bool(found))


if __name__ == "__main__":
    cli.command(lambda: main(cli.read_config(FuzzConfig)))
