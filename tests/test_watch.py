"""What a run shows while it learns: watched answers, one tree, the terminal, TensorBoard, trackers."""

import json
import sys
import time
from types import ModuleType

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import config
from countdown import make_problems, verify
from ppo import collect_mcts, collect_samples, train
from runtime import board, report
from runtime.run_folder import read_metrics, read_samples
from runtime.watch import WATCHED


def test_a_run_keeps_the_same_problems_at_every_evaluation(tiny_config):
    """Prevents answers that can't be compared, a verdict that is not that of the text, and a start that nobody kept."""
    config = tiny_config(tokens=0, steps=4, evaluations=2, eval_problems=WATCHED + 3)
    train(config, collect_mcts)
    rows = read_samples(config.folder)
    watched = make_problems(WATCHED, "validation")
    assert [row["step"] for row in rows] == [step for step in (0, 2, 4) for _ in watched]
    assert [row["problem"] for row in rows] == [str(problem) for problem in watched] * 3
    for row, problem in zip(rows, watched * 3):
        reward = verify(row["text"], problem)
        assert (row["right"], row["reward"], row["reason"]) == (reward.correct, reward.value, reward.reason)
    files = sorted((config.folder / "trees").iterdir())
    assert [file.name for file in files] == ["000000.json", "000002.json", "000004.json"]
    (tree,) = json.loads(files[1].read_text(encoding="utf-8"))
    assert tree["problem"] == str(watched[0]) and tree["moment"] == "step 2"
    assert tree["root"]["visits"] == config.tree.simulations


def test_watching_changes_nothing(tiny_config):
    """Prevents a run whose result depends on what it shows."""

    def losses(config):
        train(config, collect_mcts)
        return [(row["generated"], row["policy_loss"], row["kl"]) for row in read_metrics(config.folder) if "kl" in row]

    shown = tiny_config(tokens=0, steps=3, evaluations=3)
    hidden = shown.change(evaluations=0, out=shown.folder.with_name("hidden"))
    assert losses(shown) == losses(hidden)
    assert not (hidden.folder / "samples.jsonl").exists() and not (hidden.folder / "trees").exists()


def test_a_resumed_run_keeps_each_answer_once(tiny_config):
    """Prevents answers of a step that was lost, and answers that are kept twice."""

    def interrupted(*args):
        if len(read_metrics(config.folder)) == 4:
            raise KeyboardInterrupt
        return collect_samples(*args)

    config = tiny_config("none", tokens=0, steps=4, evaluations=4, checkpoints=2)
    with pytest.raises(KeyboardInterrupt):
        train(config, interrupted)
    assert {row["step"] for row in read_samples(config.folder)} == {0, 1, 2, 3}
    train(config, collect_samples, resume=True)
    assert [row["step"] for row in read_samples(config.folder)] == [step for step in range(5) for _ in range(4)]


# ------------------------------------------------------------------------------------------------ terminal


def test_the_terminal_keeps_a_line_for_every_evaluation(tiny_config, capsys):
    """Prevents an hour of a bar alone, and lines of a bar in a file."""
    config = tiny_config("none", tokens=0, steps=4, evaluations=2)
    train(config, collect_samples)
    out, err = capsys.readouterr()
    before, first, second, _, *table = out.splitlines()
    assert before.startswith("before training: mean@2 ") and err == ""
    problem = str(make_problems(1, "validation")[0])
    assert first.startswith(" 50 %  validation") and second.startswith("100 %  validation") and problem in second
    assert [line.split(":")[0] for line in table[-3:]] == ["play", "look", "report"]


def test_an_answer_on_the_terminal_is_one_plain_line():
    """Prevents a model's text that clears the screen or fills it."""
    sample = {"problem": "2 3 → 5", "right": False, "reason": "syntax", "text": "<answer> \x1b[2J 2\n+ ( 3 ) </answer>"}
    assert report.told(sample) == "2 3 → 5:  [2J 2 + (3)  ✗ syntax"
    long = report.told(sample | {"text": "<answer> " + "1 + " * 5_000})
    assert len(long) < 80 and long.isprintable()


def test_a_sparkline_is_read_from_zero():
    """Prevents a curve that makes noise look like progress: blocks are shares of the highest value."""
    assert report.sparkline([0.0, 0.35, 0.7]) == "▁▅█" and report.sparkline([0.0, 0.0]) == "▁▁"


def test_the_bar_shows_averages():
    """Prevents a number that jumps at every step and tells nothing."""
    terminal = report.Terminal("mcts", 0.0, [{"eval_mean": 0.1}])
    rows = [{"tree_solved": solved, "tokens_per_second": 100.0} for solved in (0.0, 1.0, 1.0)]
    for row in rows:
        terminal.show(0.5, row, [])
    assert terminal.averages["solved"] == pytest.approx(1 - report.SMOOTH**2) and terminal.scores == [0.1]
    terminal.close()


# ------------------------------------------------------------------------------------------------ board


def test_tensorboard_has_groups_samples_and_settings(tmp_path):
    """Prevents a page of 40 unsorted curves, and runs that can't be told apart."""
    shown = board.Board(tmp_path, {"seed": 3, "out": None, "method": "mcts"})
    shown.log({"step": 1, "eval_mean": 0.5, "kl": 0.1, "tree_nodes": 7, "reward": 1.0, "seconds": 2, "stopped": "no"})
    sample = {"problem": "2 3 → 5", "text": "<step> 2 + 3 </step> <b>\n</b>", "reason": "correct", "step": 1}
    shown.show([sample])
    shown.close()
    events = EventAccumulator(str(tmp_path)).Reload()
    names = {"eval/mean", "learning/kl", "tree/nodes", "lessons/reward", "cost/seconds"}
    assert set(events.Tags()["scalars"]) == names
    (text,) = events.Tensors("samples/0/text_summary")
    assert text.tensor_proto.string_val[0].decode().endswith("\n\n    <step> 2 + 3 </step>\n    <b>\n    </b>\n")
    assert "_hparams_/session_start_info" in events.summary_metadata


@pytest.mark.parametrize("name", ["trackio", "wandb"])
def test_a_tracker_gets_the_metrics(name, tmp_path, monkeypatch):
    """Prevents an option that opens an empty page. The package is played by a record of its calls."""
    calls, package = [], ModuleType(name)
    package.init = lambda **options: calls.append(options)
    package.log = lambda scalars, step: calls.append((step, scalars))
    package.finish = lambda: calls.append("finish")
    monkeypatch.setitem(sys.modules, name, package)
    logs = board.Board(tmp_path / "run", {"seed": 3}, name)
    logs.log({"step": 1, "eval_mean": 0.5})
    logs.close()
    began, *rest = calls
    assert began == {"project": board.PROJECT, "name": "run", "config": {"seed": 3}, "resume": "allow"}
    assert rest == [(1, {"eval/mean": 0.5}), "finish"]


def test_a_tracker_that_is_missing_is_told_before_the_work(tiny_config, monkeypatch):
    """Prevents a policy that is loaded for nothing."""
    monkeypatch.setitem(sys.modules, "wandb", None)
    began = time.perf_counter()
    with pytest.raises(ValueError, match="^wandb is not installed: pip install wandb, or leave out --track$"):
        train(tiny_config("none", track="wandb"), collect_samples)
    assert time.perf_counter() - began < 0.5
    assert board.load_tracker("none") is None
    with pytest.raises(ValueError, match="track must be one of none, trackio, wandb"):
        config.MeasuringConfig(track="mlflow")
