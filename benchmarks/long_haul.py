"""Memory and open files along 2,000 steps of search and distillation: neither may grow.

    python -m benchmarks.long_haul                 # make long-haul; prints a table, fails if something grows

The steps are small but complete: search, update, metrics, with evaluations, checkpoints and trees along the way. Linux
only: it reads /proc. The first tenth is warm-up; after it the resident size must stay within 5 % of its first value.
"""

import os
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # for `python benchmarks/long_haul.py`

import runtime.threads

import ppo
from config import Config, TreeConfig, check
from runtime import cli
from runtime.files import check_new
from sampling import Collect

GROWTH = 0.05


@dataclass
class LongHaul:
    """Run many small steps and watch memory and open files."""

    steps: int = 2_000
    rows: int = 20  # of the table
    out: Path = Path("runs/long-haul")  # must not be there yet

    def __post_init__(self):
        check(self, "at least", 10, "rows")
        check(self, "at least", self.rows, "steps")
        check_new(self.out)


def resident() -> float:
    """Memory of this process in MiB."""
    return int(Path("/proc/self/statm").read_text(encoding="utf-8").split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


def watch(collect: Collect, every: int, rows: list[tuple[float, int]]) -> Collect:
    """The collector, with a row of the table (memory, open files) before every `every`-th step."""
    began = time.perf_counter()

    def watched(policy, *rest):
        if policy.version % every == 0:
            rows.append((resident(), len(os.listdir("/proc/self/fd"))))
            memory, files = rows[-1]
            seconds = time.perf_counter() - began
            print(f"| {policy.version} | {memory:.1f} | {files} | {seconds:.0f} |", flush=True)
        return collect(policy, *rest)

    return watched


def main() -> None:
    bench = cli.read_config(LongHaul)
    config = replace(Config(), tree=TreeConfig(simulations=16, children=2, prior="sum")).change(
        out=bench.out, device="cpu", steps=bench.steps, tokens=0, problems=2, max_tokens=32, train_problems=500,
        evaluations=bench.rows, eval_problems=4, eval_samples=2, test_problems=4, test_samples=2,
        checkpoints=bench.rows, learning_rate=1e-5, failures=True,
    )  # fmt: skip
    rows: list[tuple[float, int]] = []
    print("| step | MiB | open files | seconds |\n|---|---|---|---|", flush=True)
    ppo.train(config, watch(ppo.collect_mcts, bench.steps // bench.rows, rows))
    memory, files = zip(*rows[len(rows) // 10 :])
    growth = max(memory) / memory[0] - 1
    print(f"\nafter warm-up: memory {growth:+.1%}, open files {max(files) - files[0]:+d}")
    if growth > GROWTH or max(files) > files[0]:
        cli.fail(f"memory grew by more than {GROWTH:.0%}, or files were left open")


if __name__ == "__main__":
    cli.command(main)
