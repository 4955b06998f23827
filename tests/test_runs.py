"""Tests of runs.py: a run folder survives what happens to it, and bad input costs one line, not a traceback."""

import io
import json
import re
import sys
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import runs
from runs import Run, read_config, read_metrics


@dataclass
class Inner:
    depth: int = 3

    def __post_init__(self):
        if self.depth < 1:
            raise ValueError("depth must be at least 1")


@dataclass
class Settings:
    """Settings of a test."""

    rate: float = 0.1
    out: Path = Path("here")
    inner: Inner = field(default_factory=Inner)

    def __post_init__(self):
        if self.rate < 0:
            raise ValueError("rate must be at least 0")


def rows(steps):
    return [{"step": step, "reward": step / 4} for step in steps]


@pytest.fixture
def run(tmp_path):
    run = Run(tmp_path / "runs" / "one", Settings())
    for row in rows(range(4)):
        run.log(row)
    return run


def saver(text):
    return lambda folder: (folder / "weights").write_text(text)


# ------------------------------------------------------------------------------------------------ command line


def test_options_override_defaults():
    """Prevents an option that is read and dropped."""
    default = Settings(rate=0.5, inner=Inner(7))
    assert read_config(Settings, ["--out", "there"], default) == Settings(0.5, Path("there"), Inner(7))
    assert read_config(Settings, ["--inner.depth", "9", "--rate", "2"]) == Settings(2.0, inner=Inner(9))


class Terminal(io.TextIOWrapper):
    def isatty(self):
        return True


@pytest.mark.parametrize("terminal", [True, False])
@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--rat", "1"], "--rat"),
        (["--rate", "fast"], "fast"),
        (["--rate"], "--rate"),
        (["--rate", "-1"], "rate must be at least 0"),
        (["--inner.depth", "0"], "depth must be at least 1"),
        (["stray"], "stray"),
    ],
)
def test_a_bad_option_is_one_line_and_exit_code_2(args, message, terminal, capsys, monkeypatch):
    """Prevents a typo that is ignored, and boxes, colours, nothing at all or a traceback for it."""
    if terminal:  # where tyro colours its messages and draws their boxes in Unicode
        monkeypatch.setattr(sys, "stdout", Terminal(io.BytesIO(), "utf-8"))
        monkeypatch.setenv("TERM", "xterm")
    with pytest.raises(SystemExit) as stop:
        read_config(Settings, args)
    error = capsys.readouterr().err
    assert stop.value.code == 2 and message in error and "\x1b" not in error
    assert re.fullmatch(r"error: [A-Z].* \(--help lists the options\)\n", error)


def test_help_is_not_an_error(capsys):
    """Prevents --help from being reported as a bad option."""
    with pytest.raises(SystemExit) as stop:
        read_config(Settings, ["--help"])
    assert stop.value.code in (0, None) and "Settings of a test." in capsys.readouterr().out


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [(ValueError("no model"), 2, "error: no model\n"), (OSError("no disk"), 2, "error: no disk\n")]
    + [(KeyboardInterrupt(), 130, "")],
)
def test_expected_failures_end_a_program_without_traceback(error, code, line, capsys):
    """Prevents tracebacks for bad input and Ctrl-C."""

    def main():
        raise error

    with pytest.raises(SystemExit) as stop:
        runs.command(main)
    assert (stop.value.code, capsys.readouterr().err) == (code, line)


def test_bugs_keep_their_traceback():
    """Prevents a real bug from being hidden behind one polite line."""
    with pytest.raises(ZeroDivisionError):
        runs.command(lambda: 1 / 0)


# ------------------------------------------------------------------------------------------------ files


def test_a_file_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    """Prevents a crash or a full disk from leaving half a file in place of a whole one."""
    path = tmp_path / "state.json"
    runs.write(path, "old")

    def torn(self, text):
        with self.open("w") as file:
            file.write(text[:2])
        raise OSError("disk full")

    monkeypatch.setattr(Path, "write_text", torn)
    with pytest.raises(OSError, match="disk full"):
        runs.write(path, "new text")
    assert path.read_text() == "old"


def test_a_run_keeps_its_configuration_and_where_it_ran(run):
    """Prevents a result that nobody can reproduce."""
    saved = json.loads((run.folder / "config.json").read_text())
    found = saved.pop("provenance")
    assert saved == {"rate": 0.1, "out": "here", "inner": {"depth": 3}}
    assert {"python", "machine", "commit", *runs.versions()} <= found.keys() and all(found.values())
    assert found["torch"][0].isdigit()


def test_provenance_works_outside_a_repository(monkeypatch):
    """Prevents a downloaded copy without git from failing to start."""
    monkeypatch.setenv("PATH", "")
    assert runs.provenance()["commit"] == "unknown"


def test_a_new_run_refuses_a_folder_that_holds_one(run):
    """Prevents two runs mixed in one folder."""
    with pytest.raises(ValueError, match=f"already holds a run: pass --resume {run.folder}"):
        Run(run.folder, Settings())
    assert read_metrics(run.folder) == rows(range(4))
    Run(run.folder, Settings(rate=9), resume=True).log({"step": 4})
    assert len(read_metrics(run.folder)) == 5 and '"rate": 0.1' in (run.folder / "config.json").read_text()


def test_metrics_reach_tensorboard(run):
    """Prevents an empty dashboard."""
    run.board.flush()
    board = EventAccumulator(str(run.folder)).Reload()
    assert [(event.step, event.value) for event in board.Scalars("reward")] == [(s, s / 4) for s in range(4)]


@given(st.data())
def test_a_torn_last_line_costs_that_line_only(run, data):
    """Prevents a run killed while writing from being unreadable, wherever the line was cut."""
    whole = "".join(json.dumps(row) + "\n" for row in rows(range(4)))
    last = json.dumps({"step": 4, "reward": 1.0})
    run.metrics.write_text(whole + last[: data.draw(st.integers(0, len(last) - 1))])
    assert read_metrics(run.folder) == rows(range(4))


# ------------------------------------------------------------------------------------------------ checkpoints


def test_restore_gives_the_newest_checkpoint_and_drops_what_came_after(run):
    """Prevents an old checkpoint from being used, and steps from being counted twice in the metrics."""
    run.checkpoint(saver("first"), {"step": 1})
    run.checkpoint(saver("second"), {"step": 2, "seconds": 0.5})
    with run.metrics.open("a") as file:
        file.write('{"step": 4, "rew')
    folder, state = Run(run.folder, Settings(), resume=True).restore()
    assert ((folder / "weights").read_text(), state) == ("second", {"step": 2, "seconds": 0.5})
    assert read_metrics(run.folder) == rows(range(3))
    assert not [path for path in run.folder.iterdir() if path.suffix in (".new", ".old")]


def test_a_crash_while_saving_keeps_the_last_checkpoint(run):
    """Prevents the loss of a long run to a crash in the middle of a checkpoint."""
    run.checkpoint(saver("first"), {"step": 1})

    def crash(folder):
        saver("half")(folder)
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        run.checkpoint(crash, {"step": 2})
    assert run.restore() == (run.folder / "checkpoint", {"step": 1})
    run.checkpoint(saver("third"), {"step": 3})
    assert (run.restore()[0] / "weights").read_text() == "third"


def test_a_crash_between_two_renames_keeps_a_checkpoint(run):
    """Prevents a moment in which no checkpoint is found."""
    run.checkpoint(saver("first"), {"step": 1})
    (run.folder / "checkpoint").rename(run.folder / "checkpoint.old")
    folder, state = run.restore()
    assert ((folder / "weights").read_text(), state) == ("first", {"step": 1})


def test_a_run_without_checkpoint_says_so(run):
    """Prevents a traceback where nothing was saved yet."""
    with pytest.raises(ValueError, match="no checkpoint to resume from"):
        run.restore()
