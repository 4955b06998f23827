"""Tests of runtime/files.py: files are written whole or not at all, and what is wrong with one costs one line."""

import shlex
from pathlib import Path

import pytest
import torch

from config import preset_for
from runtime import files, loading, report, run_folder
from runtime.scores import Score
from sampling import Progress, Usage


def test_a_file_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    """Prevents a crash or a full disk from leaving half a file in place of a whole one."""
    path = tmp_path / "state.json"
    files.write(path, "old")

    def torn(self, content):
        with self.open("wb") as file:
            file.write(content[:2])
        raise OSError("disk full")

    monkeypatch.setattr(Path, "write_bytes", torn)
    with pytest.raises(OSError, match="disk full"):
        files.write(path, "new text")
    assert path.read_text(encoding="utf-8") == "old"


@pytest.mark.parametrize("error", [OSError(), RuntimeError(), RuntimeError("\n")])
def test_an_error_without_a_text_is_one_line(tmp_path, error):
    """Prevents an IndexError in the place of what went wrong."""
    with pytest.raises(OSError, match=r"there can't be written \(\S*\); the last"), files.writing(tmp_path / "there"):
        raise error


def test_a_gpu_out_of_memory_is_no_full_disk(tmp_path):
    """Prevents advice about the disk where --rows should be lowered."""
    with pytest.raises(torch.OutOfMemoryError), files.writing(tmp_path):
        raise torch.OutOfMemoryError("CUDA out of memory")


NAMES = ["plain", "two words", "it's", 'a "quote"', "$HOME", "rün", "-run", "--force", "a;b", "(1)"]


@pytest.mark.parametrize("name", NAMES)
def test_a_path_in_advice_can_be_typed(name, tmp_path, monkeypatch):
    """Prevents advice that a shell takes apart at a blank, and a folder that a program takes for an option."""
    monkeypatch.chdir(tmp_path)
    folder = Path(name)
    (folder / "checkpoint").mkdir(parents=True)
    (folder / "metrics.jsonl").touch()
    advice = []
    for refused in (run_folder.check_unused, loading.locate):
        with pytest.raises(ValueError) as error:
            refused(folder)
        advice.append(str(error.value).partition("--resume ")[2].partition(" or ")[0].rstrip(","))
    score = Score(1, 1, 0, 0, 0, 0, 0, 0, 0, 0, Usage(), [0])
    text = report.ending({"after": score}, Progress(), preset_for("tiny", "mcts").change(out=folder))
    advice.append(text.partition("play.py ")[2].partition("\n")[0])
    for typed in advice:
        (argument,) = shlex.split(typed)
        assert Path(argument) == folder and not argument.startswith("-")
    assert shlex.split(text.partition("play:")[2].partition("\n")[0])[:2] == ["python", str(files.KIT / "play.py")]


def test_on_windows_a_path_has_double_quotes(monkeypatch):
    """Prevents single quotes, which cmd.exe takes for letters."""
    monkeypatch.setattr(files.os, "name", "nt")
    typed = [files.typed(path) for path in ("runs/plain", "my runs", "-run")]
    monkeypatch.undo()
    assert typed == ["runs/plain", '"my runs"', "./-run"]
