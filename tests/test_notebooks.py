"""Every notebook runs from top to bottom, in its quick mode, and is committed with what it showed."""

import ast
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

NOTEBOOKS = sorted((Path(__file__).parents[1] / "notebooks").glob("*.ipynb"))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs(path, monkeypatch):
    """Prevents a first impression that is a traceback: a function renamed, a result moved."""
    monkeypatch.setenv("QUICK", "1")
    notebook = nbformat.read(path, as_version=4)
    NotebookClient(notebook, timeout=120, resources={"metadata": {"path": path.parent}}).execute()


def only_defines(code: str) -> bool:
    """Whether a cell has nothing to show: functions, classes, and names that get values."""
    silent = ast.FunctionDef, ast.ClassDef, ast.Assign, ast.Import, ast.ImportFrom
    return all(isinstance(statement, silent) for statement in ast.parse(code).body)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_is_committed_with_its_outputs(path):
    """Prevents notebooks that show nothing on a forge, and ones committed after a failure or out of order."""
    code = [cell for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    assert all(cell.outputs or cell.source.startswith("%%capture") or only_defines(cell.source) for cell in code)
    assert not any(output.output_type == "error" for cell in code for output in cell.outputs)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_is_committed_with_pictures_in_place_of_sliders(path):
    """Prevents "Error displaying widget" on a forge. Execute a notebook with sliders where ipywidgets is missing."""
    notebook = nbformat.read(path, as_version=4)
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    assert not any("application/vnd.jupyter.widget-view+json" in output.get("data", {}) for output in outputs)
    assert "widgets" not in notebook.metadata


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_says_what_one_learns_and_where_to_go_next(path):
    """Prevents a reader who does not know why to start, how long it takes, or what comes after."""
    text = [cell.source for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "markdown"]
    assert "**You learn**" in text[0] and "**Time:**" in text[0]
    assert "## Exercises" in text[-1] and "## Where to go next" in text[-1]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_has_no_long_code_line(path):
    """Prevents code that a reader has to scroll sideways for: a forge shows about 90 characters."""
    code = [cell.source for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code"]
    assert max(len(line) for source in code for line in source.splitlines()) <= 88
