"""What may come in from outside: settings, places for results, JSON. What may not is refused with a line that says why.

The config dataclasses state the ranges of their fields with `check` in __post_init__. Fields are given by name; of one
that holds several values, each is checked. NaN and infinity are in no range.
"""

import json
import math
import operator
from collections.abc import Collection
from pathlib import Path
from tempfile import TemporaryFile

RULES = {"at least": operator.ge, "at most": operator.le, "above": operator.gt}


def check(settings: object, rule: str, bound: float, names: str) -> None:
    """check(self, "at least", 1, "steps batch"): ValueError for the first of these fields that isn't."""
    for name in names.split():
        for value in values(settings, name):
            if not isinstance(value, int | float) or not math.isfinite(value):
                raise ValueError(f"{name} must be a finite number, not {value!r}")
            if not RULES[rule](value, bound):
                raise ValueError(f"{name} must be {rule} {bound}, not {value}")


def check_choices(settings: object, **choices: Collection[str]) -> None:
    """ValueError for the first field that is not among its choices."""
    for name, allowed in choices.items():
        for value in values(settings, name):
            if value not in tuple(allowed):
                raise ValueError(f"{name} must be one of {', '.join(allowed)}, not {value!r}")


def values(settings: object, name: str) -> tuple:
    value = getattr(settings, name)
    if value == ():
        raise ValueError(f"{name} needs a value")
    return value if isinstance(value, tuple) else (value,)


def differing(there: dict, here: dict) -> list[str]:
    """Which of the settings `here` have another value `there`, a piece of text each."""
    return [f"{key} {there[key]} there, {value} here" for key, value in here.items() if there[key] != value]


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
