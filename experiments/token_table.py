"""Answers as HTML, each token in the colour of its advantage: notebook 03 shows what the lessons of distill.py teach.

A background is translucent, so the text is readable on a light page and on a dark one. The number before a step says
the same without colour.
"""

from collections.abc import Sequence
from html import escape

from mcts import Tree
from policy import Policy
from sampling import Trajectory

BLUE, ORANGE = "21, 101, 169", "207, 79, 20"  # those of the explorer: likelier, less likely
CELL = "text-align: left; vertical-align: top; font-size: 12px; line-height: 1.7"


def color(advantage: float) -> str:
    """A CSS background: blue for A > 0, orange for A < 0, stronger for a larger one, none where A rounds to 0.00."""
    if abs(advantage) < 0.005:
        return "transparent"
    opacity = 0.1 + 0.5 * min(abs(advantage), 1)
    return f"rgba({BLUE if advantage > 0 else ORANGE}, {opacity:.2f})"


def span(text: str, advantage: float) -> str:
    """A token on the colour of its advantage."""
    style = f"background: {color(advantage)}; border-radius: 3px; padding: 1px"
    return f"<span style='{style}'>{escape(text)}</span>"


def legend() -> str:
    """What the colours mean."""
    return f"<p>Advantage: {' '.join(span(f'{a:+.1f}', a) for a in (-1.0, -0.5, -0.1, 0.0, 0.1, 0.5, 1.0))}</p>"


def answer_lines(tree: Tree, trajectory: Trajectory, advantages: Sequence[float], policy: Policy) -> str:
    """A line for each step of an answer of a tree: the advantage of its last token, then its tokens. An answer that
    teaches the critic alone has no colour."""
    (leaf,) = [node for node in tree.answers() if node.completion() == trajectory.completion]
    lines, start = [], 0
    for node in leaf.path()[1:]:
        end = start + len(node.tokens)
        label, shown = f"{advantages[end - 1]:+.2f}", advantages[start:end]
        if trajectory.critic_only:
            label, shown = "critic", [0.0] * len(node.tokens)
        words = [policy.tokenizer.decode([token]) for token in node.tokens]
        lines.append(f"<b>{label}</b> {' '.join(map(span, words, shown))}")
        start = end
    return "<br>".join(lines)


def table(rows: list[list[str]]) -> str:
    """A table of HTML cells, aligned to the left."""
    lines = ["".join(f"<td style='{CELL}'>{cell}</td>" for cell in row) for row in rows]
    return f"<table><tr>{'</tr><tr>'.join(lines)}</tr></table>"
