"""Tests of runtime/files.py: files are written whole or not at all, and what is wrong with one costs one line."""

from pathlib import Path

import pytest
import torch

from runtime import files


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
    assert path.read_text() == "old"


@pytest.mark.parametrize("error", [OSError(), RuntimeError(), RuntimeError("\n")])
def test_an_error_without_a_text_is_one_line(tmp_path, error):
    """Prevents an IndexError in the place of what went wrong."""
    with pytest.raises(OSError, match=r"there can't be written \(\S*\); the last"), files.writing(tmp_path / "there"):
        raise error


def test_a_gpu_out_of_memory_is_no_full_disk(tmp_path):
    """Prevents advice about the disk where --rows should be lowered."""
    with pytest.raises(torch.OutOfMemoryError), files.writing(tmp_path):
        raise torch.OutOfMemoryError("CUDA out of memory")
