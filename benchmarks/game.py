"""How fast the task itself is, on one core and without a model: problems made, answers verified, multisets solved.

    python -m benchmarks.game --out runs/game.json

Seconds are the process's own on the CPU, so that other programs hardly matter.
"""

import json
import random
import sys
from dataclasses import asdict, dataclass
from itertools import combinations_with_replacement
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # for `python benchmarks/game.py`

import runtime.threads

import countdown
from benchmarks.timing import timed
from config import check
from countdown import make_problems, solve, verify
from runtime import cli, files, provenance
from runtime.files import check_writable


@dataclass
class Bench:
    """Time problems, verifier and solver."""

    problems: int = 20_000
    answers: int = 20_000  # of each kind
    repeats: int = 3
    out: Path = Path("runs/game.json")

    def __post_init__(self):
        check(self, "at least", 1, "problems answers repeats")
        check_writable(self.out)


def seconds(work, repeats: int) -> float:
    """The median CPU time of `repeats` runs, each with empty caches."""

    def work_without_caches() -> None:
        for function in countdown.play_distribution, countdown.reachable:
            function.cache_clear()
        work()

    return timed(work_without_caches, repeats)[0]


def answers(count: int) -> dict[str, list[tuple[str, countdown.Problem]]]:
    """Whole completions of four steps with a right answer, a wrong one, one that breaks the rules, and none."""
    rng, kinds = random.Random(0), {"right": [], "wrong": [], "broken": [], "none": []}
    for problem in make_problems(count, "train"):
        a, b, c, d = problem.numbers
        steps = f"<step> {a} + {b} = {a + b} left {a + b} {c} {d} </step> " * 3
        solution = solve(problem.numbers).get(problem.target, "1")
        kinds["right"].append((f"{steps}<answer> {solution} </answer>", problem))
        kinds["wrong"].append((f"{steps}<answer> ({a} + {b}) * {c} + {d} </answer>", problem))
        kinds["broken"].append((f"{steps}<answer> ({a} + {b}) * {rng.randint(14, 99)} </answer>", problem))
        kinds["none"].append((steps, problem))
    return kinds


def main() -> None:
    bench = cli.read_config(Bench)
    times = {
        f"make {bench.problems:,} problems": seconds(lambda: make_problems(bench.problems, "train"), bench.repeats)
    }
    multisets = list(combinations_with_replacement(range(1, 14), 4))
    times[f"solve all {len(multisets):,} multisets"] = seconds(lambda: list(map(solve, multisets)), bench.repeats)
    print("| on one core | seconds |\n|---|---|")
    for name, value in times.items():
        print(f"| {name} | {value:.2f} |", flush=True)
    print("\n| answers | verified a second |\n|---|---|")
    rates = {}
    for kind, pairs in answers(bench.answers).items():
        rates[kind] = len(pairs) / seconds(lambda pairs=pairs: [verify(*pair) for pair in pairs], bench.repeats)
        print(f"| {kind} | {rates[kind]:,.0f} |", flush=True)
    measured = asdict(bench) | {"seconds": times, "verified": rates} | provenance.provenance()
    files.write(bench.out, json.dumps(measured, indent=1, default=str))


if __name__ == "__main__":
    cli.command(main)
