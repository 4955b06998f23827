"""Tests of sampling.py, runtime/torch_sampler.py, beams.py and cache.py: what is drawn and what it cost.

Distributions are compared with softmax by chi-square, tokens with transformers' own generate. Log-probabilities and
stops are in test_samplers.py.
"""

import math
import shutil

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close
from transformers import AutoModelForCausalLM, MistralConfig

from runtime.beams import Beams, Draws
from runtime.cache import merge_rows
from runtime.loading import load_policy
from runtime.torch_sampler import TorchSampler, inverse_cdf
from sampling import SamplingParams, Usage, complete, shared_rows, stream

PREFIXES = [[5, 9, 9, 40, 2], [7], [11, 12, 0, 8, 99, 100, 3, 4], [60, 61], [42]]
SEEDS = [3, 1, 4, 1, 5]
END, STEP_END = 1, 6  # <|end|> and </step>
SHAPE = (
    "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads eos_token_id "
    "pad_token_id bos_token_id max_position_embeddings tie_word_embeddings"
).split()
LOGITS = st.lists(st.floats(-30, 5), min_size=1, max_size=12)


def draw(policy, prefixes=PREFIXES, seeds=SEEDS, batch=1024, n=3, max_tokens=12, stop_at_step=True, **settings):
    params = SamplingParams(n, max_tokens, stop_at_step=stop_at_step, **settings)
    return TorchSampler(policy, batch).sample(prefixes, seeds, params)


@pytest.fixture
def stopping(moved, monkeypatch):
    """The policy with some 5 % of probability for each of <|end|> and </step>, so that all ends are seen."""
    plain, bonus = moved.head, torch.zeros(285)
    bonus[[END, STEP_END]] = 3.0
    monkeypatch.setattr(moved, "head", lambda hidden: plain(hidden) + bonus)
    assert moved.tokenizer.convert_tokens_to_ids(["<|end|>", "</step>"]) == [END, STEP_END]
    return moved


@pytest.fixture
def forward_passes(moved, monkeypatch):
    """The shape [rows, tokens] of every call of the backbone."""
    shapes, plain = [], moved.hidden

    def hidden(ids, *rest, **cache):
        shapes.append(tuple(ids.shape))
        return plain(ids, *rest, **cache)

    monkeypatch.setattr(moved, "hidden", hidden)
    return shapes


def assert_distribution(tokens, probabilities):
    """Pearson's chi-square of the draws, in cells of about 10 or more, within five deviations of its mean."""
    expected = np.asarray(probabilities) * len(tokens)
    observed = np.bincount(tokens, minlength=len(expected))
    order = np.argsort(expected)
    cells = (np.cumsum(expected[order]) / 10).astype(int)
    observed, expected = np.bincount(cells, observed[order]), np.bincount(cells, expected[order])
    assert not observed[expected == 0].any()
    freedom = (expected > 0).sum() - 1
    chi_square = ((observed - expected) ** 2 / np.maximum(expected, 1e-9)).sum()
    assert freedom > 3 and abs(chi_square - freedom) < 5 * math.sqrt(2 * freedom)


# ------------------------------------------------------------------------------------------------ one token


@settings(max_examples=300)
@given(LOGITS, st.floats(0, 1, exclude_max=True) | st.sampled_from([0.0, 1 - 2**-53]))
def test_inverse_cdf_is_the_first_token_whose_cumulative_probability_exceeds_u(logits, u):
    """Prevents an index past the vocabulary, and a token of probability zero, at the edges u = 0 and u -> 1."""
    logprobs = torch.log_softmax(torch.tensor([logits]), -1)
    token = int(inverse_cdf(logprobs, torch.tensor([u], dtype=torch.float64)))
    probabilities = [math.exp(x) for x in logprobs[0].tolist()]
    total = math.fsum(probabilities)
    below, above = math.fsum(probabilities[:token]) / total, math.fsum(probabilities[: token + 1]) / total
    assert below - 1e-12 <= u <= above + 1e-12 and probabilities[token] > 0


def test_tokens_of_probability_zero_are_never_drawn():
    """Prevents masked tokens at the first and last index from being drawn at u = 0 and u -> 1."""
    logprobs = torch.tensor([[-math.inf, math.log(0.5), -math.inf, math.log(0.5), -math.inf]]).repeat(4, 1)
    uniform = torch.tensor([0.0, 0.49, 0.5, 1 - 2**-53], dtype=torch.float64)
    for rest in (0, 800):  # however little is left where likelier ones were drawn before
        assert inverse_cdf(logprobs - rest, uniform).tolist() == [1, 1, 3, 3]


def test_a_cold_sampler_is_greedy_decoding_of_transformers(moved):
    """Prevents a KV cache, positions or a mask that go wrong after the first token."""
    rows, _ = draw(moved, n=1, max_tokens=20, temperature=1e-6, stop_at_step=False)
    for prefix, (sample,) in zip(PREFIXES, rows, strict=True):
        ids = torch.tensor([prefix])
        greedy = moved.lm.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=20
        )
        assert sample.tokens == greedy[0, len(prefix) :].tolist()


# ------------------------------------------------------------------------------------------------ without replacement


@pytest.fixture
def few(moved, monkeypatch):
    """The policy with three tokens alone, one of which is <|end|>; and the probabilities of all that it can write after
    a prefix in three tokens, by transformers."""
    plain, mask = moved.head, torch.full((285,), -math.inf)
    mask[[END, 7, 9]] = torch.tensor([1.0, 0.0, 0.5])
    monkeypatch.setattr(moved, "head", lambda hidden: plain(hidden) + mask)

    def enumerate_all(prefix, tokens=(), logp=0.0):
        if len(tokens) == 3 or (tokens and tokens[-1] == END):
            return {tokens: logp}
        with torch.no_grad():
            logits = moved.lm(input_ids=torch.tensor([[*prefix, *tokens]])).logits[0, -1] + mask
        logps, found = torch.log_softmax(logits.double(), -1), {}
        for token in (END, 7, 9):
            found |= enumerate_all(prefix, (*tokens, token), logp + float(logps[token]))
        return found

    return moved, enumerate_all


def test_distinct_samples_are_drawn_without_replacement(few):
    """Prevents siblings that are the same, or whose odds are not those of one draw after another with what was drawn
    taken out: a Gumbel that is not truncated, a score that is handed to the wrong token, rows mixed up in copying."""
    policy, enumerate_all = few
    odds = {tokens: math.exp(logp) for tokens, logp in enumerate_all([5, 9, 40]).items()}
    names, p = list(odds), np.array(list(odds.values()))
    assert len(names) == 15 and p.sum() == pytest.approx(1)
    second = np.array([(p * p[b] / (1 - p)).sum() - p[b] ** 2 / (1 - p[b]) for b in range(len(p))])
    rows, _ = draw(policy, [[5, 9, 40]] * 4_000, range(4_000), max_tokens=3, cutoff=0)
    drawn = [[names.index(tuple(s.tokens)) for s in row] for row in rows]
    assert all(len(set(row)) == 3 for row in drawn)
    for place, expected in enumerate((p, second)):
        assert_distribution([row[place] for row in drawn], expected / expected.sum())
    for row in rows[:200]:
        for s in row:
            assert sum(s.logprobs) == pytest.approx(math.log(odds[tuple(s.tokens)]), abs=1e-4)
            assert s.ended == ("end" if s.tokens[-1] == END else "length")


def test_there_are_fewer_distinct_samples_where_there_are_not_more(few):
    """Prevents the same step twice, or an empty one, where a policy has no more to say, and steps less likely than the
    cutoff allows."""
    policy, enumerate_all = few
    rows, usage = draw(policy, [[5, 9, 40], [7]], [0, 1], n=20, max_tokens=3, cutoff=0)
    assert [{tuple(s.tokens) for s in row} for row in rows] == [set(enumerate_all(p)) for p in ([5, 9, 40], [7])]
    assert [len(row) for row in rows] == [15, 15]
    drawn = {(i, *s.tokens[: t + 1]) for i, row in enumerate(rows) for s in row for t in range(len(s.tokens))}
    assert usage.generated == len(drawn)  # what they have in common once
    for row in draw(policy, [[5, 9, 40]] * 100, range(100), n=20, max_tokens=3, cutoff=0.3)[0]:
        likely = [sum(s.logprobs) for s in row]
        assert min(likely) >= max(likely) + math.log(0.3)
        assert 0 < len({tuple(s.tokens) for s in row}) == len(row) < 15


def test_what_the_cutoff_has_dropped_is_compared_with_nothing_later():
    """Prevents a node without children: one of two branches splits into twelve and is dropped; then the other one
    splits too, and would be dropped for being less likely than one of the twelve was."""
    beams, alive, alive_then = Beams(1, 2, 0.3, "cpu"), torch.tensor([0]), []
    for drawn in ([[0.55, 0.45]], [[1.0, 1e-9], [1 / 12, 1 / 12]], [[0.01, 0.01]]):
        p = torch.tensor(drawn, dtype=torch.float64)  # [s, 2]
        log_mass = torch.stack([torch.ones(len(p)), 1 - p[:, 0].clamp(max=1 - 1e-9)], 1).log()
        draws = Draws(torch.zeros_like(p, dtype=torch.long), p.log(), log_mass)
        alive = beams.choose(alive, draws, torch.full_like(p, 0.5)).alive
        alive_then.append(len(alive))
    assert alive_then == [2, 1, 2]


# ------------------------------------------------------------------------------------------------ the batch around it


def assert_same_draws(one, other):
    for row, copy in zip(one, other, strict=True):
        assert [(s.tokens, s.ended) for s in row] == [(s.tokens, s.ended) for s in copy]
        for s, c in zip(row, copy):
            assert_close(s.logprobs, c.logprobs, atol=1e-4, rtol=0)


@settings(max_examples=10)
@given(
    st.permutations(range(5)), st.integers(1, 5), st.sampled_from([1, 4, 6, 1024]), st.sampled_from([None, 0, 0.01])
)  # fmt: skip
def test_draws_of_a_prefix_depend_on_its_seed_alone(stopping, order, size, batch, cutoff):
    """Prevents results that change with the number of workers, the order of problems or the memory of a machine."""
    everything, _ = draw(stopping, cutoff=cutoff)
    subset = order[:size]
    prefixes, seeds = [PREFIXES[i] for i in subset], [SEEDS[i] for i in subset]
    drawn, _ = draw(stopping, prefixes, seeds, batch, cutoff=cutoff)
    assert_same_draws(drawn, [everything[i] for i in subset])


# ------------------------------------------------------------------------------------------------ cost


def test_siblings_share_what_they_have_in_common_and_ended_rows_leave_the_batch(stopping, forward_passes):
    """Prevents prefixes and first tokens computed again for every child, and work on samples that have ended."""
    rows, usage = draw(stopping, n=6)
    samples = [s for row in rows for s in row]
    written = [(i, s.tokens) for i, row in enumerate(rows) for s in row]
    decoded = [len({(i, *tokens[:t]) for i, tokens in written if len(tokens) > t}) for t in range(1, 12)]
    assert sum(decoded) < sum(len(s.tokens) - 1 for s in samples)
    assert forward_passes == [(5, 8), *((rows, 1) for rows in decoded if rows)]
    assert (usage.generated, usage.prefilled) == (sum(len(s.tokens) for s in samples), sum(map(len, PREFIXES)))
    assert usage.decoded == sum(decoded) == sum(shared_rows([s.tokens for s in row]) for row in rows)
    assert usage.seconds > 0


@pytest.mark.parametrize("cutoff", [None, 0, 0.05])
def test_decoded_counts_the_rows_that_the_model_ran(stopping, forward_passes, cutoff):
    """Prevents a comparison by a count that charges independent samples for beginnings that they share: what is decoded
    is what went through the model one token at a time, also for distinct samples that were dropped on the way."""
    rows, usage = draw(stopping, n=6, cutoff=cutoff)
    assert usage.decoded == sum(count for count, length in forward_passes[1:]) > 0
    assert all(length == 1 for _, length in forward_passes[1:])
    assert usage.decoded >= sum(shared_rows([s.tokens for s in row]) for row in rows)
    assert usage.decoded < usage.generated


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 2)), min_size=1, max_size=20))
def test_samples_share_a_row_as_long_as_they_are_equal(pairs):
    """Prevents a sample that reads another's states, a row copied after it was overwritten, and rows without use."""
    old, drawn = (torch.tensor(column) for column in zip(*pairs))
    source, ids, row = (column.tolist() for column in merge_rows(old, drawn))
    pair_of = {}  # new row -> old row and token
    for pair, new in zip(pairs, row, strict=True):
        assert pair_of.setdefault(new, pair) == pair
    assert sorted(pair_of) == list(range(len(set(pairs)))) == list(range(len(source)))
    for new, pair in enumerate(zip(source, ids, strict=True)):
        assert pair_of[new] == pair
    stay = {new for new, parent in enumerate(source) if new == parent}
    assert stay == {parent for parent in source if parent < len(source)}  # no copy where none is needed
    moved = set(range(len(source))) - stay
    assert not {source[new] for new in moved} & moved


def search_waves(sampler, n=6, cutoff=None):
    """Three waves of a search: from the second on, of the steps that go on. Returns states, samples and usages."""
    states, waves = [list(prefix) for prefix in PREFIXES], []
    for wave in range(3):
        seeds = [1 + 100 * wave + i for i in range(len(states))]
        rows, usage = sampler.sample(states, seeds, SamplingParams(n, 6, stop_at_step=True, cutoff=cutoff))
        waves.append((states, rows, usage))
        states = [state + s.tokens for state, row in zip(states, rows) for s in row[:2] if s.ended != "end"]
    return waves


@pytest.mark.parametrize("cutoff", [None, 0, 0.01], ids=["independent", "distinct", "cutoff"])
def test_a_search_runs_each_token_once_and_draws_what_it_would_without_a_cache(stopping, cutoff):
    """Prevents prefixes run again for every wave, and states inherited from another sequence, position or column."""
    samplers = TorchSampler(stopping), TorchSampler(stopping, kept=0)
    searches = [search_waves(sampler, cutoff=cutoff) for sampler in samplers]
    for wave, (one, other) in enumerate(zip(*searches)):
        (states, rows, usage), (_, again, plain) = one, other
        assert_same_draws(rows, again)
        assert len({len(state) for state in states}) > 2 and plain.prefilled == sum(map(len, states))
        assert usage.prefilled == (plain.prefilled if wave == 0 else len(states))


def test_the_critic_reads_nothing_that_the_sampler_has_read(stopping):
    """Prevents a second pass over every state, and values of other states or weights than asked for."""
    sampler = TorchSampler(stopping)
    states, _, _ = search_waves(sampler)[-1]
    values, usage = sampler.values(states[::-1])
    assert usage.valued == 0 and len(set(values)) > 3
    assert_close(values, stopping.values(states[::-1]), atol=1e-5, rtol=0)
    values, usage = sampler.values([*states, [9, 9]])
    assert_close(values, stopping.values([*states, [9, 9]]))
    assert usage.valued == sum(map(len, states)) + 2
    stopping.version += 1
    assert sampler.values(states)[1].valued == sum(map(len, states))


def test_what_was_kept_is_forgotten_with_its_weights_and_when_it_is_too_much(stopping):
    """Prevents keys and values of old weights, and a cache that outgrows its memory or fails when it is full."""
    sampler = TorchSampler(stopping, kept=60)
    bare = search_waves(TorchSampler(stopping, kept=0))
    for wave, (_, rows, _) in enumerate(search_waves(sampler)):
        assert_same_draws(rows, bare[wave][1])
        assert sampler.pool.used <= 60
    assert sampler.pool.full
    sampler = TorchSampler(stopping)
    (states, rows, _), *_ = search_waves(sampler)
    with torch.no_grad():
        stopping.lm.get_input_embeddings().weight[5:].mul_(1.5)
    stopping.version += 1
    params = SamplingParams(6, 6, stop_at_step=True)
    again, usage = sampler.sample(states, [1, 2, 3, 4, 5], params)
    fresh, _ = TorchSampler(stopping).sample(states, [1, 2, 3, 4, 5], params)
    assert_same_draws(again, fresh)
    assert usage.prefilled == sum(map(len, states)) and [s.tokens for s in again[0]] != [s.tokens for s in rows[0]]
    sampler.rest()
    assert not sampler.pool.layers and sampler.pool.used == 0 and not sampler.states


def test_what_the_critic_will_need_is_all_that_is_kept_of_a_prefill(stopping):
    """Prevents the hidden states of all prefix tokens, of which only the last ones are read, from staying in memory."""
    sampler = TorchSampler(stopping)
    sampler.sample(PREFIXES, SEEDS, SamplingParams(2, 4, stop_at_step=True))
    storages = [state.untyped_storage() for state in sampler.states.values()]
    sizes = {storage.data_ptr(): storage.nbytes() for storage in storages}
    assert sum(sizes.values()) == len(PREFIXES) * stopping.lm.config.hidden_size * 4


def test_identical_siblings_are_kept_once(moved):
    """Prevents a cache that fills with copies: a sure policy writes the same step many times."""
    sampler = TorchSampler(moved)
    rows, _ = sampler.sample([[7]], [0], SamplingParams(8, 4, 1e-6, stop_at_step=True))
    assert len({tuple(s.tokens) for s in rows[0]}) == 1 and sampler.pool.used == 1 + 3


def test_sliding_windows_are_those_of_transformers(checkpoint, tmp_path):
    """Prevents attention to tokens that have left the window, or none to some inside it."""
    plain = AutoModelForCausalLM.from_pretrained(checkpoint).config.to_dict()
    shape = MistralConfig(**{key: plain[key] for key in SHAPE}, sliding_window=5)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(shape)
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    shutil.copytree(checkpoint, tmp_path / "sliding")
    model.save_pretrained(tmp_path / "sliding")
    policy = load_policy(tmp_path / "sliding", train=False)
    for states, rows, _ in search_waves(TorchSampler(policy), n=2):
        for prefix, sample in ((prefix, s) for prefix, row in zip(states, rows) for s in row):
            with torch.no_grad():
                logits = policy.lm(input_ids=torch.tensor([prefix + sample.tokens]), use_cache=False).logits[0]
            expected = torch.log_softmax(logits[len(prefix) - 1 : -1], -1).gather(-1, torch.tensor([sample.tokens]).T)
            assert_close(torch.tensor(sample.logprobs), expected[:, 0], atol=1e-4, rtol=0)


def test_usage_adds_up():
    """Prevents curves at equal compute from a count that is lost."""
    assert Usage(1, 20, 0.5, 7, 2.0) + Usage(2, 30, 0.25, 8, 0.5) == Usage(3, 50, 0.75, 15, 2.5)


# ------------------------------------------------------------------------------------------------ records


def test_streams_are_the_same_everywhere_and_differ_by_key():
    """Prevents seeds that change between processes or machines (pinned values), and shared randomness."""
    assert (stream(0), stream(0, 1), stream(1, 0)) == (7896617691693857887, 2918264622725855778, 3717377837946358015)
    assert len({stream(a, b) for a in range(30) for b in range(30)}) == 900


def test_completions_are_graded_with_their_own_problem(policy, fake_sampler, problems):
    """Prevents rewards of a neighbour's problem, and a trajectory with another prompt or without log-probabilities."""
    right = policy.tokenizer("<answer> 2 + 3 </answer> <|end|>")["input_ids"]
    sampler = fake_sampler(lambda prefix: [(right, 1.0, "end")])
    rows, usage = complete(policy, sampler, problems, SEEDS[:4], SamplingParams(2, 64), policy.grade)
    assert [[t.reward.reason for t in row] for row in rows] == [
        ["correct"] * 2, ["wrong value"] * 2, ["numbers"] * 2, ["numbers"] * 2
    ]  # fmt: skip
    for problem, row in zip(problems, rows):
        for t in row:
            assert (t.problem, t.prompt, t.completion) == (problem, policy.encode(problem), right)
            assert (t.advantages, len(t.logprobs)) == (None, len(right))
    assert usage.generated == 8 * len(right)
