"""Training beside another busy process, with threads that sleep while they wait (the kit's choice) and that spin.

    python -m benchmarks.neighbour        # prints a table, about two minutes; nothing else should run meanwhile

Both sides use as many threads as the machine has cores. The neighbour is one Python process in an endless loop.
"""

import runtime.threads

import os
import subprocess
import sys
import tempfile
from pathlib import Path

from runtime import cli
from runtime.run_folder import read_metrics

KIT = Path(__file__).parents[1]
WAITING = {"passive (the kit)": "PASSIVE", "PyTorch's default": ""}
RUN = "ppo.py --search mcts --evaluations 0 --no-test-before --test-problems 1 --test-samples 1 --tokens"


def rate(policy: str, busy: bool, tokens: int) -> float:
    """Generated tokens a second of a short training, after its first step."""
    environment = {**os.environ, "OMP_WAIT_POLICY": policy}
    environment.pop("OMP_NUM_THREADS", None)
    neighbour = subprocess.Popen([sys.executable, "-c", "while True: pass"]) if busy else None
    try:
        with tempfile.TemporaryDirectory() as folder:
            command = [sys.executable, *RUN.split(), str(tokens), "--out", f"{folder}/run"]
            subprocess.run(command, cwd=KIT, env=environment, check=True, capture_output=True)
            rows = [row for row in read_metrics(Path(folder) / "run") if "tokens_per_second" in row]
    finally:
        if neighbour:
            neighbour.kill()
    first, last = rows[0], rows[-1]
    return (last["generated"] - first["generated"]) / (last["seconds"] - first["seconds"])


def main() -> None:
    print("| threads wait | alone, tokens/s | beside a busy process | times slower |\n|---|---|---|---|")
    for name, policy in WAITING.items():
        alone = rate(policy, False, 60_000)
        beside = rate(policy, True, 60_000 if policy else 12_000)
        print(f"| {name} | {alone:,.0f} | {beside:,.0f} | {alone / beside:.1f} |", flush=True)


if __name__ == "__main__":
    cli.command(main)
