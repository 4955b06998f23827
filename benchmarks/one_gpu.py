"""The cost of a run of the real size on one GPU: sampling beside its floor, memory and seconds of a step by phase.

    python -m benchmarks.one_gpu                        # caps of 8, 12, 16, 24 GB, NF4 and bf16 LoRA, each sampler
    python -m benchmarks.one_gpu --caps 24 --samplers vllm --model Qwen/Qwen2.5-1.5B-Instruct

Without --model the weights are random, in the shape of Qwen2.5-1.5B (benchmarks/random_qwen.py). Memory and speed of a
step are then those of the real model, with one exception: a random model never ends a step or an answer early, so every
completion has the full length. Here that is the length of a game, 128 tokens. The preset allows 512, which may take
more memory. Each row of steps is a run in a process of its own, under a hard cap on PyTorch's allocator; a row that
runs out of memory says so. Writes OUT/one_gpu.json.

Sampling is TorchSampler beside transformers' `generate`, bf16, whole completions. The floor of a token is the larger of
two times: the bytes of all weights and of every sequence's keys and values at the rate of a large copy, and the
products with the weights at the rate of a large product, both measured here.
"""

import json
import math
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from statistics import median

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # for `python benchmarks/one_gpu.py`

import runtime.threads

import torch

from benchmarks.random_qwen import Shape, make_checkpoint
from benchmarks.speed import LENGTH, SIBLINGS, measure_sampling
from benchmarks.timing import timed
from config import METHODS, PRESETS, check, check_choices
from countdown import Problem
from policy import Policy
from runtime import cli, files, provenance
from runtime.files import KIT, check_writable
from runtime.loading import load_policy, locate, pick_device
from runtime.memory import read_sizes
from runtime.run_folder import read_metrics

COSTS = ("gpu_peak_gb", "tokens_per_second", "sampler_seconds", "critic_seconds", "update_seconds")


@dataclass
class Bench:
    """Sample, and run a few steps of the preset qwen1.5b for each memory cap, quantisation and sampler."""

    model: str = ""  # Hugging Face name or folder; empty: random weights
    rows: tuple[int, ...] = (64, 512, 2048)  # sequences sampled together
    repeats: int = 2
    caps: tuple[float, ...] = (8, 12, 16, 24)  # GB
    quantize: tuple[str, ...] = ("nf4", "none")
    samplers: tuple[str, ...] = ("torch", "vllm")
    methods: tuple[str, ...] = ("best-of-n", "mcts")
    preset: str = "qwen1.5b"
    steps: int = 5
    problems: int = 16  # trees a step
    simulations: int = 32  # a tree
    max_tokens: int = 128  # of a completion, and of a step: about what a game of four numbers takes
    step_tokens: int = 32
    device: str = "cuda"
    out: Path = Path("runs/one_gpu")

    def __post_init__(self):
        check_choices(self, quantize=("none", "nf4"), samplers=("torch", "vllm"), preset=PRESETS, methods=METHODS)
        check(self, "above", 0, "caps")
        check(self, "at least", 2, "steps")  # the first one is left out
        check(self, "at least", 1, "problems simulations repeats max_tokens step_tokens")
        check(self, "at least", SIBLINGS, "rows")
        check_writable(self.out, folder=True)
        pick_device(self.device)
        if self.model:
            locate(self.model)


def rates(device: str, side: int = 8192) -> tuple[float, float]:
    """Bytes a second of a copy of 2 * side**2 bytes, read and written, and FLOP/s of a product of that size, bf16."""
    a, b = torch.randn(2, side, side, dtype=torch.bfloat16, device=device)
    target, wait = torch.empty_like(a), torch.cuda.synchronize if device == "cuda" else lambda: None
    copying, multiplying = (
        timed(lambda do=do: (do(), wait()), 10, warm_up=2, clock=time.perf_counter)[0]
        for do in (lambda: target.copy_(a), lambda: a @ b)
    )
    return 2 * a.nbytes / copying, 2 * side**3 / multiplying


def bench_sampling(bench: Bench, model: str) -> dict:
    """The table of sampling."""
    bandwidth, flops = rates(bench.device, 8192 if bench.device == "cuda" else 512)
    sizes = read_sizes(model, model)
    cached = 2 * 2 * sizes.layers * sizes.keys  # bytes of a token's keys and values in bf16

    def floor(policy: Policy, rows: int) -> float:
        weights = sum(p.numel() for p in policy.lm.parameters())
        context = len(policy.encode(Problem((13,) * 4, 999))) + LENGTH / 2  # in the mean
        return rows / max((2 * weights + rows * context * cached) / bandwidth, 2 * rows * weights / flops)

    print(f"copy {bandwidth / 1e12:.2f} TB/s, bf16 product {flops / 1e12:.0f} TFLOP/s")
    print("| sampling, rows | ours, tokens/s | generate | ratio | floor, tokens/s | share |\n|" + "---|" * 6)
    policy, table = load_policy(model, device=bench.device, dtype="bfloat16", train=False), []
    for rows in bench.rows:
        try:
            row = measure_sampling(policy, rows, bench.repeats, floor)
        except torch.OutOfMemoryError:
            print(f"| {rows} | out of memory |", flush=True)
            continue
        table.append(row)
        shown = f"{row['ours']:,.0f} | {row['peer']:,.0f} | {row['ratio']:.2f} | {row['floor']:,.0f}"
        print(f"| {rows} | {shown} | {row['ours'] / row['floor']:.1%} |", flush=True)
    return {"bandwidth": bandwidth, "flops": flops, "sampling": table}


def measure(bench: Bench, model: str, cap: float, quantize: str, sampler: str, method: str) -> dict:
    """One row: medians over the steps after the first."""
    folder = bench.out / f"{cap:g}GB-{quantize}-{sampler}-{method}"
    shutil.rmtree(folder, ignore_errors=True)
    options = dict(
        preset=bench.preset, model=model, out=folder, gpu_memory=cap, quantize=quantize, sampler=sampler,
        steps=bench.steps, tokens=0, problems=bench.problems, device=bench.device, evaluations=0,
        test_problems=1, test_samples=1, train_problems=200, max_tokens=bench.max_tokens,
    )  # fmt: skip
    args = [part for name, value in options.items() for part in (f"--{name.replace('_', '-')}", str(value))]
    if method == "mcts":
        args += ["--simulations", str(bench.simulations), "--step-tokens", str(bench.step_tokens)]
    args += ["--failures"]  # random weights have no right answers to learn from
    program = "ppo.py" if method in ("mcts", "none") else "baselines.py"
    row = {"cap_gb": cap, "weights": "nf4" if quantize == "nf4" else "bf16", "sampler": sampler, "method": method}
    done = subprocess.run(
        [sys.executable, str(KIT / program), "--method", method, *args, "--no-test-before"],
        capture_output=True,
        text=True,
        encoding="utf-8",
        errors="replace",
    )
    if done.returncode:
        return row | {"error": (done.stderr.strip() or "no message").splitlines()[-1]}
    steps = [step for step in read_metrics(folder) if "update_seconds" in step][1:]
    for key in COSTS:
        row[key] = median(step.get(key, math.nan) for step in steps)
    # a searched random model may answer in none of its trees: no update then
    return row | {name: steps[-1].get(name) for name in ("trajectories", "micro_tokens")}


def main() -> None:
    bench = cli.read_config(Bench)
    bench.out.mkdir(parents=True, exist_ok=True)
    model = bench.model or str(make_checkpoint(Shape(bench.out / "model")))
    measured = {"steps": []} | provenance.provenance()
    print("| cap | weights | sampler | method | peak GB | tokens/s | sampler s | critic s | update s | trajectories |")
    print("|" + "---|" * 10)
    for cap, quantize, sampler, method in product(bench.caps, bench.quantize, bench.samplers, bench.methods):
        if (quantize, sampler) == ("nf4", "vllm"):  # vLLM does not serve it
            continue
        row = measure(bench, model, cap, quantize, sampler, method)
        measured["steps"].append(row)
        cost = " | ".join(f"{row[key]:.1f}" for key in COSTS if key in row)
        shown = row.get("error", f"{cost} | {row.get('trajectories')}")
        print(f"| {cap:g} GB | {row['weights']} | {sampler} | {method} | {shown} |", flush=True)
        files.write(bench.out / "one_gpu.json", json.dumps(measured, indent=1))
    measured |= bench_sampling(bench, model)  # last: it keeps the GPU's memory to the end of this process
    files.write(bench.out / "one_gpu.json", json.dumps(measured, indent=1))


if __name__ == "__main__":
    cli.command(main)
