"""What a setting may be: the refusals, a line each, that the config dataclasses share in their __post_init__.

Fields are given by name; of one that holds several values, each is checked. NaN and infinity are in no range.
"""

import math
import operator
import os
from collections.abc import Collection
from pathlib import Path

RULES = {"at least": operator.ge, "at most": operator.le, "above": operator.gt}


def check(settings: object, rule: str, bound: float, names: str) -> None:
    """check(self, "at least", 1, "steps batch"): ValueError for the first of these fields that isn't."""
    for name in names.split():
        for value in values(settings, name):
            if not math.isfinite(value):
                raise ValueError(f"{name} must be a finite number, not {value}")
            if not RULES[rule](value, bound):
                raise ValueError(f"{name} must be {rule} {bound}, not {value}")


def check_choices(settings: object, **choices: Collection[str]) -> None:
    """ValueError for the first field that is not among its choices."""
    for name, allowed in choices.items():
        for value in values(settings, name):
            if value not in allowed:
                raise ValueError(f"{name} must be one of {', '.join(allowed)}, not {value!r}")


def values(settings: object, name: str) -> tuple:
    value = getattr(settings, name)
    if value == ():
        raise ValueError(f"{name} needs a value")
    return value if isinstance(value, tuple) else (value,)


def check_writable(path: Path, folder: bool = False) -> None:
    """ValueError, before the work and not after it, where no file, or no folder of files, can be made at `path`."""
    if path.is_dir() and not folder:
        raise ValueError(f"{path} is a folder: name a file")
    places = [path.absolute(), *path.absolute().parents][0 if folder else 1 :]
    above = next(place for place in places if place.exists())
    if not above.is_dir() or not os.access(above, os.W_OK):
        raise ValueError(f"{path} can't be written: {above} is {'read-only' if above.is_dir() else 'a file'}")
