"""What a million generated tokens of training cost, this commit against the spine's first, and so what a score costs.

    python -m benchmarks.learning --out runs/learning.json

Both commits run the same recipe (preset tiny, K = 2, one thread) for their first tokens; the older one in a git
worktree made for it. Seconds are the process's own on the CPU: time.perf_counter is time.process_time in these runs.
Tokens to a score are read from results/compare, where a score was measured every 100,000 tokens, and are the same for
both commits: the recipe is, and speed is all that has changed.
"""

import json
import os
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median

import runs
from checks import check, check_writable

KIT = Path(__file__).parents[1]
RUN = (
    "import runpy, sys, time; time.perf_counter = time.process_time; sys.path.insert(0, '.'); sys.argv = sys.argv[1:]; "
    "runpy.run_path(sys.argv[0], run_name='__main__')"
)
METHODS = {
    "mcts": "ppo.py --search mcts --problems 64 --tree.children 2 --tree.simulations 32 --tree.prior sum",
    "best-of-n": "baselines.py --method best-of-n --problems 64 --samples 8",
    "cispo": "baselines.py --method cispo --problems 16 --samples 16",
}
SHARED = (
    "--learning-rate 3e-4 --evaluations 0 --test-problems 1 --test-samples 1 --eval-problems 1 --train-problems 2000"
)


@dataclass
class Bench:
    """Time the first tokens of training."""

    tokens: int = 60_000
    before: str = "0f1c32f"  # the first commit that could train the embedded policy
    score: float = 0.07  # validation mean@4
    out: Path = Path("runs/learning.json")

    def __post_init__(self):
        check(self, "at least", 1, "tokens")
        check(self, "above", 0, "score")
        check_writable(self.out)


def cost(kit: Path, method: str, bench: Bench, folder: Path) -> float:
    """CPU seconds a million generated tokens, from the end of the first step on."""
    args = f"{METHODS[method]} {SHARED} --tokens {bench.tokens} --out {folder}".split()
    args += ["--failures"] if kit == KIT else []  # the older commit learns from wrong answers too, and has no choice
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", RUN, *args], cwd=kit, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise ValueError(f"{method} in {kit} ended with code {done.returncode}: {done.stderr.strip()[-300:]}")
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    first, last = next(row for row in rows if row["step"] == 1), rows[-1]
    return 1e6 * (last["seconds"] - first["seconds"]) / (last["generated"] - first["generated"])


def tokens_to(method: str, score: float) -> list[int]:
    """Generated tokens at each seed's first evaluation that reaches the score; seeds that never do are left out."""
    found = []
    for file in sorted((KIT / "results" / "compare").glob(f"{method}-seed*/metrics.jsonl")):
        rows = map(json.loads, file.read_text().splitlines())
        if reached := next((row["generated"] for row in rows if row.get("eval_mean", 0) >= score), None):
            found.append(reached)
    return found


def main() -> None:
    bench = runs.read_config(Bench)
    git = ["git", "-C", str(KIT)]
    if subprocess.run([*git, "cat-file", "-e", f"{bench.before}^{{commit}}"], capture_output=True).returncode:
        print(f"learning: this clone does not hold commit {bench.before} (git fetch --unshallow gets it): skipped")
        return
    print(f"| method | CPU s a million tokens, {bench.before} | now | ratio | tokens to {bench.score:.0%} | ", end="")
    print(f"s, {bench.before} | s, now |\n|" + "---|" * 7, flush=True)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        old = Path(folder) / "kit"
        subprocess.run([*git, "worktree", "add", "--quiet", "--detach", str(old), bench.before], check=True)
        try:
            for method in METHODS:
                before, now = (cost(kit, method, bench, Path(folder) / f"{method}-{kit.name}") for kit in (old, KIT))
                reached = tokens_to(method, bench.score)
                row = {"method": method, "before": before, "now": now, "tokens": reached}
                rows.append(row)
                million = median(reached) / 1e6 if reached else float("nan")
                costs = f"{before:.0f} | {now:.0f} | {now / before:.2f}"
                scores = f"{million:.2f} M ({len(reached)} seeds) | {million * before:.0f} | {million * now:.0f}"
                print(f"| {method} | {costs} | {scores} |", flush=True)
        finally:
            subprocess.run([*git, "worktree", "remove", "--force", str(old)], check=True)
    runs.write(bench.out, json.dumps(asdict(bench) | {"methods": rows} | runs.provenance(), indent=1, default=str))


if __name__ == "__main__":
    runs.command(main)
