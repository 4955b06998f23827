"""The study: the runs behind the published figures and tables, from one table of settings.

    python -m experiments.study tune       # each method at up to three rates and with several kinds of step, validation
    python -m experiments.study compare    # the methods with their best settings, on the test problems, seeds from 1 on
    python -m experiments.study samples    # the same with more, or fewer, tokens a problem
    python -m experiments.study targets    # what a tree may teach (distill.py), validation
    python -m experiments.study rivals     # what may help the other methods: wrong answers, colder samples …
    python -m experiments.study ablate     # one choice of the search changed at a time, on the test problems, 3 seeds
    python -m experiments.study equal      # the search at as many decoded tokens as its rivals, 3 seeds
    python -m experiments.study cold       # their policies on the test problems again, at the post's temperature
    python -m experiments.study fresh      # compare, and distinct whole answers, on 820 problems that decided nothing
    python -m experiments.study search     # search at test time against best-of-N, before and after distillation
    python -m experiments.study chat       # on a GPU: SmolLM2-135M after scripts/warm_up.py, two rates (--jobs 1)

A run is `python ppo.py` or `python baselines.py` in a process of its own. `--jobs` runs work at a time and share the
cores equally. The study skips runs that are done and resumes interrupted ones from their checkpoints: stop it at any
moment, and go on with the same command. A run is done if it is finished, or if runtime/guard.py stopped it as
collapsed; its config.json and packed metrics go to results/STAGE/. Stages cold, fresh and search call
`python evaluate.py` on the policies in runs/ and keep a JSON file each.
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

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # for `python experiments/study.py`

import runtime.threads

import tyro

import evaluate
from config import check, check_choices
from distill import LESSONS
from runtime import cli
from runtime.files import KIT, read_json, write
from runtime.run_folder import ending, pack, read_metrics

# not GRPO: with one update a step its ratio is 1 and its gradient CISPO's (test_one_update_a_step_makes_grpo_of_cispo)
METHODS = {
    "mcts": "ppo.py --search mcts",
    "best-of-n": "baselines.py --method best-of-n",
    "cispo": "baselines.py --method cispo",
    "none": "ppo.py --search none",
}
RATES = ("1e-4", "3e-4", "1e-3")  # the last one destroys the policy
SAMPLED = {f"{p}x{n}": f"--problems {p} --samples {n}" for p, n in ((4, 16), (8, 8), (16, 4), (32, 2), (4, 8))}
SAMPLED["16x4-exact"] = SAMPLED["16x4"] + " --reward exact"
DISTINCT_SAMPLES = {  # whole answers, drawn as the search draws its steps
    "16x4-p0.3-exact": SAMPLED["16x4-exact"] + " --cutoff 0.3",
    "16x4-p0.3": SAMPLED["16x4"] + " --cutoff 0.3",
}
TREES = "--reward {} --cutoff {} --children {} --problems {} --simulations {}"
STEPS = {  # a step's settings by name: PROBLEMSxSAMPLES; of trees kCHILDREN-pCUTOFF-TREESxSIMULATIONS
    "mcts": {
        **{
            f"k{k}-{p}x{n}": TREES.format("dense", None, k, p, n)
            for k, p, n in ((2, 12, 32), (4, 4, 64), (2, 24, 32), (2, 6, 32))
        },
        **{
            f"k{k}-p{cutoff}-{p}x{n}": TREES.format("dense", cutoff, k, p, n)
            for k, cutoff, p, n in ((2, 0.3, 24, 16), (3, 0.1, 12, 32), (3, 0.3, 16, 32), (4, 0.3, 16, 32))
        },
        "k4-p0.3-16x32-exact": TREES.format("exact", 0.3, 4, 16, 32),
    },
    "best-of-n": SAMPLED | DISTINCT_SAMPLES,
    "cispo": SAMPLED | DISTINCT_SAMPLES,
    "none": {
        **{f"{p}x1": f"--problems {p}" for p in (64, 16, 128, 32)},
        "16x1-exact": "--problems 16 --reward exact",
    },
}
AT_ALL_RATES = {"k2-12x32", "k4-4x64", "4x16", "8x8", "64x1", "16x1"}
AT_TWO_RATES = {"k2-24x32", "k2-6x32", "16x4", "4x8", "128x1", "32x1"}  # the others at their method's best rate alone
SWEEP = {  # stage samples has these steps, stage compare those of the preset
    "mcts": ("k2-12x32", "k4-4x64", "k4-p0.3-16x32"),
    "best-of-n": ("4x16", "8x8", *DISTINCT_SAMPLES),
    "cispo": ("4x16", "8x8", *DISTINCT_SAMPLES),
    "none": ("64x1",),
}
TARGETS = {lesson: f"--lesson {lesson}" for lesson in LESSONS if lesson not in ("best-path", "visits")}  # see ABLATIONS
RLVR = "--failures --reward exact --kl-coefficient 0 --normalize token"  # what is usual with verifiable rewards
RIVALS = {  # options that may help a method, and the methods that they are tried with
    "failures": ("--failures", ("best-of-n", "cispo", "none")),
    "failures-exact": ("--failures --reward exact", ("best-of-n", "cispo", "none")),
    "colder": ("--temperature 0.7", ("best-of-n", "none")),
    "distinct-all": ("--cutoff 1e-9 --reward exact", ("best-of-n",)),  # drops no answer
    "rlvr-16x4": (RLVR, ("cispo",)),
    "rlvr-8x8": (f"{RLVR} {SAMPLED['8x8']}", ("cispo",)),
}
ABLATIONS = {  # each changes one setting of `mcts` in stage compare; with distinct steps prior `count` is `uniform`
    "independent": "--cutoff None",
    "min-p-0": "--cutoff 0",
    "uct": "--selection uct",
    "gumbel": "--selection gumbel",
    **{f"prior-{name}": f"--prior {name}" for name in ("mean", "uniform")},  # the preset has sum
    "unvisited-zero": "--unvisited zero",
    "virtual-loss-visit": "--virtual-loss visit",
    **{f"children-{k}": f"--children {k}" for k in (2, 8)},
    **{f"simulations-{n}": f"--simulations {n}" for n in (4, 16, 64, 128, 256)},
    "visits": "--lesson visits",
    "answers-all": "--answers all",
    "verifier-only": "--value-learning-rate 0",  # the value head starts at V = 0 and stays there
    "recomputed": "--old-logprobs recomputed",
    "failures": "--failures",
    "leaking-split": "--split post",
}
TREE = "--search mcts --simulations 4096 --workers 4 --children"
SEARCHES = {"best-of-n": "--search best-of-n", "mcts-distinct": f"{TREE} 8 --cutoff 0.02"}
SEARCHED = {  # policies, and the searches that each is tried with; best-of-4 keeps more variety than the search
    "before": ("assets/tiny", SEARCHES | {f"mcts-children{k}": f"{TREE} {k}" for k in (2, 4, 8)}),
    "after": ("runs/compare/mcts-seed1", SEARCHES),
    "best-of-4": ("runs/compare/best-of-n-seed1", SEARCHES),
}
CHAT = {  # steps of about 13,000 tokens
    "mcts": "--problems 24 --children 2 --simulations 32 --step-tokens 40",
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

    stage: tyro.conf.Positional[str]  # a stage above: tune, compare, samples …
    seeds: int = 5  # of compare, samples, cold and fresh; ablate takes at most 3, chat at most 2
    jobs: int = 2  # runs at a time
    methods: tuple[str, ...] = tuple(METHODS)  # of all stages but targets, ablate and search
    out: Path = Path("results")  # folder of the results

    def __post_init__(self):
        check_choices(self, stage=STAGES, methods=METHODS)
        check(self, "at least", 1, "seeds jobs")


# ------------------------------------------------------------------------------------------------ stages


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
    for seed, (name, options) in product(range(1, config.seeds + 1), ABLATIONS.items()):
        if seed <= 3 or name == "answers-all":  # which decided a default
            yield f"{name}-seed{seed}", f"{METHODS['mcts']} --seed {seed} {options} {BUDGET} {TEST}"


def equal(config: StudyConfig) -> Jobs:
    """The search until it has decoded as many tokens as best-of-4 and CISPO of stage compare."""
    for seed in range(1, min(config.seeds, 3) + 1):
        yield f"mcts-seed{seed}", f"{METHODS['mcts']} --seed {seed} --tokens 690000 {TEST}"


def cold(config: StudyConfig) -> Jobs:
    """A collapsed run has left no policy. One that was trained on the post's split has learnt the test problems."""
    yield "base", "evaluate.py assets/tiny --temperature 0.2"
    for stage in compare, samples, ablate:
        for name, command in stage(config):
            stopped = ending(read_metrics(config.out / stage.__name__ / name)) == "stopped"
            if not stopped and "--split post" not in command:
                yield name, f"evaluate.py runs/{stage.__name__}/{name} --temperature 0.2"


def fresh(config: StudyConfig) -> Jobs:
    yield "base", "evaluate.py assets/tiny --skip 820"
    for stage in compare, samples:
        for name, command in stage(config):
            distinct_answers = command.startswith("baselines.py") and " --cutoff " in command
            if stage is compare or distinct_answers:
                yield name, f"evaluate.py runs/{stage.__name__}/{name} --skip 820"


def search(config: StudyConfig) -> Jobs:
    for when, (model, searches) in SEARCHED.items():
        for name, options in searches.items():
            yield f"{when}-{name}", f"evaluate.py {model} {options} --problems 205 --budget 16 64 256 1024 4096"


def chat(config: StudyConfig) -> Jobs:
    measures = "--tokens 400000 --evaluations 5 --no-test-before --test-samples 8"
    for seed, rate, (method, step) in product(range(1, min(config.seeds, 2) + 1), ("1e-4", "3e-5"), CHAT.items()):
        if method in config.methods:
            options = f"--seed {seed} --learning-rate {rate} {step} {CHAT_MODEL} {measures}"
            yield f"{method}-lr{rate}-seed{seed}", f"{METHODS[method]} {options}"


STAGES = {
    stage.__name__: stage
    for stage in (tune, compare, samples, targets, rivals, ablate, equal, cold, fresh, search, chat)
}
EVALUATED = ("cold", "fresh", "search")  # stages that train nothing

# ------------------------------------------------------------------------------------------------ settings


def settings_of(command: list[str]) -> dict:
    """The settings that a command writes into its config.json, or into its JSON file."""
    program, *options = command
    if program == "evaluate.py":
        config = evaluate.parse(options)
    else:
        config, _ = cli.parse([*options, "--preset", "tiny"], "mcts")
    return json.loads(json.dumps(asdict(config), default=str))


def check_settings(folder: Path, command: list[str]) -> None:
    """ValueError if the folder holds a run, or the JSON file of its name an evaluation, with other settings than the
    command's."""
    is_evaluation = command[0] == "evaluate.py"
    place = folder.with_name(f"{folder.name}.json") if is_evaluation else folder
    file = place if is_evaluation else folder / "config.json"
    if file.exists() and (differences := cli.differences(read_json(file), settings_of(command))):
        raise ValueError(f"{place} has other settings ({'; '.join(differences)}): move it away or delete it")


# ------------------------------------------------------------------------------------------------ jobs


def is_done(folder: Path) -> bool:
    return bool(ending(read_metrics(folder)))


def call(command: list[str], config: StudyConfig) -> None:
    """Run a program. RuntimeError, with the program's last line, if it fails. Exit code 3, a run that was stopped as
    collapsed, is no failure."""
    program, *options = command
    threads = str(max(1, (os.cpu_count() or 1) // config.jobs))
    process = subprocess.run(
        [sys.executable, str(KIT / program), *options],
        capture_output=True,
        text=True,
        encoding="utf-8",
        errors="replace",
        env=os.environ | {"OMP_NUM_THREADS": threads},
    )
    if process.returncode not in (0, 3):
        raise RuntimeError((process.stderr.strip() or "no message").splitlines()[-1])


def measure(name: str, command: str, config: StudyConfig) -> None:
    """Do one evaluation, unless its result is there."""
    file, result = Path("runs") / config.stage / f"{name}.json", config.out / config.stage / f"{name}.json"
    if not result.exists():
        call([*command.split(), "--out", str(file)], config)
        write(result, file.read_text(encoding="utf-8"))


def run(name: str, command: str, config: StudyConfig) -> None:
    """Do one run, or what is left of it."""
    folder, result = Path("runs") / config.stage / name, config.out / config.stage / name
    if is_done(result):
        return
    program, *options = command.split()
    if not is_done(folder):
        begun = (folder / "config.json").exists()
        options = ["--resume", str(folder)] if begun else [*options, "--preset", "tiny", "--out", str(folder)]
        call([program, *options], config)
    pack(folder, result)


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
            for job in as_completed(running):
                if error := job.exception():
                    failed += 1
                print(f"{running[job]}: {f'failed, {error}' if error else 'done'}", flush=True)
        except KeyboardInterrupt:  # a terminal sends it to the running programs too; waiting jobs are not begun
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    if failed:
        cli.fail(f"{failed} of {len(jobs)} runs failed; the same command goes on with them")


if __name__ == "__main__":
    cli.command(main)
