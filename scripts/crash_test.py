"""Kill training runs at random moments, resume them, and compare their results with those of an undisturbed run.

    python -m scripts.crash_test                      # 20 runs, one to four kills each: make crash-test
    python -m scripts.crash_test --runs 1 --kills 3   # what the tests do

Each run is a process that is forked here, which saves the imports. SIGKILL ends it a random moment after it has begun a
search, an update, a checkpoint, an evaluation or a line of metrics. The final and the best policy, the optimiser's
state and all of metrics.jsonl but times must be those of the run that was not killed.
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

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # for `python scripts/crash_test.py`

import runtime.threads

import torch

import ppo
from config import check
from runtime import cli, run_folder, session
from runtime.files import check_new
from runtime.launch import Trainer, launch

# the function that a phase is, and the seconds that it takes at most
PHASES = {
    "search": (ppo, "search", 0.15),
    "update": (ppo, "update", 0.06),
    "checkpoint": (run_folder.Run, "publish", 0.08),
    "evaluation": (session.Session, "score", 0.1),
    "metrics": (run_folder.Run, "log", 0.01),
}
OPTIONS = (
    "--preset tiny --device cpu --steps 6 --tokens 0 --problems 4 --max-tokens 64 --simulations 32 --warmup 0 "
    "--train-problems 50 --evaluations 3 --eval-problems 8 --eval-samples 2 --test-problems 8 --test-samples 2 "
    "--checkpoints 3 --failures"
)


@dataclass
class CrashTest:
    """Kill training runs and resume them."""

    runs: int = 20
    kills: int = 0  # of each run; 0: one to four
    seed: int = 0
    out: Path = Path("runs/crash-test")  # must not be there yet

    def __post_init__(self):
        check(self, "at least", 1, "runs")
        check(self, "at least", 0, "kills seed")
        check_new(self.out)


def announce(phase: str, number: int, pipe: int) -> None:
    """From now on a phase writes to the pipe when it begins and ends, the `number`-th time that it is called."""
    owner, name, _ = PHASES[phase]
    function, calls = getattr(owner, name), count(1)

    def announced(*args, **options):
        is_announced = next(calls) == number
        if is_announced:
            os.write(pipe, b"(")
        result = function(*args, **options)
        if is_announced:
            os.write(pipe, b")")
        return result

    setattr(owner, name, announced)


def train(options: list[str], log: Path) -> None:
    """In a forked process: `python ppo.py` with its output in a file."""
    code = 1
    try:
        with log.open("a", encoding="utf-8") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        trainer = Trainer(ppo.train, ppo.update, ppo.make_optimizer, ppo.set_rate)
        cli.command(lambda: launch(options, "mcts", ppo.COLLECTORS, trainer))
        code = 0
    except SystemExit as stop:
        code = stop.code
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        os._exit(code)


def attempt(folder: Path, phase: str = "search", number: int = 0, delay: float = 0.0) -> str:
    """Start or resume a run, and kill it `delay` seconds after a phase has begun. Returns where the kill fell: "inside"
    the phase, "after" it, or "finished" if the run has ended before."""
    resume = (folder / "config.json").exists()
    options = ["--resume", str(folder)] if resume else [*OPTIONS.split(), "--out", str(folder)]
    reader, writer = os.pipe()
    log = folder.with_suffix(".log")
    if (child := os.fork()) == 0:
        os.close(reader)
        announce(phase, number, writer)
        train(options, log)
    os.close(writer)
    begun = os.read(reader, 1)  # empty if the run has ended before
    if begun:
        time.sleep(delay)
        os.kill(child, signal.SIGKILL)
    status = os.waitpid(child, 0)[1]
    ended = os.read(reader, 1)
    os.close(reader)
    if os.WIFEXITED(status) and os.WEXITSTATUS(status):
        raise ValueError(f"{' '.join(options)} failed: {log} says why")
    return "finished" if os.WIFEXITED(status) else "after" if ended else "inside"


def outcome(folder: Path) -> dict:
    """The results of a run that must not depend on kills. A torn line of metrics is an error."""
    lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
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
    """Kill one run several times, then let it end. Returns the phases of the kills, and where each kill fell."""
    folder, kills = test.out / f"{number:02d}", []
    for _ in range(test.kills or rng.randint(1, 4)):
        phase = rng.choice(list(PHASES))
        where = attempt(folder, phase, rng.randint(1, 3), rng.uniform(0, PHASES[phase][2]))
        if where == "finished":
            break
        kills.append((phase, where))
    attempt(folder)
    return kills


def main() -> None:
    test = cli.read_config(CrashTest)
    torch.set_num_threads(1)  # a fork of a process with several would hang
    began, rng, bad = time.perf_counter(), random.Random(test.seed), 0
    test.out.mkdir(parents=True)
    attempt(test.out / "whole")
    expected = outcome(test.out / "whole")
    if not any("gradient_norm" in row for row in expected["metrics"]):
        raise ValueError("the undisturbed run has learnt nothing: kills would show nothing")
    print("| run | killed during | weights | optimiser | metrics |\n|---|---|---|---|---|", flush=True)
    all_kills = Counter()
    for number in range(test.runs):
        kills = crash(test, number, rng)
        all_kills.update(kills)
        result = outcome(test.out / f"{number:02d}")
        same = {key: "same" if result[key] == expected[key] else "DIFFERENT" for key in expected}
        bad += "DIFFERENT" in same.values()
        phases = ", ".join(phase if where == "inside" else f"after {phase}" for phase, where in kills)
        print(f"| {number} | {phases} | {' | '.join(same.values())} |", flush=True)
    inside = sum(times for (_, where), times in all_kills.items() if where == "inside")
    by_phase = ", ".join(f"{all_kills[phase, 'inside'] + all_kills[phase, 'after']} {phase}" for phase in PHASES)
    seconds = time.perf_counter() - began
    print(
        f"\n{all_kills.total()} kills ({by_phase}; {inside} inside), {bad} of {test.runs} runs differ, {seconds:.0f} s"
    )
    if bad:
        cli.fail(f"{bad} runs did not end like the undisturbed one")


if __name__ == "__main__":
    cli.command(main)
