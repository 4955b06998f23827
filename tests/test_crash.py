"""A short crash test, by scripts/crash_test.py; `make crash-test` runs the whole of it."""

import subprocess
import sys

import pytest


@pytest.mark.slow
def test_a_run_that_is_killed_three_times_ends_like_an_undisturbed_one(tmp_path):
    """Prevents a run that loses steps, metrics or weights to SIGKILL, in a real process at a random moment."""
    options = f"--runs 1 --kills 3 --out {tmp_path / 'runs'}"
    command = [sys.executable, "-m", "scripts.crash_test", *options.split()]
    done = subprocess.run(command, capture_output=True, text=True, encoding="utf-8")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "| same | same | same |" in done.stdout and "3 kills" in done.stdout
