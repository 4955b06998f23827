"""Tests of runtime/cli.py: options become settings, and bad input costs one line, not a traceback."""

import io
import re
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from runtime import cli, guard
from runtime.cli import read_config


@dataclass(frozen=True)
class Inner:
    depth: int = 3

    def __post_init__(self):
        if self.depth < 1:
            raise ValueError("depth must be at least 1")


@dataclass(frozen=True)
class Settings:
    """Settings of a test."""

    rate: float = 0.1
    out: Path = Path("here")
    inner: Inner | None = Inner()

    def __post_init__(self):
        if self.rate < 0:
            raise ValueError("rate must be at least 0")


def test_options_override_defaults():
    """Prevents an option that is read and dropped."""
    default = Settings(rate=0.5, inner=Inner(7))
    assert read_config(Settings, ["--out", "there"], default) == Settings(0.5, Path("there"), Inner(7))
    assert read_config(Settings, ["--depth", "9", "--rate", "2"]) == Settings(2.0, inner=Inner(9))


def test_a_topic_that_is_not_read_has_no_options(capsys):
    """Prevents an option of another method that is read and dropped."""
    default = Settings(inner=None)
    assert read_config(Settings, ["--rate", "2"], default) == Settings(2.0, inner=None)
    for unread, message in (
        ({}, "there is no option --depth (--help lists the options)"),
        ({"depth": "grpo"}, "grpo has no use for --depth: leave it out"),
    ):
        with pytest.raises(SystemExit) as stop:
            read_config(Settings, ["--depth", "9"], default, unread)
        assert (stop.value.code, capsys.readouterr().err) == (2, f"error: {message}\n")


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
        (["--depth", "0"], "depth must be at least 1"),
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
    assert re.fullmatch(r"error: \S.* \(--help lists the options\)\n", error)


def test_help_is_not_an_error(capsys):
    """Prevents --help from being reported as a bad option."""
    with pytest.raises(SystemExit) as stop:
        read_config(Settings, ["--help"])
    assert stop.value.code in (0, None) and "Settings of a test." in capsys.readouterr().out


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [(ValueError("no model"), 2, "error: no model\n"), (OSError("no disk"), 2, "error: no disk\n")]
    + [(guard.Stopped("collapsed"), 3, "error: collapsed\n"), (KeyboardInterrupt(), 130, "")],
)
def test_expected_failures_end_a_program_without_traceback(error, code, line, capsys):
    """Prevents tracebacks for bad input and Ctrl-C, and a collapsed run that a script takes for a bad command."""

    def main():
        raise error

    with pytest.raises(SystemExit) as stop:
        cli.command(main)
    assert (stop.value.code, capsys.readouterr().err) == (code, line)


def test_bugs_keep_their_traceback():
    """Prevents a real bug from being hidden behind one polite line."""
    with pytest.raises(ZeroDivisionError):
        cli.command(lambda: 1 / 0)
