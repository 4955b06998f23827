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
import json
import os
import shutil
import zlib
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from runtime.files import is_whole, read_json, seal, sync, write, writing
from runtime.provenance import provenance

LOGS = ("metrics.jsonl", "metrics.jsonl.gz")  # of a run; of one that is kept in results/


class Run:
    """One run folder, open for writing by one process: `with Run(…) as run`. A new run refuses a folder that holds one.
    resume=True goes on with it: `restored` is the checkpoint to load (None: there was none yet), `state` what it was
    saved with, and what metrics.jsonl says of later steps is gone."""

    def __init__(self, folder: Path, settings: dict, resume: bool = False):
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
            self._open(settings, resume)
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
        self.close()

    def close(self) -> None:
        """Let go of the folder."""
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


# ------------------------------------------------------------------------------------------------ reading runs


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
