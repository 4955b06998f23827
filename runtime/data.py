"""Problems of your own, from files: JSON lines, a JSON array or Parquet, with `numbers` (or `nums`) and `target`.

read_problems(file)    all problems of a file
read_splits(path)      train, validation and test: a folder's files, or one file split by its numbers
remarks(…)             what a reader of the scores should know of the problems
"""

import json
import random
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from textwrap import shorten

from config import TINY, Config
from countdown import SHARES, SOLVER_NUMBERS, Problem, reachable, solvable, split_of
from runtime.files import KIT, one_line, read_json, sha256
from runtime.run_folder import log_of, read_settings

SUFFIXES = (".jsonl", ".json", ".parquet")
LARGEST = 999_999_999  # number and target
EXAMINED = 200  # problems of a split that the exact solver looks at

# ------------------------------------------------------------------------------------------------ reading


def read_splits(path: Path) -> dict[str, list[Problem]]:
    """Problems for training, validation and test. A folder has a file of each, and they are taken as they are. The
    problems of one file are split by their numbers (`countdown.split_of`), so that no two splits share a set of
    numbers, and shuffled, as a file may be sorted. ValueError for a split without a problem."""
    if path.is_dir():
        return {split: read_problems(file) for split, file in files_of(path).items()}
    splits: dict[str, list[Problem]] = {split: [] for split in SHARES}
    for problem in read_problems(path):
        splits[split_of(problem.numbers)].append(problem)
    for split, problems in splits.items():
        random.Random(0).shuffle(problems)
        if not problems:
            raise ValueError(
                f"{path} has too few problems: none is left for the split {split}. Pass a folder with a file of each "
                f"split, {', '.join(f'{name}.jsonl' for name in SHARES)}"
            )
    return splits


def read_test(path: Path) -> list[Problem]:
    """The problems of a file, or of a folder's test."""
    return read_problems(files_of(path)["test"] if path.is_dir() else path)


def files_of(folder: Path) -> dict[str, Path]:
    """A folder's file of each split. ValueError unless there is one of each."""
    files = {}
    for split in SHARES:
        found = sorted(f for f in folder.iterdir() if f.stem == split and f.suffix in SUFFIXES and f.is_file())
        if len(found) != 1:
            holds = shorten(", ".join(sorted(file.name for file in folder.iterdir())) or "nothing", 100)
            raise ValueError(
                f"{folder} needs one file {split}.jsonl, {split}.json or {split}.parquet (it holds {holds}). "
                f"One file alone can be passed too"
            )
        files[split] = found[0]
    return files


def checksums(path: Path) -> dict[str, str]:
    """The SHA-256 of each file that `path` means, by its name."""
    return {file.name: sha256(file) for file in (files_of(path).values() if path.is_dir() else [path])}


def are_those_of(path: Path, run: Path) -> bool:
    """Whether the files of `path` are, to the byte, those that a run began with. ValueError if they are gone."""
    if not path.exists():
        raise ValueError(f"{path} is gone, the problems of {run}: pass --data with their new place")
    provenance = read_settings(run).get("provenance")
    return isinstance(provenance, dict) and checksums(path) == provenance.get("data")


def read_problems(path: str | Path) -> list[Problem]:
    """The problems of a file. ValueError names the first bad row."""
    problems = []
    for place, row in read_rows(Path(path)):
        try:
            problems.append(to_problem(row))
        except ValueError as error:
            raise ValueError(f"{path}, {place}: not a problem ({error})") from None
    if not problems:
        raise ValueError(f"{path} is empty: it holds no problem")
    return problems


def read_rows(path: Path) -> Iterator[tuple[str, object]]:
    """The rows of a file, each with its place. The content tells the format, whatever the file's name."""
    if not path.is_file():  # a pipe could be read once only
        raise ValueError(
            f"there is no file {path}. Of a data set of Hugging Face, pass a file: "
            f"hf download NAME --repo-type dataset --local-dir FOLDER"
        )
    content = path.read_bytes()
    if content.startswith(b"PAR1"):
        yield from enumerated("row", parquet_rows(path))
        return
    text = content.decode(json.detect_encoding(content), errors="replace")  # UTF-8 or UTF-16, with a mark or without
    if text.lstrip().startswith("["):
        yield from enumerated("item", parsed(path, text, 1))
        return
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            yield f"line {number}", parsed(path, line, number)


def enumerated(name: str, rows: list) -> Iterator[tuple[str, object]]:
    yield from ((f"{name} {number}", row) for number, row in enumerate(rows, 1))


def parsed(path: Path, text: str, first: int) -> object:
    """The JSON value in a text that begins in line `first` of a file. ValueError names the line."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}, line {first + error.lineno - 1}: not a problem ({error.msg})") from None
    except (ValueError, RecursionError) as error:  # a number of thousands of digits; brackets in brackets
        raise ValueError(f"{path}, line {first}: not a problem ({one_line(error)})") from None


def parquet_rows(path: Path) -> list[dict]:
    """The rows of a Parquet file."""
    try:
        from pyarrow.parquet import ParquetFile
    except ImportError:
        raise ValueError(f"{path} is Parquet: pip install pyarrow, or pass the problems as JSON lines") from None
    try:
        with ParquetFile(path) as file:
            wanted = [name for name in file.schema_arrow.names if name in ("numbers", "nums", "target")]
            return file.read(wanted).to_pylist()
    except Exception as error:  # pyarrow's own
        raise ValueError(f"{path} is a damaged Parquet file ({one_line(error)})") from None


def to_problem(row: object) -> Problem:
    """A row as a problem. ValueError for what is none."""
    present = [name for name in ("numbers", "nums") if isinstance(row, dict) and row.get(name) is not None]
    if len(present) != 1 or "target" not in row:
        raise ValueError('a row is like {"numbers": [3, 5, 7, 9], "target": 44}, or has nums in place of numbers')
    numbers = row[present[0]]
    if not isinstance(numbers, list) or not numbers:
        raise ValueError(f"numbers and target must be positive integers, not {shorten(repr(numbers), 40)}")
    return Problem(tuple(whole(number) for number in numbers), whole(row["target"]))


def whole(value: object) -> int:
    """A number of a row. 3.0 is 3: tables store integers so where a column has a gap."""
    number = int(value) if isinstance(value, float) and value.is_integer() else value
    if type(number) is not int or not 0 < number <= LARGEST:
        shown = shorten(repr(value), 40, placeholder="a longer one")
        raise ValueError(f"numbers and target must be positive integers up to {LARGEST:,}, not {shown}")
    return number


# ------------------------------------------------------------------------------------------------ looking at problems


def multisets(problems: list[Problem]) -> set[tuple[int, ...]]:
    """The numbers of each problem, sorted."""
    return {tuple(sorted(problem.numbers)) for problem in problems}


def leak(split: str, problems: list[Problem], train: list[Problem]) -> list[str]:
    """A warning about problems with the numbers of a training problem, in any order."""
    seen = multisets(train)
    if not (shared := sum(tuple(sorted(problem.numbers)) in seen for problem in problems)):
        return []
    return [
        f"warning: {shared:,} of {len(problems):,} {split} problems have the numbers of a training problem: "
        f"their score says little of other numbers"
    ]


def unsolvable(problems: list[Problem]) -> tuple[int, int]:
    """How many targets can't be reached, and of how many problems. At most EXAMINED of them are looked at, evenly
    chosen, and none with more than SOLVER_NUMBERS numbers."""
    small = [problem for problem in problems if len(problem.numbers) <= SOLVER_NUMBERS]
    chosen = small[:: len(small) // EXAMINED + 1]
    found = sum(not solvable(problem.numbers, problem.target) for problem in chosen)
    reachable.cache_clear()
    return found, len(chosen)


def pretraining(model: str) -> dict:
    """The settings that experiments/pretrain.py made a model with, or the model that its run began with. Empty for a
    model from elsewhere."""
    for _ in range(8):  # runs that began with runs
        path = KIT / TINY if model == TINY else Path(model).expanduser()
        places = path, path.parent  # RUN/policy too
        if file := next((place / "pretrain.json" for place in places if (place / "pretrain.json").is_file()), None):
            return read_json(file)
        run = next((place for place in places if log_of(place)), None)
        model = str(read_settings(run).get("model", "")) if run else ""
        if not model:
            break
    return {}


def unfamiliar(problems: list[Problem], model: str) -> list[str]:
    """A warning about problems of another kind than those that the embedded policy was pretrained on."""
    known = pretraining(model)
    size, highest = known.get("size", 0), known.get("highest", 0)
    others = sum(len(p.numbers) != size or max(p.numbers) > highest for p in problems) if known else 0
    if not others:
        return []
    return [
        f"warning: the embedded policy was pretrained on {size} numbers from 1 to {highest}, and {others:,} of "
        f"{len(problems):,} problems are others: it may know too little of them to learn anything"
    ]


def remarks(splits: dict[str, list[Problem]], model: str) -> list[str]:
    """A line for each fact of problems from files that a reader of the scores should know."""
    lines = []
    for split, problems in splits.items():
        lines += leak(split, problems, splits["train"]) if split != "train" and "train" in splits else []
        if repeated := sum(Counter(problems).values()) - len(set(problems)):
            lines.append(f"note: {repeated:,} of {len(problems):,} {split} problems are repetitions")
        missing, examined = unsolvable(problems)
        if missing:
            lines.append(f"note: {missing} of {examined} {split} problems that were examined have no solution")
    return lines + unfamiliar([problem for problems in splits.values() for problem in problems], model)


def counts(splits: dict[str, list[Problem]], config: Config) -> str:
    """How many problems a run has of each split, and how many were asked for where there are fewer."""
    asked = {"train": 0, "validation": config.measuring.eval_problems, "test": config.measuring.test_problems}
    sizes = []
    for split, problems in splits.items():
        fewer = f" ({asked[split]:,} were asked for)" if len(problems) < asked[split] else ""
        sizes.append(f"{len(problems):,} {split}{fewer}")
    return f"problems of {config.task.data}: {', '.join(sizes)}"
