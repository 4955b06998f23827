"""The exercises of the notebooks: solutions pass their checks, stubs and plausible mistakes do not."""

import math
import re
import sys
from pathlib import Path

import nbformat
import numpy as np
import pytest

NOTEBOOKS = Path(__file__).parents[1] / "notebooks"
sys.path.append(str(NOTEBOOKS))

import checks  # noqa: E402, a module of the notebooks' folder

CELLS = nbformat.read(NOTEBOOKS / "exercises.ipynb", as_version=4).cells
STUBS = [cell.source for cell in CELLS if cell.cell_type == "code" and "print(checks." in cell.source]
SOLUTIONS = [re.findall(r"```python\n(.*?)```", cell.source, re.S)[0] for cell in CELLS if "Solution" in cell.source]
NAMES = [re.findall(r"print\(checks\.(\w+)\((\w+)\)\)", stub)[0] for stub in STUBS]


def checked(name: str, function: str, code: str) -> str:
    """What the check called `name` says of a function that some code defines."""
    names = {"math": math, "np": np, "re": re}
    exec(code, names)  # noqa: S102, our own text
    return getattr(checks, name)(names[function])


def test_there_are_eight_exercises_with_solutions():
    """Prevents an exercise without a solution, or a check that no exercise uses."""
    assert len(STUBS) == len(SOLUTIONS) == 8
    used = {name for name, _ in NAMES}
    assert used == {name for name, value in vars(checks).items() if str(value.__doc__).startswith("function(")}


@pytest.mark.parametrize(("names", "solution"), zip(NAMES, SOLUTIONS), ids=[name for name, _ in NAMES])
def test_a_solution_passes(names, solution):
    """Prevents a folded solution that its own check refuses."""
    assert checked(*names, solution) == checks.RIGHT


@pytest.mark.parametrize(("names", "stub"), zip(NAMES, STUBS), ids=[name for name, _ in NAMES])
def test_a_stub_is_not_yet_right(names, stub):
    """Prevents a check that says nothing: an empty function fails, and in words of its own."""
    assert checked(*names, stub.partition("print(checks.")[0]).startswith("Not yet")


MISTAKES = {
    "puct": {
        "1 + N": "return q + c * prior * math.sqrt(parent_visits) / np.maximum(visits, 1)",
        "square root": "return q + c * prior * parent_visits / (1 + visits)",
        "For Q": "return q + prior * math.sqrt(parent_visits) / (1 + visits)",
        "shape": "return 1.0",
    },
    "backup": {
        "root has 0 visits": """
            node = leaf
            while node.parent:
                node.visits += 1; node.total += value; node = node.parent""",
        "no sign": """
            node, sign = leaf, 1
            while node:
                node.visits += 1; node.total += sign * value; node, sign = node.parent, -sign""",
        "the loop does not end": """
            while leaf:
                leaf.visits += 1; leaf.total += value""",
    },
    "best_path": {
        "highest Q": """
            texts, node = [], tree
            while node["children"]:
                node = max(node["children"], key=lambda child: child["q"]); texts.append(node["text"])
            return texts""",
        "higher Q": """
            texts, node = [], tree
            while node["children"]:
                node = max(node["children"], key=lambda child: child["visits"]); texts.append(node["text"])
            return texts""",
        "Leave out the root": 'return ["", "a", "d", "e"]',
        "not of the kind": "return 3",
    },
    "verifier": {
        "a text that is a program": """
            try:
                used = [int(n) for n in re.findall("[0-9]+", text)]
                return all(used.count(n) <= numbers.count(n) for n in used) and (
                    "import" in text or eval(text) == target)
            except Exception:
                return False""",
        "used too often": """
            try:
                used = [int(n) for n in re.findall("[0-9]+", text)]
                if not set(used) <= set(numbers) or not re.fullmatch("[-0-9+*() ]*", text) or "**" in text:
                    return False
                return eval(text) == target
            except Exception:
                return False""",
    },
    "advantages": {
        "standard deviation": "return np.array(rewards) - np.mean(rewards)",
        "n - 1": "return (np.array(rewards) - np.mean(rewards)) / (np.std(rewards) + 1e-4)",
        "an advantage for each": "return np.std(rewards)",
        "equal rewards": """
            values = np.array(rewards)
            return (values - values.mean()) / (values.std(ddof=1) + 1e-4) + (values.std() == 0)""",
    },
    "cispo_loss": {
        "sign": "return (logprobs - old).exp().clamp(max=clip).detach() * advantage * logprobs",
        "capped": "return -(logprobs - old).exp().detach() * advantage * logprobs",
        "a loss for each token": "return -((logprobs - old).exp().detach() * advantage * logprobs).mean()",
        "detach the ratio alone": "return -((logprobs - old).exp().clamp(max=clip) * advantage * logprobs).detach()",
        "detach": "return -(logprobs - old).exp().clamp(max=clip) * advantage * logprobs",
    },
    "workers": {
        "not of the kind": "return 0",
        "leave a mark": "return [int(np.argmax(q))] * count",
        "crowd at one child": """
            total, pending, chosen = q * visits, np.zeros(len(q)), []
            for _ in range(count):
                best = int(np.argmax(total / (visits + pending))); pending[best] += 1; chosen.append(best)
            return chosen""",
    },
    "pass_at_k": {
        "with replacement": "return 1 - (1 - right / n) ** k",
        "the chance is": "return min(1.0, right * k / n)",
    },
}


@pytest.mark.parametrize(
    ("names", "solution", "words"),
    [(names, solution, words) for names, solution in zip(NAMES, SOLUTIONS) for words in MISTAKES[names[0]]],
    ids=[f"{names[0]} {words}" for names in NAMES for words in MISTAKES[names[0]]],
)
def test_a_mistake_is_told_in_words(names, solution, words):
    """Prevents a check that lets a plausible mistake pass, or that does not say what it is."""
    head, body = solution.partition("\n")[0], MISTAKES[names[0]][words].strip("\n")
    lines = body.splitlines()
    indent = len(lines[0]) - len(lines[0].lstrip())
    code = "\n".join([head, *(f"    {line[indent:]}" for line in lines)])
    assert words in checked(*names, code)
