"""The cost of a score, end to end: each method now beside the first commit that could train.

    python -m benchmarks.learning --out runs/learning.json

Each commit runs its own preset tiny on one thread for a number of tokens, which gives CPU seconds a million generated
tokens. The older commit runs in a git worktree that is made for it. Both have time.process_time in place of
time.perf_counter. The number of tokens that a score takes is read from the logs in results/: those of the first runs,
and those of stage compare.
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

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # for `python benchmarks/learning.py`

import runtime.threads

from config import check
from experiments.study import METHODS
from runtime import cli, files, provenance
from runtime.files import KIT, check_writable
from runtime.run_folder import read_metrics

RUN = (
    "import runpy, sys, time; time.perf_counter = time.process_time; sys.path.insert(0, '.'); sys.argv = sys.argv[1:]; "
    "runpy.run_path(sys.argv[0], run_name='__main__')"
)
# what the first commit ran as preset tiny, in its own options: some of its defaults were others
FIRST = {
    "mcts": "--problems 64 --tree.children 2 --tree.simulations 32 --tree.prior sum",
    "best-of-n": "--problems 64 --samples 8",
    "cispo": "--problems 16 --samples 16",
}
SHARED = "--learning-rate 3e-4 --evaluations 0 --test-problems 1 --test-samples 1"
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
    args = f"{METHODS[method]} {recipe} {SHARED} --train-problems 2000 --tokens {bench.tokens}".split()
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", RUN, *args, "--out", str(folder)],
        cwd=kit,
        env=environment,
        capture_output=True,
        text=True,
        encoding="utf-8",
        errors="replace",
    )
    if done.returncode:
        raise ValueError(f"{method} in {kit} ended with code {done.returncode}: {done.stderr.strip()[-300:]}")
    rows = read_metrics(folder)
    first, last = next(row for row in rows if row["step"] == 1), rows[-1]
    return 1e6 * (last["seconds"] - first["seconds"]) / (last["generated"] - first["generated"])


def millions_to(score: float, pattern: str) -> float | None:
    """Median over seeds of the million generated tokens at the first evaluation that reaches the score; None if not
    half of them do."""
    tokens = []  # of each seed
    for folder in sorted(KIT.glob(pattern)):
        reached = (row["generated"] for row in read_metrics(folder) if row.get("eval_mean", 0) >= score)
        tokens.append(next(reached, math.inf))
    return median(tokens) / 1e6 if tokens and median(tokens) < math.inf else None


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
    files.write(
        bench.out, json.dumps(asdict(bench) | {"methods": rows} | provenance.provenance(), indent=1, default=str)
    )


if __name__ == "__main__":
    cli.command(main)
