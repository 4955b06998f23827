"""Play: the policy before and after training at a problem of your own, and the search at work.

python play.py 3 5 7 9 44                         # the newest run and the model it began with: 64 answers each
python play.py runs/mcts-tiny-seed0 3 5 7 9 44    # a run, a saved policy or a Hugging Face model
python play.py 3 5 7 9 44 --search                # the tree too, while it grows
python play.py                                    # goes on asking for problems
"""

import runtime.threads

import sys
import time
from collections import Counter
from shutil import get_terminal_size

from distill import most_visited_path
from mcts import Tree, plant, wave
from runtime import drawing
from runtime.cli import command
from runtime.playing import Player, Table, sit_down
from sampling import Problem, SamplingParams, ask, complete

COMMONEST = 6  # answers shown of each player
FRAME = 0.3  # seconds that a wave stays on the terminal


def play(problem: Problem, table: Table) -> None:
    """Show what each player answers, one right answer, and the search of the last player."""
    print(f"\n{problem}")
    print(drawing.columns([commonest(player, problem, table) for player in table.players]))
    if solution := ask(table.task, "solution", problem):
        print(f"solver: {solution}")
    elif ask(table.task, "reachable", problem, []) is False:
        print("solver: no answer reaches it")
    if table.settings.search:
        grow(table.players[-1], problem, table)


def commonest(player: Player, problem: Problem, table: Table) -> list[str]:
    """The commonest answers among a player's samples, a line each: count, answer, verdict."""
    policy, settings = player.policy, table.settings
    params = SamplingParams(settings.samples, table.tree.max_tokens, table.tree.temperature)
    (samples,), _ = complete(policy, player.sampler, [problem], [settings.seed], params, policy.grade)
    answers = Counter((drawing.answer(policy.decode(s.completion)), s.reward.correct, s.reward.reason) for s in samples)
    lines = [f"{player.name}: {sum(s.reward.correct for s in samples)} of {len(samples)} answers are right"]
    for (answer, right, reason), count in answers.most_common(COMMONEST):
        lines.append(f"{count:4d}  {answer}  {drawing.verdict(right, reason)}")
    if others := len(samples) - sum(count for _, count in answers.most_common(COMMONEST)):
        lines.append(f"{others:4d}  others")
    return lines


def grow(player: Player, problem: Problem, table: Table) -> Tree:
    """Search, and draw the tree after every wave. In a pipe or a file it is drawn once, in full."""
    (tree,) = plant(player.policy, [problem], [table.settings.seed])
    live, shown = sys.stdout.isatty(), 0
    size = get_terminal_size() if live else (200, 10_000)  # columns, lines
    while tree.simulations_left(table.tree):
        wave([tree], player.sampler, table.grade(player.policy), table.tree, player.sampler.values)
        if live or not tree.simulations_left(table.tree):
            lines = drawing.tree_lines(tree, player.policy, most_visited_path(tree, table.tree), size)
            print(drawing.over(shown) + "\n".join(lines), flush=True)
            shown = len(lines)
            time.sleep(FRAME * live)
    return tree


def main() -> None:
    table, problem = sit_down(sys.argv[1:])
    if problem:
        return play(problem, table)
    print(f"Type a problem, as {table.example()}. An empty line ends the game.")
    while line := read_line():
        try:
            play(table.parse(line), table)
        except ValueError as error:
            print(f"error: {error}")


def read_line() -> str:
    """A line that a person types; empty at the end of the input."""
    try:
        return input("\n> ").strip()
    except EOFError:
        return ""


if __name__ == "__main__":
    command(main)
