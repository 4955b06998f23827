"""The figures of the README and of docs/results.md are those of the committed logs."""

import json
import re
from dataclasses import asdict
from pathlib import Path

import pytest

import evaluate
from config import Config
from experiments import tables
from runtime import cli, run_folder
from runtime.evaluation import EVALUATIONS

ROOT = Path(__file__).parents[1]
COMMAND = r"python -m experiments\.plots (table|summary|overview|tokens|validation|scores) ([^>]+)"
TEXTS = (ROOT / "README.md").read_text(encoding="utf-8") + (ROOT / "docs/results.md").read_text(encoding="utf-8")
BLOCKS = re.findall(rf"<!-- table: {COMMAND} -->\n(.*?)\n<!-- end -->", TEXTS, re.S)
RUNS = sorted(path.parent for path in (ROOT / "results").rglob("metrics.jsonl*"))


@pytest.mark.parametrize(("what", "pattern", "table"), BLOCKS, ids=[f"{b[0]} {b[1]}" for b in BLOCKS])
def test_a_table_is_that_of_its_logs(what, pattern, table):
    """Prevents a number that was typed, or that outlived its run."""
    paths = [path for glob in pattern.split() for path in sorted(ROOT.glob(glob))]
    if what != "scores":
        paths = [path for path in paths if run_folder.log_of(path)]
    assert paths and table == tables.TABLES[what](paths)


def test_no_table_is_passed_over():
    """Prevents the test above from passing because a block is written in another way."""
    assert len(BLOCKS) == TEXTS.count("<!-- table") > 0


@pytest.mark.parametrize("folder", RUNS, ids=lambda path: "/".join(path.parts[-2:]))
def test_a_run_says_how_it_was_made(folder):
    """Prevents published numbers without seed, commit, versions and machine, and with uncommitted code."""
    config, rows = tables.load(folder)
    made = config["provenance"]
    assert {"torch", "python", "machine", "commit"} <= set(made) and "seed" in config
    assert ("test_mean_at_k" in rows[-1] or "stopped" in rows[-1]) and rows == run_folder.read_metrics(folder)


@pytest.mark.parametrize("folder", RUNS, ids=lambda path: "/".join(path.parts[-2:]))
def test_the_settings_of_a_run_are_settings_of_today(folder):
    """Prevents results whose settings nobody can run again: a setting that was renamed, left out or is refused."""
    saved = run_folder.read_settings(folder)
    config, problems = cli.restore(Config, saved, folder)
    saved.pop("provenance")
    assert not problems and json.loads(json.dumps(asdict(config))) == saved


EVALUATED = sorted(file for stage in ("cold", "fresh", "search") for file in (ROOT / "results" / stage).glob("*.json"))


@pytest.mark.parametrize("file", EVALUATED, ids=lambda path: "/".join(path.parts[-2:]))
def test_the_settings_of_an_evaluation_are_settings_of_today(file):
    """Prevents the same of evaluations."""
    result = tables.read_scores(file)
    settings = asdict(EVALUATIONS[result["method"]](method=result["method"]))
    assert result.keys() == settings.keys() | {"scores", "provenance"}
    assert result.get("tree", {}).keys() == settings.get("tree", {}).keys()


def test_results_name_no_folder_of_a_machine():
    """Prevents a path in results/ that is of use on one machine alone."""
    for file in (ROOT / "results").rglob("*.json"):
        assert not re.search(r'"(model|out|data|task)": "/', file.read_text(encoding="utf-8")), file


def test_results_stay_small():
    """Prevents a clone that takes minutes."""
    assert sum(path.stat().st_size for path in (ROOT / "results").rglob("*") if path.is_file()) < 20 * 2**20


def commands():
    """The commands of the README and docs/ that take options, [program, arguments]."""
    texts = [file for file in (ROOT / "docs").glob("*.md") if file.name != "LOG.md"]  # which tells of earlier versions
    for file in (ROOT / "README.md", *texts):
        for language, block in re.findall(r"^```(\w*)\n(.*?)^```$", file.read_text(encoding="utf-8"), re.S | re.M):
            if language == "python":
                continue
            for line in block.replace("\\\n", " ").splitlines():
                command = re.search(r"(?:python|torchrun .*) (ppo|baselines|evaluate)\.py ([^#]+)", line)
                if command and "--resume" not in line:  # there is no run
                    yield pytest.param(*command.groups(), id=f"{file.name} {command[0].strip()}")


@pytest.mark.parametrize(("program", "options"), commands())
def test_a_command_of_the_readme_is_understood(program, options, tmp_path, monkeypatch):
    """Prevents a first command that is refused: an option renamed, a value that is no more."""
    monkeypatch.chdir(tmp_path)
    if program == "evaluate":
        evaluate.parse(options.split())
    else:
        cli.parse(options.split(), "mcts")
