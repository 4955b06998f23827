"""Tests of scripts/warm_up.py: a chat model that knows nothing of the game writes its format afterwards."""

import json
from dataclasses import replace

import pytest

from benchmarks.random_qwen import THIN, Shape, make_checkpoint
from runtime.cli import parse
from runtime.loading import load_policy
from runtime.torch_sampler import TorchSampler
from sampling import SamplingParams, complete
from scripts import warm_up as module
from scripts.warm_up import WarmUpConfig, warm_up


@pytest.fixture(scope="module")
def warm(tmp_path_factory):
    """The folder of a warmed-up model, and its losses."""
    folder = tmp_path_factory.mktemp("chat")
    random = make_checkpoint(Shape(folder / "random", **THIN))
    config = WarmUpConfig(random, folder / "warm", steps=50, batch=16, learning_rate=3e-3, device="cpu")
    return config, warm_up(config)


def test_the_games_are_learnt(warm, problems):
    """Prevents a warm-up on the prompt, on padding, or behind another opening than the one that is sampled after."""
    config, losses = warm
    assert losses[0] > 5 and losses[-1] < 2 and len(losses) == 50
    policy = load_policy(config.folder, train=False)
    params = SamplingParams(8, 160, temperature=0.5)
    rows, _ = complete(policy, TorchSampler(policy), problems, [1, 2, 3, 4], params, policy.grade)
    answers = [policy.decode(t.completion) for row in rows for t in row]
    assert sum(text.strip().startswith("<step>") and "</step>" in text for text in answers) > 16  # of 32


def test_what_is_written_is_a_model_like_the_one_before(warm):
    """Prevents a folder that runs refuse, with the value head of another run, or without the chat template."""
    config, _ = warm
    assert not (config.folder / "value_head").exists()
    before, after = (
        json.loads((folder / "config.json").read_text(encoding="utf-8")) for folder in (config.model, config.folder)
    )
    assert {key: value for key, value in after.items() if key != "dtype"} == {
        key: value for key, value in before.items() if key != "dtype"
    }
    there, here = (load_policy(folder, train=False) for folder in (config.model, config.folder))
    assert there.tokenizer.chat_template == here.tokenizer.chat_template and there.stop_ids == here.stop_ids
    assert parse(["--preset", "tiny", "--model", str(config.folder)], "mcts")[0].model == str(config.folder)


def test_an_interrupted_warm_up_does_not_pass_for_a_finished_one(warm, tmp_path, monkeypatch):
    """Prevents a study from a start that is half warm, and the loss of the steps until then."""
    config = replace(warm[0], folder=tmp_path / "warm", steps=101, batch=1)
    play = module.games

    def interrupted(lesson, step):
        if step == 100:
            raise KeyboardInterrupt
        return play(lesson, step)

    monkeypatch.setattr(module, "games", interrupted)
    with pytest.raises(KeyboardInterrupt):
        warm_up(config)
    assert [folder.name for folder in tmp_path.iterdir()] == ["warm.part"]
    load_policy(config.part, train=False)
    with pytest.raises(ValueError, match="warm.part exists already: remove it or name another folder"):
        replace(config)
