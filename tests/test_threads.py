"""Tests of runtime/threads.py: which programs wait passively."""

import subprocess
import sys
from pathlib import Path

import pytest

KIT = Path(__file__).parents[1]
FOLDERS = ("", "benchmarks", "experiments", "scripts")
PROGRAMS = sorted(
    str(file.relative_to(KIT))
    for folder in FOLDERS
    for file in (KIT / folder).glob("*.py")
    if "__main__" in file.read_text(encoding="utf-8") and file.name != "doctor.py"  # which computes nothing
)
# runs a program up to the moment at which it loads torch, and prints how its threads will wait
WATCH = """
import os, runpy, sys

class Watch:
    def find_spec(self, name, *_):
        if name == "torch":
            print("waits:", os.environ.get("OMP_WAIT_POLICY"), os.environ.get("KMP_BLOCKTIME"), flush=True)
            os._exit(0)

sys.meta_path.insert(0, Watch())
sys.path.insert(0, os.getcwd())
program = sys.argv[1]
sys.argv = [program] if program in ("ppo.py", "baselines.py") else [program, "--help"]
runpy.run_path(program, run_name="__main__")
"""


def waits(program: str, **environment: str) -> str:
    """What a program has said of its threads; nothing if it does not load torch."""
    command = [sys.executable, "-c", WATCH, program]
    done = subprocess.run(command, capture_output=True, text=True, encoding="utf-8", cwd=KIT, env=environment)
    assert done.returncode == 0, done.stderr
    return done.stdout.partition("waits: ")[2].strip()


def test_the_programs_are_found():
    """Prevents a test of nothing."""
    assert {"ppo.py", "baselines.py", "evaluate.py", "experiments/study.py", "scripts/warm_up.py"} <= {*PROGRAMS}


@pytest.mark.parametrize("program", PROGRAMS)
def test_every_program_waits_passively(program):
    """Prevents a run that falls to a fiftieth of its speed beside one other busy process."""
    assert waits(program) in ("PASSIVE 0", "")
    if program in ("ppo.py", "baselines.py", "evaluate.py"):
        assert waits(program) == "PASSIVE 0"


def test_a_users_choice_stays():
    """Prevents a kit that overrules an environment that somebody has set on purpose."""
    assert waits("evaluate.py", OMP_WAIT_POLICY="ACTIVE") == "ACTIVE None"
    assert waits("evaluate.py", KMP_BLOCKTIME="200") == "PASSIVE 200"
