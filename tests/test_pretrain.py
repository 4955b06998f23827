"""Tests of pretrain.py: the tokenizer loses nothing, the games are legal and leak-free, a stopped training goes on."""

import random
import re
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from countdown import Problem, follow, play_distribution, split_of, verify
from experiments import pretrain as module
from experiments.pretrain import PretrainConfig, build_tokenizer, encode_games, games, pretrain, write_game
from runtime.loading import load_policy

WORDS = ["Numbers:", "Target:", "left", "<step>", "</step>", "<answer>", "</answer>", *"+-*/()="]
CONFIGS = st.builds(
    PretrainConfig, seed=st.integers(0, 99), size=st.integers(2, 4), highest=st.integers(3, 9), batch=st.just(6)
)


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer()


# ------------------------------------------------------------------------------------------------ tokenizer


@settings(max_examples=200)
@given(st.lists(st.integers(0, 10**5).map(str) | st.sampled_from(WORDS), min_size=1, max_size=30))
def test_text_comes_back_from_its_tokens(tokenizer, words):
    """Prevents numbers that are cut, merged or unknown, and tags that vanish before they are graded."""
    ids = tokenizer(" ".join(words))["input_ids"]
    assert tokenizer.decode(ids, skip_special_tokens=True) == " ".join(words)
    assert tokenizer.unk_token_id not in ids


def test_every_integer_comes_back_from_its_tokens(tokenizer):
    """Prevents a number, just one, that the policy can't read or write; up to 255 it is a single token."""
    numbers = list(map(str, range(100_001)))
    ids = tokenizer(numbers)["input_ids"]
    assert tokenizer.batch_decode(ids) == numbers
    assert {len(row) for row in ids[:256]} == {1} and tokenizer.tokenize("468") == ["46", "##8"]


def test_spaces_around_operators_are_optional(tokenizer):
    """Prevents unknown tokens in an expression written without spaces."""
    assert tokenizer("(2+13)*400/5-1=")["input_ids"] == tokenizer("( 2 + 13 ) * 400 / 5 - 1 =")["input_ids"]


# ------------------------------------------------------------------------------------------------ games


@settings(max_examples=40)
@given(CONFIGS, st.integers(0, 9))
def test_games_are_legal_solved_in_the_asked_format_and_leak_nothing(tokenizer, config, step):
    """Prevents a policy that learns illegal steps, wrong arithmetic or a problem of the test split."""
    for problem, text in games(config, step):
        assert split_of(problem.numbers) == "train"
        assert len(problem.numbers) == config.size and max(problem.numbers) <= config.highest
        state = problem.numbers
        steps = re.findall(r"<step> (.+?) </step>", text)
        for line in steps:
            state = follow(state, line)
            assert state is not None and line.endswith(f"left {' '.join(map(str, state))}")
        assert len(steps) == config.size - 1 and len(state) == 1 and state[0] <= config.largest_result
        assert verify(text, Problem(problem.numbers, state[0])).correct
        assert sorted(map(int, re.findall("[0-9]+", text.partition("<answer>")[2]))) == sorted(problem.numbers)
        assert tokenizer.unk_token_id not in tokenizer(text)["input_ids"]


@settings(max_examples=60)
@given(st.lists(st.integers(1, 13), min_size=2, max_size=4).map(tuple), st.integers(0, 2**32))
def test_a_game_ends_at_the_result_it_is_conditioned_on(numbers, seed):
    """Prevents a posterior over moves that does not lead to its result, however rare that is."""
    rng = random.Random(seed)
    result = rng.choice(list(play_distribution(tuple(sorted(numbers)))))
    assert verify(write_game(numbers, result, rng), Problem(numbers, result)).correct


def test_moves_follow_the_exact_posterior():
    """Prevents games of one kind: 2, 3, 4 -> 24 by hand. The first move is 2 * 3, 2 * 4 or 3 * 4 and leaves 4 6, 3 8
    or 2 12, which have 5, 5 and 6 moves, 2 of them to 24."""
    rng = random.Random(0)
    firsts = [write_game((2, 3, 4), 24, rng)[7:12] for _ in range(3_000)]
    weights = {"3 * 2": 2 / 5, "4 * 2": 2 / 5, "4 * 3": 2 / 6}
    for move, weight in weights.items():
        assert firsts.count(move) / 3_000 == pytest.approx(weight / sum(weights.values()), abs=0.03)


def test_the_batch_of_a_step_is_a_function_of_seed_and_step():
    """Prevents a resumed run that sees other games, and steps or seeds that see the same."""
    config = PretrainConfig(batch=5, size=3)
    assert games(config, 3) == games(config, 3)
    assert games(config, 3) != games(config, 4) != games(replace(config, seed=1), 4)


@pytest.mark.parametrize(("share", "low", "high"), [(0.0, 0.0, 0.1), (0.4, 0.35, 0.5), (1.0, 1.0, 1.0)])
def test_the_share_of_games_on_target_is_the_one_asked_for(share, low, high):
    """Prevents a policy that knows more or less before any search than --on-target says."""
    config = PretrainConfig(batch=1_000, highest=7, on_target=share, early_on_target=1 - share, steps=10)
    for step, expected in ((3, (low, high)), (2, (1 - high, 1 - low + 0.1))):
        found = sum(verify(text, problem).correct for problem, text in games(config, step)) / 1_000
        assert expected[0] <= found <= expected[1]


@pytest.mark.parametrize(("rarity", "rare"), [(1.0, 1 / 5), (0.5, 1 / (1 + 2 * 2**0.5)), (0.0, 1 / 3)])
def test_rare_results_are_drawn_as_often_as_asked(rarity, rare):
    """Prevents targets of random play only: 2 3 gives 5, 6 and 1 with probabilities 0.4, 0.4 and 0.2."""
    config = PretrainConfig(batch=3_000, size=2, highest=4, rarity=rarity)
    results = [
        text.split("= ")[1].split()[0] for problem, text in games(config, 0) if sorted(problem.numbers) == [2, 3]
    ]
    assert results.count("1") / len(results) == pytest.approx(rare, abs=0.05)


# ------------------------------------------------------------------------------------------------ training


def test_labels_are_the_completion_and_its_end_as_the_policy_will_see_them(tokenizer, policy):
    """Prevents a policy trained to write prompts or padding, never to stop, or on prompts other than `encode` makes;
    a game that does not fit is left out whole."""
    batch = games(PretrainConfig(batch=40), 0)
    lengths = [len(policy.encode(p)) + len(tokenizer(text)["input_ids"]) + 1 for p, text in batch]
    width = sorted(lengths)[-4]
    ids, labels = encode_games(batch, tokenizer, width)
    assert ids.shape == labels.shape == (40, width)
    for row, label, (problem, text), length in zip(ids.tolist(), labels.tolist(), batch, lengths):
        if length > width:
            assert set(row) == {tokenizer.pad_token_id} and set(label) == {-100}
            continue
        start, end = policy.encode(problem), [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]
        blank = width - length
        assert row == start + end + [tokenizer.pad_token_id] * blank
        assert label == [-100] * len(start) + end + [-100] * blank


def test_a_width_for_which_all_games_are_too_long_is_refused(tokenizer):
    """Prevents an average over nothing, NaN, from which the weights do not come back."""
    with pytest.raises(ValueError, match="no game fits into 5 tokens: pass a larger --width"):
        encode_games(games(PretrainConfig(batch=3), 0), tokenizer, 5)


@pytest.fixture
def small(tmp_path):
    """Three steps of a model of one layer."""
    return PretrainConfig(
        out=tmp_path / "a", steps=3, batch=8, hidden=32, layers=1, warmup=1, save_every=2, compile=False
    )


def test_pretraining_goes_on_where_it_was_stopped(small, tmp_path, monkeypatch):
    """Prevents an interrupted run that starts anew or ends elsewhere, and a result that does not load."""
    pretrain(small)
    config, play = replace(small, out=tmp_path / "b"), games
    seen = []

    def interrupted(config, step):
        seen.append(step)
        if seen == [0, 1, 2]:
            raise KeyboardInterrupt
        return play(config, step)

    monkeypatch.setattr(module, "games", interrupted)
    with pytest.raises(KeyboardInterrupt):
        pretrain(config)
    pretrain(config)
    assert seen == [0, 1, 2, 2]
    one, other = (load_file(c.out / "model.safetensors") for c in (small, config))
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
    policy, plain = load_policy(config.out), AutoModelForCausalLM.from_pretrained(config.out)
    assert policy.tokenizer.get_vocab() == build_tokenizer().get_vocab()
    assert plain.config.vocab_size == len(policy.tokenizer) and policy.stop_ids == {policy.tokenizer.eos_token_id}


def test_a_checkpoint_with_other_settings_is_refused(small, capsys):
    """Prevents a policy that is made by two settings and says one, and a traceback of tensor shapes."""
    pretrain(small)
    told = "pretrain.pt has other settings .hidden 32 there, 64 here; seed 0 there, 1 here.: pass them, or move it away"
    with pytest.raises(ValueError, match=told):
        pretrain(replace(small, hidden=64, seed=1))
    pretrain(replace(small, save_every=1))  # what is only about how
    assert capsys.readouterr().out.count("going on from step 3") == 1
    saved = torch.load(small.out / "pretrain.pt")  # noqa: TID251
    saved["model"].popitem()
    torch.save(saved, small.out / "pretrain.pt")
    with pytest.raises(ValueError, match="pretrain.pt is of another model: pass its settings, or move it away"):
        pretrain(small)


def test_pretraining_lowers_the_loss(small, capsys):
    """Prevents labels that are shifted or masked so that nothing, or something else than the next token, is learnt:
    the loss of transformers on new games is the one that was reported."""
    config = replace(small, steps=40, save_every=1)
    pretrain(config)
    losses = [float(loss) for loss in re.findall(r"loss ([0-9.]+)", capsys.readouterr().out)]
    assert len(losses) == 40 and sum(losses[-5:]) < 0.75 * sum(losses[:5])
    model = AutoModelForCausalLM.from_pretrained(config.out)
    ids, labels = encode_games(games(replace(config, batch=64), 99), build_tokenizer(), config.width)
    assert model(ids, labels=labels).loss.item() == pytest.approx(sum(losses[-5:]) / 5, rel=0.1)
