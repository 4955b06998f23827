"""Countdown problems as files: writes FOLDER/{train,validation,test}.jsonl and prints their statistics.

    python -m scripts.make_data --out data    # or python scripts/make_data.py --out data

A training run makes its problems itself and needs no such files. `python ppo.py --data FOLDER` trains with them, and
`python evaluate.py --data FOLDER` reads the test.
"""

import json
import random
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # for `python scripts/make_data.py`

import runtime.threads

import numpy as np

from config import RANGES, check, check_choices, check_ranges
from countdown import PLAYS, Problem, make_splits, solve
from runtime import cli
from runtime.data import multisets
from runtime.files import check_writable


@dataclass
class DataConfig:
    """Write Countdown data sets as JSONL and print their statistics."""

    out: Path = Path("data")  # folder of the three files
    split: str = "multiset"  # multiset: no leak; post: the post's leaking split, for comparison
    train: int = 20_000  # problems
    validation: int = 200  # problems
    test: int = 820  # problems
    size: int = 4  # numbers in a problem
    highest: int = 13  # number in a problem
    plays: int = PLAYS  # random plays behind one target
    seed: int = 0
    preview: int = 3  # solved problems to print

    def __post_init__(self):
        check(self, "at least", 0, "train validation test preview")
        check_choices(self, split=("multiset", "post"))
        check_ranges(**{name: getattr(self, name) for name in RANGES})
        check_writable(self.out, folder=True)


def describe(name: str, problems: list[Problem], train: list[Problem]) -> str:
    """One line: how many problems, how many of their multisets are in the training set, and how large the targets."""
    own = multisets(problems)
    leaked = 0 if name == "train" else len(own & multisets(train))
    low, median, high, largest = np.quantile([p.target for p in problems] or [0], [0.1, 0.5, 0.9, 1]).astype(int)
    return (
        f"{name:10s} {len(problems):6d} problems, {len(own):5d} multisets, {leaked:4d} of them in train; "
        f"target 10 % {low}, median {median}, 90 % {high}, max {largest}"
    )


def main(config: DataConfig) -> None:
    arguments = asdict(config)
    out, preview = arguments.pop("out"), arguments.pop("preview")
    splits = make_splits(**arguments)
    out.mkdir(parents=True, exist_ok=True)
    for name, problems in splits.items():
        (out / f"{name}.jsonl").write_text(
            "".join(json.dumps(asdict(problem)) + "\n" for problem in problems), encoding="utf-8"
        )
        print(describe(name, problems, splits["train"]))
    for problem in random.Random(config.seed).sample(splits["test"], min(preview, len(splits["test"]))):
        print(f"  {problem.numbers} -> {problem.target} = {solve(problem.numbers)[problem.target]}")


if __name__ == "__main__":
    cli.command(lambda: main(cli.read_config(DataConfig)))
