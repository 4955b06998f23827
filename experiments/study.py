"""The study: the runs behind the published figures and tables, from one table of settings.

    python study.py tune       # each method at up to three rates, with several ways to make a step, validation
    python study.py compare    # the methods at their best, on the test problems, seeds from 1 on
    python study.py samples    # the same with more, or fewer, tokens a problem
    python study.py targets    # what a tree may teach (distill.py), validation
    python study.py rivals     # what the other methods might gain from: wrong answers too, colder samples …, validation
    python study.py ablate     # one choice of the search changed at a time, on the test problems, three seeds
    python study.py cold       # their policies on the test problems again, at the post's temperature
    python study.py fresh      # compare, and distinct whole answers, on 820 test problems that decided nothing
    python study.py search     # search at test time against best-of-N, before and after distillation
    python study.py chat       # on a GPU: SmolLM2-135M after scripts/warm_up.py, four methods, two rates (--jobs 1)

Runs are `python ppo.py` and `python baselines.py` in processes of their own, `--jobs` at a time with an equal share of
the cores. What is done with the same settings is skipped, what was interrupted is resumed from its checkpoint, so the
study can be stopped at any moment and goes on with the same command. Of a run that is finished, or that guard.py
stopped as collapsed, config.json and the metrics, packed, go to results/STAGE/. Stages cold, fresh and search run
`python evaluate.py` on what others left in runs/, a JSON file each.
"""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path

import tyro

from runtime import cli
from runtime import files
from runtime import run_folder
from config import check, check_choices
from runtime.cli import differing
from runtime.files import read_json
from runtime.cli import differences, parse
from distill import LESSONS
from evaluate import Evaluation

# not GRPO: with one update a step its ratio is 1 and its gradient CISPO's (test_one_update_a_step_makes_grpo_of_cispo)
METHODS = {
    "mcts": "ppo.py --search mcts",
    "best-of-n": "baselines.py --method best-of-n",
    "cispo": "baselines.py --method cispo",
    "none": "ppo.py --search none",
}
RATES = ("1e-4", "3e-4", "1e-3")  # the last destroys the policy
SAMPLED = {f"{p}x{n}": f"--problems {p} --samples {n}" for p, n in ((4, 16), (8, 8), (16, 4), (32, 2), (4, 8))}
SAMPLED["16x4-exact"] = SAMPLED["16x4"] + " --reward exact"
DISTINCT_SAMPLES = {  # as the search's steps, in whole answers and without a tree
    "16x4-p0.3-exact": SAMPLED["16x4-exact"] + " --min-p 0.3",
    "16x4-p0.3": SAMPLED["16x4"] + " --min-p 0.3",
}
TREES = "--reward {} {} --tree.children {} --problems {} --tree.simulations {}"
INDEPENDENT, DISTINCT = "--tree.no-distinct --tree.min-p 0", "--tree.distinct --tree.min-p "
STEPS = {  # problems x samples, or children, min_p of distinct ones: trees x simulations
    "mcts": {
        **{
            f"k{k}-{p}x{n}": TREES.format("dense", INDEPENDENT, k, p, n)
            for k, p, n in ((2, 12, 32), (4, 4, 64), (2, 24, 32), (2, 6, 32))
        },
        **{
            f"k{k}-p{m}-{p}x{n}": TREES.format("dense", DISTINCT + m, k, p, n)
            for k, m, p, n in ((2, "0.3", 24, 16), (3, "0.1", 12, 32), (3, "0.3", 16, 32), (4, "0.3", 16, 32))
        },
        "k4-p0.3-16x32-exact": TREES.format("exact", DISTINCT + "0.3", 4, 16, 32),
    },
    "best-of-n": SAMPLED | DISTINCT_SAMPLES,
    "cispo": SAMPLED | DISTINCT_SAMPLES,
    "none": {
        **{f"{p}x1": f"--problems {p}" for p in (64, 16, 128, 32)},
        "16x1-exact": "--problems 16 --reward exact",
    },
}
AT_ALL_RATES = {"k2-12x32", "k4-4x64", "4x16", "8x8", "64x1", "16x1"}
AT_TWO_RATES = {"k2-24x32", "k2-6x32", "16x4", "4x8", "128x1", "32x1"}  # other steps at their method's best alone
SWEEP = {  # besides what stage compare has
    "mcts": ("k2-12x32", "k4-4x64", "k4-p0.3-16x32"),
    "best-of-n": ("4x16", "8x8", *DISTINCT_SAMPLES),
    "cispo": ("4x16", "8x8", *DISTINCT_SAMPLES),
    "none": ("64x1",),
}
TARGETS = {lesson: f"--distill {lesson}" for lesson in LESSONS if lesson != "best-path"}
RLVR = "--failures --reward exact --kl-coefficient 0 --normalize token"  # what is usual with verifiable rewards
RIVALS = {  # what they might gain from, beside what is tuned
    "failures": ("--failures", ("best-of-n", "cispo", "none")),
    "failures-exact": ("--failures --reward exact", ("best-of-n", "cispo", "none")),
    "colder": ("--temperature 0.7", ("best-of-n", "none")),
    "distinct-all": ("--min-p 1e-9 --reward exact", ("best-of-n",)),  # nothing is left out
    "rlvr-16x4": (RLVR, ("cispo",)),
    "rlvr-8x8": (f"{RLVR} {SAMPLED['8x8']}", ("cispo",)),
}
ABLATIONS = {  # of `mcts` in stage compare; of distinct steps prior count is uniform
    "independent": INDEPENDENT,
    "min-p-0": "--tree.min-p 0",
    "uct": "--tree.selection uct",
    "gumbel": "--tree.selection gumbel",
    **{f"prior-{name}": f"--tree.prior {name}" for name in ("mean", "uniform")},  # sum is the preset's
    "unvisited-zero": "--tree.unvisited zero",
    "virtual-loss-visit": "--tree.virtual-loss visit",
    **{f"children-{k}": f"--tree.children {k}" for k in (2, 8)},
    **{f"simulations-{n}": f"--tree.simulations {n}" for n in (4, 16, 64, 128, 256)},
    "visits": "--distill visits",
    "verifier-only": "--value-learning-rate 0",  # the head starts at V = 0 and stays there
    "recomputed": "--old-logprobs recomputed",
    "failures": "--failures",
    "leaking-split": "--split post",
}
TREE = "--search mcts --simulations 4096 --workers 4 --children"
SEARCHES = {"best-of-n": "--search best-of-n", "mcts-distinct": f"{TREE} 8 --distinct --min-p 0.02"}
SEARCHED = {  # a policy and what is tried on it: after distilling the search, and after best-of-n, which keeps variety
    "before": ("assets/tiny", SEARCHES | {f"mcts-children{k}": f"{TREE} {k}" for k in (2, 4, 8)}),
    "after": ("runs/compare/mcts-seed1", SEARCHES),
    "best-of-4": ("runs/compare/best-of-n-seed1", SEARCHES),
}
CHAT = {  # steps of about 13,000 tokens
    "mcts": "--problems 24 --tree.children 2 --tree.simulations 32 --tree.step-tokens 40",
    "best-of-n": "--problems 16 --samples 8",
    "cispo": "--problems 8 --samples 16",
    "none": "--problems 128",
}
CHAT_MODEL = "--model models/smollm2-warm --max-tokens 128"
BUDGET = "--tokens 1000000"
VALIDATE = "--evaluations 1 --eval-samples 16 --test-problems 1 --test-samples 1 --no-test-before"
TEST = "--evaluations 10 --no-test-before"

Jobs = Iterator[tuple[str, str]]  # a name and a command line for each run


@dataclass
class StudyConfig:
    """Run a stage of the study, or go on with it."""

    stage: tyro.conf.Positional[str]  # tune, compare, samples, targets, rivals, ablate, cold, fresh, search, chat
    seeds: int = 5  # of compare, samples, cold and fresh; of ablate at most 3, of chat 2
    jobs: int = 2  # runs at a time
    methods: tuple[str, ...] = tuple(METHODS)  # of all stages but targets, ablate and search
    out: Path = Path("results")  # config.json and metrics.jsonl.gz of finished runs

    def __post_init__(self):
        check_choices(self, stage=STAGES, methods=METHODS)
        check(self, "at least", 1, "seeds jobs")


def tune(config: StudyConfig) -> Jobs:
    for method in config.methods:
        best = ("1e-4",) if method == "none" else ("3e-4",)
        for name, step in STEPS[method].items():
            for rate in RATES if name in AT_ALL_RATES else RATES[:2] if name in AT_TWO_RATES else best:
                command = f"{METHODS[method]} --learning-rate {rate} {step} {BUDGET} {VALIDATE}"
                yield f"{method}-{name}-lr{rate}", command


def compare(config: StudyConfig) -> Jobs:
    for seed, method in product(range(1, config.seeds + 1), config.methods):
        yield f"{method}-seed{seed}", f"{METHODS[method]} --seed {seed} {BUDGET} {TEST}"


def samples(config: StudyConfig) -> Jobs:
    for seed, method in product(range(1, config.seeds + 1), config.methods):
        for name in SWEEP[method]:
            command = f"{METHODS[method]} --learning-rate 3e-4 {STEPS[method][name]} --seed {seed} {BUDGET} {TEST}"
            yield f"{method}-{name}-seed{seed}", command


def targets(config: StudyConfig) -> Jobs:
    for name, options in TARGETS.items():
        yield f"mcts-{name}", f"{METHODS['mcts']} {options} {BUDGET} {VALIDATE}"


def rivals(config: StudyConfig) -> Jobs:
    for name, (options, methods) in RIVALS.items():
        for method in methods:
            if method in config.methods:
                yield f"{method}-{name}", f"{METHODS[method]} {options} {BUDGET} {VALIDATE}"


def ablate(config: StudyConfig) -> Jobs:
    for seed, (name, options) in product(range(1, min(config.seeds, 3) + 1), ABLATIONS.items()):
        yield f"{name}-seed{seed}", f"{METHODS['mcts']} --seed {seed} {options} {BUDGET} {TEST}"


def cold(config: StudyConfig) -> Jobs:
    yield "base", "evaluate.py assets/tiny --temperature 0.2"
    for stage in compare, samples, ablate:
        for name, command in stage(config):
            stopped = run_folder.ending(run_folder.read_metrics(config.out / stage.__name__ / name)) == "stopped"
            if not stopped and "--split post" not in command:  # no policy is left; it was taught these problems
                yield name, f"evaluate.py runs/{stage.__name__}/{name} --temperature 0.2"


def fresh(config: StudyConfig) -> Jobs:
    yield "base", "evaluate.py assets/tiny --skip 820"
    for stage in compare, samples:
        for name, command in stage(config):
            if stage is compare or " --min-p " in command:
                yield name, f"evaluate.py runs/{stage.__name__}/{name} --skip 820"


def search(config: StudyConfig) -> Jobs:
    for when, (model, searches) in SEARCHED.items():
        for name, options in searches.items():
            yield f"{when}-{name}", f"evaluate.py {model} {options} --problems 205 --budget 16 64 256 1024 4096"


def chat(config: StudyConfig) -> Jobs:
    measures = "--tokens 400000 --evaluations 5 --no-test-before --test-samples 8"
    for seed, rate, (method, knob) in product(range(1, min(config.seeds, 2) + 1), ("1e-4", "3e-5"), CHAT.items()):
        if method in config.methods:
            options = f"--seed {seed} --learning-rate {rate} {knob} {CHAT_MODEL} {measures}"
            yield f"{method}-lr{rate}-seed{seed}", f"{METHODS[method]} {options}"


STAGES = {
    stage.__name__: stage for stage in (tune, compare, samples, targets, rivals, ablate, cold, fresh, search, chat)
}
EVALUATED = ("cold", "fresh", "search")  # stages that train nothing


def configuration(command: list[str]) -> tuple[list[str], str]:
    """A command's options and method, as `cli.parse` takes them."""
    return (command[1:], "mcts") if command[0] == "ppo.py" else (command[3:], command[2])


def check_settings(folder: Path, command: list[str]) -> None:
    """ValueError if the folder holds a run, or the JSON file of its name an evaluation, with other settings than the
    command's."""
    place, differ = folder, []
    if command[0] == "evaluate.py":
        place = folder.with_name(f"{folder.name}.json")
        differ = evaluated_otherwise(place, command) if place.exists() else []
    elif (folder / "config.json").exists():
        differ = differences(run_folder.read_settings(folder), parse(*configuration([*command, "--preset", "tiny"]))[0])
    if differ:
        raise ValueError(f"{place} has other settings ({'; '.join(differ)}): move it away or delete it")


def evaluated_otherwise(file: Path, command: list[str]) -> list[str]:
    """Which settings of an evaluation are not the command's, a piece of text each; one not there had its default."""
    usual, wanted = (
        json.loads(json.dumps(asdict(cli.read_config(Evaluation, args)), default=str))
        for args in ([], command[1:])
    )
    return differing(usual | read_json(file) | {"out": wanted["out"]}, wanted)


def is_done(folder: Path) -> bool:
    return bool(run_folder.ending(run_folder.read_metrics(folder)))


def call(command: list[str], config: StudyConfig) -> None:
    """Run a program. RuntimeError with its last line if it fails; a run that is stopped as collapsed has not."""
    threads = str(max(1, (os.cpu_count() or 1) // config.jobs))
    told = subprocess.run(
        [sys.executable, *command], capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": threads}
    )
    if told.returncode not in (0, 3):
        raise RuntimeError((told.stderr.strip() or "no message").splitlines()[-1])


def measure(name: str, command: str, config: StudyConfig) -> None:
    """Do one evaluation, unless its result is there."""
    kept, fresh = config.out / config.stage / f"{name}.json", Path("runs") / config.stage / f"{name}.json"
    if not kept.exists():
        call([*command.split(), "--out", str(fresh)], config)
        files.write(kept, fresh.read_text())


def run(name: str, command: str, config: StudyConfig) -> None:
    """Do one run, or what is left of it."""
    folder, kept = Path("runs") / config.stage / name, config.out / config.stage / name
    if is_done(kept):
        return
    program, *options = command.split()
    if not is_done(folder):
        begun = (folder / "config.json").exists()
        options = ["--resume", str(folder)] if begun else [*options, "--preset", "tiny", "--out", str(folder)]
        call([program, *options], config)
    run_folder.pack(folder, kept)


def main() -> None:
    config = cli.read_config(StudyConfig)
    jobs = dict(STAGES[config.stage](config))
    for name, command in jobs.items():
        for folder in (Path("runs"), config.out):
            check_settings(folder / config.stage / name, command.split())
    do, failed = measure if config.stage in EVALUATED else run, 0
    with ThreadPoolExecutor(config.jobs) as pool:
        try:
            running = {pool.submit(do, name, command, config): name for name, command in jobs.items()}
            for ended in as_completed(running):
                if error := ended.exception():
                    failed += 1
                print(f"{running[ended]}: {f'failed, {error}' if error else 'done'}", flush=True)
        except KeyboardInterrupt:  # in a terminal the runs have had it too; what waits for its turn is not begun
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    if failed:
        cli.fail(f"{failed} of {len(jobs)} runs failed; the same command goes on with them")


if __name__ == "__main__":
    cli.command(main)
