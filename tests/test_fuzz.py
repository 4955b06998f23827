"""Tests of the verifier on hostile answers: a short run of tests/fuzz.py, and properties of any answer there is."""

import re
from functools import partial
from random import Random

import pytest
from fuzz import KINDS, agree, fuzz, judge
from hypothesis import given, settings
from hypothesis import strategies as st

import countdown
from countdown import Problem, verify

TRIES = settings(max_examples=300)
FIVES = Problem((2, 3, 5, 10), 25)
PIECES = ["<answer>", "</answer>", "<answer>5*(2+3)</answer>", "10", "\n", *"235+-*/() "]
TEXTS = st.lists(st.sampled_from(PIECES) | st.text(max_size=5), max_size=20).map("".join)
TAGGED = st.lists(st.sampled_from(PIECES[3:]), max_size=12).map(lambda words: f"<answer>{''.join(words)}</answer>")
MADE = st.builds(lambda kind, seed: KINDS[kind](Random(seed)), st.sampled_from(list(KINDS)), st.integers(0, 2**32))
CASES = MADE | st.tuples(TEXTS | TAGGED, st.just(FIVES))


@pytest.mark.parametrize("kind", KINDS)
def test_verifier_and_oracle_agree_on_hostile_answers(kind):
    """Prevents false accepts, false rejects, exceptions and stalls, and a fuzzer that makes only wrong answers."""
    row = fuzz(kind, 400, seed=0)
    assert row.answers == 400 and not row.disagreements and row.worst < 1e-3
    assert row.accepts == {"right": 400, "repeated": 0}.get(kind, row.accepts)
    assert 0 < row.accepts < 400 or kind in ("right", "repeated")


@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        ("PRECEDENCE", dict.fromkeys("+-*/", 1)),
        ("TOKEN", re.compile(r"\s*([1-9]\d*|[-+*/()])")),
        ("MAX_EXPRESSION", 201),
        ("MAX_COMPLETION", 49_999),
        ("apply", partial(countdown.apply, strict=False)),
    ],
)
def test_the_fuzzer_finds_a_planted_fault(monkeypatch, name, wrong):
    """Prevents a run without disagreements because the oracle errs alike, or no answer reaches the rule."""
    monkeypatch.setattr(countdown, name, wrong)
    assert any(fuzz(kind, 1_000, seed=0).disagreements for kind in KINDS)


@TRIES
@given(CASES, st.booleans())
def test_verifier_and_oracle_agree_on_any_answer(case, strict):
    """Prevents what the fuzzer's authors did not think of; hypothesis shortens what it finds."""
    assert agree(verify(*case, strict), judge(*case, strict))


@TRIES
@given(CASES, st.booleans())
def test_a_reward_fits_its_verdict(case, strict):
    """Prevents a reward out of range, or one that says another thing than its verdict or its reason."""
    reward = verify(*case, strict)
    assert -1 <= reward.value <= 1
    assert reward.correct == (reward.value == 1.0) == (reward.reason == "correct")
    assert reward.parsed == (reward.reason in ("correct", "wrong value"))
    assert reward.parsed or reward.value == (-1 if reward.reason in ("no answer", "too long") else -0.9)


@TRIES
@given(CASES, st.randoms(use_true_random=False), st.booleans())
def test_the_order_of_the_numbers_does_not_matter(case, rng, strict):
    """Prevents a grade that depends on how a problem was shown."""
    completion, problem = case
    shuffled = Problem(tuple(rng.sample(problem.numbers, len(problem.numbers))), problem.target)
    assert verify(completion, problem, strict) == verify(completion, shuffled, strict)
