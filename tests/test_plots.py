"""Figures and tables from run folders."""

import json
import math

import numpy as np
import pytest

import plots


@pytest.fixture
def folders(tmp_path):
    """Two seeds of one method, with made-up metrics."""
    for seed in (0, 1):
        folder = tmp_path / f"mcts-{seed}"
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps({"search": "mcts", "seed": seed}))
        test = {f"test_{key}": 0.1 * (seed + 1) for key in ("mean_at_k", "mean_low", "mean_high", "pass_at_k")}
        counters = [{"step": i, "generated": 1_000 * i, "seconds": 30.0 * i} for i in range(5)]
        rows = [counters[0] | test, *(row | {"eval_mean": 0.1 * row["step"]} for row in counters[1:])]
        rows.append(counters[4] | {key: 2 * value for key, value in test.items()})
        (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return sorted(tmp_path.iterdir())


def test_curves_average_the_seeds_of_a_method(folders):
    """A curve that shows one seed, or shares for per cent, would mislead."""
    lines = plots.learning_curves(folders).axes[0].get_lines()
    seeds, mean = lines[:2], lines[2]
    assert [list(line.get_xdata()) for line in seeds] == [[1_000, 2_000, 3_000, 4_000]] * 2
    assert mean.get_label() == "mcts (2 seeds)" and mean.get_ydata()[0] == pytest.approx(10)
    assert mean.get_ydata()[-1] == pytest.approx(40)


def test_table_takes_first_and_last_test_score(folders):
    """The README's table must show the score before and after, not two of the same."""
    header, _, first, second = plots.results_table(folders).splitlines()
    assert header.startswith("| method | seed |")
    assert (
        "| mcts | 0 | 10.0% [10.0%, 10.0%] | **20.0% [20.0%, 20.0%]** | 10.0% → 20.0% | 0.00 M | 4 | 2.0 min |" == first
    )
    assert "**40.0% [40.0%, 40.0%]**" in second
    metrics = folders[0] / "metrics.jsonl"
    metrics.write_text(metrics.read_text().partition("\n")[2])  # a run without a test before training
    assert "| – | **20.0% [20.0%, 20.0%]** | – → 20.0% |" in plots.results_table(folders[:1])


def test_intervals_pool_seeds_and_problems():
    """Prevents intervals that take five seeds on the same problems for independent problems, or one seed for certainty:
    where seeds agree only problems vary, where all problems are alike only seeds do."""
    rng = np.random.default_rng(1)
    problems = rng.integers(0, 17, 400)
    mean, low, high = plots.pooled(np.tile(problems, (5, 1)), 16)["mean"]
    error = (problems / 16).std() / 20
    assert mean == pytest.approx(problems.mean() / 16)
    assert (high - low) / 2 == pytest.approx(1.96 * error, rel=0.1)
    seeds = np.array([2, 4, 6, 8, 10])
    mean, low, high = plots.pooled(np.tile(seeds[:, None], (1, 400)), 16)["mean"]
    assert (high - low) / 2 == pytest.approx(1.96 * (seeds / 16).std() / math.sqrt(5), rel=0.15)
    assert plots.pooled(np.array([[0, 0, 3, 16]]), 16)["pass"][0] == 0.5


def test_a_summary_has_a_row_a_method(folders):
    """Prevents seeds of two methods, or of two targets of the search, in one row."""
    for i, folder in enumerate(folders):
        rows = plots.load(folder)[1]
        rows[-1] |= {"test_right": [16 * i, 8, 0, 8], "test_samples": 16, "test_parsed": 0.5}
        (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    header, _, row = plots.summary_table(folders).splitlines()
    assert row.startswith("| mcts | 2 | **37.5% [") and "| 62.5% [" in row and row.endswith("| 0.00 M | 4 | 2.0 min |")
    (folders[1] / "config.json").write_text(json.dumps({"search": "mcts", "seed": 1, "distill": "steps"}))
    assert [line.split(" | ")[:2] for line in plots.summary_table(folders).splitlines()[2:]] == [
        ["| mcts", "1"], ["| mcts, steps", "1"]
    ]  # fmt: skip


def test_command_line(folders, tmp_path, monkeypatch, capsys):
    """Both forms must work on a shell's glob, which names other files too; nonsense is one line."""
    monkeypatch.setattr("sys.argv", ["plots.py", "curves", *map(str, folders), "--out", str(tmp_path / "curves.png")])
    plots.main()
    assert (tmp_path / "curves.png").stat().st_size > 10_000
    monkeypatch.setattr("sys.argv", ["plots.py", "table", *map(str, tmp_path.iterdir())])
    plots.main()
    assert "| mcts | 1 |" in capsys.readouterr().out
    for arguments in (["pie", str(folders[0])], ["table", str(tmp_path / "nothing")]):
        monkeypatch.setattr("sys.argv", ["plots.py", *arguments])
        with pytest.raises(SystemExit) as stop:
            plots.main()
        assert stop.value.code == 2 and capsys.readouterr().err.count("\n") == 1
