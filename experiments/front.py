"""The picture of README.md: a search that ends in a right answer, and the policy's own answers before and after.

    python -m experiments.front results/make-run/mcts-tiny-seed0 --out results/front.png

The search is the embedded policy's, before any training, with the settings of preset tiny. The two answers come from
the run's samples.jsonl: the same problem, before training and at the last evaluation, without a search.
"""

import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # for `python experiments/front.py`

import runtime.threads

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import tyro

from config import preset_for
from countdown import make_problems
from distill import most_visited_path
from mcts import Node, Tree, plant, search
from policy import Policy
from runtime import cli
from runtime.files import check_writable
from runtime.loading import load_policy
from runtime.run_folder import read_samples
from runtime.torch_sampler import TorchSampler
from runtime.watch import WATCHED
from sampling import stream

RIGHT, WRONG, OTHER, FAINT = "#1a7f37", "#b35900", "#57606a", "#d0d7de"  # green and orange differ for colour-blind eyes


@dataclass
class Front:
    """Draw the picture of README.md."""

    run: tyro.conf.Positional[Path]  # a run of preset tiny
    out: Path = Path("results/front.png")

    def __post_init__(self):
        check_writable(self.out)


def before_and_after(run: Path) -> dict[str, tuple[dict, dict]]:
    """Of each watched problem the first and the last answer of a run."""
    samples: dict[str, list[dict]] = {}
    for row in read_samples(run):
        samples.setdefault(row["problem"], []).append(row)
    return {problem: (rows[0], rows[-1]) for problem, rows in samples.items()}


def searched(policy: Policy) -> list[Tree]:
    """The trees of the watched problems, as preset tiny searches them."""
    config = preset_for("tiny", "mcts")
    problems = make_problems(WATCHED, "validation")
    trees = plant(policy, problems, [stream(config.seed, i) for i in range(WATCHED)])
    search(trees, TorchSampler(policy), partial(policy.grade, exact=True), config.search)
    return trees


def example(trees: list[Tree], answers: dict[str, tuple[dict, dict]]) -> Tree:
    """The first problem that the search solves, and the trained policy alone, but not the policy before. ValueError if
    there is none."""
    for tree in trees:
        before, after = answers.get(str(tree.problem), ({}, {}))
        if tree.solved and after.get("right") and not before["right"]:
            return tree
    raise ValueError("this run has no problem that the search solves and that training has taught")


# ------------------------------------------------------------------------------------------------ drawing


def rows_of(node: Node, first: int, rows: dict[Node, float]) -> int:
    """Give a node and those below it their rows, leaves from `first` on, a parent amid its children; returns the next
    free row."""
    after = first
    for child in node.children:
        after = rows_of(child, after, rows)
    rows[node] = (rows[node.children[0]] + rows[node.children[-1]]) / 2 if node.children else first
    return after if node.children else first + 1


def right_answer(tree: Tree, chosen: Node | None) -> Node:
    """The answer that the picture marks: the chosen one if it is right, else the first right one."""
    if chosen and chosen.reward.correct:
        return chosen
    return next(answer for answer in tree.answers() if answer.reward.correct)


def draw_tree(axes, tree: Tree, policy: Policy, answer: Node) -> None:
    """The whole tree from left to right. Dots grow with visits; the path to the answer has its steps written."""
    rows: dict[Node, float] = {}
    rows_of(tree.root, 0, rows)
    path = answer.path()
    for node in tree.nodes():
        lit = node in path
        if node.parent:
            line = [node.parent.depth, node.depth], [rows[node.parent], rows[node]]
            axes.plot(*line, color=RIGHT if lit else FAINT, linewidth=2.2 if lit else 0.8, zorder=2 if lit else 1)
        colour = OTHER if node.visits else FAINT
        if node.reward:
            colour = RIGHT if node.reward.correct else WRONG
        marker = "o" if not node.reward or node.reward.correct else "X"
        axes.scatter(node.depth, rows[node], s=14 + 9 * node.visits, color=colour, marker=marker, zorder=3)
    for node in path[1:]:
        text = policy.decode(node.tokens).replace("<step>", "").replace("</step>", "").strip()
        text = text.replace("<answer>", "").replace("</answer>", "✓").replace("( ", "(").replace(" )", ")")
        above = node.depth % 2 == 1  # neighbours have no room beside each other
        place = dict(xytext=(0, 11 if above else -11), ha="center", va="bottom" if above else "top")
        box = dict(facecolor="white", edgecolor="none", alpha=0.9, pad=1)
        axes.annotate(
            text,
            (node.depth, rows[node]),
            textcoords="offset points",
            fontsize=9,
            color=RIGHT,
            bbox=box,
            zorder=4,
            **place,
        )
    axes.invert_yaxis()
    axes.set_axis_off()
    axes.margins(x=0.12, y=0.06)


def draw_answer(axes, title: str, sample: dict, top: float) -> None:
    """A sampled answer, a line a step."""
    colour = RIGHT if sample["right"] else WRONG
    axes.text(0, top, title, fontsize=10, weight="bold", va="top")
    lines = sample["text"].replace("</step>", "</step>\n").replace("( ", "(").replace(" )", ")").splitlines()
    lines = [line.strip() for line in lines]
    axes.text(0, top - 0.085, "\n".join(lines), fontsize=8.5, family="monospace", va="top", linespacing=1.5)
    verdict = "✓ right" if sample["right"] else f"✗ {sample['reason']}"
    axes.text(0, top - 0.36, verdict, fontsize=9.5, weight="bold", color=colour, va="top")


def draw(tree: Tree, policy: Policy, before: dict, after: dict):
    """The figure."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.4), width_ratios=[1.7, 1])
    answer = right_answer(tree, most_visited_path(tree, preset_for("tiny", "mcts").search))
    draw_tree(left, tree, policy, answer)
    left.set_title(
        f"Search before training: {tree.root.visits} simulations, {len(tree.nodes())} nodes", fontsize=10, weight="bold"
    )
    right.set_axis_off()
    right.set_ylim(0, 1)
    draw_answer(right, "Before training, one sample", before, 0.96)
    draw_answer(right, "After training, one sample, no search", after, 0.46)
    figure.suptitle(f"Reach {tree.problem.target} from {', '.join(map(str, tree.problem.numbers))}", fontsize=12)
    figure.tight_layout()
    return figure


def main() -> None:
    config = cli.read_config(Front)
    policy = load_policy(preset_for("tiny", "mcts").model, train=False, seed=0)
    answers = before_and_after(config.run)
    tree = example(searched(policy), answers)
    draw(tree, policy, *answers[str(tree.problem)]).savefig(config.out, dpi=160)
    print(f"{config.out}: {tree.problem}")


if __name__ == "__main__":
    cli.command(main)
