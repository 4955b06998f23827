"""The figures of the README and of docs/results.md are those of the committed logs."""

import ast
import re
from pathlib import Path

import pytest

from runtime import cli
from runtime import run_folder
from experiments import tables
from runtime.cli import parse
from evaluate import Evaluation

ROOT = Path(__file__).parents[1]
BLOCK = r"<!-- table: python plots\.py (table|summary|validation|scores) ([^>]+) -->\n(.*?)\n<!-- end -->"
README = (ROOT / "README.md").read_text()
TEXTS = README + (ROOT / "docs/results.md").read_text()
BLOCKS = re.findall(BLOCK, TEXTS, re.S)
IMPORT = ast.Import, ast.ImportFrom
RUNS = sorted(path.parent for path in (ROOT / "results").rglob("metrics.jsonl*"))


@pytest.mark.parametrize(("what", "pattern", "table"), BLOCKS, ids=[f"{b[0]} {b[1]}" for b in BLOCKS])
def test_a_table_is_that_of_its_logs(what, pattern, table):
    """Prevents a number that was typed, or that outlived its run."""
    found = [folder for glob in pattern.split() for folder in sorted(ROOT.glob(glob))]
    folders = found if what == "scores" else [folder for folder in found if run_folder.log_of(folder)]
    assert folders and table == tables.TABLES[what](folders)


def test_no_table_is_passed_over():
    """Prevents the test above from passing because a block is written in another way."""
    assert len(BLOCKS) == TEXTS.count("<!-- table") > 0


def test_imports_only_point_down_the_list():
    """Prevents a circle, and a file that the README puts on the wrong floor."""
    names = re.findall(r"^(\w+)\.py  ", README, re.M)
    for place, name in enumerate(names[: names.index("checks") + 1]):
        nodes = ast.parse((ROOT / f"{name}.py").read_text()).body
        found = [n.module if isinstance(n, ast.ImportFrom) else n.names[0].name for n in nodes if isinstance(n, IMPORT)]
        assert not set(found) & set(names[:place]), f"{name} imports what is above it"


@pytest.mark.parametrize("folder", RUNS, ids=lambda path: "/".join(path.parts[-2:]))
def test_a_run_says_how_it_was_made(folder):
    """Prevents published numbers without seed, commit, versions and machine, and with uncommitted code."""
    config, rows = tables.load(folder)
    made = config["provenance"]
    assert {"torch", "python", "machine", "commit"} <= set(made) and "seed" in config
    assert ("test_mean_at_k" in rows[-1] or "stopped" in rows[-1]) and rows == run_folder.read_metrics(folder)


def test_results_stay_small():
    """Prevents a clone that takes minutes."""
    assert sum(path.stat().st_size for path in (ROOT / "results").rglob("*") if path.is_file()) < 20 * 2**20


def commands():
    """The commands of the README and docs/ that take options, [program, arguments]."""
    for file in (ROOT / "README.md", *(ROOT / "docs").glob("*.md")):
        for block in re.findall(r"^```\n(.*?)^```", file.read_text(), re.S | re.M):
            for line in block.replace("\\\n", " ").splitlines():
                found = re.search(r"(?:python|torchrun .*) (ppo|baselines|evaluate)\.py ([^#]+)", line)
                if found and "--resume" not in line:  # there is no run
                    yield pytest.param(*found.groups(), id=f"{file.name} {found[0].strip()}")


@pytest.mark.parametrize(("program", "options"), commands())
def test_a_command_of_the_readme_is_understood(program, options, tmp_path, monkeypatch):
    """Prevents a first command that is refused: an option renamed, a value that is no more."""
    monkeypatch.chdir(tmp_path)
    if program == "evaluate":
        cli.read_config(Evaluation, options.split())
    else:
        parse(options.replace("--method", "--search").split(), "mcts")
