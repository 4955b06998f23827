"""Tests of experiments/token_table.py: answers as HTML, coloured by advantage."""

from types import SimpleNamespace

from countdown import Problem, Reward
from experiments import token_table
from mcts import Node, Tree
from sampling import Trajectory

WORDS = ["<step>", "<img src=x>", "<answer>", "& 1"]
POLICY = SimpleNamespace(tokenizer=SimpleNamespace(decode=lambda ids: WORDS[ids[0]]))


def answer(critic_only=False):
    """A tree with one answer of two steps, and its trajectory."""
    reward = Reward(1.0, True, True, "correct")
    root = Node()
    step = Node(tokens=[0, 1], parent=root)
    leaf = Node(tokens=[2, 3], parent=step, ended=True, reward=reward)
    root.children, step.children = [step], [leaf]
    problem = Problem((1, 2), 3)
    trajectory = Trajectory(problem, [], leaf.completion(), [0.0] * 4, reward, critic_only=critic_only)
    return Tree(problem, [], None, root), trajectory


def test_a_token_is_text_on_the_colour_of_its_advantage():
    """Prevents markup that a model wrote from running in a notebook, and colours of the wrong sign or step."""
    page = token_table.answer_lines(*answer(), [0.5, 0.5, -1.0, -1.0], POLICY)
    first, second = page.split("<br>")
    assert "<img" not in page and "&lt;img src=x&gt;" in first and "&amp; 1" in second
    assert first.startswith("<b>+0.50</b>") and first.count(token_table.BLUE) == 2 and token_table.ORANGE not in first
    assert second.startswith("<b>-1.00</b>") and second.count(token_table.ORANGE) == 2


def test_an_answer_for_the_critic_alone_has_no_colour():
    """Prevents a reader who thinks that the policy learns it."""
    page = token_table.answer_lines(*answer(critic_only=True), [1.0] * 4, POLICY)
    assert "rgba" not in page and page.count("<b>critic</b>") == 2


def test_a_larger_advantage_is_a_stronger_colour():
    """Prevents a table in which a small advantage looks like a large one, or like none."""
    colors = [token_table.color(a) for a in (0.0, 0.04, 0.5, 1.0, 7.0)]
    assert colors[0] == "transparent" and len(set(colors[1:4])) == 3 and colors[3] == colors[4]
    assert colors[1:] == sorted(colors[1:])
