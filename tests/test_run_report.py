"""Tests of runtime/run_report.py and settings.py: a report says what a run recorded, and a model's text stays text."""

import json
import math
import re
import shlex
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import pytest

import ppo
from config import preset_for
from experiments import plots
from runtime import cli, explorer
from runtime.cli import option_names
from runtime.files import write
from runtime.run_folder import read_metrics
from runtime.run_report import TEMPLATE, write_report
from runtime.settings import command, topics

MAKE_RUN = Path(__file__).parents[1] / "results" / "make-run" / "mcts-tiny-seed0"
HOSTILE = "</script><script>document.title = 'owned'</script><img src=x onerror=\"document.title='owned'\"><!--"


@pytest.fixture
def run(tiny_config):
    """The folder of a run of 3 steps."""
    config = tiny_config(tokens=0, steps=3)
    ppo.train(config, ppo.collect_mcts)
    return config.folder


@pytest.fixture
def packed(tmp_path):
    """A copy of the run of results/make-run: packed metrics, no samples, no trees."""
    return Path(shutil.copytree(MAKE_RUN, tmp_path / "packed"))


def data_of(page: Path) -> dict:
    """The data in a page, as its script reads them."""
    text = page.read_text(encoding="utf-8")
    return json.loads(re.search(r'<script id="report" type="application/json">(.*?)</script>', text, re.S)[1])


def write_samples(folder: Path, **changes) -> None:
    """Two problems at two evaluations, right at the second one alone."""
    sample = {"share": 0.0, "generated": 0, "text": "<answer> 3 + 5 </answer>", "reward": 1.0, "reason": "correct"}
    rows = [
        sample | {"step": step, "problem": problem, "right": step == 3} | changes
        for step in (0, 3)
        for problem in ("2 3 → 5", "3 5 → 8")
    ]
    (folder / "samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def test_a_report_has_the_numbers_of_the_run(run):
    """Prevents a score of another row, an interval that is not the run's, a curve in other units, and lost settings."""
    write_samples(run)
    rows, page = read_metrics(run), write_report(run)
    data, before, after = data_of(page), rows[0], rows[-1]
    assert (data["before"], data["after"], data["ending"]) == (before, after, "finished")
    assert data["change"]["mean"][0] == pytest.approx(after["test_mean_at_k"] - before["test_mean_at_k"], abs=1e-5)
    low, high = data["change"]["pass"][1:]
    assert low <= after["test_pass_at_k"] - before["test_pass_at_k"] <= high
    trained = [row for row in rows if "entropy" in row]
    assert data["curves"]["entropy"] == [[row["generated"], pytest.approx(row["entropy"])] for row in trained]
    assert data["costs"]["update_seconds"] == pytest.approx(sum(row.get("update_seconds", 0) for row in rows))
    assert [row["eval_mean"] for row in data["evaluations"]] == [row["eval_mean"] for row in rows if "eval_mean" in row]
    assert ["steps", "3", "0"] in data["changed"] and "--steps 3" in data["command"]
    assert data["samples"]["steps"] == [0, 3] and len(data["samples"]["rows"]) == 2
    assert [answer["right"] for answer in data["samples"]["rows"][0]["answers"]] == [False, True]


def test_the_trees_are_in_a_frame_of_the_page(packed):
    """Prevents trees out of order, and a frame whose end is taken for the page's."""
    root = {"text": "</script>", "children": []}
    for step in (120, 0):
        tree = {"problem": "3 5 → 8", "moment": f"step {step}", "settings": {}, "simulations": [], "root": root}
        write(packed / "trees" / f"{step:06d}.json", json.dumps([tree]))
    frame = data_of(write_report(packed))["explorer"]
    assert frame == explorer.page([tree | {"moment": "step 0"}, tree | {"moment": "step 120"}])
    (packed / "trees" / "000000.json").write_text("[]", encoding="utf-8")
    with pytest.raises(ValueError, match="holds no trees"):
        write_report(packed)


def test_the_report_of_make_run(packed):
    """Prevents a page that fails on packed metrics and samples, or without trees, and a sentence with other numbers
    than the README."""
    text, data = write_report(packed).read_text(encoding="utf-8"), data_of(packed / "report.html")
    assert "From 2.7\u00a0% to 40.6\u00a0% right answers" in text
    assert "At least one of 16 samples is right on 52.8\u00a0% of the 820 test problems." in text
    assert len(data["samples"]["rows"]) == 8 and data["samples"]["steps"][0] == 0 and data["changed"] == []
    assert data["command"] == "python ppo.py --search mcts --seed 0"
    assert all(len(points) <= 120 for points in data["curves"].values())


def test_a_run_that_has_not_ended_is_reported_as_such(packed):
    """Prevents a traceback in the middle of a run, a validation score taken for a test, and a page from nothing."""
    rows = read_metrics(packed)
    (packed / "metrics.jsonl.gz").unlink()
    for count, words in (
        (3, "has not been evaluated"),
        (len(rows) - 1, "mean@4 is 40.9\u00a0%."),
    ):
        lines = "".join(json.dumps(row) + "\n" for row in rows[:count])
        (packed / "metrics.jsonl").write_text(lines, encoding="utf-8")
        page = write_report(packed)
        data, text = data_of(page), page.read_text(encoding="utf-8")
        assert data["ending"] == "" and data["after"] is None and words in text
    (packed / "metrics.jsonl").write_text("", encoding="utf-8")
    with pytest.raises(ValueError, match="has no metrics yet"):
        write_report(packed)


@pytest.mark.parametrize(
    ("preset", "method", "changes", "words"),
    [
        ("tiny", "cispo", {"seed": 2, "samples": 8}, "baselines.py --method cispo --seed 2 --samples 8"),
        ("tiny", "none", {"failures": True}, "ppo.py --search none --seed 0 --failures"),
        ("post", "mcts", {"failures": False}, "ppo.py --search mcts --seed 0 --preset post --no-failures"),
        ("tiny", "mcts", {"cutoff": None, "model": "a b"}, "--seed 0 --model 'a b' --cutoff None"),
    ],
)
def test_the_command_makes_the_run_again(preset, method, changes, words):
    """Prevents a command that starts another run: each option is read back by the command line."""
    config = preset_for(preset, method).change(**changes)
    line = command(config)
    assert line.endswith(words)
    assert cli.parse(shlex.split(line)[2:], method) == (config, False)


def test_every_setting_is_in_a_table():
    """Prevents a setting that a report does not tell, and one that the method does not have."""
    config = preset_for("tiny", "cispo")
    tables = {table["name"]: {name: value for name, value, _ in table["settings"]} for table in topics(config)}
    assert {name for table in tables.values() for name in table} == {
        name.replace("-", "_") for name in option_names(config)
    }
    assert tables["Group"]["samples"] == "4" and "Tree" not in tables and "tree" not in tables["Run"]


def test_hostile_text_is_data(packed):
    """Prevents an answer, a problem or a model's name that runs as a script when somebody opens the report."""
    write_samples(packed, text=HOSTILE, problem=HOSTILE, reason=HOSTILE)
    settings = json.loads((packed / "config.json").read_text(encoding="utf-8"))
    (packed / "config.json").write_text(json.dumps(settings | {"model": HOSTILE}), encoding="utf-8")
    page = write_report(packed)
    elements = []

    class Elements(HTMLParser):
        def handle_starttag(self, tag, attributes):
            elements.append(tag)

    Elements().feed(page.read_text(encoding="utf-8"))
    assert elements.count("script") == 2 and "img" not in elements
    assert data_of(page)["samples"]["rows"][0]["problem"] == HOSTILE
    template = TEMPLATE.read_text(encoding="utf-8")
    assert "innerHTML" not in template and not re.search(r"(src|href)=|https?://(?!www\.w3\.org/2000/svg)", template)


def test_infinite_metrics_are_left_out(packed):
    """Prevents a page of a collapsed run that no browser can read: JSON has no infinity."""
    (packed / "metrics.jsonl.gz").unlink()
    scores = {"eval_k": 4, "eval_mean": 0.25, "eval_pass": 0.5}
    rows = [{"step": step, "generated": 10 * step, "kl": kl} | scores for step, kl in ((1, 0.5), (2, math.inf))]
    lines = "".join(json.dumps(row) + "\n" for row in [*rows, rows[-1] | {"stopped": "collapsed", "kl": math.nan}])
    (packed / "metrics.jsonl").write_text(lines, encoding="utf-8")
    data = data_of(write_report(packed))
    assert data["curves"]["kl"] == [[10, 0.5]] and data["stopped"] == "collapsed"
    assert "Infinity" not in json.dumps(data) and "NaN" not in json.dumps(data)


def test_a_torn_line_of_samples_is_left_out(packed):
    """Prevents a run that was killed while it wrote a sample from having no report."""
    write_samples(packed)
    with (packed / "samples.jsonl").open("a", encoding="utf-8") as file:
        file.write('{"step": 9, "prob')
    assert data_of(write_report(packed))["samples"]["steps"] == [0, 3]


@pytest.mark.skipif(not shutil.which("chromium"), reason="needs chromium (Debian's package)")
@pytest.mark.parametrize("ended", [True, False])
def test_the_page_draws_itself(packed, tmp_path, ended):
    """Prevents a page with a broken script, found by the first reader, and text that becomes an element after all."""
    write_samples(packed, text=HOSTILE)
    if not ended:
        lines = "".join(json.dumps(row) + "\n" for row in read_metrics(packed)[1:5])
        (packed / "metrics.jsonl").write_text(lines, encoding="utf-8")
    page = write_report(packed)
    check = """<script>
        addEventListener("error", () => { document.title = "broken"; });
        const titles = [...document.querySelectorAll("h2")].map((title) => title.textContent[0]).join("");
        const images = document.images.length, slider = document.querySelector("input");
        slider.value = 0;
        slider.dispatchEvent(new Event("input"));
        const told = document.querySelector("output").textContent;
        document.title = [titles, images, told, document.querySelectorAll("svg path").length > 4].join("|");
    </script>"""
    text = page.read_text(encoding="utf-8").replace("</body>", check + "</body>")
    page.write_text(text, encoding="utf-8")
    args = ["--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path}/profile", "--dump-dom"]
    done = subprocess.run(
        ["chromium", *args, f"file://{page}"], capture_output=True, timeout=120, encoding="utf-8", errors="replace"
    )
    titles = "ASRSC" if ended else "ASSC"  # along training, samples, right answers, settings, cost
    assert f"<title>{titles}|0|step 0: 0 of 2 right|true</title>" in done.stdout


def test_the_command_line(packed, tmp_path, monkeypatch, capsys):
    """Prevents a command that writes elsewhere, and a traceback for a folder that holds no run."""
    monkeypatch.setattr("sys.argv", ["plots.py", "report", str(packed)])
    plots.main()
    assert capsys.readouterr().out.strip() == str(packed / "report.html") and (packed / "report.html").exists()
    for wrong in (
        ["report", str(tmp_path)],
        ["report", str(tmp_path / "nothing")],
        ["report", str(packed), "--out", "x"],
    ):
        monkeypatch.setattr("sys.argv", ["plots.py", *wrong])
        with pytest.raises(SystemExit) as stop:
            plots.main()
        assert stop.value.code == 2 and capsys.readouterr().err.count("\n") == 1
    with pytest.raises(ValueError, match="holds no run"):
        write_report(tmp_path)
