"""Tests of runtime/run_folder.py: a run folder survives what happens to it."""

import json
import os
import resource
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from runtime import cli, files, provenance, run_folder
from runtime.run_folder import Run, read_metrics

SETTINGS = {"rate": 0.1, "out": Path("here"), "tree": {"depth": 3}}


def rows(steps):
    return [{"step": step, "reward": step / 4} for step in steps]


@pytest.fixture
def run(tmp_path):
    with Run(tmp_path / "runs" / "one", SETTINGS) as run:
        for row in rows(range(4)):
            run.log(row)
        yield run


def saver(text):
    return lambda folder: (folder / "weights").write_text(text, encoding="utf-8")


def resumed(run):
    """What a new process finds: the checkpoint's weights (None: no checkpoint) and state."""
    run.lock.release()
    with Run(run.folder, SETTINGS, resume=True) as again:
        return again.restored and (again.restored / "weights").read_text(encoding="utf-8"), again.state


# ------------------------------------------------------------------------------------------------ files


def test_what_is_written_is_on_the_disk_before_it_counts(run, monkeypatch):
    """Prevents an empty file in place of a whole one, and rows that are lost, when the power goes."""
    events, fsync, replace = [], os.fsync, Path.replace
    monkeypatch.setattr(os, "fsync", lambda handle: events.append(os.fstat(handle).st_ino) or fsync(handle))
    monkeypatch.setattr(Path, "replace", lambda *paths: events.append("replace") or replace(*paths))
    files.write(path := run.folder / "state.json", "text")
    assert events == [path.stat().st_ino, "replace", run.folder.stat().st_ino]
    events.clear()
    run.log({"step": 4})
    assert events == [run.metrics.stat().st_ino]


def test_a_run_keeps_its_configuration_and_where_it_ran(run):
    """Prevents a result that nobody can reproduce."""
    saved = json.loads((run.folder / "config.json").read_text(encoding="utf-8"))
    found = saved.pop("provenance")
    assert saved == {"rate": 0.1, "out": "here", "tree": {"depth": 3}}
    assert {"python", "machine", "commit", *provenance.versions()} <= found.keys() and all(found.values())
    assert found["torch"][0].isdigit()


def test_provenance_works_outside_a_repository(monkeypatch):
    """Prevents a downloaded copy without git from failing to start."""
    monkeypatch.setenv("PATH", "")
    assert provenance.provenance()["commit"] == "unknown"


def test_a_new_run_refuses_a_folder_that_holds_one(run):
    """Prevents two runs mixed in one folder, and a resumed run that forgets where it was made."""
    run.lock.release()
    with pytest.raises(ValueError, match=f"already holds a run: pass --resume {run.folder}"):
        Run(run.folder, SETTINGS)
    run.checkpoint(saver("first"), {"step": 3})
    made = json.loads((run.folder / "config.json").read_text(encoding="utf-8"))["provenance"]
    with Run(run.folder, SETTINGS | {"rate": 9}, resume=True) as again:
        assert (
            json.loads((run.folder / "config.json").read_text(encoding="utf-8"))["rate"] != 9
        )  # the checkpoint may not fit them
        again.write_config()
        again.log({"step": 4})
    assert read_metrics(run.folder) == [*rows(range(4)), {"step": 4}]
    saved = json.loads((run.folder / "config.json").read_text(encoding="utf-8"))
    assert (saved["rate"], saved["provenance"]) == (9, made)


def test_a_run_that_begins_again_is_of_the_code_that_begins_it(run, monkeypatch):
    """Prevents a result under a commit that has no part in it."""
    run.lock.release()
    monkeypatch.setattr(run_folder, "provenance", lambda: {"commit": "another"})
    Run(run.folder, SETTINGS, resume=True).lock.release()
    assert run_folder.read_settings(run.folder)["provenance"] == {"commit": "another"}


def test_two_processes_never_write_to_one_run(run):
    """Prevents metrics and checkpoints of two processes mixed up, and a lock that a failed start keeps."""
    for resume in (False, True):
        with pytest.raises(ValueError, match=f"another process is writing to {run.folder}"):
            Run(run.folder, SETTINGS, resume)
    run.lock.release()
    for _ in range(2):
        with pytest.raises(ValueError, match="already holds a run"):
            Run(run.folder, SETTINGS)


def test_metrics_reach_tensorboard(run):
    """Prevents an empty dashboard, and one that shows steps twice after --resume."""

    def shown():
        events = EventAccumulator(str(run.folder)).Reload()
        return [(event.step, event.value) for event in events.Scalars("lessons/reward")]

    run.checkpoint(saver("first"), {"step": 1})
    run.board.writer.flush()
    assert shown() == [(step, step / 4) for step in range(4)]
    time.sleep(1)  # its files are read in the order of the seconds in their names
    run.lock.release()
    with Run(run.folder, SETTINGS, resume=True) as again:
        again.log({"step": 2, "reward": 9.0})
    assert shown() == [(0, 0), (1, 0.25), (2, 9)]


@given(st.data())
def test_a_torn_last_line_costs_that_line_only(run, data):
    """Prevents a run killed while writing from being unreadable, wherever the line was cut."""
    whole = "".join(json.dumps(row) + "\n" for row in rows(range(4)))
    last = json.dumps({"step": 4, "reward": 1.0})
    run.metrics.write_text(whole + last[: data.draw(st.integers(0, len(last) - 1))], encoding="utf-8")
    assert read_metrics(run.folder) == rows(range(4))


@pytest.mark.parametrize("line", ['{"step": 1, "rew', "{}", "[1]", "3", "", '{"step": "one"}', "[" * 100_000])
def test_a_damaged_line_before_the_last_is_told(run, line):
    """Prevents a run that goes on, or is published, without rows that it had."""
    lines = run.metrics.read_text(encoding="utf-8").splitlines()
    run.metrics.write_text("\n".join([*lines[:1], line, *lines[2:]]), encoding="utf-8")
    with pytest.raises(ValueError, match="metrics.jsonl is damaged: line 2 is no row of a run$"):
        read_metrics(run.folder)


def test_metrics_are_kept_packed(run, tmp_path):
    """Prevents results that grow by a megabyte a run, rows lost on the way, and a traceback for a torn file."""
    run_folder.pack(run.folder, kept := tmp_path / "kept")
    assert read_metrics(kept) == read_metrics(run.folder) and run_folder.read_settings(
        kept
    ) == run_folder.read_settings(run.folder)
    file = kept / "metrics.jsonl.gz"
    assert (
        run_folder.log_of(kept) == file
        and run_folder.log_of(run.folder) == run.metrics
        and run_folder.log_of(tmp_path) is None
    )
    whole = file.read_bytes()
    for torn in (whole[:-9], whole[:9], b"x" * 30, whole[:20] + b"\0" * 9 + whole[29:]):
        file.write_bytes(torn)
        with pytest.raises(ValueError, match="metrics.jsonl.gz is damaged: it can't be unpacked"):
            read_metrics(kept)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
def test_a_full_disk_while_metrics_are_written_is_one_line(run):
    """Prevents a traceback, or a run that goes on without its metrics."""
    run.metrics.unlink()
    run.metrics.symlink_to("/dev/full")
    told = r"metrics.jsonl can't be written \(No space left on device\); the last checkpoint is kept$"
    with pytest.raises(OSError, match=told):
        run.log({"step": 4})


def test_a_read_only_folder_is_one_line(tmp_path, monkeypatch, capsys):
    """Prevents a traceback where nothing can be written."""

    def refuse(path, *_, **__):
        raise OSError(30, "Read-only file system", str(path))

    monkeypatch.setattr(Path, "mkdir", refuse)
    with pytest.raises(SystemExit):
        cli.command(lambda: Run(tmp_path / "run", SETTINGS))
    assert capsys.readouterr().err == f"error: {tmp_path / 'run'}: Read-only file system\n"


def test_ctrl_c_waits_for_a_write_in_progress(run):
    """Prevents half a checkpoint at Ctrl-C, and a Ctrl-C that is forgotten."""

    def interrupted(folder):
        signal.raise_signal(signal.SIGINT)
        saver("whole")(folder)

    with pytest.raises(KeyboardInterrupt):
        run.checkpoint(interrupted, {"step": 3})
    assert resumed(run) == ("whole", {"step": 3})
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)


# ------------------------------------------------------------------------------------------------ checkpoints


def test_a_run_goes_on_from_the_newest_checkpoint_and_drops_what_came_after(run):
    """Prevents an old checkpoint from being used, and steps from being counted twice in the metrics."""
    run.checkpoint(saver("first"), {"step": 1})
    run.checkpoint(saver("second"), {"step": 2, "seconds": 0.5})
    with run.metrics.open("a", encoding="utf-8") as file:
        file.write('{"step": 4, "rew')
    assert resumed(run) == ("second", {"step": 2, "seconds": 0.5})
    assert read_metrics(run.folder) == rows(range(3))
    assert {path.name for path in run.folder.iterdir() if path.is_dir()} == {"checkpoint", "checkpoint.old"}


def test_of_other_folders_no_old_one_is_kept(run):
    """Prevents a disk that fills up with policies nobody asked for."""
    for text in ("first", "second"):
        run.publish("best", saver(text))
    assert (run.folder / "best" / "weights").read_text(encoding="utf-8") == "second"
    assert {path.name for path in run.folder.iterdir() if path.is_dir()} == {"best"}


def test_a_kill_at_any_moment_of_a_checkpoint_loses_none(run, monkeypatch):
    """Prevents a moment in which no whole checkpoint is found: the process ends before each change of the disk."""

    class Killed(BaseException):
        pass

    def fatal(name, function):
        def call(*args, **options):
            left.pop()
            if not left:
                raise Killed(name)
            return function(*args, **options)

        return call

    run.checkpoint(saver("0"), {"step": 0})
    moments, found = [], []
    for survived in range(1, 50):
        left = [None] * survived
        with monkeypatch.context() as patch:
            for owner, name in ((Path, "mkdir"), (Path, "rename"), (Path, "write_text"), (shutil, "rmtree")):
                patch.setattr(owner, name, fatal(name, getattr(owner, name)))
            for module in (files, run_folder):
                patch.setattr(module, "sync", fatal("sync", module.sync))
            try:
                run.checkpoint(saver(str(survived)), {"step": survived})
            except Killed as moment:
                moments.append(str(moment))
        text, state = resumed(run)
        assert text == str(state["step"])
        found.append(state["step"])
        if left:
            break
    assert {"mkdir", "rename", "write_text", "rmtree", "sync"} == set(moments)
    assert found == sorted(found) and found[-1] == survived and not (run.folder / "checkpoint.damaged").exists()


def spoil(name, how):
    return lambda folder: (folder / name).write_bytes(how((folder / name).read_bytes()))


@pytest.mark.parametrize(
    "damage",
    [
        spoil("weights", lambda data: data[:-1]),
        spoil("weights", lambda data: b""),
        spoil("weights", lambda data: bytes([data[0] ^ 1]) + data[1:]),
        spoil("state.json", lambda data: data.replace(b"2", b"3")),
        spoil(files.SUMS, lambda data: b""),
        spoil(files.SUMS, lambda data: data.splitlines(keepends=True)[0]),
        spoil(files.SUMS, lambda data: b"\xff" + data),
        lambda folder: (folder / "weights").unlink(),
        lambda folder: (folder / files.SUMS).unlink(),
        lambda folder: [path.unlink() for path in folder.iterdir()],
        lambda folder: files.seal(folder) or spoil(files.SUMS, lambda data: data.replace(b"# 2", b"# 3"))(folder),
    ],
)
def test_a_damaged_checkpoint_is_told_and_the_one_before_it_used(run, damage, capsys):
    """Prevents a run that goes on from half a file, or not at all, or says nothing; and the whole one's loss."""
    run.checkpoint(saver("first"), {"step": 1})
    run.checkpoint(saver("second"), {"step": 2})
    damage(run.folder / "checkpoint")
    assert resumed(run) == ("first", {"step": 1})
    told = capsys.readouterr().out
    assert told.startswith(f"warning: {run.folder}/checkpoint is damaged") and told.count("\n") == 1
    assert read_metrics(run.folder) == rows(range(2))
    run.checkpoint(saver("third"), {"step": 2})
    assert resumed(run) == ("third", {"step": 2})
    spoil("weights", lambda data: b"x")(run.folder / "checkpoint")
    assert resumed(run) == ("first", {"step": 1})


def test_a_run_without_a_whole_checkpoint_is_refused_and_one_without_any_begins_again(run, capsys):
    """Prevents hours of training that start from nothing without a word."""
    run.checkpoint(saver("first"), {"step": 1})
    spoil("weights", lambda data: b"")(run.folder / "checkpoint")
    for _ in range(2):
        with pytest.raises(ValueError, match=f"no checkpoint in {run.folder} is whole"):
            resumed(run)
    assert read_metrics(run.folder) == rows(range(4))
    shutil.rmtree(run.folder / "checkpoint")
    assert resumed(run) == (None, {}) and read_metrics(run.folder) == []
    assert capsys.readouterr().out == f"{run.folder} has no checkpoint yet: from the start\n"


def test_a_foreign_file_is_no_damage(run):
    """Prevents a file manager's file from costing a run its newest checkpoint."""
    run.checkpoint(saver("first"), {"step": 1})
    (run.folder / "checkpoint" / ".DS_Store").write_text("foreign", encoding="utf-8")
    assert files.is_whole(run.folder / "checkpoint")
    check = ["sha256sum", "--check", "--strict", files.SUMS]
    assert not subprocess.run(check, cwd=run.folder / "checkpoint", capture_output=True).returncode


def test_other_settings_than_the_checkpoints_are_told(run, capsys):
    """Prevents a config.json edited by hand, or a checkpoint of another run, from passing in silence."""
    run.checkpoint(saver("first"), {"step": 1})
    run.lock.release()
    for settings in (SETTINGS | {"out": Path("moved")}, SETTINGS | {"rate": 3.0}):
        with Run(run.folder, settings, resume=True) as again:
            assert again.state == {"step": 1}
    assert capsys.readouterr().out == f"note: {run.folder}/checkpoint was written with other settings\n"


@pytest.mark.parametrize(
    "save",
    [
        lambda file: file.write_bytes(bytes(2**20)),
        lambda file: torch.save(torch.zeros(2**18), file),
        lambda file: save_file({"weights": torch.zeros(2**18)}, file),
    ],
    ids=["bytes", "torch", "safetensors"],
)
def test_a_full_disk_while_saving_is_one_line_and_keeps_the_last_checkpoint(run, save):
    """Prevents the loss of a long run to a full disk, and a traceback of torch's for it."""
    run.checkpoint(saver("first"), {"step": 1})
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**16, limits[1]))  # longer files fail, as on a full disk
    try:
        with pytest.raises(
            OSError, match=r"checkpoint.new can't be written \(.+\); the last checkpoint is kept$"
        ) as told:
            run.checkpoint(lambda folder: save(folder / "weights"), {"step": 2})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "\n" not in str(told.value)
    assert resumed(run) == ("first", {"step": 1})
    run.checkpoint(saver("third"), {"step": 3})
    assert resumed(run) == ("third", {"step": 3})


def test_a_run_with_only_its_first_test_is_not_finished(tmp_path):
    """Prevents a run killed after the test before training from counting as done."""
    metrics = tmp_path / "metrics.jsonl"
    metrics.write_text(json.dumps({"step": 0, "test_mean_at_k": 0.1}) + "\n", encoding="utf-8")
    assert not run_folder.finished(tmp_path) and not run_folder.finished(tmp_path / "nowhere")
    metrics.write_text(
        metrics.read_text(encoding="utf-8") + json.dumps({"step": 3, "test_mean_at_k": 0.1}) + "\n", encoding="utf-8"
    )
    assert run_folder.finished(tmp_path)
