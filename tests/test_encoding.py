"""Tests of what a machine whose encoding is not UTF-8 reads and prints."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

KIT = Path(__file__).parents[1]
SOURCES = [
    file
    for folder in ("", "runtime", "experiments", "scripts", "benchmarks", "tests")
    for file in (KIT / folder).glob("*.py")
]
READERS = {"read_text", "write_text", "open", "run", "Popen"}


def opens_text(call: ast.Call) -> bool:
    """Whether a call reads or writes text in an encoding that it does not name."""
    function = call.func
    name = function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")
    words = {keyword.arg for keyword in call.keywords}
    if name not in READERS or "encoding" in words:
        return False
    if name in ("run", "Popen"):
        return "text" in words
    if name == "open":
        modes = [a.value for a in call.args if isinstance(a, ast.Constant) and isinstance(a.value, str)]
        is_os = isinstance(function, ast.Attribute) and getattr(function.value, "id", "") in ("os", "gzip")
        return not is_os and not any("b" in mode for mode in modes)
    return True


@pytest.mark.parametrize("file", SOURCES, ids=lambda file: str(file.relative_to(KIT)))
def test_every_text_file_names_its_encoding(file):
    """Prevents files that Windows, whose default is cp1252, writes or reads in another way."""
    calls = [node for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))) if isinstance(node, ast.Call)]
    assert [call.lineno for call in calls if opens_text(call)] == []
    strict = [n for n in ({word.arg for word in call.keywords} for call in calls) if "text" in n and "errors" not in n]
    assert file.parent.name == "tests" or not strict  # other programs may print in another encoding


@pytest.mark.parametrize("encoding", ["cp1252", "ascii", "latin-1", "utf-8"])
@pytest.mark.parametrize("command", [
    "-m experiments.plots summary results/compare/mcts-seed1", "experiments/plots.py table results/compare/none-seed1",
    "ppo.py --help", "ppo.py --help-all", "evaluate.py --help", "evaluate.py models/√", "scripts/make_data.py --help",
    "scripts/doctor.py", "tests/fuzz.py --count 10", "benchmarks/scaling.py --help",
])  # fmt: skip
def test_every_terminal_and_pipe_gets_its_text(command, encoding):
    """Prevents a UnicodeEncodeError after the work is done, because a pipe lacks an arrow, a dash or a bar."""
    environment = {"PYTHONIOENCODING": encoding, "PYTHONUTF8": "0", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, *command.split()], capture_output=True, cwd=KIT, env=environment)
    said = (done.stdout + done.stderr).decode(encoding)
    assert done.returncode in {"evaluate.py models/√": [2], "scripts/doctor.py": [0, 1]}.get(command, [0]), said
    assert len(said) > 40 and "UnicodeEncodeError" not in said and "Traceback" not in said


@pytest.mark.parametrize("program", ["ppo.py --out", "evaluate.py", "scripts/make_data.py --out"])
def test_a_name_that_the_machine_can_not_write_is_refused(program, tmp_path):
    """Prevents an error of a library, which names no cause, after the run has begun."""
    environment = {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0", "HF_HUB_OFFLINE": "1"}
    look = [sys.executable, "-c", "import sys; print(sys.getfilesystemencoding())"]
    if b"utf-8" in subprocess.run(look, capture_output=True, env=environment).stdout:
        pytest.skip("names are UTF-8 here, whatever the locale")
    script, *options = program.split()
    command = [sys.executable, KIT / script, *options, "rün"]
    done = subprocess.run(command, capture_output=True, cwd=tmp_path, env=environment)
    assert done.returncode == 2 and done.stderr.endswith(b"lacks: set the variable PYTHONUTF8=1\n")
    assert done.stderr.count(b"error") == 1 and not list(tmp_path.iterdir())
