"""The house: what may import what, how large the root is, and the README's loop."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import ppo
from config import preset_for

ROOT = Path(__file__).parents[1]
FOLDERS = {"runtime", "experiments", "benchmarks", "scripts", "tests"}
DOORS = {"ppo", "baselines", "evaluate", "play"}
MODULES = {file.stem: file for file in ROOT.glob("*.py")}
ALGORITHM = MODULES.keys() - DOORS


def imports(file: Path) -> set[str]:
    """The first names of all imports of a file, those inside functions too."""
    names = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add(node.module.partition(".")[0])
    return names


@pytest.mark.parametrize("name", sorted(ALGORITHM))
def test_the_algorithm_imports_no_folder_and_no_door(name):
    """Prevents an algorithm that can't be copied without the machine room."""
    assert not imports(MODULES[name]) & (FOLDERS | DOORS)


@pytest.mark.parametrize("name", sorted(MODULES.keys() - {"countdown", "play"}))
def test_the_algorithm_knows_no_countdown(name):
    """Prevents a search, a lesson or a loss that another task can't use: they know `sampling.Task` alone."""
    assert "countdown" not in imports(MODULES[name])


@pytest.mark.parametrize("file", sorted((ROOT / "runtime").glob("*.py")), ids=lambda file: file.stem)
def test_the_machine_room_imports_no_door(file):
    """Prevents a circle between the training loop and what serves it."""
    assert not imports(file) & (DOORS | {"experiments", "benchmarks", "scripts", "tests"})


def test_nothing_imports_the_laboratory():
    """Prevents a training run that needs the code of a study."""
    for name in DOORS & MODULES.keys():
        assert not imports(MODULES[name]) & {"experiments", "benchmarks", "scripts", "tests"}, name


def test_the_algorithm_has_no_circle():
    """Prevents root modules that can't be read one after another."""
    left = {name: imports(MODULES[name]) & ALGORITHM for name in ALGORITHM}
    while ready := [name for name, needs in left.items() if not needs & left.keys()]:
        for name in ready:
            del left[name]
    assert not left


def test_the_algorithm_loads_without_torch():
    """Prevents seconds of waiting for whoever only reads, searches with a policy of their own or asks for help."""
    names = ", ".join(sorted(ALGORITHM - {"policy"}))
    code = f"import sys; import {names}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


def test_the_root_stays_small():
    """Prevents a house that outgrows its reader."""
    lines = {name: len(file.read_text(encoding="utf-8").splitlines()) for name, file in MODULES.items()}
    assert len(lines) <= 11 and sum(lines.values()) <= 2_400 and lines["ppo"] <= 350


def test_the_readme_lists_the_root_modules():
    """Prevents a file that a newcomer is not told of, and one that is gone."""
    assert set(re.findall(r"^(\w+)\.py  ", (ROOT / "README.md").read_text(encoding="utf-8"), re.M)) == MODULES.keys()


def test_the_loop_of_the_readme_is_the_trainer(tmp_path):
    """Prevents a loop that a student copies and that trains another method than ppo.py."""
    (loop,) = re.findall(r"^```python\n(.*?)^```", (ROOT / "README.md").read_text(encoding="utf-8"), re.M | re.S)
    assert len(loop.splitlines()) <= 15
    shorter = {"steps": 2, "tokens": 0, "problems": 4}
    preset = 'preset_for("tiny", "mcts")'
    names: dict = {}
    exec(loop.replace(preset, f"{preset}.change(**{shorter})"), names)  # noqa: S102, our own text
    small = dict(out=tmp_path / "run", test_before=False, test_problems=1, test_samples=1, evaluations=0, checkpoints=1)
    ppo.train(preset_for("tiny", "mcts").change(**shorter, **small), ppo.collect_mcts)
    from runtime.loading import load_policy

    trained, start = (load_policy(m, train=False, seed=0) for m in (tmp_path / "run", preset_for("tiny", "mcts").model))
    for name, weight in trained.named_parameters():
        assert torch.equal(weight, names["policy"].get_parameter(name)), name
    assert any(not torch.equal(weight, start.get_parameter(name)) for name, weight in trained.named_parameters())
