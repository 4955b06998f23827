"""The training step beside TRL's GRPOTrainer: the same trajectories and weights, the same loss, equal gradients.

    python -m benchmarks.training --out runs/training.json

Two models: the embedded policy with 256 of its own completions; and a thin one that has Qwen2.5's vocabulary of 151,936
tokens, with random completions. Each side is a process of its own (benchmarks/steps.py), which steps in its turn. Its
memory is what it takes beyond the loaded model: gradients, optimiser, activations. TRL gets the fastest of several
micro-batches, no gradient checkpointing, and fp32 as here. Neither side has a KL term.
"""

import json
import random
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from statistics import median

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # for `python benchmarks/training.py`

import runtime.threads

import torch
from safetensors.torch import load_file

from benchmarks.random_qwen import Shape, make_checkpoint
from benchmarks.steps import UNCLIPPED
from config import TINY, Config, check, check_choices, preset_for
from countdown import Problem, make_problems
from distill import group_advantages
from runtime import cli, files, provenance
from runtime.files import KIT, check_writable
from runtime.loading import load_policy
from runtime.torch_sampler import TorchSampler
from sampling import Reward, SamplingParams, Trajectory, complete

SIBLINGS = 16
WIDE = dict(layers=2, hidden=128, intermediate=256, heads=4, kv_heads=2, context=1024, dtype="float32")
MODELS = ("tiny", "wide")


@dataclass
class Bench:
    """Time the kit's training step beside TRL's."""

    models: tuple[str, ...] = MODELS
    kit: tuple[int, ...] = (1024, 4096)  # tokens in the kit's micro-batch
    trl: tuple[int, ...] = (16, 64)  # sequences in TRL's; the kit is compared with the fastest
    wide_rows: int = 16  # trajectories of the model with the large vocabulary
    repeats: int = 3
    threads: int = 1
    out: Path = Path("runs/training.json")

    def __post_init__(self):
        check_choices(self, models=MODELS)
        check(self, "at least", SIBLINGS, "trl wide_rows")
        check(self, "at least", 1, "kit repeats threads")
        check_writable(self.out)


def settings(model: str) -> Config:
    """The kit's settings with TRL's loss; weights do not move."""
    return preset_for("tiny", "cispo").change(
        model=model, normalize="token", kl_coefficient=0.0, clip_gradient=UNCLIPPED, learning_rate=0.0, failures=True
    )


def tiny_batch() -> dict:
    """Completions of the embedded policy, 16 of each of 16 problems, with the group's advantages."""
    policy = load_policy(TINY, train=False)
    problems = make_problems(16, "train")
    params = SamplingParams(SIBLINGS, max_tokens=64)
    rows, _ = complete(policy, TorchSampler(policy), problems, list(range(16)), params, policy.grade)
    advantages = [float(a) for row in rows for a in group_advantages([t.reward.value for t in row])]
    return pack(TINY, [t for row in rows for t in row], advantages)


def wide_batch(folder: Path, count: int) -> dict:
    """Random prompts of 32 to 96 tokens and completions of 16 to 128 for a model with Qwen2.5's vocabulary."""
    model, rng = make_checkpoint(Shape(folder / "wide", **WIDE)), random.Random(0)
    policy = load_policy(model, train=False)

    def text(shortest: int, longest: int) -> list[int]:
        return [rng.randrange(policy.lm.config.vocab_size) for _ in range(rng.randint(shortest, longest))]

    pairs = [(text(32, 96), text(16, 128)) for _ in range(count)]
    trajectories = []
    for prompt, completion in pairs:
        with torch.no_grad():
            states = policy.states(policy.batch([prompt], [completion]))
            logprobs = policy.logprobs(*states, 1.0)[0][0].tolist()
        trajectories.append(trajectory(prompt, completion, logprobs))
    return pack(model, trajectories, [rng.gauss(0, 1) for _ in pairs])


def trajectory(prompt: list[int], completion: list[int], logprobs: list[float]) -> Trajectory:
    return Trajectory(Problem((1, 2), 3), prompt, completion, logprobs, Reward(0.0, False, False, ""))


def pack(model: Path, trajectories: list[Trajectory], advantages: list[float]) -> dict:
    return {
        "model": str(model),
        "siblings": SIBLINGS,
        "prompts": [t.prompt for t in trajectories],
        "completions": [t.completion for t in trajectories],
        "logprobs": [t.logprobs for t in trajectories],
        "advantages": advantages,
    }


def read_trajectories(batch: dict) -> list[Trajectory]:
    """What `pack` wrote, for the kit's trainer."""
    rows = zip(batch["prompts"], batch["completions"], batch["logprobs"], batch["advantages"], strict=True)
    trajectories = []
    for prompt, completion, logprobs, advantage in rows:
        trajectories.append(trajectory(prompt, completion, logprobs))
        trajectories[-1].advantages = [advantage] * len(completion)
    return trajectories


class Side:
    """A process that makes a step when it is asked."""

    def __init__(self, *args: str):
        command = [sys.executable, str(KIT / "benchmarks" / "steps.py"), *args]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, encoding="utf-8", errors="replace"
        )
        self.seconds: list[float] = []
        self.read("ready")

    def read(self, key: str) -> dict:
        """The next answer with this key; what libraries print is skipped."""
        for line in self.process.stdout:
            if line.startswith("{") and key in (answer := json.loads(line)):
                return answer
        raise ValueError(f"{' '.join(self.process.args[1:])} ended with code {self.process.wait()}")

    def step(self) -> None:
        self.process.stdin.write("step\n")
        self.process.stdin.flush()
        self.seconds.append(self.read("seconds")["seconds"])

    def end(self) -> dict:
        """The median step, the first left out, and the memory it took."""
        self.process.stdin.close()
        measured = {"seconds": median(self.seconds[1:])} | self.read("took")
        self.process.wait()
        return measured


def measure(model: str, bench: Bench, folder: Path) -> dict:
    """The kit beside TRL with each size of micro-batch, in turn."""
    batch = tiny_batch() if model == "tiny" else wide_batch(folder, bench.wide_rows)
    (folder / "batch.json").write_text(json.dumps(batch | {"threads": bench.threads}), encoding="utf-8")
    count = len(batch["prompts"])
    names = [f"kit {size}" for size in bench.kit]
    if find_spec("trl"):
        names += [f"trl {size}" for size in bench.trl if size <= count]
    sides = {name: Side(name.split()[0], str(folder), name.split()[1]) for name in names}
    for _ in range(bench.repeats + 1):
        for side in sides.values():
            side.step()
    measured = {name: side.end() for name, side in sides.items()}
    tokens = sum(map(len, batch["prompts"] + batch["completions"]))
    row = {"model": model, "trajectories": count, "tokens": tokens, "sides": measured}
    if find_spec("trl"):
        ours, peer = load_file(folder / "kit.safetensors"), load_file(folder / "trl.safetensors")
        row["gradient_error"] = compare(ours, peer)
    return row


def compare(ours: dict[str, torch.Tensor], peer: dict[str, torch.Tensor]) -> float:
    """The largest relative distance between the two gradients of a tensor, |a - b| / |b|."""
    if ours.keys() != peer.keys():
        raise ValueError(f"gradients of other weights: {sorted(ours.keys() ^ peer.keys())[:3]}")
    return max(((ours[name] - peer[name]).norm() / peer[name].norm()).item() for name in peer)


def show(row: dict) -> None:
    """Lines of the table: each side, and what it takes of TRL's fastest."""
    peers = [side for name, side in row["sides"].items() if name.startswith("trl")]
    best = min(peers, key=lambda side: side["seconds"], default=None)
    for name, side in row["sides"].items():
        ratios = [f"{side[key] / best[key]:.2f}" if best else "" for key in ("seconds", "took")]
        took = f"{side['took'] / 2**20:,.0f}"
        padding = f"{side['padding']:.1%}"
        print(
            f"| {row['model']} | {name} | {side['seconds']:.2f} | {took} | {padding} | {' | '.join(ratios)} |",
            flush=True,
        )
    if best:
        print(f"{row['model']}: gradients differ by {row['gradient_error']:.1e} of their length at most")


def main() -> None:
    bench, rows = cli.read_config(Bench), []
    if not find_spec("trl"):
        print("TRL is not installed (pip install -r requirements-dev.txt): skipped")
    print("| model | side, micro-batch | seconds | MiB taken | padding | time over TRL's | memory |\n|" + "---|" * 7)
    for model in bench.models:
        with tempfile.TemporaryDirectory() as folder:
            rows.append(measure(model, bench, Path(folder)))
        show(rows[-1])
    files.write(bench.out, json.dumps({"training": rows} | provenance.provenance(), indent=1, default=str))


if __name__ == "__main__":
    cli.command(main)
