"""Answers and trees as text on a terminal. A model has written them: control characters are taken out."""

from itertools import zip_longest
from shutil import get_terminal_size

from mcts import Node, Tree
from policy import Policy

ANSWER_WIDTH = 44  # characters


def printable(text: str, width: int) -> str:
    """A text on one line, without control characters, its last `width` characters at most."""
    line = " ".join("".join(c if c.isprintable() else " " for c in text).split())
    line = line.replace("( ", "(").replace(" )", ")")
    return line if len(line) <= width else f"…{line[1 - width :]}"


def answer(text: str) -> str:
    """What a completion gives as its answer; where it has no tag <answer>, its end."""
    return printable(text.rpartition("<answer>")[2].replace("</answer>", ""), ANSWER_WIDTH)


def verdict(right: bool, reason: str) -> str:
    return "✓" if right else f"✗ {reason}"


def columns(blocks: list[list[str]]) -> str:
    """Blocks of lines beside each other, or one below the other where the terminal is too narrow."""
    widths = [max(map(len, block)) for block in blocks]
    if sum(widths) + 4 * (len(blocks) - 1) > get_terminal_size()[0]:
        return "\n\n".join("\n".join(block) for block in blocks)
    rows = zip_longest(*blocks, fillvalue="")
    return "\n".join("    ".join(f"{text:{width}}" for text, width in zip(row, widths)).rstrip() for row in rows)


def over(lines: int) -> str:
    """What moves a terminal's cursor up over so many lines, and clears them."""
    return f"\x1b[{lines}A\x1b[J" if lines else ""


# ------------------------------------------------------------------------------------------------ trees


def tree_lines(tree: Tree, policy: Policy, chosen: Node | None, size: tuple[int, int]) -> list[str]:
    """The visited part of a tree, a line a node: visits N, mean value Q, the step. The path to the `chosen` answer is
    marked. `size`: columns and lines that there are; the nodes of most visits are drawn."""
    width, height = size
    path = set(chosen.path()) if chosen else {tree.root}
    visited = [node for node in tree.nodes() if node.visits]
    # a parent has no fewer visits than its child and stands before it: the nodes that are drawn are a tree
    by_visits = sorted(visited, key=lambda node: (node not in path, -node.visits))
    drawn = set(by_visits[: max(height - 4, len(path))])
    lines = [f"{'N':>4} {'Q':>6}   {tree.root.visits} simulations, {len(tree.nodes())} nodes, {tree.generated} tokens"]

    def add(node: Node, indent: str, branch: str) -> None:
        text = f"{node.visits:4d} {node.q:+6.2f} {'▸' if node in path else ' '} {indent}{branch}{label(node, policy)}"
        lines.append(text[: width - 1])
        children = sorted((child for child in node.children if child in drawn), key=lambda child: -child.visits)
        below = indent + {"": "", "├─ ": "│  ", "└─ ": "   "}[branch]
        for child in children:
            add(child, below, "└─ " if child is children[-1] else "├─ ")

    add(tree.root, "", "")
    if len(drawn) < len(visited):
        lines.append(f"… and {len(visited) - len(drawn)} visited nodes more")
    return lines


def label(node: Node, policy: Policy) -> str:
    """What a node's step says; the verdict of an answer."""
    if node.parent is None:
        return "the prompt"
    text = policy.decode(node.tokens)
    if node.reward:
        return f"{answer(text)}  {verdict(node.reward.correct, node.reward.reason)}"
    return printable(text.replace("<step>", "").replace("</step>", ""), ANSWER_WIDTH)
