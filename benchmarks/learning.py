"""What a score costs end to end: the methods as they are now against the first commit that could train.

    python -m benchmarks.learning --out runs/learning.json

Each commit runs its own preset tiny, one thread, for its first tokens: CPU seconds a million generated tokens; the
older one in a git worktree made for it, and with time.process_time in place of time.perf_counter. How many tokens a
score takes is read from the logs in results/: the first runs, and those of stage compare.
"""

import json
import math
import os
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median

from runtime import cli
from runtime import files
from runtime import provenance
from runtime import run_folder
from config import check
from runtime.files import check_writable
from experiments.study import METHODS

KIT = Path(__file__).parents[1]
RUN = (
    "import runpy, sys, time; time.perf_counter = time.process_time; sys.path.insert(0, '.'); sys.argv = sys.argv[1:]; "
    "runpy.run_path(sys.argv[0], run_name='__main__')"
)
# what the first commit ran as preset tiny, some of it by other defaults
FIRST = {
    "mcts": "--problems 64 --tree.children 2 --tree.simulations 32 --tree.prior sum",
    "best-of-n": "--problems 64 --samples 8",
    "cispo": "--problems 16 --samples 16",
}
SHARED = "--learning-rate 3e-4 --evaluations 0 --test-problems 1 --test-samples 1 --eval-problems 1"
LOGS = {"first": "results/first/{}-tiny-seed*", "now": "results/compare/{}-seed*"}


@dataclass
class Bench:
    """Time the first tokens of training."""

    tokens: int = 60_000
    before: str = "0f1c32f"  # the first commit that could train the embedded policy
    score: float = 0.1  # validation mean@4
    out: Path = Path("runs/learning.json")

    def __post_init__(self):
        check(self, "at least", 1, "tokens")
        check(self, "above", 0, "score")
        check_writable(self.out)


def cost(kit: Path, method: str, bench: Bench, folder: Path) -> float:
    """CPU seconds a million generated tokens, from the end of the first step on."""
    recipe = "" if kit == KIT else FIRST[method]
    args = f"{METHODS[method]} {recipe} {SHARED} --train-problems 2000 --tokens {bench.tokens} --out {folder}".split()
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", RUN, *args], cwd=kit, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise ValueError(f"{method} in {kit} ended with code {done.returncode}: {done.stderr.strip()[-300:]}")
    rows = run_folder.read_metrics(folder)
    first, last = next(row for row in rows if row["step"] == 1), rows[-1]
    return 1e6 * (last["seconds"] - first["seconds"]) / (last["generated"] - first["generated"])


def millions_to(score: float, pattern: str) -> float | None:
    """Median over seeds of the million generated tokens at the first evaluation that reaches the score; None if not
    half of them do."""
    found = []
    for folder in sorted(KIT.glob(pattern)):
        reached = (row["generated"] for row in run_folder.read_metrics(folder) if row.get("eval_mean", 0) >= score)
        found.append(next(reached, math.inf))
    return median(found) / 1e6 if found and median(found) < math.inf else None


def main() -> None:
    bench = cli.read_config(Bench)
    git = ["git", "-C", str(KIT)]
    if subprocess.run([*git, "cat-file", "-e", f"{bench.before}^{{commit}}"], capture_output=True).returncode:
        print(f"learning: this clone does not hold commit {bench.before} (git fetch --unshallow gets it): skipped")
        return
    print(f"| method | s a million tokens, {bench.before} | now | million tokens to {bench.score:.0%}, ", end="")
    print("first runs | now | s to it, first runs | now |\n|" + "---|" * 7, flush=True)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        old = Path(folder) / "kit"
        subprocess.run([*git, "worktree", "add", "--quiet", "--detach", str(old), bench.before], check=True)
        try:
            for method in FIRST:
                row = {"method": method}
                for when, kit in ("first", old), ("now", KIT):
                    seconds = cost(kit, method, bench, Path(folder) / f"{method}-{when}")
                    row[when] = seconds, millions_to(bench.score, LOGS[when].format(method))
                rows.append(row)
                (before, first), (after, now) = row["first"], row["now"]
                reached = " | ".join("never" if tokens is None else f"{tokens:.2f}" for tokens in (first, now))
                cells = ("never" if t is None else f"{s * t:.0f}" for s, t in ((before, first), (after, now)))
                print(f"| {method} | {before:.0f} | {after:.0f} | {reached} | {' | '.join(cells)} |", flush=True)
        finally:
            subprocess.run([*git, "worktree", "remove", "--force", str(old)], check=True)
    files.write(bench.out, json.dumps(asdict(bench) | {"methods": rows} | provenance.provenance(), indent=1, default=str))


if __name__ == "__main__":
    cli.command(main)
