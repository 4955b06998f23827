"""Tests of config.py: what a run may be, its presets, and how the command line reads them."""

import json
from collections import defaultdict
from dataclasses import asdict, replace
from pathlib import Path
from statistics import mean

import pytest
import torch

from runtime import run_folder
from config import Config, EARLIER, METHODS, PRESETS, preset_for
from runtime.cli import differences, parse, result_settings
from config import SearchConfig

RESULTS = Path(__file__).parents[1] / "results"


def test_presets_are_valid_and_the_post_keeps_the_posts_numbers():
    """Prevents a preset under another's name, and a reproduction with other hyper-parameters than the post's."""
    for name, preset in PRESETS.items():
        assert preset.preset == name
    post = PRESETS["post"]
    found = (post.problems, post.steps, post.learning_rate, post.clip_gradient, post.inner_steps, post.samples)
    assert found == (16, 2_048, 5e-6, 0.1, 1, 64) and (post.max_tokens, post.eval_temperature) == (512, 0.2)
    assert (post.clip_high, post.value_coefficient, post.kl_coefficient, post.schedule) == (5.0, 1.0, 0.05, "linear")
    assert PRESETS["qwen1.5b"].reward == post.reward == "dense"
    tree = post.search_config
    assert (tree.simulations, tree.workers, tree.children, tree.c_puct) == (1_600, 16, 4, 0.5)
    assert (tree.prior, tree.unvisited, tree.virtual_loss) == ("sum", "zero", "visit")
    assert (tree.temperature, tree.max_tokens, tree.step_tokens) == (0.8, 512, 64)


def test_the_command_line_starts_from_a_preset_and_overrides_it(monkeypatch):
    """Prevents an option or a preset that is read and dropped; without --preset the machine decides."""
    args = ["--preset=post", "--seed", "3", "--tree.simulations", "9", "--no-value-gradient"]
    config, resume = parse(args, "mcts")
    expected = replace(PRESETS["post"], seed=3, tree=replace(PRESETS["post"].tree, simulations=9), value_gradient=False)
    assert (config, resume) == (expected, False)
    assert parse(["--preset", "tiny"], "mcts")[0] == PRESETS["tiny"] == Config()
    assert parse(["--preset", "tiny", "--search", "none"], "mcts")[0] == preset_for("tiny", "none")
    assert parse(["--preset", "tiny", "--problems", "5"], "cispo")[0].problems == 5
    assert (parse(["--preset", "tiny"], "grpo")[0].loss, parse(["--preset", "tiny"], "cispo")[0].loss) == (
        "ppo",
        "cispo",
    )
    for present, preset in ((True, "qwen1.5b"), (False, "tiny")):
        monkeypatch.setattr(torch.cuda, "is_available", lambda present=present: present)
        assert parse([], "mcts")[0] == preset_for(preset, "mcts")


def test_what_one_process_does_not_read_makes_no_difference():
    """Prevents two runs from being told apart by a setting of clusters that neither has."""
    assert not differences(asdict(Config(max_staleness=3)), Config())
    assert differences(asdict(Config(max_staleness=3, cluster="local")), Config(cluster="local"))


def test_tiny_steps_are_their_methods_best():
    """Prevents a first run that learns less than it could, a comparison with a rival that is not at its best (of five
    seeds on the validation problems; of samples that are drawn independently), a way that was not tuned, and steps of
    preset tiny in the others."""
    trees = {f"tree.{name}" for name in ("children", "simulations", "distinct", "min_p")}

    def way(config: dict, method: str) -> tuple:
        own = {"mcts": trees, "none": set()}.get(method, {"samples"})
        told = result_settings(config)
        return tuple((name, told[name]) for name in sorted({"problems", "learning_rate", "reward"} | own))

    for method in METHODS:
        like = "cispo" if method == "grpo" else method
        scores = defaultdict(list)
        for folder in (*(RESULTS / "compare").glob(f"{like}-*"), *(RESULTS / "samples").glob(f"{like}-*")):
            last = [row["eval_mean"] for row in run_folder.read_metrics(folder) if "eval_mean" in row][-1]
            if not run_folder.read_settings(folder).get("min_p"):
                scores[way(run_folder.read_settings(folder), like)].append(last)
        mine = way(asdict(preset_for("tiny", method)), like)
        assert mine == max(scores, key=lambda some: mean(scores[some])) and len(scores[mine]) == 5
        assert mine in [way(run_folder.read_settings(f), like) for f in (RESULTS / "tune").glob(f"{like}-*")]
        assert preset_for("post", method).problems == 16
        assert preset_for("post", method).samples == (16 if like == "cispo" else 64)


def test_a_resumed_run_is_configured_by_its_folder(tmp_path):
    """Prevents a resume under other settings, and one that fails on the versions and machine that config.json holds, on
    a run of an earlier version (fields that are new), or after the folder has moved."""
    folder = save(tmp_path, lambda saved: [saved.pop(name) for name in ("gpu_memory", *EARLIER)])
    old = replace(SAVED, out=tmp_path, **EARLIER)
    assert parse(["--resume", folder], "mcts") == (old, True)
    free = ["--gpu-memory", "8", "--checkpoints", "3", "--max-disagreement", "1"]  # how, not what
    expected = replace(old, gpu_memory=8.0, checkpoints=3, max_disagreement=1.0)
    assert parse([f"--resume={folder}", *free], "mcts") == (expected, True)


SAVED = Config(seed=3, lora_rank=4, quantize="nf4", out="elsewhere", tree=SearchConfig(simulations=9))


def save(folder, change=lambda saved: None):
    saved = json.loads(json.dumps(asdict(SAVED), default=str)) | {"provenance": {"torch": "2"}}
    change(saved)
    (folder / "config.json").write_text(json.dumps(saved))
    return str(folder)


@pytest.mark.parametrize(
    ("change", "options", "told", "forced"),
    [
        (lambda saved: None, ["--patience", "9"], "patience 5 there, 9 here", dict(patience=9)),
        (
            lambda saved: None,
            ["--seed=4", "--no-strict"],
            "seed 3 there, 4 here; strict True there, False here",
            dict(seed=4, strict=False),
        ),
        (lambda saved: saved.update(gone=1), [], "gone is no setting here", {}),
        (lambda saved: saved["tree"].update(old=1), [], "tree.old is no setting here", {}),
    ],
)
def test_other_settings_for_a_resumed_run_need_force(tmp_path, capsys, change, options, told, forced):
    """Prevents a run that changes under way by accident, one that can't change at all, and a traceback for a setting
    that this version has no more."""
    folder = save(tmp_path, change)
    with pytest.raises(SystemExit) as stop:
        parse([*options, "--resume", folder], "mcts")
    assert stop.value.code == 2
    assert capsys.readouterr().err == f"error: {folder} has other settings ({told}): --force goes on all the same\n"
    expected = replace(SAVED, out=tmp_path, **forced)
    assert parse(["--force", "--resume", folder, *options], "mcts") == (expected, True)
    assert parse(["--resume", save(tmp_path), "--seed", "3"], "mcts") == (replace(SAVED, out=tmp_path), True)


@pytest.mark.parametrize(
    ("text", "message"),
    [(None, "holds no run: there is no"), ("", "is damaged"), ('{"seed": ', "is damaged"), ("[1]", "is damaged")],
)
def test_a_folder_that_is_no_run_can_not_be_resumed(tmp_path, text, message):
    """Prevents a traceback for a mistyped or torn folder."""
    if text is not None:
        (tmp_path / "config.json").write_text(text)
    with pytest.raises(ValueError, match=message):
        parse(["--resume", str(tmp_path)], "mcts")


def test_a_run_has_a_folder_of_its_own():
    """Prevents runs of two methods, presets or seeds in one folder."""
    assert str(Config(search="cispo", seed=3).folder) == "runs/cispo-tiny-seed3"
    assert str(Config(out="elsewhere").folder) == "elsewhere"
    assert parse(["--out", "."], "none")[0].folder == Path()  # the one that you are in
