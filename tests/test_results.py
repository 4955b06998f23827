"""The README's figures are those of the committed logs."""

import re
from pathlib import Path

import pytest

import plots
import runs

ROOT = Path(__file__).parents[1]
BLOCK = r"<!-- table: python plots\.py (table|summary|validation|scores) ([^>]+) -->\n(.*?)\n<!-- end -->"
BLOCKS = re.findall(BLOCK, (ROOT / "README.md").read_text(), re.S)
RUNS = sorted(path.parent for path in (ROOT / "results").rglob("metrics.jsonl*"))


@pytest.mark.parametrize(("what", "pattern", "table"), BLOCKS, ids=[f"{b[0]} {b[1]}" for b in BLOCKS])
def test_a_table_of_the_readme_is_that_of_its_logs(what, pattern, table):
    """Prevents a number that was typed, or that outlived its run."""
    found = [folder for glob in pattern.split() for folder in sorted(ROOT.glob(glob))]
    folders = found if what == "scores" else [folder for folder in found if runs.log_of(folder)]
    assert folders and table == plots.TABLES[what](folders)


def test_the_readme_has_a_table():
    """Prevents the test above from passing because nothing matched."""
    assert BLOCKS


@pytest.mark.parametrize("folder", RUNS, ids=lambda path: "/".join(path.parts[-2:]))
def test_a_run_says_how_it_was_made(folder):
    """Prevents published numbers without seed, commit, versions and machine, and with uncommitted code."""
    config, rows = plots.load(folder)
    made = config["provenance"]
    assert {"torch", "python", "machine", "commit"} <= set(made) and "seed" in config
    assert ("test_mean_at_k" in rows[-1] or "stopped" in rows[-1]) and rows == runs.read_metrics(folder)


def test_results_stay_small():
    """Prevents a clone that takes minutes."""
    assert sum(path.stat().st_size for path in (ROOT / "results").rglob("*") if path.is_file()) < 20 * 2**20
