"""The study: every run behind a published figure, from one table of settings.

    python study.py tune             # each method's main knob and learning rate, coarsely: 0.3 M tokens, validation
    python study.py rates            # the two rates left, with the budget of the comparison: 1 M tokens, validation
    python study.py compare          # the methods with what was chosen, on the test problems, seeds from 1 on
    python study.py compare --seeds 3 --jobs 2

Runs are `python ppo.py` and `python baselines.py` in processes of their own, `--jobs` at a time with an equal share of
the cores. What is done is skipped, what was interrupted is resumed from its checkpoint, so the study can be stopped at
any moment and goes on with the same command. Of a finished run, config.json and metrics.jsonl go to results/STAGE/.
"""

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import tyro

import runs

PROGRAMS = {
    "mcts": "ppo.py --search mcts",
    "best-of-n": "baselines.py --method best-of-n",
    "mcts-answers": "ppo.py --search mcts --distill answers",
    "mcts-steps": "ppo.py --search mcts --distill steps",
    "cispo": "baselines.py --method cispo",
    "none": "ppo.py --search none",
    "grpo": "baselines.py --method grpo",
}
TREES = ("--tree.children 2 --tree.simulations 32", "--tree.children 4 --tree.simulations 64 --problems 32")
# each method's main knob: how it spends its tokens
KNOBS = {
    "mcts": TREES,
    "best-of-n": ("--samples 8", "--samples 32"),
    "mcts-answers": TREES,
    "mcts-steps": TREES,
    "cispo": ("--problems 16 --samples 16", "--problems 32 --samples 8"),
    "none": ("--problems 64", "--problems 256"),
}
KNOBS["grpo"] = KNOBS["cispo"]
RATES = ("3e-4", "1e-3", "3e-3")
VALIDATE = "--evaluations 1 --eval-samples 16 --test-problems 1 --test-samples 1 --no-test-before"
BUDGET = "--tokens 1000000"
# of the two rates, the one with the higher validation mean@16 (LOG.md)
CHOSEN = dict.fromkeys(("mcts", "best-of-n", "mcts-steps", "cispo", "grpo"), "3e-4")  # the others: not tuned yet


@dataclass
class StudyConfig:
    """Run a stage of the study, or go on with it."""

    stage: tyro.conf.Positional[str]  # tune, rates, compare
    seeds: int = 5  # of compare
    jobs: int = 2  # runs at a time
    methods: tuple[str, ...] = tuple(PROGRAMS)
    out: Path = Path("results")  # config.json and metrics.jsonl of finished runs

    def __post_init__(self):
        if self.stage not in STAGES:
            raise ValueError(f"the first word must be {' or '.join(STAGES)}, not {self.stage!r}")
        if unknown := set(self.methods) - set(PROGRAMS):
            raise ValueError(f"methods are {', '.join(PROGRAMS)}, not {', '.join(unknown)}")
        if min(self.seeds, self.jobs) < 1:
            raise ValueError("seeds and jobs must be at least 1")


def tune(config: StudyConfig) -> Iterator[tuple[str, str]]:
    """A name and a command line for each setting tried."""
    for number in (0, 1):
        for method in filter(KNOBS.get, config.methods):
            for rate in RATES:
                knob = KNOBS[method][number]
                yield (
                    f"{method}-lr{rate}-knob{number}",
                    f"{PROGRAMS[method]} --learning-rate {rate} {knob} --tokens 300000 {VALIDATE}",
                )


def rates(config: StudyConfig) -> Iterator[tuple[str, str]]:
    for method in filter(KNOBS.get, config.methods):
        for rate in ("3e-4", "1e-3"):
            options = f"--learning-rate {rate} {KNOBS[method][0]} {BUDGET} {VALIDATE}"
            yield f"{method}-lr{rate}", f"{PROGRAMS[method]} {options}"


def compare(config: StudyConfig) -> Iterator[tuple[str, str]]:
    for seed in range(1, config.seeds + 1):
        for method in filter(CHOSEN.get, config.methods):
            options = f"--learning-rate {CHOSEN[method]} {KNOBS[method][0]} {BUDGET} --evaluations 10 --no-test-before"
            yield f"{method}-seed{seed}", f"{PROGRAMS[method]} --seed {seed} {options}"


STAGES = {"tune": tune, "rates": rates, "compare": compare}


def finished(folder: Path) -> bool:
    """Whether a run has come to its end, the final policy and test."""
    rows = runs.read_metrics(folder) if (folder / "metrics.jsonl").exists() else []
    return bool(rows) and rows[-1]["step"] > 0 and "test_mean_at_k" in rows[-1]


def run(name: str, command: str, config: StudyConfig) -> str:
    """Do one run, or what is left of it; returns a line about it."""
    folder, kept = Path("runs") / config.stage / name, config.out / config.stage / name
    if finished(kept):
        return f"{name}: done before"
    program, *options = command.split()
    if not finished(folder):
        if (folder / "checkpoint").is_dir():
            options = ["--resume", str(folder)]
        else:
            shutil.rmtree(folder, ignore_errors=True)
            options += ["--preset", "tiny", "--out", str(folder)]
        threads = str(max(1, (os.cpu_count() or 1) // config.jobs))
        told = subprocess.run(
            [sys.executable, program, *options],
            capture_output=True,
            text=True,
            env=os.environ | {"OMP_NUM_THREADS": threads},
        )
        if told.returncode:
            return f"{name}: failed, {(told.stderr.strip() or 'no message').splitlines()[-1]}"
    kept.mkdir(parents=True, exist_ok=True)
    for file in ("config.json", "metrics.jsonl"):
        shutil.copy(folder / file, kept / file)
    return f"{name}: done"


def main() -> None:
    config = runs.read_config(StudyConfig)
    with ThreadPoolExecutor(config.jobs) as pool:
        for line in pool.map(lambda job: run(*job, config), list(STAGES[config.stage](config))):
            print(line, flush=True)


if __name__ == "__main__":
    runs.command(main)
