"""The cost of a simulation in 1 to 256 trees, and in trees of 8 to 1,024 simulations.

    python -m benchmarks.scaling --out runs/scaling.json

K = 8 and uniform priors, so that no tree is searched out: how many simulations still expand a node is in the table.
Seconds are the process's own on the CPU, with one thread; the prompts' one prefill is part of the first wave.
"""

import json
import sys
from dataclasses import asdict, dataclass, replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # for `python benchmarks/scaling.py`

import runtime.threads

import torch

from benchmarks.timing import timed
from config import TINY, Config, SearchConfig, check
from countdown import make_problems
from mcts import plant, search
from policy import Policy
from runtime import cli, files, provenance
from runtime.files import check_writable
from runtime.loading import load_policy
from runtime.torch_sampler import TorchSampler


@dataclass
class Bench:
    """Time searches of more and more trees, and of more and more simulations."""

    trees: tuple[int, ...] = (1, 4, 16, 64, 256)
    simulations: tuple[int, ...] = (8, 32, 128, 512, 1024)
    of: tuple[int, int] = (32, 16)  # simulations of the first row of searches, trees of the second
    children: int = 8
    repeats: int = 3
    out: Path = Path("runs/scaling.json")

    def __post_init__(self):
        check(self, "at least", 1, "trees simulations of children repeats")
        check_writable(self.out)


def measure(policy: Policy, trees: int, config: SearchConfig, repeats: int) -> dict:
    """Milliseconds of a simulation, and the share of simulations that expand a node."""
    problems = make_problems(trees, "train")

    def work():
        planted = plant(policy, problems, list(range(trees)))
        return planted, search(planted, TorchSampler(policy), policy.grade, config)

    seconds, (searched, usage) = timed(work, repeats)
    done = sum(tree.root.visits for tree in searched)
    expanded = sum(tree.expansions for tree in searched) / done
    cost = 1000 * seconds
    return {
        "trees": trees,
        "simulations": config.simulations,
        "ms": cost / done,
        "expanded": expanded,
        "ms_expansion": cost / (done * expanded),
        "us_token": 1000 * cost / usage.generated,
    }


def main() -> None:
    bench = cli.read_config(Bench)
    torch.set_num_threads(1)
    policy = load_policy(TINY, train=False)
    base = replace(Config().search, children=bench.children, prior="uniform", cutoff=None)
    sizes = [(trees, bench.of[0]) for trees in bench.trees] + [(bench.of[1], count) for count in bench.simulations]
    measure(policy, 4, base, 1)  # warm-up
    rows = []
    print("| trees | simulations | ms a simulation | of them expand | ms an expansion | µs a token |\n|" + "---|" * 6)
    for trees, simulations in sizes:
        row = measure(policy, trees, replace(base, simulations=simulations), bench.repeats)
        rows.append(row)
        shown = f"{row['ms']:.2f} | {row['expanded']:.0%} | {row['ms_expansion']:.2f} | {row['us_token']:.0f}"
        print(f"| {trees} | {simulations} | {shown} |", flush=True)
    files.write(
        bench.out, json.dumps(asdict(bench) | {"scaling": rows} | provenance.provenance(), indent=1, default=str)
    )


if __name__ == "__main__":
    cli.command(main)
