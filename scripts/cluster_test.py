"""Kill generators and trainers at random moments, and compare what is learnt with undisturbed runs.

    python -m scripts.cluster_test                # 3 undisturbed runs, then ten minutes of kills: make cluster-test
    python -m scripts.cluster_test --minutes 1 --alone 2 --steps 20

Ray is started here; every trainer is a process that joins it. In the first runs nothing is killed. Then, every few
seconds, one of three things happens: a generator is killed (SIGKILL); a generator is stopped, so that it seems to hang
(SIGSTOP); or the trainer is killed and resumed. When a run has ended, a run with the next seed follows it.

At the end every shard of every run must have been trained on exactly once, and no trajectory may be older than allowed.
The validation rewards of disturbed runs should lie in the 95 % interval for one more undisturbed run. With
--max-staleness 0 a disturbed run must end with exactly the weights of the undisturbed run of its seed. Linux only.
"""

import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # for `python scripts/cluster_test.py`

import runtime.threads

import numpy as np

from config import check
from runtime import cli
from runtime.cli import parse
from runtime.files import KIT, check_new
from runtime.run_folder import read_metrics

STUDENT = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776}  # t for 95 %, by the number of runs
OPTIONS = (
    "--preset tiny --failures --device cpu --tokens 0 --problems 24 --shards 3 --simulations 16 --checkpoints 20 "
    "--evaluations 5 --eval-problems 100 --eval-samples 4 --test-problems 20 --test-samples 1 --no-test-before "
    "--cluster auto --generator-timeout 30"
)


@dataclass
class ClusterTest:
    """Kill generators and trainers, and check what their runs have learnt."""

    minutes: float = 10.0  # of kills
    every: float = 10.0  # seconds between kills, on average
    alone: int = 3  # undisturbed runs
    steps: int = 60
    generators: int = 3
    max_staleness: int = 1
    seed: int = 0
    out: Path = Path("runs/cluster-test")  # must not be there yet

    def __post_init__(self):
        check(self, "at least", 2, "alone")
        check(self, "at most", max(STUDENT), "alone")
        check(self, "at least", 1, "steps generators")
        check(self, "above", 0, "minutes every")
        check_new(self.out)


def options(test: ClusterTest, seed: int) -> list[str]:
    """A run's command line."""
    own = f"--steps {test.steps} --generators {test.generators} --max-staleness {test.max_staleness} --seed {seed}"
    return [*own.split(), *OPTIONS.split()]


def trainer(test: ClusterTest, folder: Path, seed: int) -> subprocess.Popen:
    """Start or resume a run, in a process of its own."""
    resume = (folder / "config.json").exists()
    command = ["--resume", str(folder)] if resume else [*options(test, seed), "--out", str(folder)]
    with folder.with_suffix(".log").open("a", encoding="utf-8") as log:
        return subprocess.Popen([sys.executable, str(KIT / "ppo.py"), *command], stdout=log, stderr=log)


def generators() -> dict[int, str]:
    """The process ids of the generators that descend from this process, and what they do: load, collect or nothing."""
    parents, titles = {}, {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            parents[int(folder.name)] = int((folder / "stat").read_text(encoding="utf-8").rpartition(")")[2].split()[1])
            titles[int(folder.name)] = (folder / "cmdline").read_text(encoding="utf-8").strip("\0 ")
        except OSError:  # it has ended meanwhile
            continue
    doing = {}
    for pid, title in titles.items():
        above = pid
        while above and above != os.getpid():
            above = parents.get(above, 0)
        if above and title.startswith("ray::Generator"):
            doing[pid] = title.partition(".")[2] or "nothing"
    return doing


def finish(process: subprocess.Popen, folder: Path) -> None:
    if process.wait():
        raise ValueError(f"a trainer failed: {folder.with_suffix('.log')} says why")


def disturb(test: ClusterTest, rng: random.Random) -> tuple[list[Path], Counter]:
    """Runs under kills until the time is over. Returns their folders, and how often what was killed."""
    folders, killed = [], Counter()
    ends = time.monotonic() + 60 * test.minutes
    while time.monotonic() < ends:
        folders.append(test.out / f"disturbed{len(folders)}")
        process = trainer(test, folders[-1], len(folders) - 1)
        while process.poll() is None and time.monotonic() < ends:
            time.sleep(rng.expovariate(1 / test.every))
            what = rng.choices(["kill", "stop", "trainer"], [7, 1, 2])[0]
            if what == "trainer" and (folders[-1] / "checkpoint").exists() and process.poll() is None:
                process.kill()
                process.wait()
                killed["trainer"] += 1
                process = trainer(test, folders[-1], len(folders) - 1)
            elif what != "trainer" and (doing := generators()):
                pid = rng.choice(sorted(doing))
                os.kill(pid, signal.SIGKILL if what == "kill" else signal.SIGSTOP)
                killed[f"generator {'stopped' if what == 'stop' else 'killed'} in {doing[pid]}"] += 1
        finish(process, folders[-1])
    return folders, killed


def account(test: ClusterTest, folder: Path) -> str:
    """What is wrong with the shards that a run has trained on; empty if nothing is."""
    rows = [row for row in read_metrics(folder) if "shards" in row]
    trained = Counter(tuple(shard) for row in rows for shard in row["shards"])
    expected = {(step, number) for step in range(test.steps) for number in range(3)}
    lost, doubled = len(expected - trained.keys()), sum(times > 1 for times in trained.values())
    old = sum(row["age_max"] > test.max_staleness for row in rows)
    return f"{lost} shards lost, {doubled} doubled, {old} steps with too old ones" if lost or doubled or old else ""


def weights(folder: Path) -> list[bytes]:
    return [file.read_bytes() for file in sorted((folder / "policy").rglob("*.safetensors"))]


def curve(folder: Path) -> list[float]:
    return [row["eval_reward"] for row in read_metrics(folder) if "eval_reward" in row]


def main() -> None:
    test = cli.read_config(ClusterTest)
    parse(options(test, 0), "mcts")  # before Ray and minutes of runs
    os.environ |= {"RAY_USAGE_STATS_ENABLED": "0", "OMP_NUM_THREADS": "1"}
    import ray

    ray.init("local", num_cpus=test.generators, include_dashboard=False, log_to_driver=False, object_store_memory=2**28)
    os.environ["RAY_ADDRESS"] = ray.get_runtime_context().gcs_address
    test.out.mkdir(parents=True)
    print("| run | steps | seconds | restarts | dropped | validation reward along the run |\n|---|---|---|---|---|---|")
    alone = [test.out / f"alone{seed}" for seed in range(test.alone)]
    for seed, folder in enumerate(alone):
        finish(trainer(test, folder, seed), folder)
        show(folder)
    disturbed, killed = disturb(test, random.Random(test.seed))
    for folder in disturbed:
        show(folder)
    print("\n" + "; ".join(f"{times} times {what}" for what, times in killed.most_common()))
    wrong = [f"{folder.name}: {error}" for folder in (*alone, *disturbed) if (error := account(test, folder))]
    if not test.max_staleness:
        wrong += [f"{b.name}: other weights" for a, b in zip(alone, disturbed) if weights(a) != weights(b)]
    curves = np.array([curve(folder) for folder in alone])  # [runs, evaluations]
    mean, spread = curves.mean(0), curves.std(0, ddof=1) * np.sqrt(1 + 1 / len(alone)) * STUDENT[len(alone)]
    print("interval   " + ", ".join(f"[{m - s:+.3f}, {m + s:+.3f}]" for m, s in zip(mean, spread)))
    outside = sum(int((abs(np.array(curve(folder)) - mean) > spread).sum()) for folder in disturbed)
    print(f"{outside} of {len(disturbed) * len(mean)} evaluations of disturbed runs outside")
    print(f"accounts: {'; '.join(wrong) or 'right'}")
    if wrong:
        cli.fail("a run has lost shards, or trained on some twice")


def show(folder: Path) -> None:
    rows = [row for row in read_metrics(folder) if "shards" in row]
    restarts, dropped = (sum(row[key] for row in rows) for key in ("restarts", "dropped"))
    points = ", ".join(f"{value:+.3f}" for value in curve(folder))
    print(
        f"| {folder.name} | {len(rows)} | {rows[-1]['seconds']:.0f} | {restarts} | {dropped} | {points} |", flush=True
    )


if __name__ == "__main__":
    cli.command(main)
