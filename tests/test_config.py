"""Tests of config.py, and of runs on the command line: what a run may be, its presets, its options, how it goes on."""

import json
import subprocess
import sys
from collections import defaultdict
from dataclasses import asdict, replace
from pathlib import Path
from statistics import mean

import pytest

import distill
from config import (
    GROUP_METHODS,
    LESSON_NAMES,
    METHODS,
    PRESETS,
    SAMPLING_METHODS,
    Config,
    CriticConfig,
    flatten,
    preset_for,
)
from runtime.cli import SHORT_HELP, differences, help_all, option_names, parse, result_settings, short_help
from runtime.run_folder import read_metrics, read_settings

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "results"


def refusal(args, method, capsys) -> str:
    """What is said of options that are refused: one line, exit code 2."""
    with pytest.raises(SystemExit) as stop:
        parse(args, method)
    message = capsys.readouterr().err
    assert stop.value.code == 2 and message.count("\n") == 1
    return message


# ------------------------------------------------------------------------------------------------ settings


def test_presets_are_valid_and_the_post_keeps_the_posts_numbers():
    """Prevents a preset under another's name, and a reproduction with other hyper-parameters than the post's."""
    for name, preset in PRESETS.items():
        assert preset.preset == name
    post = PRESETS["post"]
    learning, measuring = post.learning, post.measuring
    assert (learning.problems, learning.learning_rate) == (16, 5e-6)
    assert (learning.clip_gradient, learning.inner_steps) == (0.1, 1)
    assert (post.budget.steps, post.task.max_tokens, measuring.eval_temperature) == (2_048, 512, 0.2)
    assert (learning.clip, learning.kl_coefficient, learning.critic) == (5.0, 0.05, CriticConfig(5e-6, True))
    assert preset_for("post", "best-of-n").group.samples == 64
    assert PRESETS["qwen1.5b"].task.reward == post.task.reward == "dense"
    tree = post.search
    assert (tree.simulations, tree.workers, tree.children, tree.c_puct) == (1_600, 16, 4, 0.5)
    assert (tree.prior, tree.unvisited, tree.virtual_loss) == ("sum", "zero", "visit")
    assert (tree.temperature, tree.max_tokens, tree.step_tokens) == (0.8, 512, 64)


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("method", METHODS)
def test_a_method_has_the_topics_that_it_reads(preset, method):
    """Prevents a setting of trees in a run without trees, and a run that lacks a topic that it reads."""
    config = preset_for(preset, method)
    assert (config.preset, config.method) == (preset, method)
    assert (config.tree is not None) == (config.distill is not None) == (method == "mcts")
    assert (config.group is not None) == (method in SAMPLING_METHODS)
    assert (config.learning.critic is None) == (method in GROUP_METHODS)
    drawn = config.tree or config.group
    assert config.cutoff == (drawn.cutoff if drawn else None)
    with pytest.raises(ValueError, match="has other topics than these"):
        replace(config, method="best-of-n" if method == "none" else "none")


def test_a_setting_is_changed_by_its_name():
    """Prevents a change that is lost between the topics, or that goes to a setting that the method does not have."""
    config = Config().change(seed=1, learning_rate=1e-4, simulations=9, value_gradient=True, cluster="local")
    assert (config.seed, config.learning.learning_rate, config.tree.simulations) == (1, 1e-4, 9)
    assert config.learning.critic == CriticConfig(value_gradient=True) and config.cluster.cluster == "local"
    before, after = flatten(Config()), flatten(config)
    assert {name for name in after if after[name] != before[name]} == {
        "seed", "learning_rate", "simulations", "value_gradient", "cluster",
    }  # fmt: skip
    assert Config().change() == Config()
    for method, setting in (("cispo", "simulations"), ("mcts", "samples"), ("grpo", "value_gradient"), ("none", "x")):
        with pytest.raises(TypeError, match=setting):
            preset_for("tiny", method).change(**{setting: 1})


@pytest.mark.parametrize("method", METHODS)
def test_a_name_means_one_setting(method):
    """Prevents two topics with a setting of the same name: an option would set one of them."""

    def names(settings: dict) -> list[str]:
        topics = [names(value) for value in settings.values() if isinstance(value, dict)]
        return [name for name, value in settings.items() if not isinstance(value, dict)] + sum(topics, [])

    settings = names(asdict(preset_for("tiny", method)))
    assert len(set(settings)) == len(settings)


def test_the_lessons_are_those_of_distill():
    """Prevents an option for a lesson that does not exist, and a lesson without an option."""
    assert set(LESSON_NAMES) == set(distill.LESSONS) and len(set(LESSON_NAMES)) == len(LESSON_NAMES)


def test_what_one_process_does_not_read_makes_no_difference():
    """Prevents two runs from being told apart by a setting of clusters that neither has."""
    assert not differences(asdict(Config().change(max_staleness=3)), asdict(Config()))
    local = Config().change(cluster="local")
    assert differences(asdict(local.change(max_staleness=3)), asdict(local))


def test_tiny_steps_are_their_methods_best():
    """Prevents a first run that learns less than it could, a comparison with a rival that is not at its best (of five
    seeds on the validation problems; of samples that are drawn independently), settings that were not tuned, and steps
    of preset tiny in the others."""
    trees = {"children", "simulations", "cutoff"}

    def tuned(saved: dict, method: str) -> tuple:
        own = {"mcts": trees, "none": set()}.get(method, {"samples"})
        settings = result_settings(saved)
        return tuple((name, settings[name]) for name in sorted({"problems", "learning_rate", "reward"} | own))

    for method in METHODS:
        like = "cispo" if method == "grpo" else method
        scores = defaultdict(list)
        for folder in (*(RESULTS / "compare").glob(f"{like}-*"), *(RESULTS / "samples").glob(f"{like}-*")):
            last = [row["eval_mean"] for row in read_metrics(folder) if "eval_mean" in row][-1]
            saved = read_settings(folder)
            if saved["group"] is None or saved["group"]["cutoff"] is None:
                scores[tuned(saved, like)].append(last)
        mine = tuned(asdict(preset_for("tiny", method)), like)
        assert mine == max(scores, key=lambda settings: mean(scores[settings])) and len(scores[mine]) == 5
        assert mine in [tuned(read_settings(folder), like) for folder in (RESULTS / "tune").glob(f"{like}-*")]
        post = preset_for("post", method)
        assert post.learning.problems == 16
        assert post.group is None or post.group.samples == (16 if like == "cispo" else 64)


def test_a_run_has_a_folder_of_its_own():
    """Prevents runs of two methods, presets or seeds in one folder."""
    assert str(preset_for("tiny", "cispo").change(seed=3).folder) == "runs/cispo-tiny-seed3"
    assert str(Config(out="elsewhere").folder) == "elsewhere"
    assert parse(["--out", "."], "none")[0].folder == Path()  # the one that you are in


# ------------------------------------------------------------------------------------------------ options


def test_the_command_line_starts_from_a_preset_and_overrides_it():
    """Prevents an option or a preset that is read and dropped, and a preset that depends on the machine."""
    args = ["--preset=post", "--seed", "3", "--simulations", "9", "--no-value-gradient", "--cutoff", "0.25"]
    changed = PRESETS["post"].change(seed=3, simulations=9, value_gradient=False, cutoff=0.25)
    assert parse(args, "mcts") == (changed, False)
    assert parse([], "mcts")[0] == parse(["--preset", "tiny"], "mcts")[0] == PRESETS["tiny"] == Config()
    for option in (["--search", "none"], ["--method=none"], ["--search=none"]):
        assert parse(option, "mcts")[0] == preset_for("tiny", "none")
    assert parse(["--problems", "5"], "cispo")[0].learning.problems == 5
    assert (parse([], "grpo")[0].learning.loss, parse([], "cispo")[0].learning.loss) == ("ppo", "cispo")
    assert parse(["--cutoff", "None"], "mcts")[0] == Config().change(cutoff=None)
    assert parse(["--cutoff", "0"], "best-of-n")[0].group.cutoff == 0.0


@pytest.mark.parametrize(
    ("option", "near"),
    [
        ("--simulatons", "--simulations"),
        ("--learning-rat", "--learning-rate"),
        ("--no-failure", "--failures"),
        ("--lessons", "--lesson"),
        ("--sed=1", "--seed"),
    ],
)
def test_a_mistyped_option_is_told_the_right_one(option, near, capsys):
    """Prevents a search through a hundred options for a typo."""
    name = option.partition("=")[0]
    assert refusal([option], "mcts", capsys) == (
        f"error: there is no option {name}: did you mean {near}? (--help lists the options)\n"
    )


@pytest.mark.parametrize(
    ("method", "option"),
    [
        ("mcts", "--samples"),
        ("none", "--samples"),
        ("none", "--cutoff"),
        ("none", "--simulations"),
        ("best-of-n", "--children"),
        ("best-of-n", "--lesson"),
        ("cispo", "--value-learning-rate"),
        ("grpo", "--no-value-gradient"),
    ],
)
def test_an_option_of_another_method_is_refused(method, option, capsys):
    """Prevents an option that is read and dropped, and a table of runs that differ in nothing."""
    message = refusal([option, "1"], method, capsys)
    assert message == f"error: {method} has no use for {option}: leave it out\n"


@pytest.mark.parametrize("method", METHODS)
def test_help_lists_options_that_exist(method):
    """Prevents a help that names an option that is no more, leaves one out, or says nothing of it."""
    config = preset_for("tiny", method)
    options = set(option_names(config))
    assert options == {name.replace("_", "-") for name in flatten(config)} - {"tree", "distill", "group", "critic"}
    short, every = short_help("about", config), help_all(config)
    for name in SHORT_HELP:
        assert (f"--{name.replace('_', '-')} " in short) == (name.replace("_", "-") in options)
    for option in options:
        (line,) = (line for line in every.splitlines() if line.startswith(f"  --{option} "))
        assert len(line.split()) > 2  # the option, its value and what it means
    assert short.count("\n") < 60


def test_every_name_of_the_short_help_is_a_setting():
    """Prevents a line of the help that no method shows."""
    settings = {name for method in METHODS for name in flatten(preset_for("tiny", method))}
    assert SHORT_HELP.keys() <= settings


@pytest.mark.parametrize("program", ["ppo.py", "baselines.py"])
def test_the_help_of_a_program_is_short_and_loads_no_torch(program):
    """Prevents a first look that takes seconds, and one that fills the screen three times."""
    look = (
        "import atexit, runpy, sys; atexit.register(lambda: print('torch' in sys.modules, file=sys.stderr)); "
        f"sys.argv = [{program!r}, '--help']; sys.path.insert(0, '.'); runpy.run_path({program!r}, run_name='__main__')"
    )
    done = subprocess.run(
        [sys.executable, "-c", look], cwd=ROOT, capture_output=True, text=True, timeout=120, encoding="utf-8"
    )
    assert (done.returncode, done.stderr) == (0, "False\n")
    assert 10 < done.stdout.count("\n") < 60 and "--learning-rate" in done.stdout


# ------------------------------------------------------------------------------------------------ resumed runs

SAVED = Config(seed=3, out="elsewhere").change(lora_rank=4, quantize="nf4", simulations=9)


def save(folder, change=lambda saved: None):
    saved = json.loads(json.dumps(asdict(SAVED), default=str)) | {"provenance": {"torch": "2"}}
    change(saved)
    (folder / "config.json").write_text(json.dumps(saved), encoding="utf-8")
    return str(folder)


def test_a_resumed_run_is_configured_by_its_folder(tmp_path):
    """Prevents a resume under other settings, and one that fails on the versions and machine that config.json holds, or
    after the folder has moved."""
    folder = save(tmp_path)
    saved = replace(SAVED, out=tmp_path)
    assert parse(["--resume", folder], "mcts") == (saved, True)
    free = ["--gpu-memory", "8", "--checkpoints", "3", "--micro-batch-tokens", "99"]  # how, not what
    expected = saved.change(gpu_memory=8.0, checkpoints=3, micro_batch_tokens=99)
    assert parse([f"--resume={folder}", *free], "mcts") == (expected, True)


@pytest.mark.parametrize(
    ("change", "options", "message", "forced"),
    [
        (lambda saved: None, ["--warmup", "9"], "warmup 10 there, 9 here", dict(warmup=9)),
        (
            lambda saved: None,
            ["--seed=4", "--failures"],
            "seed 3 there, 4 here; failures False there, True here",
            dict(seed=4, failures=True),
        ),
        (lambda saved: None, ["--children", "2"], "children 4 there, 2 here", dict(children=2)),
        (lambda saved: saved.update(gone=1), [], "gone is no setting here", {}),
        (lambda saved: saved["tree"].update(old=1), [], "old is no setting here", {}),
    ],
)
def test_other_settings_for_a_resumed_run_need_force(tmp_path, capsys, change, options, message, forced):
    """Prevents a run that changes under way by accident, one that can't change at all, and a traceback for a setting
    that this version has no more."""
    folder = save(tmp_path, change)
    assert refusal([*options, "--resume", folder], "mcts", capsys) == (
        f"error: {folder} has other settings ({message}): --force goes on all the same\n"
    )
    expected = replace(SAVED, out=tmp_path).change(**forced)
    assert parse(["--force", "--resume", folder, *options], "mcts") == (expected, True)
    assert parse(["--resume", save(tmp_path), "--seed", "3"], "mcts") == (replace(SAVED, out=tmp_path), True)


def test_a_resumed_run_keeps_its_method(tmp_path, capsys):
    """Prevents a search that goes on as CISPO, and options of a method that the run does not have."""
    folder = save(tmp_path)
    assert "is a run of mcts" in refusal(["--resume", folder, "--method", "cispo"], "mcts", capsys)
    assert "mcts has no use for --samples" in refusal(["--resume", folder, "--samples", "4"], "mcts", capsys)


@pytest.mark.parametrize(
    ("text", "message"),
    [(None, "holds no run: there is no"), ("", "is damaged"), ('{"seed": ', "is damaged"), ("[1]", "is damaged")],
)
def test_a_folder_that_is_no_run_can_not_be_resumed(tmp_path, text, message):
    """Prevents a traceback for a mistyped or torn folder."""
    if text is not None:
        (tmp_path / "config.json").write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=message):
        parse(["--resume", str(tmp_path)], "mcts")


@pytest.mark.parametrize(
    "damage",
    [
        lambda saved: saved.update(tree=3),
        lambda saved: saved.update(task=None),
        lambda saved: saved["learning"].update(critic=[]),
        lambda saved: saved.update(model=3),
    ],
)
def test_a_damaged_topic_is_told(tmp_path, damage):
    """Prevents a traceback for a config.json whose topics are not what a run writes."""
    with pytest.raises(ValueError, match="config.json is damaged"):
        parse(["--resume", save(tmp_path, damage)], "mcts")
