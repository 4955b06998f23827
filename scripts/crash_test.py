"""Kill training runs at random moments, go on with them, and hold what comes out against a run left alone.

    python -m scripts.crash_test                      # 20 runs, one to four kills each: make crash-test
    python -m scripts.crash_test --runs 1 --kills 3   # what the tests do

A run is a process of its own, forked here to save the imports, and killed by SIGKILL from outside a random moment after
it has begun a search, an update, a checkpoint, an evaluation or a line of metrics. Final and best policy, the
optimiser's state and every figure of metrics.jsonl but times must be those of the run that nobody killed.
"""

import json
import os
import random
import signal
import sys
import time
import traceback
from collections import Counter
from dataclasses import dataclass
from itertools import count
from pathlib import Path

import torch

from runtime import session
import ppo
from runtime import cli
from runtime import run_folder
from config import check
from runtime.files import check_new

# what begins, and the seconds after which it is over at the latest
PHASES = {
    "search": (ppo, "search", 0.15),
    "update": (ppo, "update", 0.06),
    "checkpoint": (run_folder.Run, "publish", 0.08),
    "evaluation": (session.Session, "measure", 0.1),
    "metrics": (run_folder.Run, "log", 0.01),
}
OPTIONS = (
    "--preset tiny --device cpu --steps 6 --tokens 0 --problems 4 --max-tokens 64 --tree.simulations 32 --warmup 0 "
    "--train-problems 50 --evaluations 3 --eval-problems 8 --eval-samples 2 --test-problems 8 --test-samples 2 "
    "--checkpoints 3 --failures"
)


@dataclass
class CrashTest:
    """Kill training runs and go on with them."""

    runs: int = 20
    kills: int = 0  # of each run; 0: one to four
    seed: int = 0
    out: Path = Path("runs/crash-test")  # must not be there yet

    def __post_init__(self):
        check(self, "at least", 1, "runs")
        check(self, "at least", 0, "kills seed")
        check_new(self.out)


def announce(phase: str, number: int, pipe: int) -> None:
    """From here on the beginning and the end of a phase, the `number`-th time, are told through the pipe."""
    owner, name, _ = PHASES[phase]
    function, calls = getattr(owner, name), count(1)

    def told(*args, **options):
        is_it = next(calls) == number
        os.write(pipe, b"(" * is_it)
        result = function(*args, **options)
        os.write(pipe, b")" * is_it)
        return result

    setattr(owner, name, told)


def train(options: list[str], log: Path) -> None:
    """In a forked process: `python ppo.py`, what it prints in a file."""
    code = 1
    try:
        with log.open("a") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        cli.command(lambda: launch.launch(ppo.COLLECTORS, options, "mcts"))
        code = 0
    except SystemExit as stop:
        code = stop.code
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        os._exit(code)


def attempt(folder: Path, phase: str = "search", number: int = 0, delay: float = 0.0) -> str:
    """Begin or go on with a run, kill it `delay` seconds into a phase: "inside" it, "after" it, or not: "finished"."""
    begun = (folder / "config.json").exists()
    options = ["--resume", str(folder)] if begun else [*OPTIONS.split(), "--out", str(folder)]
    ours, theirs = os.pipe()
    log = folder.with_suffix(".log")
    if (child := os.fork()) == 0:
        os.close(ours)
        announce(phase, number, theirs)
        train(options, log)
    os.close(theirs)
    begun = os.read(ours, 1)  # empty if the run has ended before
    if begun:
        time.sleep(delay)
        os.kill(child, signal.SIGKILL)
    status = os.waitpid(child, 0)[1]
    ended = os.read(ours, 1)
    os.close(ours)
    if os.WIFEXITED(status) and os.WEXITSTATUS(status):
        raise ValueError(f"{' '.join(options)} failed: {log} says why")
    return "finished" if os.WIFEXITED(status) else "after" if ended else "inside"


def outcome(folder: Path) -> dict:
    """What a run has left behind that must not depend on its kills. A torn line of metrics is an error."""
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    rows = [{key: value for key, value in json.loads(line).items() if not is_time(key)} for line in lines]
    files = {
        f"{name}/{path.name}": path.read_bytes()
        for name in ("policy", "best", "checkpoint")
        for path in sorted((folder / name).rglob("*.safetensors"))
    }
    return {"weights": files, "optimiser": (folder / "checkpoint" / "optimizer.pt").read_bytes(), "metrics": rows}


def is_time(key: str) -> bool:
    return "seconds" in key or key == "tokens_per_second"


def crash(test: CrashTest, number: int, rng: random.Random) -> list[tuple[str, str]]:
    """Kill one run several times, then let it end; where the kills fell."""
    folder, fell = test.out / f"{number:02d}", []
    for _ in range(test.kills or rng.randint(1, 4)):
        phase = rng.choice(list(PHASES))
        found = attempt(folder, phase, rng.randint(1, 3), rng.uniform(0, PHASES[phase][2]))
        if found == "finished":
            break
        fell.append((phase, found))
    attempt(folder)
    return fell


def main() -> None:
    test = cli.read_config(CrashTest)
    torch.set_num_threads(1)  # one that forked from several would hang
    began, rng, bad = time.perf_counter(), random.Random(test.seed), 0
    test.out.mkdir(parents=True)
    attempt(test.out / "whole")
    expected = outcome(test.out / "whole")
    if not any("gradient_norm" in row for row in expected["metrics"]):
        raise ValueError("the run left alone has learnt nothing: the kills of such runs would show nothing")
    print("| run | killed during | weights | optimiser | metrics |\n|---|---|---|---|---|", flush=True)
    everywhere = Counter()
    for number in range(test.runs):
        fell = crash(test, number, rng)
        everywhere.update(fell)
        found = outcome(test.out / f"{number:02d}")
        same = {key: "same" if found[key] == expected[key] else "DIFFERENT" for key in expected}
        bad += "DIFFERENT" in same.values()
        where = ", ".join(phase if how == "inside" else f"after {phase}" for phase, how in fell)
        print(f"| {number} | {where} | {' | '.join(same.values())} |", flush=True)
    inside = sum(times for (_, how), times in everywhere.items() if how == "inside")
    kills = ", ".join(f"{everywhere[phase, 'inside'] + everywhere[phase, 'after']} {phase}" for phase in PHASES)
    seconds = time.perf_counter() - began
    print(f"\n{everywhere.total()} kills ({kills}; {inside} inside), {bad} of {test.runs} runs differ, {seconds:.0f} s")
    if bad:
        cli.fail(f"{bad} runs did not end like the one left alone")


if __name__ == "__main__":
    cli.command(main)
