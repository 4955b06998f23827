"""What a run of the real size costs on one card: peak memory, tokens a second, seconds a step by phase.

    python -m benchmarks.one_gpu                        # caps of 8, 12, 16, 24 GB, NF4 and bf16 LoRA, each sampler
    python -m benchmarks.one_gpu --caps 24 --samplers vllm --model Qwen/Qwen2.5-1.5B-Instruct

Without --model the weights are random, in the shape of Qwen2.5-1.5B (benchmarks/random_qwen.py): memory and speed of a
step are those of the real model, except that a random one never ends a step or an answer early, so every
completion takes its full length. Each row is `python ppo.py` in a process of its own, under a hard cap on
PyTorch's allocator; a row that runs out of memory says so. Writes OUT/one_gpu.json.
"""

import json
import math
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import runs
from benchmarks.random_qwen import Shape, make_checkpoint
from checks import check, check_choices, check_writable
from config import PRESETS
from loading import locate, pick_device

COSTS = ("gpu_peak_gb", "tokens_per_second", "sampler_seconds", "critic_seconds", "update_seconds")


@dataclass
class Bench:
    """Run a few steps of the preset qwen1.5b for each memory cap, quantisation and sampler."""

    model: str = ""  # Hugging Face name or folder; empty: random weights
    caps: tuple[float, ...] = (8, 12, 16, 24)  # GB
    quantize: tuple[str, ...] = ("nf4", "none")
    samplers: tuple[str, ...] = ("torch", "vllm")
    preset: str = "qwen1.5b"
    steps: int = 5
    problems: int = 16  # trees a step
    simulations: int = 16  # a tree
    device: str = "cuda"
    out: Path = Path("runs/one_gpu")

    def __post_init__(self):
        check_choices(self, quantize=("none", "nf4"), samplers=("torch", "vllm"), preset=PRESETS)
        check(self, "above", 0, "caps")
        check(self, "at least", 2, "steps")  # the first one is left out
        check(self, "at least", 1, "problems simulations")
        check_writable(self.out, folder=True)
        pick_device(self.device)
        if self.model:
            locate(self.model)


def measure(bench: Bench, model: str, cap: float, quantize: str, sampler: str) -> dict:
    """One row: medians over the steps after the first."""
    folder = bench.out / f"{cap:g}GB-{quantize}-{sampler}"
    shutil.rmtree(folder, ignore_errors=True)
    options = dict(
        preset=bench.preset, model=model, out=folder, gpu_memory=cap, quantize=quantize, sampler=sampler,
        steps=bench.steps, tokens=0, problems=bench.problems, device=bench.device, evaluations=0, eval_problems=1,
        eval_samples=1, test_problems=1, test_samples=1, train_problems=200,
    )  # fmt: skip
    args = [part for name, value in options.items() for part in (f"--{name.replace('_', '-')}", str(value))]
    args += ["--tree.simulations", str(bench.simulations)]
    row = {"cap_gb": cap, "weights": "nf4" if quantize == "nf4" else "bf16", "sampler": sampler}
    done = subprocess.run([sys.executable, "ppo.py", *args], capture_output=True, text=True)
    if done.returncode:
        return row | {"error": (done.stderr.strip() or "no message").splitlines()[-1]}
    steps = [step for step in runs.read_metrics(folder) if "update_seconds" in step][1:]
    for key in COSTS:
        row[key] = median(step.get(key, math.nan) for step in steps)
    return row | {"micro_tokens": steps[-1]["micro_tokens"]}


def main() -> None:
    bench = runs.read_config(Bench)
    bench.out.mkdir(parents=True, exist_ok=True)
    model = bench.model or str(make_checkpoint(Shape(bench.out / "model")))
    rows = []
    print("| cap | weights | sampler | peak GB | tokens/s | sampler s | critic s | update s |")
    print("|" + "---|" * 8)
    for cap in bench.caps:
        for quantize in bench.quantize:
            for sampler in bench.samplers:
                if (quantize, sampler) == ("nf4", "vllm"):  # vLLM does not serve it
                    continue
                row = measure(bench, model, cap, quantize, sampler)
                rows.append(row)
                cost = " | ".join(f"{row[key]:.1f}" for key in COSTS if key in row)
                print(f"| {cap:g} GB | {row['weights']} | {sampler} | {row.get('error', cost)} |", flush=True)
    runs.write(bench.out / "one_gpu.json", json.dumps({"rows": rows} | runs.provenance(), indent=1))


if __name__ == "__main__":
    runs.command(main)
