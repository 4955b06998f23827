"""Tests of play.py: what a person types and sees."""

import io
import re
import shutil
from pathlib import Path

import pytest

import play
from config import SearchConfig
from countdown import Countdown, Problem, evaluate_expression
from mcts import Node, Tree
from ppo import collect_samples, train
from runtime import drawing, playing
from runtime.cli import command
from runtime.torch_sampler import TorchSampler
from sampling import Reward

PROBLEM = Problem((3, 5, 7, 9), 44)


@pytest.fixture
def run(tiny_config, monkeypatch, tmp_path):
    """The folder of a run of one step, runs/one, as seen from the working folder."""
    monkeypatch.chdir(tmp_path)
    config = tiny_config("none", tokens=0, steps=1, out=Path("runs/one"))
    train(config, collect_samples)
    return "runs/one"


@pytest.fixture
def typed(monkeypatch, capsys):
    """Runs the program with a command line and what a person types; returns what is shown, and the exit code."""

    def run(args: str, lines: str = "") -> tuple[str, int]:
        monkeypatch.setattr("sys.argv", ["play.py", *args.split()])
        monkeypatch.setattr("sys.stdin", io.StringIO(lines))
        try:
            command(play.main)
            code = 0
        except SystemExit as stop:
            code = stop.code
        written = capsys.readouterr()
        return written.out + written.err, code

    return run


def test_a_run_plays_beside_its_base(run, checkpoint, typed):
    """Prevents a trained policy that nobody can compare with what it was."""
    out, code = typed(f"{run} 3 5 7 9 44 --samples 9 --search")
    assert code == 0
    loaded, _, problem, *_ = out.splitlines()
    assert loaded == f"loading {checkpoint} and {run} …" and problem == "3 5 7 9 → 44"
    assert out.index(f"{checkpoint}: 0 of 9 answers are right") < out.index(f"{run}: 0 of 9 answers are right")
    solution = re.search(r"^solver: (.*)$", out, re.M)[1]
    assert evaluate_expression(solution, PROBLEM.numbers) == 44
    assert re.search(r"^ +N +Q +32 simulations, \d+ nodes", out, re.M) and "\x1b" not in out


@pytest.mark.parametrize("words", ["", "3 5 7 9 44"])
def test_without_a_model_the_newest_run_plays(run, typed, words):
    """Prevents a person who has to look for the folder of what was just trained."""
    out, code = typed(words)
    assert code == 0 and out.splitlines()[0].endswith(f" and {run} …")


def test_an_adapter_plays_beside_its_base(tiny_config, qwen, typed, monkeypatch, tmp_path):
    """Prevents a game that knows the embedded policy alone: a chat model with an adapter, saved without its run."""
    monkeypatch.chdir(tmp_path)
    config = tiny_config("none", tokens=0, steps=1, out=Path("runs/one"), model=str(qwen), lora_rank=2, max_tokens=24)
    train(config, collect_samples)
    out, code = typed("3 5 7 9 44 --samples 3")
    assert code == 0 and f"{qwen}: " in out and "runs/one: " in out
    shutil.move("runs/one/policy", "adapter")
    out, code = typed("adapter 3 5 7 9 44 --samples 2")
    assert code == 0 and f"loading {qwen} and adapter …" in out


def test_without_a_run_the_embedded_policy_plays(typed, monkeypatch, tmp_path):
    """Prevents a newcomer's first command that fails for want of a run."""
    monkeypatch.chdir(tmp_path)
    out, code = typed("3 5 7 9 44 --samples 4")
    assert code == 0 and "assets/tiny: " in out


def test_the_prompt_goes_on_asking(run, typed):
    """Prevents a game that ends at the first typing error, and one that has no end."""
    out, code = typed(f"{run} --samples 2", "2 3 5\nseven\n6 6 37\n\n")
    assert code == 0 and "solver: 2 + 3" in out and "solver: no answer reaches it" in out
    assert "error: a problem is numbers from 1 to" in out and "2 3 → 5" in out and "6 6 → 37" in out


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ("3 5 seven 44", "a problem is numbers from 1 to 999,999,999, the target last"),
        ("3", "a problem is numbers from 1 to 999,999,999, the target last"),
        ("0 5 9", "a problem is numbers from 1 to 999,999,999, the target last"),
        ("runs/none 3 5 8", "no such folder"),
        ("3 5 8 --samples 0", "samples must be at least 1"),
        ("3 5 8 --serch", "did you mean --search?"),
    ],
)
def test_bad_input_is_one_line(args, message, typed, monkeypatch, tmp_path):
    """Prevents a traceback, and a policy that is loaded for nothing."""
    monkeypatch.chdir(tmp_path)
    out, code = typed(args)
    assert code == 2 and message in out and out.splitlines()[-1].startswith("error: ") and "Traceback" not in out


def test_answers_are_counted(policy):
    """Prevents counts of other samples, and the rarest answers in place of the commonest."""
    table = playing.Table([], Countdown(), SearchConfig(max_tokens=2), True, playing.Play(samples=50))
    first, *lines = play.commonest(playing.Player("it", policy, TorchSampler(policy)), PROBLEM, table)
    assert first == "it: 0 of 50 answers are right"
    counts = [int(line.split()[0]) for line in lines]
    assert sum(counts) == 50 and lines[-1].endswith("others") and len(counts) == play.COMMONEST + 1
    assert counts[:-1] == sorted(counts[:-1], reverse=True) and all("✗ no answer" in line for line in lines[:-1])


def test_the_settings_are_those_of_the_run(run):
    """Prevents a policy that plays with another model's limits; a run without a tree gets its preset's."""
    config = playing.config_of(run)
    assert config.task.max_tokens == 8 and config.tree.simulations == 32
    assert playing.config_of("assets/tiny").preset == "tiny"


# ------------------------------------------------------------------------------------------------ drawing


def grown(texts, policy):
    """A tree whose root has a child for each text, visited 1, 2, 3 … times; the last one is a wrong answer."""
    tree = Tree(PROBLEM, [1], None)
    for visits, text in enumerate(texts, 1):
        tokens = policy.tokenizer(text, add_special_tokens=False)["input_ids"]
        tree.root.children.append(Node(tokens, [], tree.root, 1, len(tokens), visits=visits))
        tree.root.visits += visits
    tree.root.children[-1].reward = Reward(-1.0, False, True, "wrong value")
    return tree


def test_a_tree_that_is_too_large_keeps_its_best_nodes(policy):
    """Prevents a drawing that scrolls away, and one without the chosen answer."""
    tree = grown([f"{n} + 1" for n in range(30)], policy)
    lines = drawing.tree_lines(tree, policy, tree.root.children[0], (80, 12))
    assert len(lines) == 10 and lines[-1] == "… and 23 visited nodes more"
    assert [int(line.split()[0]) for line in lines[1:-1]] == [465, 30, 29, 28, 27, 26, 25, 1][:8]
    assert [line for line in lines if "▸" in line][1].endswith("└─ 0 + 1")
    assert "✗ wrong value" in lines[2]
    everything = drawing.tree_lines(tree, policy, None, (80, 1_000))
    assert len(everything) == 32


def test_a_hostile_text_is_one_line_of_plain_text():
    """Prevents an answer that clears the terminal, rings its bell or fills it."""
    assert drawing.answer("<answer>\x1b[2J\x07 ( 1 +\n2 ) </answer>") == "[2J (1 + 2)"
    long = drawing.answer("1 + " * 10_000)
    assert len(long) == drawing.ANSWER_WIDTH and long.startswith("…")


def test_columns_go_below_each_other_where_the_terminal_is_narrow(monkeypatch):
    """Prevents columns that wrap."""
    blocks = [["a", "bb"], ["ccc"]]
    monkeypatch.setattr(drawing, "get_terminal_size", lambda: (9, 24))
    assert drawing.columns(blocks) == "a     ccc\nbb"
    monkeypatch.setattr(drawing, "get_terminal_size", lambda: (8, 24))
    assert drawing.columns(blocks) == "a\nbb\n\nccc"
