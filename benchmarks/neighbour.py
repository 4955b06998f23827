"""Training beside another busy process, with threads that sleep while they wait (the kit's choice) and that spin.

    python -m benchmarks.neighbour        # prints a table, about three minutes; nothing else should run meanwhile

All processes use as many threads as the machine has cores. One neighbour is a Python process in an endless loop, the
other one multiplies matrices with threads that spin.
"""

import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # for `python benchmarks/neighbour.py`

import runtime.threads

from config import check
from runtime import cli
from runtime.files import KIT
from runtime.run_folder import read_metrics

WAITING = {"passive, the kit": "PASSIVE", "PyTorch's default": ""}
NEIGHBOURS = {
    "alone": "",
    "beside a busy loop": "while True: pass",
    "beside spinning threads": "import torch; x = torch.ones(512, 512)\nwhile True: x @ x",
}
RUN = "ppo.py --search mcts --evaluations 0 --no-test-before --test-problems 1 --test-samples 1 --tokens 0 --steps"


@dataclass
class Bench:
    """Time a short training alone and beside two kinds of busy process."""

    steps: int = 8  # of a training, the first is not timed; 2 with spinning threads beside a neighbour

    def __post_init__(self):
        check(self, "at least", 2, "steps")


def rate(policy: str, neighbour: str, steps: int) -> float:
    """Generated tokens a second of a short training, after its first step."""
    environment = os.environ | {"OMP_WAIT_POLICY": policy}
    environment.pop("OMP_NUM_THREADS", None)
    if not policy:
        environment.pop("KMP_BLOCKTIME", None)
    command = [sys.executable, "-c", neighbour]
    busy = subprocess.Popen(command, env=environment | {"OMP_WAIT_POLICY": "ACTIVE"}) if neighbour else None
    try:
        with tempfile.TemporaryDirectory() as folder:
            command = [sys.executable, *RUN.split(), str(steps), "--out", f"{folder}/run"]
            subprocess.run(command, cwd=KIT, env=environment, check=True, capture_output=True)
            rows = [row for row in read_metrics(Path(folder) / "run") if "tokens_per_second" in row]
    finally:
        if busy:
            busy.kill()
            busy.wait()
    first, last = rows[0], rows[-1]
    return (last["generated"] - first["generated"]) / (last["seconds"] - first["seconds"])


def main() -> None:
    bench = cli.read_config(Bench)
    print(f"| threads wait | {' | '.join(f'{name}, tokens/s' for name in NEIGHBOURS)} |\n|" + "---|" * 4)
    for name, policy in WAITING.items():
        alone = rate(policy, "", bench.steps)
        print(f"| {name} | {alone:,.0f} |", end="", flush=True)
        for neighbour in list(NEIGHBOURS.values())[1:]:
            beside = rate(policy, neighbour, bench.steps if policy else 2)
            print(f" {beside:,.0f} ({alone / beside:.1f} times slower) |", end="", flush=True)
        print()


if __name__ == "__main__":
    cli.command(main)
