"""A run folder: the settings of a run, its metrics, its checkpoints and its policy.

RUN/config.json               all settings, with versions, machine and commit
RUN/metrics.jsonl             a line for each step: counters, rewards, losses, evaluation
RUN/samples.jsonl             answers to the same problems at every evaluation
RUN/trees/                    one problem's tree at every evaluation
RUN/report.html               the run on one page
RUN/events.out.tfevents…      metrics and samples for TensorBoard
RUN/checkpoint/               the newest checkpoint: policy (by `save_pretrained`), value head, optimiser, counters
RUN/checkpoint.old/           the one before it, used if the newest is damaged (`sha256sum -c SHA256SUMS` checks it)
RUN/best/                     the policy with the best validation mean
RUN/policy/                   the final policy, for AutoModelForCausalLM / PeftModel

A checkpoint is written under another name, forced to the disk and then renamed, so a kill at any moment leaves a whole
one. When the run goes on, lines of metrics.jsonl and samples.jsonl that are younger than the checkpoint are removed.
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

from runtime.board import Board
from runtime.files import is_whole, read_json, seal, sync, typed, write, writing
from runtime.provenance import provenance

LOGS = ("metrics.jsonl", "metrics.jsonl.gz")  # of a run; of a run that was packed into results/
SAMPLES = "samples.jsonl"


class Run:
    """One run folder, open for writing by one process: `with Run(…) as run`.

    A new run refuses a folder that already holds a run; resume=True goes on with that run. Then `restored` is the
    folder of the checkpoint to load, or None if there is none yet, and `state` is what `checkpoint` got as state.
    """

    def __init__(
        self,
        folder: Path,
        settings: dict,
        resume: bool = False,
        checksums: dict | None = None,
        track: str = "none",
    ):
        """`checksums`: those of the files that problems and task come from; part of the provenance. `track`: where
        metrics go too."""
        from filelock import FileLock, Timeout

        self.folder, self.checksums, self.track = Path(folder), checksums or {}, track
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
        if not resume:
            check_unused(self.folder)
        self.settings = settings
        self.restored, self.state = self._restore() if resume else (None, {})
        if not self.restored:
            self.write_config()
        first_step = self.state.get("step", -1) + 1 if resume else None
        self.board = Board(self.folder, by_name(settings), self.track, first_step)

    def write_config(self) -> None:
        """Write the settings, and what the run was begun with. A resumed run calls this once its checkpoint is loaded:
        settings that the checkpoint does not fit are never written."""
        begun_with = provenance() | self.checksums
        if self.restored:
            begun_with = read_settings(self.folder).get("provenance")
        settings = self.settings | {"provenance": begun_with}
        write(self.folder / "config.json", json.dumps(settings, indent=1, default=str))

    def __enter__(self) -> "Run":
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def close(self) -> None:
        """Close the log and give up the lock."""
        with suppress(OSError):  # a full disk, of which `log` has told
            self.board.close()
        self.lock.release()

    def log(self, row: dict) -> None:
        """Append a line of metrics; its numbers also go to the board."""
        row = {key: round(value, 6) if isinstance(value, float) else value for key, value in row.items()}
        with writing(self.metrics):
            append(self.metrics, [row])
            self.board.log(row)

    def show(self, samples: list[dict]) -> None:
        """Append answers to the watched problems; they also go to the board."""
        with writing(self.folder / SAMPLES):
            append(self.folder / SAMPLES, samples)
            self.board.show(samples)

    def checkpoint(self, save: Callable[[Path], None], state: dict) -> None:
        """Write a checkpoint: `save(folder)` writes the tensors, `state` is the rest, as JSON. The checkpoint before it
        stays."""

        def fill(folder: Path) -> None:
            save(folder)
            (folder / "state.json").write_text(
                json.dumps(state | {"settings": fingerprint(self.settings)}), encoding="utf-8"
            )

        self.publish("checkpoint", fill)

    def publish(self, name: str, fill: Callable[[Path], None]) -> None:
        """Make the folder RUN/name, which `fill(folder)` writes: whole or not at all. If it is a checkpoint, the one
        before it stays as checkpoint.old."""
        new, newest, old = (self.folder / f"{name}{suffix}" for suffix in (".new", "", ".old"))
        with writing(new):
            shutil.rmtree(new, ignore_errors=True)
            new.mkdir()
            fill(new)
            seal(new)
            if newest.exists():
                shutil.rmtree(old, ignore_errors=True)
                newest.rename(old)
            new.rename(newest)
            sync(self.folder)
            if name != "checkpoint":
                shutil.rmtree(old, ignore_errors=True)

    def _restore(self) -> tuple[Path | None, dict]:
        """The newest whole checkpoint and its state. metrics.jsonl loses its younger lines."""
        newest, old = self.folder / "checkpoint", self.folder / "checkpoint.old"
        checkpoints = [folder for folder in (newest, old) if folder.exists()]
        folder = next((folder for folder in checkpoints if is_whole(folder)), None)
        if checkpoints and folder is None:
            raise ValueError(f"no checkpoint in {self.folder} is whole: its files are not those that were written")
        if folder == old and newest.exists():
            print(f"warning: {newest} is damaged (now {newest}.damaged): going on from the one before it")
            shutil.rmtree(f"{newest}.damaged", ignore_errors=True)
            newest.rename(f"{newest}.damaged")
        if folder is None:
            print(f"{self.folder} has no checkpoint yet: from the start")
        state = json.loads((folder / "state.json").read_text(encoding="utf-8")) if folder else {}
        if folder and state.pop("settings") != fingerprint(self.settings):
            print(f"note: {folder} was written with other settings")
        for file in (self.metrics, self.folder / SAMPLES):
            rows = [row for row in read_rows(file) if row["step"] <= state.get("step", -1)]
            write(file, "".join(json.dumps(row) + "\n" for row in rows))
        return folder, state


def append(file: Path, rows: list[dict]) -> None:
    """Add lines to a file, and force them to the disk."""
    with file.open("a", encoding="utf-8") as lines:
        lines.writelines(json.dumps(row) + "\n" for row in rows)
        lines.flush()
        os.fsync(lines.fileno())


def by_name(settings: dict) -> dict:
    """The settings of a config.json by their names alone, without topics."""
    flat = {}
    for name, value in settings.items():
        flat |= by_name(value) if isinstance(value, dict) else {name: value}
    return flat


# ------------------------------------------------------------------------------------------------ reading runs


def check_unused(folder: Path) -> None:
    """ValueError if the folder holds a run."""
    if log_of(folder):
        raise ValueError(f"{folder} already holds a run: pass --resume {typed(folder)} or another --out")


def read_settings(folder: Path) -> dict:
    """A run's config.json. ValueError if there is none, or it is damaged."""
    file = Path(folder) / "config.json"
    if not file.is_file():
        raise ValueError(f"{folder} holds no run: there is no {file}")
    return read_json(file)


def log_of(folder: Path) -> Path | None:
    """The file with a run's metrics; None if the folder holds no run."""
    return next((file for name in LOGS if (file := Path(folder) / name).exists()), None)


def pack(folder: Path, target: Path) -> None:
    """Copy a run's config.json, metrics and watched answers to `target`; they are compressed to a seventh."""
    write(target / "config.json", (folder / "config.json").read_text(encoding="utf-8"))
    for name in (LOGS[0], SAMPLES):
        if (folder / name).exists():
            write(target / f"{name}.gz", gzip.compress((folder / name).read_bytes(), mtime=0))


def read_metrics(folder: Path) -> list[dict]:
    """A run's rows of metrics; an empty list if the folder holds no run."""
    file = log_of(folder)
    return read_rows(file) if file else []


def read_samples(folder: Path) -> list[dict]:
    """A run's answers to the watched problems; an empty list if it has none."""
    plain = Path(folder) / SAMPLES
    return read_rows(plain if plain.exists() else plain.with_name(f"{SAMPLES}.gz"))


def read_rows(file: Path) -> list[dict]:
    """The rows of metrics.jsonl or samples.jsonl; an empty list if there is no such file.

    A torn last line, as a kill leaves it, is left out. ValueError for another line that is not a row with its step.
    """
    rows, content = [], b""
    if file.exists():
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
            raise ValueError(f"{file} is damaged: line {number} is no row of a run")
    return rows


def fingerprint(settings: dict) -> str:
    """A hash of a run's settings. The place of its folder does not change it."""
    settings = {name: value for name, value in settings.items() if name != "out"}
    return hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode()).hexdigest()


def ending(rows: list[dict]) -> str:
    """How a run with these rows of metrics has ended: "finished" after the test of the final policy, "stopped" by
    runtime/guard.py or for a loss that is not finite, "" if it has not ended."""
    last = rows[-1] if rows else {"step": 0}
    if "stopped" in last:
        return "stopped"
    return "finished" if last["step"] > 0 and "test_mean_at_k" in last else ""


def finished(folder: Path) -> bool:
    """Whether a run's final policy has been tested."""
    return ending(read_metrics(folder)) == "finished"
