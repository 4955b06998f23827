"""Files: written whole or not at all, with checksums, and errors of one line."""

import hashlib
import json
import os
import shlex
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryFile
from textwrap import shorten

from safetensors import SafetensorError

KIT = Path(__file__).resolve().parents[1]
SUMS = "SHA256SUMS"  # in a sealed folder: the list of its files' checksums


def typed(path: Path | str) -> str:
    """A path as one types it in a shell: in quotes where it needs them, and never like an option."""
    text = f"./{path}" if str(path).startswith("-") else str(path)
    quoted = shlex.quote(text)
    return f'"{text}"' if os.name == "nt" and quoted != text else quoted


def typed_program(name: str) -> str:
    """A program of the kit as one types it in the working folder."""
    return f"python {name if Path.cwd() == KIT else typed(KIT / name)}"


def check_writable(path: Path, folder: bool = False) -> None:
    """ValueError if no file, or with `folder` no folder, can be made at `path`. Called before long work; leaves
    nothing behind."""
    if path.is_dir() and not folder:
        raise ValueError(f"{path} is a folder: name a file")
    parents = [path.absolute(), *path.absolute().parents][0 if folder else 1 :]
    parent = next(parent for parent in parents if parent.exists())
    try:
        TemporaryFile(dir=parent).close()
    except OSError as error:
        raise ValueError(f"{path} can't be written: {parent}: {error.strerror}") from None


def check_new(folder: Path) -> None:
    """ValueError for a folder that exists already or can't be made. Called before long work."""
    if folder.exists():
        raise ValueError(f"{folder} exists already: remove it or name another folder")
    check_writable(folder, folder=True)


def read_json(file: Path) -> dict:
    """The JSON object in a file. ValueError, which names the file, if there is none in it."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError):
        content = None
    if not isinstance(content, dict):
        raise ValueError(f"{file} is damaged: it holds no JSON object")
    return content


def write(path: Path, content: str | bytes) -> None:
    """Write a file whole or not at all. Missing folders above it are made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_name(path.name + ".new")
    new.write_bytes(content.encode() if isinstance(content, str) else content)
    sync(new)
    new.replace(path)
    sync(path.parent)


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """The block that writes `path`: Ctrl-C takes effect after it, and an error in it becomes an OSError that names
    `path`."""
    interrupts: list[bool] = []
    main = threading.current_thread() is threading.main_thread()
    handler = signal.signal(signal.SIGINT, lambda *_: interrupts.append(True)) if main else None
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:  # on a full disk torch raises RuntimeError
        if type(error).__name__ == "OutOfMemoryError":  # torch's, a RuntimeError too; torch is not imported here
            raise
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        raise OSError(f"{path} can't be written ({shorten(reason, 400)}); the last checkpoint is kept") from error
    finally:
        if main:
            signal.signal(signal.SIGINT, handler)
    if interrupts:
        signal.raise_signal(signal.SIGINT)


def seal(folder: Path) -> None:
    """Write the checksums of a folder's files into it, and force all files to the disk."""
    lines = sums(folder)
    (folder / SUMS).write_text("\n".join([*lines, last_line(lines)]) + "\n", encoding="utf-8")
    for path in (*folder.rglob("*"), folder):
        sync(path)


def is_whole(folder: Path) -> bool:
    """Whether a folder is sealed and its files are the sealed ones. Files that came later do not count."""
    if not (folder / SUMS).exists():
        return False
    *lines, last = (folder / SUMS).read_text(encoding="utf-8", errors="replace").splitlines() or [""]
    return set(lines) <= set(sums(folder)) and last == last_line(lines)


def last_line(lines: list[str]) -> str:
    """The end of a list of checksums. A list without it is torn; sha256sum takes it for a comment."""
    return f"# {len(lines)} files"


def sums(folder: Path) -> list[str]:
    """A line with the checksum of each file in a folder, as sha256sum writes it; the list of checksums has none."""
    files = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}
    return [f"{sha256(path)}  {name}" for name, path in files.items() if name != SUMS]


def sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(2**20):
            digest.update(chunk)
    return digest.hexdigest()


def sync(path: Path) -> None:
    """Force a file or folder to the disk. On Windows a file must be open for writing, and a folder can't be forced."""
    if os.name == "nt" and path.is_dir():
        return
    handle = os.open(path, os.O_RDWR if os.name == "nt" else os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def one_line(error: Exception) -> str:
    """An error's text on one line, of at most 400 characters. A KeyError has a name alone for a text."""
    text = f"unknown or missing: {error}" if isinstance(error, KeyError) else str(error)
    return shorten(text, 400, placeholder=" …") or type(error).__name__
