"""Tests of runtime/data.py: problems of one's own, in training and in evaluation."""

import codecs
import json
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as parquet
import pytest
from test_evaluate import command

import ppo
from config import TINY, TaskConfig
from countdown import Countdown, Problem, make_splits, split_of
from runtime import cli, data, evaluation, session
from runtime.data import read_problems, read_splits, read_test
from runtime.run_folder import read_metrics, read_settings
from scripts import make_data

TWO = [Problem((3, 3, 8, 8), 24), Problem((2, 3), 5)]
ROWS = [{"numbers": [3, 3, 8, 8], "target": 24}, {"numbers": [2, 3], "target": 5}]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS)


def write_parquet(path, rows):
    parquet.write_table(pa.Table.from_pylist(rows), path)
    return path


def write_lines(path, problems):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(
        "".join(json.dumps({"numbers": p.numbers, "target": p.target}) + "\n" for p in problems), encoding="utf-8"
    )
    return path


# ------------------------------------------------------------------------------------------------ reading


@pytest.mark.parametrize(
    "content",
    [
        LINES.encode(),
        codecs.BOM_UTF8 + LINES.encode(),
        LINES.replace("\n", "\r\n").encode(),
        LINES.encode("utf-16"),  # what `>` of PowerShell writes
        f"\n{LINES}\n  \n".encode(),
        LINES.strip().encode(),
        LINES.replace("numbers", "nums").encode(),
        LINES.replace("24", "24.0").replace("[2,", "[2.0,").encode(),
        LINES.replace('"target"', '"note": "é", "target"').encode(),
        json.dumps(ROWS).encode(),
        json.dumps(ROWS, indent=1).replace("\n", "\r\n").encode(),
        codecs.BOM_UTF8 + json.dumps(ROWS).encode(),
    ],
    ids=lambda content: repr(content[:24]),
)
@pytest.mark.parametrize("name", ["problems.jsonl", "problems.txt"])
def test_every_plain_format_is_read(tmp_path, content, name):
    """Prevents a file that a student has to convert, and one that is read in part."""
    path = tmp_path / name
    path.write_bytes(content)
    assert read_problems(path) == TWO


@pytest.mark.parametrize("kind", [pa.int8(), pa.int64(), pa.uint16(), pa.float32(), pa.float64()])
@pytest.mark.parametrize("column", ["numbers", "nums"])
def test_parquet_is_read(tmp_path, column, kind):
    """Prevents the best-known data set (Jiayi-Pan/Countdown-Tasks-3to4 has nums and target) from being refused, and
    other columns from being read with it."""
    table = {
        "target": pa.array([24, 5], kind),
        column: pa.array([[3, 3, 8, 8], [2, 3]], pa.list_(kind)),
        "note": pa.array(["a", "b"]),
    }
    for name in ("problems.parquet", "problems"):
        parquet.write_table(pa.table(table), tmp_path / name, row_group_size=1)
        assert read_problems(tmp_path / name) == TWO


def test_parquet_without_its_package_is_told(tmp_path, monkeypatch):
    """Prevents a ModuleNotFoundError where the kit's own requirements are installed."""
    path = write_parquet(tmp_path / "a.parquet", ROWS)
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(
        ValueError, match="a.parquet is Parquet: pip install pyarrow, or pass the problems as JSON lines"
    ):
        read_problems(path)


def test_a_damaged_parquet_file_is_told(tmp_path):
    """Prevents a traceback of pyarrow's for a download that was cut off."""
    path = write_parquet(tmp_path / "a.parquet", ROWS)
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(ValueError, match="a.parquet is a damaged Parquet file") as error:
        read_problems(path)
    assert "\n" not in str(error.value)


BAD = [
    '{"numbers": [1, 2]}',
    '{"target": 3}',
    '{"numbers": [1, 2], "nums": [1, 2], "target": 3}',
    '{"numbers": null, "target": 3}',
    '{"numbers": [], "target": 3}',
    '{"numbers": 12, "target": 3}',
    '{"numbers": "1 2", "target": 3}',
    '{"numbers": ["1", 2], "target": 3}',
    '{"numbers": [1, 2], "target": "3"}',
    '{"numbers": [true, 2], "target": 3}',
    '{"numbers": [1, 2], "target": true}',
    '{"numbers": [[1], 2], "target": 3}',
    '{"numbers": [1.5, 2], "target": 3}',
    '{"numbers": [NaN, 2], "target": 3}',
    '{"numbers": [1, 2], "target": Infinity}',
    '{"numbers": [1, 2], "target": 1e400}',
    '{"numbers": [1, 2], "target": 1e300}',
    '{"numbers": [1, -2], "target": 3}',
    '{"numbers": [1, 2], "target": 0}',
    '{"numbers": [1, 2], "target": null}',
    '{"numbers": [1, 2], "target": 1000000000}',
    '{"numbers": [%s, 2], "target": 3}' % ("9" * 4000),
    '{"numbers": {"0": 1}, "target": 3}',
    '["numbers", "target"]',
    "3",
    "null",
]


@pytest.mark.parametrize(
    "row", [*BAD, "x", '{"numbers": [1', '{"numbers": [%s, 2], "target": 3}' % ("9" * 5000), "[" * 9**5]
)
def test_a_bad_line_is_named(tmp_path, row):
    """Prevents a run on other problems than those of the file, a traceback, and a search for the damage by hand."""
    path = tmp_path / "problems.jsonl"
    path.write_text(f"{json.dumps(ROWS[0])}\n\n{row}\n{json.dumps(ROWS[1])}\n", encoding="utf-8")
    with pytest.raises(ValueError, match=r"problems.jsonl, line 3: not a problem \(.+\)$") as error:
        read_problems(path)
    assert len(str(error.value)) < 300 + len(str(path)) and "\n" not in str(error.value)


@pytest.mark.parametrize("row", BAD)
def test_a_bad_item_of_an_array_is_named(tmp_path, row):
    """Prevents the same of a JSON array."""
    path = tmp_path / "problems.json"
    path.write_text(f"[{json.dumps(ROWS[0])},\n{row}]", encoding="utf-8")
    with pytest.raises(ValueError, match=r"problems.json, item 2: not a problem \(.+\)$"):
        read_problems(path)
    path.write_text(f"[{json.dumps(ROWS[0])},\n{row}", encoding="utf-8")
    with pytest.raises(ValueError, match=r"problems.json, line 2: not a problem \(.+\)$"):
        read_problems(path)


@pytest.mark.parametrize(
    "row",
    [{"nums": [1, None], "target": 3}, {"nums": [1, 2], "target": None}, {"nums": None, "target": 3}, {"nums": [1]}],
)
def test_a_bad_row_of_a_table_is_named(tmp_path, row):
    """Prevents the same of a Parquet file."""
    path = write_parquet(tmp_path / "a.parquet", [{"nums": [1, 2], "target": 3}, row])
    with pytest.raises(ValueError, match=r"a.parquet, row 2: not a problem \(.+\)$"):
        read_problems(path)


@pytest.mark.parametrize("content", ["", "\n \n", "[]", "\ufeff"])
def test_a_file_without_a_problem_is_told(tmp_path, content):
    """Prevents a run on nothing."""
    (tmp_path / "a.json").write_text(content, encoding="utf-8")
    with pytest.raises(ValueError, match="a.json is empty: it holds no problem"):
        read_problems(tmp_path / "a.json")


# ------------------------------------------------------------------------------------------------ splits

SIZES = {"train": 60, "validation": 6, "test": 12}


@pytest.fixture
def folder(tmp_path):
    """A folder as scripts/make_data.py writes it."""
    make_data.main(make_data.DataConfig(out=tmp_path / "data", preview=0, **SIZES))
    return tmp_path / "data"


def test_a_folder_has_its_splits(folder):
    """Prevents training on the test's file."""
    assert read_splits(folder) == make_splits(**SIZES) and read_test(folder) == make_splits(**SIZES)["test"]
    write_parquet(folder / "train.parquet", [{"nums": [1, 2], "target": 3}])
    with pytest.raises(
        ValueError, match="data needs one file train.jsonl, train.json or train.parquet .it holds test.j"
    ):
        read_splits(folder)
    (folder / "train.jsonl").unlink()
    assert read_splits(folder)["train"] == [Problem((1, 2), 3)]
    (folder / "validation.jsonl").unlink()
    with pytest.raises(ValueError, match="data needs one file validation.jsonl"):
        read_splits(folder)


def test_a_file_is_split_by_its_numbers(tmp_path):
    """Prevents a test whose numbers were trained on in another order or with another target, one whose numbers the
    embedded policy was pretrained on, and an easy validation at the head of a sorted file."""
    problems = sorted((p for part in make_splits(train=300, validation=40, test=90).values() for p in part), key=str)
    problems += [Problem(p.numbers[::-1], p.target + 1) for p in problems[::3]]
    splits = read_splits(write_lines(tmp_path / "all.jsonl", problems))
    assert sorted(sum(splits.values(), []), key=str) == sorted(problems, key=str)
    for name, part in splits.items():
        assert {split_of(problem.numbers) for problem in part} == {name} and part != sorted(part, key=str)
    assert splits == read_splits(tmp_path / "all.jsonl")
    with pytest.raises(ValueError, match="has too few problems: none is left for the split"):
        read_splits(write_lines(tmp_path / "few.jsonl", problems[:2]))


# ------------------------------------------------------------------------------------------------ remarks


def test_what_is_odd_is_told_once(tmp_path):
    """Prevents a score that nobody can read: on problems of the training set, without solution or written twice."""
    train = [Problem((2, 3), 5), Problem((2, 3), 5), Problem((4, 6, 9), 20)]
    test = [Problem((3, 2), 6), Problem((9, 4, 6), 999), Problem((1, 2, 3, 4, 5, 6), 7)]
    lines = data.remarks({"test": test, "train": train}, "elsewhere")
    assert lines == [
        "warning: 2 of 3 test problems have the numbers of a training problem: their score says little of other "
        "numbers",
        "note: 1 of 2 test problems that were examined have no solution",  # six numbers are too many for the solver
        "note: 1 of 3 train problems are repetitions",
        "note: 1 of 3 train problems that were examined have no solution",
    ]
    assert data.remarks({"test": [Problem((1, 2, 3, 4), 10)]}, TINY) == []


def test_the_solver_looks_at_few_problems(monkeypatch):
    """Prevents minutes before the first step of a run with half a million problems."""
    monkeypatch.setattr(data, "solvable", lambda numbers, target: False)
    found, examined = data.unsolvable([Problem((1, 2), 9)] * 5_000)
    assert found == examined and 100 < examined <= data.EXAMINED


@pytest.mark.parametrize(
    ("problem", "is_other"), [((1, 2, 3, 13), False), ((1, 2, 3), True), ((1, 2, 3, 14), True), ((1,) * 5, True)]
)
def test_problems_that_the_embedded_policy_does_not_know_are_told(tmp_path, problem, is_other):
    """Prevents hours with a policy that has never seen such problems; also of a run that began with it."""
    (tmp_path / "run" / "policy").mkdir(parents=True)
    (tmp_path / "run" / "metrics.jsonl").touch()
    (tmp_path / "run" / "config.json").write_text(json.dumps({"model": str(Path(TINY).absolute())}), encoding="utf-8")
    for model in (TINY, str(Path(TINY).absolute()), str(tmp_path / "run"), str(tmp_path / "run" / "policy")):
        (line,) = data.unfamiliar([Problem(problem, 3)] * 4, model) or [""]
        assert ("pretrained on 4 numbers from 1 to 13, and 4 of 4 problems are others" in line) == is_other
    assert not data.unfamiliar([Problem(problem, 3)], "Qwen/Qwen2.5-1.5B-Instruct")


def test_the_longest_prompts_are_among_the_measured(policy):
    """Prevents a prompt that does not fit into the context in the middle of a run."""
    problems = [Problem((1,) * k, 3) for k in range(1, 60)] + [Problem((99_999_999,) * 3, 99_999_999)] * 90
    assert policy.chat.longest(problems) == max(len(policy.encode(p)) for p in problems)


# ------------------------------------------------------------------------------------------------ training


def test_a_run_with_the_files_of_the_game_is_a_run_of_the_game(folder, tiny_config, capsys):
    """Prevents problems of a file that are drawn, ordered or split in another way than the kit's own."""
    own = dict(train_problems=60, eval_problems=6, test_problems=12, tokens=400)
    runs = []
    for name, settings in {
        "game": own,
        "files": dict(data=folder, eval_problems=6, test_problems=12, tokens=400),
    }.items():
        config = tiny_config("none", **settings)
        if name == "files":
            config = config.change(train_problems=20_000)
        config = config.change(out=config.out.parent / name)
        ppo.train(config, ppo.COLLECTORS["none"])
        skipped = ("seconds", "tokens_per_second")
        runs.append([{k: v for k, v in r.items() if not k.endswith(skipped)} for r in read_metrics(config.folder)])
    assert runs[0] == runs[1] and len(runs[0]) > 3
    assert f"problems of {folder}: 60 train, 6 validation, 12 test\n" in capsys.readouterr().out


@pytest.fixture
def trained(folder, tiny_config):
    """The folder of a run with --data, of two steps."""
    config = tiny_config("none", data=folder, test_problems=50, eval_problems=50, steps=2, tokens=0)
    ppo.train(config.change(train_problems=20_000), ppo.COLLECTORS["none"])
    return config.out


def test_fewer_problems_than_asked_for_are_told(capsys, trained):
    """Prevents a score on twelve problems that is read as one on fifty."""
    said = capsys.readouterr().out
    assert ": 60 train, 6 validation (50 were asked for), 12 test (50 were asked for)\n" in said
    assert "12 held-out problems" in said
    assert read_metrics(trained)[-1]["test_problems"] == 12


def test_config_json_names_the_files(trained, folder):
    """Prevents a run of which nobody knows what it was trained with."""
    saved = read_settings(trained)
    assert saved["task"]["data"] == str(folder) and folder.is_absolute()
    assert saved["provenance"]["data"] == {f"{name}.jsonl": data.sha256(folder / f"{name}.jsonl") for name in SIZES}


def test_a_run_goes_on_with_the_same_problems_alone(trained, folder, capsys):
    """Prevents a run that changes its problems by accident, and one that can't go on where they have moved."""

    def resume(*options):
        return cli.parse(["--resume", str(trained), *map(str, options)], "none")[0]

    def refused(*options):
        with pytest.raises(SystemExit):
            resume(*options)
        return capsys.readouterr().err

    assert resume().task.data == folder
    moved = folder.rename(folder.with_name("moved"))
    with pytest.raises(ValueError, match="data is gone, the problems of .*: pass --data with their new place"):
        resume()
    assert resume("--data", moved).task.data == moved
    with (moved / "test.jsonl").open("a", encoding="utf-8") as file:
        file.write(LINES)
    assert "moved does not hold the problems that the run began with" in refused("--data", moved)
    assert resume("--data", moved, "--force").task.data == moved


def test_a_resumed_run_keeps_its_problems_and_checksums(trained):
    """Prevents a second interruption after which nobody knows what the run began with."""
    begun = read_settings(trained)["provenance"]["data"]
    for steps in ("4", "6"):
        config, _ = cli.parse(["--resume", str(trained), "--steps", steps, "--force"], "none")
        ppo.train(config, ppo.COLLECTORS["none"], resume=True)
        assert read_settings(trained)["provenance"]["data"] == begun and read_metrics(trained)[-1]["step"] == int(steps)


@pytest.mark.parametrize("settings", ["3", "[1]", "true", '{"a": 1}'])
def test_a_damaged_place_is_told(trained, settings):
    """Prevents a traceback for a config.json whose data is no path."""
    file = trained / "config.json"
    saved = json.loads(file.read_text(encoding="utf-8"))
    saved["task"]["data"] = json.loads(settings)
    file.write_text(json.dumps(saved), encoding="utf-8")
    with pytest.raises(ValueError, match="config.json is damaged"):
        cli.parse(["--resume", str(trained)], "none")


def test_the_place_is_that_of_the_command(tmp_path, monkeypatch):
    """Prevents a run that looks for its problems in the folder that it is resumed from."""
    monkeypatch.chdir(tmp_path)
    assert TaskConfig(data=Path("a") / "b").data == tmp_path / "a" / "b" == TaskConfig(data="a/b").data
    monkeypatch.setenv("HOME", str(tmp_path))
    assert TaskConfig(data=Path("~/a")).data == tmp_path / "a"


def test_prompts_beyond_the_context_are_refused_before_any_work(tmp_path, tiny_config, monkeypatch):
    """Prevents an error in the first step that draws the longest problem."""
    problems = [Problem((k, k + 1, k + 2), 3) for k in range(1, 200)] + [Problem((7,) * 600, 3)]
    config = tiny_config("none", data=write_lines(tmp_path / "all.jsonl", problems))
    monkeypatch.setattr(session, "load_policy", lambda *_: pytest.fail("a model is loaded"))
    with pytest.raises(ValueError, match="new tokens exceed the context of 512"):
        ppo.train(config, ppo.COLLECTORS["none"])


# ------------------------------------------------------------------------------------------------ evaluation


def evaluated(config_args, capsys):
    config = evaluation.parse([*map(str, config_args), "--max-tokens", "8"])
    return evaluation.choose_problems(config, Countdown(config.size)), capsys.readouterr().out


def test_a_run_is_evaluated_on_its_own_test(trained, folder, capsys):
    """Prevents a score on problems that the run was trained on, and one on another game than its own."""
    capsys.readouterr()
    test = make_splits(**SIZES)["test"]
    for model in (trained, trained / "policy", trained / "best"):
        assert evaluated([model], capsys) == (
            test,
            f"12 of 12 test problems of {folder}, which {trained} was trained with\n",
        )
    assert evaluated([trained, "--problems", 5, "--skip", 4], capsys)[0] == test[4:9]
    with pytest.raises(ValueError, match="has 12 test problems: pass a smaller --skip"):
        evaluated([trained, "--skip", 12], capsys)
    with pytest.raises(ValueError, match="was trained with --data .*: leave out --size"):
        evaluated([trained, "--size", 3], capsys)
    moved = folder.rename(folder.with_name("moved"))
    with pytest.raises(ValueError, match="is gone, the problems of .*: pass --data with their new place"):
        evaluated([trained], capsys)
    assert evaluated([trained, "--data", moved], capsys)[0] == test
    moved.rename(folder)
    found, said = evaluated([trained, "--data", folder / "train.jsonl"], capsys)
    assert found == make_splits(**SIZES)["train"] and "60 of 60 test problems have the numbers of a training" in said
    (folder / "test.jsonl").write_text(LINES, encoding="utf-8")
    with pytest.raises(ValueError, match="has changed since .* was trained with it: pass --data with other problems"):
        evaluated([trained], capsys)
    assert evaluated([trained, "--data", folder / "test.jsonl"], capsys)[0] == TWO


def test_a_run_with_one_file_is_tested_on_what_it_has_not_seen(tmp_path, tiny_config, capsys):
    """Prevents `evaluate.py RUN --data FILE` from scoring the run on its training problems."""
    file = write_lines(tmp_path / "all.jsonl", [Problem((a, b), a + b) for a in range(1, 14) for b in range(1, 14)])
    config = tiny_config("none", data=file, steps=1, tokens=0)
    ppo.train(config, ppo.COLLECTORS["none"])
    capsys.readouterr()
    found, said = evaluated([config.out, "--data", file], capsys)
    assert found == evaluated([config.out], capsys)[0] == read_splits(file)["test"] and "warning" not in said


def test_evaluate_reads_every_format(checkpoint, tmp_path, monkeypatch, capsys):
    """Prevents a format that training reads and evaluation does not."""
    out = tmp_path / "result.json"
    for file in (write_parquet(tmp_path / "a.parquet", ROWS), write_lines(tmp_path / "b.jsonl", TWO)):
        command(monkeypatch, checkpoint, "--data", file, "--samples", 1, "--out", out)
        assert json.loads(out.read_text(encoding="utf-8"))["problems"] == 2
