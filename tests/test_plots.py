"""Tests of experiments/plots.py and tables.py: figures and tables from run folders."""

import json
import math
from dataclasses import asdict
from itertools import combinations

import numpy as np
import pytest

from config import Config, preset_for
from experiments import figures, plots, tables
from runtime.cli import restore
from runtime.run_folder import read_metrics, read_settings


def save(folder, config):
    (folder / "config.json").write_text(json.dumps(asdict(config), default=str), encoding="utf-8")


@pytest.fixture
def folders(tmp_path):
    """Two seeds of one method, with made-up metrics."""
    for seed in (0, 1):
        folder = tmp_path / f"mcts-{seed}"
        folder.mkdir()
        save(folder, preset_for("tiny", "mcts").change(seed=seed))
        test = {"test_samples": 16} | {
            f"test_{key}": 0.1 * (seed + 1) for key in ("mean_at_k", "mean_low", "mean_high", "pass_at_k")
        }
        counters = [{"step": i, "generated": 1_000 * i, "seconds": 30.0 * i} for i in range(5)]
        evaluation = {"eval_pass": 0.5, "eval_reward": 0.25, "eval_parsed": 1.0, "eval_k": 4}
        rows = [counters[0] | test, *(row | evaluation | {"eval_mean": 0.1 * row["step"]} for row in counters[1:])]
        rows.append(counters[4] | {key: 2 * value for key, value in test.items()} | {"test_samples": 16})
        (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return sorted(tmp_path.iterdir())


def test_curves_average_the_seeds_of_a_method(folders):
    """A curve that shows one seed, or shares for per cent, would mislead."""
    lines = [json.loads(line) for line in (folders[1] / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    rows = [row | {"eval_mean": 3 * row["eval_mean"]} if "eval_mean" in row else row for row in lines]
    (folders[1] / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    axes = plots.learning_curves(folders).axes[0]
    (mean,), (band,) = axes.get_lines(), axes.collections
    assert (mean.get_xdata()[0], mean.get_xdata()[-1]) == (1_000, 4_000) and axes.get_ylabel().endswith("mean@4, %")
    assert mean.get_label() == "mcts (2 seeds)" and mean.get_ydata()[[0, -1]] == pytest.approx([20, 80])
    at_the_end = band.get_paths()[0].vertices[:, 1][band.get_paths()[0].vertices[:, 0] == 4_000]
    assert (at_the_end.min(), at_the_end.max()) == pytest.approx((40, 120))


def test_cpu_seconds_are_summed_where_they_were_recorded(folders):
    """Prevents a curve along the cost of single steps, and one at 0 for a run that has none."""
    lines = [json.loads(line) for line in (folders[0] / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    rows = [row | {"cpu_seconds": 2.0} if "eval_mean" in row else row for row in lines]
    (folders[0] / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    (mean,) = plots.learning_curves(folders, "cpu_seconds").axes[0].get_lines()
    assert (mean.get_xdata()[0], mean.get_xdata()[-1]) == (2, 8) and mean.get_label() == "mcts (1 seed)"
    with pytest.raises(ValueError, match="none of the runs"):
        plots.learning_curves(folders[1:], "cpu_seconds")


def test_table_takes_first_and_last_test_score(folders):
    """The README's table must show the score before and after, not two of the same."""
    header, _, first, second = tables.results_table(folders).splitlines()
    assert header.startswith("| method | seed |")
    assert (
        "| mcts | 0 | 10.0% [10.0%, 10.0%] | **20.0% [20.0%, 20.0%]** | 10.0% → 20.0% | 0.00 M | 4 | 2.0 min |" == first
    )
    assert "**40.0% [40.0%, 40.0%]**" in second
    metrics = folders[0] / "metrics.jsonl"
    metrics.write_text(
        metrics.read_text(encoding="utf-8").partition("\n")[2], encoding="utf-8"
    )  # a run without a test before training
    assert "| – | **20.0% [20.0%, 20.0%]** | – → 20.0% |" in tables.results_table(folders[:1])


@pytest.mark.parametrize(("seeds", "rivals"), [(3, 0), (5, 0), (5, 3), (1, 5)])
def test_95_per_cent_intervals_hold_the_truth_in_95_per_cent_of_studies(seeds, rivals):
    """Prevents the narrow intervals of a bootstrap over three seeds (80 %), and five seeds on the same problems taken
    for independent problems. Each made-up study has effects of seed, of problem (which rivals share), and noise."""
    rng, inside, studies = np.random.default_rng(2), 0, 400
    for _ in range(studies):
        problems = rng.normal(0, 0.25, 200)

        def runs_of(n, problems=problems):
            return 0.1 + problems + rng.normal(0, 0.02, (n, 1)) + rng.normal(0, 0.1, (n, 200))

        scores, rival = runs_of(seeds), runs_of(rivals) if rivals else None
        _, low, high = tables.pooled(scores, rival)
        inside += low <= (0.0 if rivals else 0.1) <= high
    assert 0.92 <= inside / studies <= 0.99


def test_the_interval_of_one_seed_is_that_of_its_problems():
    """Prevents NaN, and an interval of nothing."""
    right = np.random.default_rng(1).integers(0, 17, (1, 400)) / 16
    mean, low, high = tables.pooled(right)
    assert mean == pytest.approx(right.mean())
    assert (high - low) / 2 == pytest.approx(1.96 * right.std() / 20, rel=0.1)


def test_the_interval_of_three_seeds_on_like_problems_is_students():
    """Prevents a standard deviation over n in place of n - 1: t(0.975; 2) = 4.303."""
    mean, low, high = tables.pooled(np.repeat([[0.1], [0.2], [0.3]], 50, 1))
    assert mean == pytest.approx(0.2) and (high - low) / 2 == pytest.approx(4.303 * 0.1 / math.sqrt(3), rel=0.06)


def finish(folder, right, method=None, **settings):
    """Give a run its test scores, another method or other settings."""
    rows = read_metrics(folder)
    config, _ = restore(Config, read_settings(folder), folder)
    if method:
        config = preset_for("tiny", method).change(seed=config.seed)
    save(folder, config.change(**settings))
    rows[-1] |= {"test_right": right, "test_parsed": 0.5}
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def test_pass_at_k_is_the_share_of_all_draws_of_k_that_hold_a_right_answer():
    """Prevents a biased estimate: of all subsets of k samples, those with a right one are counted."""
    right = np.array([[0, 1, 6, 2], [3, 3, 0, 5]])
    found = tables.pass_at(right / 6, 6)
    for k in range(1, 7):
        hits = [[any(i < count for i in some) for some in combinations(range(6), k)] for count in right.flat]
        assert found[:, k - 1] == pytest.approx(np.mean(hits, 1).reshape(2, 4).mean(1))
    _, axes = plots.plt.subplots()
    plots.pass_curves({"mcts": right / 6, "cispo": right[:1] / 6}, 6, axes)
    assert [line.get_label() for line in axes.lines] == ["mcts", "cispo"]
    assert axes.lines[0].get_ydata() == pytest.approx(100 * found.mean(0))


def test_a_summary_has_a_row_a_method(folders):
    """Prevents runs of two settings in one row as if they were seeds."""
    for i, folder in enumerate(folders):
        finish(folder, [16 * i, 8, 0, 8])
    header, _, row = tables.summary_table(folders).splitlines()
    assert row.startswith("| mcts | 2 | **37.5% [") and "| – | 62.5% [" in row and "mean@16" in header
    assert row.endswith("| 0.00 M | 4 | – |")
    config, rows = tables.load(folders[0])
    (folders[0] / "metrics.jsonl").write_text(
        "".join(json.dumps(row | {"cpu_seconds": 30}) + "\n" for row in rows), encoding="utf-8"
    )
    cost = f"| {len(rows) * 30 / 60:.1f} min |"  # of the one that recorded it
    assert tables.summary_table(folders).endswith(cost)
    with pytest.raises(ValueError, match="two runs of mcts have the same seed: pass each run once"):
        tables.summary_table([*folders, folders[0]])
    finish(folders[1], [16, 8, 0, 8], seed=0, preset="qwen1.5b")
    assert list(tables.by_method(folders)) == ["mcts, preset qwen1.5b", "mcts, preset tiny"]
    finish(folders[1], [16, 8, 0, 8], seed=1, preset="tiny")
    finish(folders[1], [16, 8, 0, 8], selection="uct", lesson="steps")
    _, other = tables.summary_table(folders).splitlines()[2:]
    assert other.startswith("| mcts, selection uct, lesson steps | 1 | **50.0% [") and "| +25.0 [" in other


def test_methods_are_compared_at_equal_tokens_of_both_counts(folders):
    """Prevents a method that is charged for more tokens than it runs from looking worse than it is: the scores are read
    where all have spent the same, between two evaluations."""
    with pytest.raises(ValueError, match="a run has not recorded decoded tokens"):
        tables.tokens_table(folders)
    save(folders[1], preset_for("tiny", "cispo"))
    for folder, decoded in zip(folders, (900, 500)):
        rows = [{"step": i, "generated": 1_000 * i, "decoded": decoded * i, "prefilled": 0} for i in range(1, 5)]
        scores = [row | {"eval_mean": 0.1 * row["step"]} for row in rows]
        (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in scores), encoding="utf-8")
    header, _, cispo, mcts = tables.tokens_table(folders).splitlines()
    assert header.endswith("| validation at 0.00 M generated | validation at 0.00 M decoded |")
    assert cispo == "| cispo | 1 | 0.00 M | 0.00 M | 2.00 | 0.00 M | **40.0%** | **40.0%** |"
    assert mcts == "| mcts | 1 | 0.00 M | 0.00 M | 1.11 | 0.00 M | **40.0%** | **22.2%** |"  # at 2,000 decoded


def test_collapsed_seeds_are_counted_in_a_summary_and_not_averaged(folders):
    """Prevents a setting that loses two seeds of three from looking like its lucky one, or from going unmentioned."""
    finish(folders[0], [16, 8, 0, 8])
    lines = (folders[1] / "metrics.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)[:3]
    stopped = json.dumps(json.loads(lines[-1]) | {"stopped": "collapsed"}) + "\n"
    (folders[1] / "metrics.jsonl").write_text("".join([*lines[:2], stopped]), encoding="utf-8")
    (row,) = tables.summary_table(folders).splitlines()[2:]
    assert row.startswith("| mcts | 1, 1 collapsed | **50.0% [")
    save(folders[1], preset_for("tiny", "mcts").change(seed=1, lesson="steps"))
    _, row = tables.summary_table(folders).splitlines()[2:]
    assert row == "| mcts, lesson steps | 1 collapsed |" + " – |" * 7


def test_a_forest_shows_what_a_setting_changes(folders):
    """Prevents a point at another row's difference, and a search that is held against nothing."""
    for i, folder in enumerate(folders):
        finish(folder, [16 * i, 8, 0, 8], **({"selection": "uct"} if i else {}))
    axes = plots.forest(folders).axes[0]
    (line,), (point,) = axes.collections[0].get_segments(), axes.collections[1].get_offsets()
    assert point.tolist() == [pytest.approx(25), 0] and line[0, 0] <= 25 <= line[1, 0]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["selection uct (1)"]
    with pytest.raises(ValueError, match="pass those of `mcts` too"):
        plots.forest(folders[1:])


@pytest.mark.parametrize("other", [{"size": 3}, {"test_problems": 2}, {"eval_temperature": 0.2}, {"split": "post"}])
def test_scores_of_another_test_are_not_subtracted(folders, other):
    """Prevents a difference between four numbers and three, two temperatures, or our test problems and the post's, of
    which the training set has most; and a traceback about shapes."""
    finish(folders[0], [16, 8, 0, 8])
    finish(folders[1], [16, 8] * (1 if "test_problems" in other else 2), lesson="steps", **other)
    _, row = tables.summary_table(folders).splitlines()[2:]
    assert "lesson steps" in row and "%]** | – |" in row
    finish(folders[1], [16, 8, 0, 8], size=4, split="multiset", test_problems=820, eval_temperature=1.0)
    _, row = tables.summary_table(folders).splitlines()[2:]
    assert "%]** | +0.0 [" in row


def test_searches_are_drawn_by_what_they_really_spent(tmp_path):
    """Prevents a tree that was searched out after 200 tokens drawn at its budget of 4,096, policies that look alike,
    and one count of tokens drawn as the other."""
    score = {"problems": 10, "mean_at_k": 0.2, "mean_low": 0.1, "mean_high": 0.4}
    for method, spent in (("mcts", (160, 2_000)), ("best-of-n", (150, 40_000))):
        scores = [score | {"usage": {"generated": tokens, "decoded": tokens // 2}} for tokens in spent]
        one = {"model": "a", "method": method, "budget": [16, 4_096], "scores": scores}
        tree = {"tree": {"children": 2, "cutoff": None}} if method == "mcts" else {}
        (tmp_path / f"{method}.json").write_text(json.dumps(one | tree), encoding="utf-8")
    figure = plots.search_curves(sorted(tmp_path.iterdir()))
    rival, tree = (container.lines[0] for container in figure.axes[0].containers)
    assert list(tree.get_xdata()) == [16, 200] and list(rival.get_xdata()) == [15, 4_000]
    assert tree.get_ydata() == pytest.approx([20, 20])
    rival, tree = (container.lines[0] for container in figure.axes[1].containers)
    assert list(tree.get_xdata()) == [8, 100] and list(rival.get_xdata()) == [7.5, 2_000]
    (tmp_path / "other.json").write_text(json.dumps(one | {"model": "b"}), encoding="utf-8")
    figures = figure, plots.search_curves(sorted(tmp_path.iterdir()))
    one, two = ([text.get_text() for text in f.axes[1].get_legend().get_texts()] for f in figures)
    assert one == ["best-of-n", "mcts, K = 2"] and two == ["best-of-n, a", "mcts, K = 2, a", "best-of-n, b"]
    tree = json.loads((tmp_path / "mcts.json").read_text(encoding="utf-8")) | {"tree": {"children": 2, "cutoff": 0.0}}
    (tmp_path / "mcts.json").write_text(json.dumps(tree), encoding="utf-8")
    legend = plots.search_curves([tmp_path / "mcts.json"]).axes[1].get_legend()
    assert [text.get_text() for text in legend.get_texts()] == ["mcts, K = 2, distinct"]


def test_evaluations_of_seeds_are_pooled(tmp_path):
    """Prevents a seed taken for a policy of its own, a difference to another row than the search's, and searches or
    fewer problems taken for the same."""
    told = {"mcts-seed1": [4, 0], "mcts-seed2": [0, 0], "none-seed1": [4, 4], "base": [1, 0]}
    for name, right in told.items():
        one = {"model": name, "method": "none", "samples": 4, "temperature": 0.2}
        (tmp_path / f"{name}.json").write_text(
            json.dumps(one | {"scores": [{"right": right, "samples": 4}]}), encoding="utf-8"
        )
    files = sorted(tmp_path.iterdir())
    header, _, none, search, base = tables.scores_table(files).splitlines()
    assert "mean@4 at 0.2" in header
    assert none.startswith("| none | 1 | **100.0% [100.0%, 100.0%]** | +75.0 [") and none.endswith(
        " | 100.0% [100.0%, 100.0%] |"
    )
    assert search.startswith("| mcts | 2 | **25.0% [") and " | – | 25.0% [" in search
    assert base.startswith("| base | 1 | **12.5% [") and " | -12.5 [" in base and " | 50.0% [" in base
    whole = json.loads(files[1].read_text(encoding="utf-8"))
    for change, message in (
        ({"method": "mcts", "tree": {}}, "holds scores of a search"), ({"temperature": 1.0}, "temperature"),
        ({"size": 3}, "size"), ({"method": "mcts"}, "holds no scores"),
    ):  # fmt: skip
        files[1].write_text(json.dumps(whole | change), encoding="utf-8")
        with pytest.raises(ValueError, match=f"{files[1]} .*{message}"):
            tables.scores_table(files)


def test_an_overview_has_both_temperatures_of_a_run(folders, tmp_path):
    """Prevents the cold scores of another run in a row, a difference to the search at another temperature, and a
    traceback where there is no search."""
    finish(folders[0], [16, 8, 0, 8])
    finish(folders[1], [0, 8, 0, 8], "cispo")
    stage, cold = tmp_path / "compare", tmp_path / "cold"
    stage.mkdir()
    cold.mkdir()
    runs = [folder.rename(stage / name) for folder, name in zip(folders, ("mcts-seed0", "cispo-seed1"))]
    for run, right in zip(runs, ([4, 4], [4, 0])):
        result = {"model": run.name, "method": "none", "samples": 4, "temperature": 0.2}
        (cold / f"{run.name}.json").write_text(
            json.dumps(result | {"scores": [{"right": right, "samples": 4}]}), encoding="utf-8"
        )
    header, _, search, rival = tables.overview_table(runs).splitlines()
    assert header == "| method | mean@16 | minus search | pass@16 | mean@4 at 0.2 | minus search |"
    assert rival.startswith("| cispo | **25.0% [") and "| -25.0 [" in rival and "| -50.0 [" in rival
    assert search.startswith("| mcts | **50.0% [") and search.count(" – ") == 2 and "**100.0%" in search
    with pytest.raises(ValueError, match="pass those of `mcts` too"):
        tables.overview_table(runs[1:])


def test_what_some_method_varies_is_told_of_all(folders, tmp_path):
    """Prevents a row that looks like the post's loss because its method was run from right answers alone only."""
    finish(folders[0], [1, 2], failures=True, problems=20)
    finish(folders[1], [1, 2], failures=False)
    other = tmp_path / "none"
    other.mkdir()
    for file in folders[0].iterdir():
        (other / file.name).write_text(file.read_text(encoding="utf-8"), encoding="utf-8")
    finish(other, [1, 2], "none", failures=True, problems=20)
    assert list(tables.by_method([*folders, other])) == [
        "mcts",
        "mcts, problems 20, failures",
        "none, problems 20, failures",
    ]
    finish(folders[0], [1, 2], "cispo", samples=4)
    finish(folders[1], [1, 2], "cispo", samples=8)
    assert list(tables.by_method(folders)) == ["cispo", "cispo, samples 8"]  # 4 are the preset's, not GroupConfig's
    finish(folders[0], [1, 2], "mcts", cutoff=0.3)
    finish(folders[1], [1, 2], "mcts", cutoff=None)
    assert list(tables.by_method(folders)) == ["mcts", "mcts, no cutoff"]


def test_validation_scores_the_best_first(folders):
    """Prevents a list of what was tried that hides the winner, or shows another than the last score."""
    lines = [json.loads(line) for line in (folders[1] / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    for row in lines:
        row |= {"eval_mean": 2 * row["eval_mean"]} if "eval_mean" in row else {}
    (folders[1] / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in lines), encoding="utf-8")
    header, _, first, second = tables.validation_table(folders).splitlines()
    assert "mean@4" in header and first == "| mcts-1 | 1 | **80.0%** | 50.0% | +0.25 | 100% | 0.00 M |"
    assert second.startswith("| mcts-0 | 0 | **40.0%** |")


def test_unfinished_runs_are_named(folders, monkeypatch, capsys):
    """Prevents a traceback, or a half run in a table."""
    for what, rows in (("table", 3), ("summary", 3), ("summary", 0), ("curves", 1)):
        for folder in folders:
            lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
            (folder / "metrics.jsonl").write_text("".join(lines[:rows]), encoding="utf-8")
        monkeypatch.setattr("sys.argv", ["plots.py", what, *map(str, folders)])
        with pytest.raises(ValueError, match="mcts, seed 0, has no test|none of the runs has been evaluated"):
            plots.main()


OF_RUNS = ["curves", "table", "summary", "validation", "forest"]


@pytest.mark.parametrize("what", OF_RUNS)
@pytest.mark.parametrize(
    "damage",
    [
        lambda config: config.clear(),
        lambda config: config.update(tree=3),
        lambda config: config.update(method="x"),
        lambda config: config.update(preset=[]),
        lambda config: config.pop("seed"),
        lambda config: config["task"].update(split=[]),
        lambda config: config["learning"].pop("problems"),
    ],
)
def test_a_config_of_no_run_is_named(folders, what, damage):
    """Prevents a traceback, and an error that does not say which of fifty folders is meant."""
    config = read_settings(folders[1])
    damage(config)
    (folders[1] / "config.json").write_text(json.dumps(config), encoding="utf-8")
    draw = (plots.FIGURES | tables.TABLES)[what]
    with pytest.raises(ValueError, match=f"{folders[1]}/config.json is damaged"):
        draw(folders)


@pytest.mark.parametrize("what", OF_RUNS)
@pytest.mark.parametrize("text", ["{", "[]"])
def test_a_torn_config_is_named(folders, what, text):
    """Prevents the same for a file that holds no JSON object."""
    (folders[1] / "config.json").write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=f"{folders[1]}/config.json is damaged"):
        (plots.FIGURES | tables.TABLES)[what](folders)


def test_a_table_needs_no_place_for_a_figure(folders, monkeypatch, capsys, tmp_path):
    """Prevents a table that is refused in a folder that can't be written, and an empty one without a word."""
    (tmp_path / "curves.png").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["plots.py", "validation", "mcts-0"])
    plots.main()
    assert "| mcts-0 | 0 |" in capsys.readouterr().out
    metrics = folders[0] / "metrics.jsonl"
    metrics.write_text(metrics.read_text(encoding="utf-8").partition("\n")[0], encoding="utf-8")
    with pytest.raises(ValueError, match="none of the runs has been evaluated yet"):
        plots.main()


def test_command_line(folders, tmp_path, monkeypatch, capsys):
    """Both forms must work on a shell's glob, which names other files too; nonsense is one line."""
    monkeypatch.setattr("sys.argv", ["plots.py", "curves", *map(str, folders), "--out", str(tmp_path / "curves.png")])
    plots.main()
    assert (tmp_path / "curves.png").stat().st_size > 10_000
    monkeypatch.setattr("sys.argv", ["plots.py", "table", *map(str, tmp_path.iterdir())])
    plots.main()
    assert "| mcts | 1 |" in capsys.readouterr().out
    unread = ["table", str(folders[0]), "--out", "x.png"], ["forest", str(folders[0]), "--x", "seconds"]
    for arguments in (["pie", str(folders[0])], ["table", str(tmp_path / "nothing")], *unread):
        monkeypatch.setattr("sys.argv", ["plots.py", *arguments])
        with pytest.raises(SystemExit) as stop:
            plots.main()
        assert stop.value.code == 2 and capsys.readouterr().err.count("\n") == 1


def test_a_drawn_tree_is_readable():
    """Prevents a picture of a big tree whose boxes nobody can read, and one without the chosen path."""

    def node(number, visits, best, children=()):
        known = {"q": 0.0, "text": f"<step> 1 + 1 = {number} left 2 </step>", "solvable": "yes"}
        return known | {"id": number, "visits": visits, "best": best, "children": list(children)}

    last = node(60, 1, True)
    children = [node(i, 1, False) for i in range(1, 41)] + [node(41, 2, True, [last]), node(42, 0, False)]
    figure = plots.draw_tree({"problem": "1 1 → 2", "root": node(0, 42, True, children)})
    labels = [text.get_text() for text in figure.axes[0].texts]
    assert len(labels) == 25 and figure.get_figwidth() < 10
    assert {"1 + 1 = 41\nN 2  Q +0.00", "1 + 1 = 60\nN 1  Q +0.00"} <= set(labels)
    plots.plt.close(figure)


def test_the_post_and_the_kit_are_shown_at_one_temperature():
    """Prevents bars of two temperatures beside each other: the order of the methods depends on the temperature."""
    folders = figures.runs_of("compare")
    shares, settings = tables.evaluated(figures.cold_files(folders))
    post, kit = figures.beside_the_post(folders).axes
    assert settings["temperature"] == 0.2
    assert [bar.get_height() for bar in post.patches] == [3.1, 7.7, 8.4, 11.3]  # the post's own numbers
    order = [label.get_text() for label in kit.get_xticklabels()]
    assert order == ["base", "best-of-n", "cispo", "mcts", "none"]
    for name, bar in zip(order[1:], kit.patches[1:], strict=True):
        assert bar.get_height() == pytest.approx(100 * shares[name].mean())
