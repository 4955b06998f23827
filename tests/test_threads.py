"""Tests of how the programs start: from any folder, and with threads that wait passively (runtime/threads.py)."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

KIT = Path(__file__).resolve().parents[1]
FILES = [
    file for folder in ("", "benchmarks", "experiments", "scripts", "tests") for file in (KIT / folder).glob("*.py")
]
PROGRAMS = sorted(
    str(file.relative_to(KIT))
    for file in FILES
    if not file.name.startswith("test_") and 'if __name__ == "__main__"' in file.read_text(encoding="utf-8")
)
MODULES = ["ppo", "baselines", "evaluate", *sorted(f"runtime.{file.stem}" for file in (KIT / "runtime").glob("*.py"))]
NOTEBOOKS = sorted((KIT / "notebooks").glob("*.ipynb"))
# a sitecustomize.py, which Python loads first: a program ends where it begins to load torch, and says how its threads
# wait; one that loads no torch says it at its end
WATCH = """
import atexit, os, sys

def say():
    print("waits:", os.environ.get("OMP_WAIT_POLICY"), os.environ.get("KMP_BLOCKTIME"), flush=True)

class Watch:
    def find_spec(self, name, *_):
        if name == "torch":
            say()
            os._exit(0)

atexit.register(say)
sys.meta_path.insert(0, Watch())
"""


@pytest.fixture(scope="module")
def waits(tmp_path_factory):
    """A function that starts Python, and returns what it says of its threads."""
    place = tmp_path_factory.mktemp("watch")
    (place / "sitecustomize.py").write_text(WATCH, encoding="utf-8")

    def start(args: list, folder: Path, **environment: str) -> str:
        environment |= {"PYTHONPATH": str(place), "MPLCONFIGDIR": str(place)}
        done = subprocess.run(
            [sys.executable, *args], cwd=folder, env=environment, capture_output=True, text=True, encoding="utf-8"
        )
        assert done.returncode == 0, done.stderr
        return done.stdout.rpartition("waits: ")[2].strip()

    return start


def options(program: str) -> list[str]:
    """Options with which a program starts, and does no work if it needs no torch."""
    return [] if program in ("ppo.py", "baselines.py", "scripts/doctor.py") else ["--help"]


def test_the_programs_are_found():
    """Prevents a test of nothing."""
    assert {"ppo.py", "baselines.py", "evaluate.py", "experiments/study.py", "scripts/warm_up.py"} <= {*PROGRAMS}
    assert {"benchmarks/steps.py", "scripts/doctor.py", "tests/fuzz.py"} <= {*PROGRAMS} and len(NOTEBOOKS) > 3


@pytest.mark.parametrize("way", ["file", "module"])
@pytest.mark.parametrize("program", PROGRAMS)
def test_every_program_starts_in_both_ways_and_waits_passively(program, way, waits, tmp_path):
    """Prevents a run that falls to a fiftieth of its speed beside one other busy process, and a program that is only
    found from the repository's root, or only with -m."""
    if way == "file":
        said = waits([KIT / program, *options(program)], tmp_path)
    else:
        said = waits(["-m", program.removesuffix(".py").replace("/", "."), *options(program)], KIT)
    assert said == ("None None" if program == "scripts/doctor.py" else "PASSIVE 0")  # the doctor computes nothing


@pytest.mark.parametrize("module", MODULES)
def test_a_program_of_ones_own_waits_passively(module, waits):
    """Prevents a student's script, or a process of Ray, whose first import of the kit comes to torch unprepared."""
    assert waits(["-c", f"import {module}"], KIT) == "PASSIVE 0"


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_waits_passively(notebook, waits):
    """Prevents the same in the course, whose first notebook needs no torch."""
    cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    lines = next(cell["source"] for cell in cells if cell["cell_type"] == "code")
    source = "".join(line for line in "".join(lines).splitlines(True) if line.lstrip()[:1] not in ("%", "!"))
    assert waits(["-c", source], notebook.parent) == ("None None" if notebook.stem.startswith("01") else "PASSIVE 0")


def test_a_users_choice_stays(waits):
    """Prevents a kit that overrules an environment that somebody has set on purpose."""
    start = [KIT / "evaluate.py", "--help"]
    assert waits(start, KIT, OMP_WAIT_POLICY="ACTIVE") == "ACTIVE None"
    assert waits(start, KIT, OMP_WAIT_POLICY="ACTIVE", KMP_BLOCKTIME="200") == "ACTIVE 200"
    assert waits(start, KIT, KMP_BLOCKTIME="200") == "PASSIVE 200"


@pytest.mark.parametrize("environment, spins", [
    ({}, "0"), ({"GOMP_SPINCOUNT": "77"}, "77"), ({"OMP_WAIT_POLICY": "ACTIVE"}, "30000000000"),
])  # fmt: skip
def test_torch_reads_the_choice(environment, spins):
    """Prevents a variable that comes too late, or that torch's OpenMP does not read."""
    if not any((Path(sys.prefix) / "lib").glob("python*/site-packages/torch/lib/libgomp*")):
        pytest.skip("torch's OpenMP is not GNU's here")
    done = subprocess.run(
        [sys.executable, "-c", "import runtime.threads, torch"], env=environment | {"OMP_DISPLAY_ENV": "VERBOSE"},
        cwd=KIT, capture_output=True, text=True, encoding="utf-8",
    )  # fmt: skip
    assert done.returncode == 0 and f"GOMP_SPINCOUNT = '{spins}'" in done.stderr
