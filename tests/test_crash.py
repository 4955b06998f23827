"""The crash test in small: scripts/crash_test.py, `make crash-test` for the whole of it."""

import subprocess
import sys


def test_a_run_that_is_killed_three_times_ends_like_one_left_alone(tmp_path):
    """Prevents a run that loses steps, metrics or weights to SIGKILL, in a real process at a random moment."""
    command = [
        sys.executable,
        "-m",
        "scripts.crash_test",
        "--runs",
        "1",
        "--kills",
        "3",
        "--out",
        str(tmp_path / "runs"),
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "| same | same | same |" in done.stdout and "3 kills" in done.stdout
