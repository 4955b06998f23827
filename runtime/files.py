"""Files: written whole or not at all, with checksums, and read without surprises."""

import hashlib
import json
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryFile

from safetensors import SafetensorError

SUMS = "SHA256SUMS"


def check_writable(path: Path, folder: bool = False) -> None:
    """ValueError, before the work and not after it, where no file, or no folder of files, can be made at `path`. Makes
    nothing that stays."""
    if path.is_dir() and not folder:
        raise ValueError(f"{path} is a folder: name a file")
    places = [path.absolute(), *path.absolute().parents][0 if folder else 1 :]
    above = next(place for place in places if place.exists())
    try:
        TemporaryFile(dir=above).close()
    except OSError as error:
        raise ValueError(f"{path} can't be written: {above}: {error.strerror}") from None


def check_new(folder: Path) -> None:
    """ValueError, before the work, for a folder that is there already or can't be made."""
    if folder.exists():
        raise ValueError(f"{folder} exists already: remove it or name another folder")
    check_writable(folder, folder=True)


def read_json(file: Path) -> dict:
    """A file's JSON object. ValueError, with its name, if it holds none."""
    try:
        found = json.loads(file.read_text())
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        raise ValueError(f"{file} is damaged: it holds no JSON object")
    return found


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
    """Whether a sealed folder's files are those that were written, whatever has come beside them."""
    if not (folder / SUMS).exists():
        return False
    lines, present = (folder / SUMS).read_text(errors="replace").splitlines(), sums(folder)
    return set(lines[:-1]) <= set(present) and lines[-1:] == [counted(lines[:-1])]


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
