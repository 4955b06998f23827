"""Tests of countdown.py. Each docstring or name says which failure it prevents; the maths is compared with a literal
simulation of the post and a brute force over subsets, both written here from scratch; tests/fuzz.py has more."""

import json
import random
import re
import subprocess
import sys
import time
from collections import Counter
from fractions import Fraction
from itertools import combinations_with_replacement, product
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

import countdown
from countdown import Problem, Reward, follow, make_problems, make_splits, play_distribution, verify
from runtime.data import read_problems
from scripts import make_data

ROOT = Path(__file__).parents[1]
FIVES = Problem((2, 3, 5, 10), 25)  # 5 * (2 + 3) = 25
GAMES = st.lists(st.integers(1, 13), min_size=1, max_size=4).map(tuple)


def examples(count):
    return settings(deadline=None, max_examples=count)


def answer(expression, problem=FIVES, strict=True):
    return verify(f"<step> 2 + 3 = 5 left 5 5 10 </step>\n<answer>{expression}</answer>", problem, strict)


def multisets(problems):
    return {tuple(sorted(p.numbers)) for p in problems}


# ------------------------------------------------------------------------------------------------ playing the game


def literal_game(numbers, rng):
    """The post's play, step by step: a random ordered pair and a random operator, illegal moves drawn again."""
    numbers = list(numbers)
    while len(numbers) > 1:
        i, j = rng.sample(range(len(numbers)), 2)
        a, b, sign = numbers[i], numbers[j], rng.choice("+-*/")
        if sign == "-" and a <= b or sign == "*" and 1 in (a, b) or sign == "/" and (b == 1 or a % b):
            continue
        result = {"+": a + b, "-": a - b, "*": a * b, "/": a // b}[sign]
        numbers = [n for k, n in enumerate(numbers) if k not in (i, j)] + [result]
        yield f"{a} {sign} {b} = {result}", numbers


def literal_result(numbers, rng):
    *_, (_, (result,)) = literal_game(numbers, rng)
    return result


def assert_chi_square(observed, expected, variances):
    """Fails at p < 0.001: sum (observed - expected)^2 / variance, the rare cells pooled (Wilson-Hilferty bound)."""
    rare = variances < 10
    cells = [np.append(x[~rare], x[rare].sum()) for x in (observed, expected, variances)]
    degrees = (cells[2] > 0).sum() - 1
    assert degrees >= 5, "too few cells to see a difference"
    bound = degrees * (1 - 2 / (9 * degrees) + 3.09 * np.sqrt(2 / (9 * degrees))) ** 3
    statistic = ((cells[0] - cells[1]) ** 2 / np.maximum(cells[2], 1e-9)).sum()
    assert statistic < bound, f"{degrees} degrees of freedom"


@pytest.mark.parametrize("numbers", [(2, 3, 4), (1, 5, 5), (3, 3, 8, 8), (1, 2, 7, 13)])
def test_enumerated_plays_have_the_distribution_of_the_simulated_ones(numbers, games=12_000):
    """Prevents targets of another difficulty than the post's: wrong weights of duplicate, illegal or ordered moves."""
    rng = random.Random(0)
    counts = Counter(literal_result(numbers, rng) for _ in range(games))
    distribution = play_distribution(numbers)
    assert counts.keys() <= distribution.keys() and sum(distribution.values()) == pytest.approx(1)
    expected = games * np.array(list(distribution.values()))
    assert_chi_square(np.array([counts[result] for result in distribution]), expected, expected)


def test_the_cache_of_plays_has_an_end_beyond_the_default_game():
    """Prevents gigabytes for --size 5 --highest 999, and 16,837 states that are enumerated again and again."""
    assert 16_837 <= play_distribution.cache_info().maxsize <= 10**5


@pytest.mark.parametrize("numbers", [(2, 3, 7), (2, 2, 3)])
def test_target_is_the_least_seen_of_the_literal_plays(numbers, plays=12, games=2_000):
    """Prevents a target drawn otherwise than by the post: the most seen, the least likely, or ties not at random."""
    rng, generator = random.Random(1), np.random.default_rng(1)

    def literal_rarest():
        counts = Counter(literal_result(numbers, rng) for _ in range(plays))
        return rng.choice([result for result, count in counts.items() if count == min(counts.values())])

    simulated = Counter(literal_rarest() for _ in range(games))
    drawn = Counter(countdown.rarest_result(numbers[::-1], generator, plays) for _ in range(games))
    results = sorted(simulated | drawn)
    simulated, drawn = (np.array([counts[result] for result in results]) for counts in (simulated, drawn))
    assert_chi_square(simulated, drawn, simulated + drawn)


def brute_force(numbers):
    """Every positive whole value of every expression over any subset, each subset split into two in every way."""
    values = {0: set()}
    for subset in range(1, 2 ** len(numbers)):
        values[subset] = {n for k, n in enumerate(numbers) if subset == 1 << k}
        for part in (part for part in range(1, subset) if part & subset == part):
            for a, b in product(values[part], values[subset ^ part]):
                results = (Fraction(a + b), Fraction(a - b), Fraction(a * b), Fraction(a, b))
                values[subset] |= {int(x) for x in results if x > 0 and x.denominator == 1}
    return set().union(*values.values())


@examples(25)
@given(GAMES)
@example((3, 3, 8, 8))
@example((13, 7, 12, 11))
def test_solver_finds_what_brute_force_finds_and_its_solutions_are_graded_correct(numbers):
    """Prevents solvable problems called unsolvable (and the reverse), and solutions that the verifier refuses."""
    solutions, expected = countdown.solve(numbers), brute_force(numbers)
    assert solutions.keys() == countdown.reachable(tuple(sorted(numbers))) == expected
    for value, expression in solutions.items():
        assert answer(expression, Problem(numbers, value)).correct, f"{value} = {expression}"
    assert all(countdown.solvable(numbers, target) == (target in expected) for target in range(-1, 40))


@examples(100)
@given(GAMES, st.integers())
def test_follow_keeps_up_with_any_legal_game(numbers, seed):
    """Prevents a critic measured against the wrong state: every legal step leads where the game went."""
    rng = random.Random(seed)
    for step, left in literal_game(numbers, rng):
        listed = " ".join(map(str, rng.sample(left, len(left))))
        for written in (step, step.replace(" ", ""), f"<step> {step} left {listed} </step>"):
            assert follow(numbers, written) == tuple(sorted(left))
        numbers = tuple(left)


@pytest.mark.parametrize(
    ("step", "left"),
    [
        ("3 * 4 = 12 left 12 5", (5, 12)),
        ("- 3*4=12", (5, 12)),
        ("2. 5 - 4 = 1", (1, 3)),
        ("3 * 4 = 12 left 5", None),
        ("3 * 4 = 12 left 5 5 12", None),
        ("3 * 4 = 12 left 5 13", None),
        ("3 + 4 = 8", None),
        ("3 * 6 = 18", None),
        ("4 * 4 = 16", None),
        ("3 - 4 = -1", None),
        ("3 - 4 = 1", None),
        ("5 / 4 = 1", None),
        ("5 / 0 = 0", None),
        ("3 + 4", None),
        ("", None),
        ("5 - 3 + 4 = 7", None),
        ("(5 - 3)*4 = 12", None),
        ("5 * 3 + 4 = 7 left 5 7", None),
        ("1.3 + 4 = 7", None),
        ("10000003 + 4 = 7", None),
        ("3 + 4 = 7000000000", None),
    ],
)
def test_follow_refuses_illegal_miscalculated_and_mislisted_steps(step, left):
    assert follow((5, 3, 4), step) == left


def test_follow_refuses_a_difference_of_zero_and_allows_a_pair_of_equal_numbers():
    assert follow((4, 4), "4 - 4 = 0") is None
    assert follow((4, 4), "4 / 4 = 1") == (1,)


# ------------------------------------------------------------------------------------------------ data sets


def test_default_splits_are_disjoint_distinct_and_as_hard_as_the_posts():
    """Prevents the original's leak (all test multisets were in the training set) and a drift of the difficulty."""
    splits = make_splits()
    train, validation, test = (splits[name] for name in ("train", "validation", "test"))
    assert (len(train), len(validation), len(test)) == (20_000, 200, 820)
    assert not multisets(test) & multisets(train)
    assert not multisets(validation) & (multisets(train) | multisets(test))
    assert len(set(train)) == 20_000
    assert len({(tuple(sorted(p.numbers)), p.target) for p in test}) == 820
    assert {n for p in train for n in p.numbers} == set(range(1, 14))
    assert all(countdown.solvable(p.numbers, p.target) for p in test[:50])
    low, median, high = np.quantile([p.target for p in train], [0.1, 0.5, 0.9])
    assert 6 <= low <= 8 and 38 <= median <= 50 and 130 <= high <= 160, "the post's test file: 7, 44, 142"


def test_a_seed_gives_one_data_set_and_never_moves_a_multiset_to_another_split():
    """Prevents runs that can't be repeated, seeds without effect, and a leak between runs of different seeds."""
    first, again, other = (make_splits(train=300, validation=30, test=60, plays=500, seed=s) for s in (0, 0, 1))
    assert first == again
    assert all(first[name] != other[name] for name in first)
    assert not multisets(first["test"]) & multisets(other["train"])
    assert not multisets(first["train"]) & multisets(other["test"])


def test_shares_of_the_splits_are_those_promised():
    counts = Counter(map(countdown.split_of, combinations_with_replacement(range(1, 14), 4)))
    assert {name: counts[name] / 1820 for name in counts} == pytest.approx(countdown.SHARES, abs=0.03)


def test_post_split_warns_of_its_leak():
    """Prevents numbers of the leaking data set being reported as if they were clean."""
    with pytest.warns(UserWarning, match="leaks"):
        splits = make_splits("post", train=2_000, validation=5, test=20, plays=50)
    assert [len(problems) for problems in splits.values()] == [2_000, 5, 20]
    assert len(multisets(splits["test"]) & multisets(splits["train"])) > 5


@pytest.mark.parametrize(("size", "count"), [(2, 10), (3, 40), (5, 3)])
def test_games_of_other_sizes_are_disjoint_and_solvable(size, count):
    train, test = (make_problems(count, split, size=size, highest=9, plays=500) for split in ("train", "test"))
    assert {len(p.numbers) for p in train + test} == {size}
    assert max(n for p in train + test for n in p.numbers) <= 9
    assert len(set(train)) == len(set(test)) == count and not multisets(train) & multisets(test)
    assert all(countdown.solvable(p.numbers, p.target) for p in test)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: make_problems(1, "train", size=6), "size must be from 2 to 5, not 6"),
        (lambda: make_problems(300, "test", size=2, highest=5, plays=20), "found only [0-9]+ distinct test problems"),
        (lambda: make_problems(1, "validation", size=2, highest=2), "found only 0 distinct validation problems"),
        (lambda: make_problems(1, "tset"), "split must be one of"),
        (lambda: make_problems(1, "test", seed=-1), "seed must be from 0"),
    ],
)
def test_impossible_requests_are_refused_instead_of_running_for_ever(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_problems_are_read_as_written(tmp_path):
    path = tmp_path / "problems.jsonl"
    path.write_text(
        '{"numbers": [3, 3, 8, 8], "target": 24}\n{"target": 5, "numbers": [2, 3], "note": "kept out"}\n',
        encoding="utf-8",
    )
    assert read_problems(path) == [Problem((3, 3, 8, 8), 24), Problem((2, 3), 5)]


@pytest.mark.parametrize(
    "line",
    [
        "x",
        "[]",
        '{"numbers": [1, 2]}',
        '{"target": 3}',
        '{"numbers": 12, "target": 3}',
        '{"numbers": "12", "target": 3}',
        '{"numbers": [1.5, 2], "target": 3}',
        '{"numbers": [true, 2], "target": 3}',
        '{"numbers": [1, 2], "target": 0}',
        '{"numbers": [1, -2], "target": 3}',
        '{"numbers": [1, 2], "target": null}',
    ],
)
def test_a_bad_line_of_a_data_file_is_named(tmp_path, line):
    """Prevents a long run from starting on a damaged file, and a search for the damage by hand."""
    path = tmp_path / "problems.jsonl"
    path.write_text(f'{{"numbers": [1, 2], "target": 3}}\n{line}\n', encoding="utf-8")
    with pytest.raises(ValueError, match="problems.jsonl, line 2: not a problem"):
        read_problems(path)


def test_make_data_writes_what_the_reader_reads(tmp_path, capsys):
    """Prevents files that evaluate.py can't read, or whose problems are not those of a training run."""
    sizes = {"train": 40, "validation": 5, "test": 10, "plays": 200, "seed": 3}
    make_data.main(make_data.DataConfig(out=tmp_path / "new" / "data", preview=2, **sizes))
    for name, problems in make_splits(**sizes).items():
        assert read_problems(tmp_path / "new" / "data" / f"{name}.jsonl") == problems
    printed = capsys.readouterr().out
    assert printed.count(" 0 of them in train") == 3
    solved = re.findall(r"\((.+)\) -> (\d+) = (.+)", printed)
    assert len(solved) == 2
    for numbers, target, solution in solved:
        assert answer(solution, Problem(tuple(json.loads(f"[{numbers}]")), int(target))).correct


@pytest.mark.parametrize("program", [["-m", "scripts.make_data"], ["scripts/make_data.py"]])
def test_make_data_runs_as_a_module_and_as_a_file(tmp_path, program):
    """Prevents the ModuleNotFoundError of a script in a folder of its own."""
    sizes = "--train 9 --validation 0 --test 2 --plays 50 --preview 1".split()
    command = [sys.executable, *program, "--out", str(tmp_path), *sizes]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, encoding="utf-8")
    assert (done.returncode, done.stderr) == (0, "") and len(done.stdout.splitlines()) == 4
    assert len(read_problems(tmp_path / "train.jsonl")) == 9


# ------------------------------------------------------------------------------------------------ prompt


@given(GAMES, st.integers(1, 9999))
def test_prompt_holds_all_numbers_in_order_and_the_target(numbers, target):
    """Prevents unsolvable tasks (a number or the target missing), and rules that the verifier does not follow."""
    system, user = countdown.prompt(Problem(numbers, target))
    assert (system["role"], user["role"]) == ("system", "user")
    assert [int(n) for n in re.findall("[0-9]+", user["content"])] == [*numbers, target]
    assert all(tag in system["content"] for tag in ("<step>", "</step>", "<answer>", "</answer>"))
    assert not verify(system["content"], Problem(numbers, target)).parsed, "the example answer must not count"


# ------------------------------------------------------------------------------------------------ verifier


@pytest.mark.parametrize(
    ("expression", "value"),
    [
        ("5*(2+3)", 1.0),
        ("\n 5 * ( 2\t+ 3 ) \n", 1.0),
        ("((5))*((2+3))", 1.0),
        ("10 + 5 * 3", 1.0),
        ("10*5/2", 1.0),
        ("10*3-5", 1.0),
        ("10*3-2", 1 - 2 * 3 / 25),
        ("10+5", 1 - 2 * 10 / 25),
        ("5", 1 - 2 * 20 / 25),
        ("10*5-2", 1 - 2 * 23 / 25),
        ("10*5", -1.0),
        ("10*5*3*2", -1.0),
    ],
)
def test_dense_reward_by_hand(expression, value):
    """Prevents a reward of another scale than the post's 1 - 2 min(|value - 25| / 25, 1)."""
    correct = value == 1
    assert answer(expression) == Reward(pytest.approx(value), correct, True, "correct" if correct else "wrong value")


@pytest.mark.parametrize(
    ("completion", "reason"),
    [
        ("", "no answer"),
        ("5*(2+3)", "no answer"),
        ("<answer>5*(2+3)", "no answer"),
        ("5*(2+3)</answer>", "no answer"),
        ("</answer>5*(2+3)<answer>", "no answer"),
        ("</answer><answer>5*(2+3)</answer>", "several answers"),
        ("<ANSWER>5*(2+3)</ANSWER>", "no answer"),
        ("<answer >5*(2+3)</answer>", "no answer"),
        ("<answer>5*(2+3)</answer>" + " " * 50_000, "too long"),
        ("<answer>5</answer><answer>5*(2+3)</answer>", "several answers"),
        ("<answer>5*(2+3)</answer> no: <answer>", "several answers"),
        ("<answer><answer>5*(2+3)</answer></answer>", "several answers"),
        ("<answer>5*(2+3)</answer></answer>", "several answers"),
        (f"<answer>5*(2+3){' ' * 194}</answer>", "expression too long"),
    ],
)
def test_completions_without_exactly_one_answer_are_refused(completion, reason):
    """Prevents a reward for guessing twice, for the prompt's example, or for an unfinished answer."""
    reward = -1.0 if reason in ("no answer", "too long") else -0.9
    assert verify(completion, FIVES) == Reward(reward, False, False, reason)


def test_the_longest_completion_and_expression_still_count():
    completion = f"<answer>5*(2+3){' ' * 193}</answer>"
    assert verify(completion + "x" * (50_000 - len(completion)), FIVES).correct


SYNTAX = """5**2 10//2 5.0*(2+3) .5 1_0 5e0 5E0 5j 0x5 05*(2+3) 0 0*5+10 00 -5 +5 5*-2 5*+2 10-(-5) 5+ *5 () 5() 5*()
(5)(2+3) 5(2+3) (2+3)5 (2)(3) 5*(2+3 5*(2+3)) )5( ( ) 5*(2+3)=25 25=5*(2+3) 5*(2+3); 5*[2+3] 5×(2+3) 10÷2 5−2 10%3 2^3
5,2 ５*(2+3) ٥*(2+3) 5² Ⅴ 5*(2+3)<br> a 5*x None __import__('os') exec('1')""".split()


SYNTAX += ["", " ", "5*(2+3)\0", "5*\u00a0(2+3)", "5*(2+3)\r", "\ud800", "5 <step>"]
SYNTAX += ["1 0+5*3", "1\u0660+5*3", "5 2", "5 * (2 + 3"]


@pytest.mark.parametrize("expression", SYNTAX)
def test_anything_but_whole_numbers_and_four_operators_is_a_syntax_error(expression):
    """Prevents what other graders let pass: powers, decimals, 1_5, 5e3, signs, foreign digits, code."""
    assert answer(expression) == answer(expression, strict=False) == Reward(-0.9, False, False, "syntax")


@pytest.mark.parametrize("expression", ["25", "5*5", "5+5+10", "2+3+4", "50-25", "52", "9" * 199, "11111*2"])
def test_numbers_that_were_not_given_or_are_used_twice_are_refused(expression):
    assert answer(expression) == answer(expression, strict=False) == Reward(-0.9, False, False, "numbers")


def test_a_number_given_twice_may_be_used_twice_but_not_three_times():
    assert answer("5*5", Problem((5, 2, 5), 25)).correct
    assert answer("5*5*5", Problem((5, 2, 5), 125)).reason == "numbers"


def test_a_given_number_may_have_any_length():
    """Prevents a right answer refused for its ten digits."""
    assert answer("10000000000", Problem((10**10,), 10**10)).correct


@pytest.mark.parametrize(
    ("expression", "numbers", "target", "strict", "loose"),
    [
        ("8/(3-8/3)", (3, 3, 8, 8), 24, "intermediate", "correct"),
        ("2-3+10", (2, 3, 10), 9, "intermediate", "correct"),
        ("10/(3-2-1)", (1, 2, 3, 10), 10, "intermediate", "division by zero"),
        ("10*(3-3)+7", (3, 3, 7, 10), 7, "intermediate", "correct"),
        ("10/3", (3, 10), 3, "intermediate", "wrong value"),
        ("10/3*3", (3, 3, 10), 10, "intermediate", "correct"),
        ("3*10/3", (3, 3, 10), 10, "correct", "correct"),
        ("12/6/2", (2, 6, 12), 1, "correct", "correct"),
        ("9-5-3", (3, 5, 9), 1, "correct", "correct"),
    ],
)
def test_strict_grading_wants_positive_whole_intermediates_and_loose_grading_any(
    expression, numbers, target, strict, loose
):
    """Prevents a reward for steps that the prompt forbids, and keeps the post's looser rule at hand."""
    problem = Problem(numbers, target)
    assert (answer(expression, problem).reason, answer(expression, problem, False).reason) == (strict, loose)


def test_loose_reward_of_a_fraction_and_of_a_negative_value():
    assert answer("10/3", Problem((3, 10), 3), strict=False).value == pytest.approx(1 - 2 / 9)
    assert answer("3-10", Problem((3, 10), 7), strict=False).value == -1


def test_a_near_miss_of_a_huge_target_is_not_rounded_up_to_the_full_reward():
    """Prevents value == 1 for a wrong answer where 1 - 2e-17 rounds to 1."""
    numbers = (999_999_999, 999_999_998)
    reward = answer("999999999*999999998", Problem(numbers, numbers[0] * numbers[1] + 1))
    assert not reward.correct and 0.999 < reward.value < 1


NINES = Problem((999_999_999,) * 20, 1)
ADVERSARIAL = {
    "opening parentheses": "<answer>" + "(" * 200 + "</answer>",
    "closing parentheses": "<answer>" + ")" * 200 + "</answer>",
    "deep nesting": "<answer>" + "(" * 99 + "5" + ")" * 99 + "</answer>",
    "deep nesting after operators": "<answer>" + "2+3*" + "(" * 97 + "5" + ")" * 97 + "</answer>",
    "many operators": "<answer>" + "5+" * 100 + "</answer>",
    "many signs": "<answer>" + "-" * 200 + "</answer>",
    "200 digits": "<answer>" + "9" * 200 + "</answer>",
    "200 zeros": "<answer>" + "0" * 200 + "</answer>",
    "spaces": "<answer>" + "5" + " " * 198 + "x" + "</answer>",
    "long products": "<answer>" + "*".join(["999999999"] * 20) + "</answer>",
    "long quotients": "<answer>" + "/".join(["999999999"] * 20) + "</answer>",
    "a million characters": "<answer>" + "5" * 10**6 + "</answer>",
    "a long text": "5" * 49_900 + "<answer>5</answer>",
    "a long expression": "<answer>" + "(" * 49_900 + "</answer>",
    "thousands of tags": "<answer>" * 6_000,
    "thousands of pairs": "<answer></answer>" * 2_900,
    "thousands of near tags": "<answer" * 7_000,
    "thousands of closing tags": "<answer>" + "</answer>" * 5_500,
}


@pytest.mark.parametrize("completion", ADVERSARIAL.values(), ids=ADVERSARIAL.keys())
def test_hostile_completions_are_graded_in_a_millisecond(completion):
    """Prevents a policy that learns to stall the trainer, a RecursionError, and numbers without bound."""
    seconds = []
    for _ in range(5):
        start = time.thread_time()
        rewards = [verify(completion, problem, strict) for problem in (FIVES, NINES) for strict in (True, False)]
        seconds.append((time.thread_time() - start) / len(rewards))
    assert min(seconds) < 1e-3
    assert all(-1 <= reward.value < 1 for reward in rewards)


def test_the_deepest_expression_has_a_value():
    """Prevents a recursion limit that refuses a legal answer."""
    assert answer("(" * 99 + "5" + ")" * 99, Problem((5,), 5)).correct
