"""Tests of runtime/unread.py: an option that would change nothing is refused, and no other one is."""

import json
import shlex

import pytest
from test_evaluate import command

import baselines
import ppo
from config import METHODS, PRESETS, TINY, TreeConfig, preset_for
from experiments import study
from runtime import unread
from runtime.cli import read_training_config
from runtime.evaluation import parse as parse_evaluation
from runtime.run_folder import read_metrics
from runtime.unread import check_stated

COLLECTORS = ppo.COLLECTORS | baselines.COLLECTORS
NO_RATES = dict(learning_rate=0.0, value_learning_rate=0.0)
MEASURED = ("seconds", "tokens_per_second")  # ends of the names of metrics that the clock decides

# method, settings of a run | settings that then change nothing | what must change for them to decide again
IDLE = [
    ("mcts", dict(selection="gumbel"), dict(c_puct=9.0, unvisited="zero"), dict(selection="puct")),
    ("mcts", dict(selection="uct"), dict(prior="uniform", unvisited="zero"), dict(selection="puct")),
    ("mcts", dict(workers=1, children=2), dict(virtual_loss="visit"), dict(workers=8)),
    (
        "mcts",
        dict(simulations=1, answers="all"),
        dict(workers=2, virtual_loss="visit", c_puct=9.0, unvisited="zero"),
        dict(simulations=32),
    ),
    (
        "mcts",
        dict(children=1),
        dict(selection="uct", c_puct=9.0, prior="uniform", unvisited="zero", virtual_loss="visit"),
        dict(children=4),
    ),
    ("none", dict(evaluations=0), dict(eval_problems=9, eval_samples=3), dict(evaluations=1)),
    ("none", {}, dict(clip=1.02), dict(inner_steps=2)),
    ("cispo", dict(old_logprobs="recomputed"), dict(clip=1.02), dict(inner_steps=2)),
    ("grpo", {}, dict(clip=0.02), dict(inner_steps=2)),
    ("none", NO_RATES, dict(warmup=5, inner_steps=3, clip_gradient=1e-9), dict(learning_rate=1e-3)),
    ("none", {}, dict(max_staleness=0, generator_timeout=9.0), None),  # what they decide: tests/test_cluster.py
]
EVALUATIONS = [
    ("--search none", "--kept 9", "--search mcts"),
    ("--search best-of-n", "--kept 9", "--search mcts"),
    ("--sampler torch", "--cache-gb 2", "--sampler auto"),
    ("--search mcts --sampler torch", "--cache-gb 2", "--search mcts --sampler auto"),
    ("--search mcts --cutoff 0.1", "--cache-gb 2", "--search mcts"),
    ("--search mcts", "--virtual-loss visit", "--search mcts --workers 2"),
    ("--search mcts --selection uct", "--prior uniform", "--search mcts"),
    ("--search mcts --selection uct", "--unvisited zero", "--search mcts"),
    ("--search mcts --children 1", "--c-puct 9", "--search mcts"),
]


@pytest.fixture
def metrics(tiny_config):
    """What a run of one step of the embedded policy writes to metrics.jsonl, but for what the clock decides."""

    def run(config) -> list[dict]:
        number = len(list(config.out.parent.iterdir()))
        config = config.change(out=config.out.parent / f"run{number}")
        ppo.train(config, COLLECTORS[config.method])
        return [{k: v for k, v in row.items() if not k.endswith(MEASURED)} for row in read_metrics(config.folder)]

    return run


@pytest.mark.parametrize(("method", "settings", "change", "cure"), IDLE, ids=str)
def test_settings_that_are_refused_change_nothing(tiny_config, metrics, monkeypatch, method, settings, change, cure):
    """Prevents the refusal of a setting that decides something, and one that stays after its reason is gone."""
    monkeypatch.setattr(unread, "find_spec", lambda name: None)
    tree = {"tree": TreeConfig(simulations=32)} if method == "mcts" else {}
    base = dict(model=TINY, max_tokens=64, problems=3, tokens=0, steps=1, learning_rate=1e-2, test_before=False)
    base |= dict(evaluations=0, checkpoints=1)
    config = tiny_config(method, **(base | tree | settings))
    assert change.keys() <= unread.unread(config).keys() & unread.unread(config.change(**change)).keys()
    assert metrics(config) == metrics(config.change(**change))
    if cure:
        cured = config.change(**cure)
        assert not change.keys() & unread.unread(cured).keys()
        assert metrics(cured) != metrics(cured.change(**change))


@pytest.mark.parametrize(("settings", "option", "cured"), EVALUATIONS)
def test_an_evaluation_refuses_what_changes_nothing(checkpoint, tmp_path, monkeypatch, capsys, settings, option, cured):
    """Prevents the same of evaluate.py."""
    monkeypatch.setattr(unread, "find_spec", lambda name: None)
    name = option.split()[0]
    with pytest.raises(ValueError, match=f"^{name} has no effect here .*: leave it out$"):
        parse_evaluation(shlex.split(f"{settings} {option}"))
    monkeypatch.setattr(unread, "find_spec", lambda name: "installed")
    parse_evaluation(shlex.split(f"{cured} {option}"))
    monkeypatch.setattr("runtime.evaluation.check_stated", lambda *_: None)
    results = []
    for more in ("", option):
        out = tmp_path / f"result{len(results)}.json"
        short = "--problems 3 " + ("--samples 2" if "none" in settings or "--search" not in settings else "--budget 60")
        command(monkeypatch, checkpoint, *shlex.split(f"{settings} {short} {more}"), "--out", out)
        (score,) = json.loads(out.read_text(encoding="utf-8"))["scores"]
        results.append(score | {"usage": {k: v for k, v in score["usage"].items() if not k.endswith(MEASURED)}})
    assert results[0] == results[1]


def test_the_torch_samplers_settings_are_refused_beside_vllm():
    """Prevents --rows that vLLM never sees."""
    for option in ("--rows 8", "--kept 8"):
        with pytest.raises(ValueError, match="it belongs to the torch sampler"):
            parse_evaluation(shlex.split(f"--search mcts --sampler vllm {option}"))


def stated(options: str, method: str = "mcts") -> None:
    """Check a command line of a training run."""
    read_training_config(shlex.split(options), preset_for("tiny", method))


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("mcts", "--clip 4"),
        ("mcts", "--clip=4"),
        ("mcts", "--selection gumbel --c-puct 0.5"),
        ("mcts", "--selection gumbel --c_puct 0.7"),
        ("mcts", "--virtual-loss value --workers 1"),
        ("grpo", "--sampler torch --clip 0.1"),
        ("cispo", "--old-logprobs truncated --clip 3"),
        ("none", "--max-staleness 0"),
        ("none", "--learning-rate 0 --value-learning-rate 0 --warmup 3"),
        ("cispo", "--learning-rate 0 --warmup 3"),
        ("mcts", "--evaluations 0 --eval-samples 4"),
        ("mcts", "--data x --size 3"),
        ("mcts", "--data x --split multiset"),
        ("mcts", "--data x --train-problems 9"),
    ],
)
def test_what_has_no_effect_is_refused_whatever_its_value(method, options, monkeypatch):
    """Prevents an option that is read and dropped, and a table of runs that differ in nothing."""
    monkeypatch.setattr(unread, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="^--[a-z_-]+ has no effect here .*: leave it out$"):
        stated(options, method)


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("mcts", "--loss ppo --clip 0.2"),  # the preset's clip does not go with it
        ("mcts", "--value-learning-rate 0 --value-gradient"),  # a run's policy brings a trained critic
        ("mcts", "--clip 0.5"),  # below the ratio
        ("mcts", "--inner-steps 2 --clip 4"),
        ("mcts", "--cluster local --clip 4"),
        ("mcts", "--cluster local --max-staleness 0 --generator-timeout 9"),
        ("mcts", "--lora-rank 4 --dtype bfloat16 --clip 2"),  # sampler and trainer round in their own ways
        ("mcts", "--selection gumbel --prior uniform --virtual-loss visit"),
        ("mcts", "--selection uct --c-puct 1"),
        ("mcts", "--generators 1 --shards 2"),
        ("mcts", "--gpu-memory 8 --device cpu"),  # an estimate for another machine
        ("none", "--learning-rate 0 --warmup 3"),  # the critic learns
        ("mcts", "--data x --eval-problems 5 --test-problems 5"),
        ("none", "--no-value-gradient --no-test-before"),
    ],
)
def test_what_has_an_effect_is_not_refused(method, options, monkeypatch):
    """Prevents a refusal of what decides something, or of an option without which the others are refused."""
    monkeypatch.setattr(unread, "find_spec", lambda name: None)
    stated(options, method)


def test_clip_is_read_where_vllm_may_draw(monkeypatch):
    """Prevents a refusal where sampler and trainer round in their own ways: then the ratio is not 1."""
    monkeypatch.setattr(unread, "find_spec", lambda name: "installed")
    stated("--clip 3", "cispo")
    for options in ("--clip 3 --device cpu", "--clip 3 --cutoff 0.1", "--clip 3 --sampler torch"):
        with pytest.raises(ValueError, match="the ratio is 1"):
            stated(options, "cispo")


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("method", METHODS)
def test_of_a_preset_little_is_idle(preset, method, monkeypatch):
    """Prevents a rule that refuses what most runs read."""
    monkeypatch.setattr(unread, "find_spec", lambda name: None)
    config = preset_for(preset, method)
    assert unread.unread(config).keys() <= {"clip", "max_staleness", "generator_timeout"}
    check_stated([], config, config)


def test_a_resumed_run_may_state_what_its_new_settings_need(tmp_path, monkeypatch):
    """Prevents a run of several generators that can't go on in one process: neither with --generators 1, which would be
    refused as idle, nor without it."""
    default = preset_for("tiny", "none").change(cluster="local", generators=2)
    options = shlex.split("--cluster none --generators 1")
    check_stated(options, default.change(cluster="none", generators=1), default)


def test_the_study_states_nothing_idle():
    """Prevents a stage of the study that stops at its first command."""
    config = study.StudyConfig("compare", seeds=1)
    commands = {command for stage in study.STAGES.values() for _, command in stage(config)}
    for line in commands:
        program, *options = shlex.split(line)
        if program == "evaluate.py":
            parse_evaluation(options)
        else:
            method = options[1]
            check_stated(
                options[2:], study.cli.parse([*options, "--preset", "tiny"], method)[0], preset_for("tiny", method)
            )
