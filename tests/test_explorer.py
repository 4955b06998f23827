"""Tests of experiments/explorer.py: what a page shows is what was searched, and a model's text stays text."""

import json
import re
import subprocess
from html.parser import HTMLParser
from shutil import which

import numpy as np
import pytest

from config import TINY, Config
from countdown import Problem
from distill import most_visited_path
from experiments import explorer, plots
from mcts import plant, search
from ppo import collect_mcts
from runtime import trees
from runtime.loading import load_policy
from runtime.torch_sampler import TorchSampler

SETTINGS = Config().search


@pytest.fixture(scope="module")
def searched():
    """The embedded policy, and a tree of it."""
    policy, problem = load_policy(TINY, train=False), Problem((5, 4, 5, 12), 116)
    (tree,) = plant(policy, [problem], [0])
    search([tree], TorchSampler(policy), policy.grade, SETTINGS)
    return policy, tree


def every(node):
    return [node, *(below for child in node["children"] for below in every(child))]


def test_the_page_holds_the_visited_tree(searched):
    """Prevents numbers of another node, a best path that is not the search's, an oracle that reads other numbers."""
    policy, tree = searched
    made = trees.tree_to_dict(tree, policy, SETTINGS)
    nodes, visited = every(made["root"]), [node for node in tree.nodes() if node.visits]
    assert made["problem"] == "5 4 5 12 → 116" and len(nodes) == len(visited) > 10
    assert sorted(n["visits"] for n in nodes) == sorted(n.visits for n in visited)
    best = [n for n in nodes if n["best"]]
    assert [n["text"] for n in best] == [policy.decode(n.tokens) for n in most_visited_path(tree, SETTINGS).path()]
    by_text = {n["text"]: n for n in nodes}
    assert by_text["<step> 12 + 5 = 17 left 4 5 17 </step>"]["solvable"] == "no"
    assert made["root"]["solvable"] == "yes" and {n["solvable"] for n in nodes} <= {"yes", "no", "unknown"}
    for n in nodes:
        assert (n["reward"] is None) == (n["reason"] is None)
        assert n["reward"] is None or (n["solvable"] == "yes") == (n["reward"] == 1.0)


def test_a_models_text_is_never_markup(searched):
    """Prevents a completion that runs as a script when somebody looks at it."""
    policy, tree = searched
    made = trees.tree_to_dict(tree, policy, SETTINGS)
    hostile = "</script><script>alert(1)</script><img src=x onerror=alert(1)>\u2028\u2029\"'&quot;<!--"
    made["root"]["children"][0]["text"] = made["problem"] = hostile
    page = explorer.render([made])
    found = []

    class Tags(HTMLParser):
        def handle_starttag(self, tag, attrs):
            found.append(tag)

    Tags().feed(page)
    assert found.count("script") == 2 and "img" not in found
    data = re.search(r'<script id="trees" type="application/json">(.*?)</script>', page, re.S)[1]
    assert json.loads(data)[0]["problem"] == hostile
    assert "\u2028" not in page and "\u2029" not in page
    assert "innerHTML" not in page and not re.search(r"(src|href)=\"?http", page) and "import" not in page


@pytest.mark.skipif(not which("chromium"), reason="needs chromium (Debian's package)")
def test_the_page_opens_draws_and_answers_a_click(searched, tmp_path):
    """Prevents a page with a broken script, found by the first reader."""
    policy, tree = searched
    page = explorer.render([trees.tree_to_dict(tree, policy, SETTINGS)])
    clicks = """<script>
        const nodes = () => [...document.querySelectorAll(".node")], before = nodes().length;
        const click = () => nodes().at(-1).dispatchEvent(new MouseEvent("click"));
        click(); const told = document.getElementById("details").textContent;
        click(); document.title = [before, nodes().length, told.split("\\n")[2]].join("|");
    </script>"""
    (tmp_path / "page.html").write_text(page.replace("</body>", clicks + "</body>"), encoding="utf-8")
    args = ["--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path}/profile", "--dump-dom"]
    done = subprocess.run(
        ["chromium", *args, f"file://{tmp_path}/page.html"],
        capture_output=True,
        text=True,
        timeout=120,
        encoding="utf-8",
    )
    visited = sum(node.visits > 0 for node in tree.nodes())
    assert f"<title>{visited}|1|visits N  {tree.root.visits}</title>" in done.stdout


def test_a_run_dumps_trees_that_plots_render(searched, tmp_path, monkeypatch, capsys):
    """Prevents an option that does nothing, a page from another file, and a traceback for the wrong one."""
    policy, _ = searched
    config = Config(out=tmp_path).change(dump_trees=2)
    problems = [Problem((2, 3, 5, 10), 25)] * 3
    collect_mcts(policy, TorchSampler(policy), problems, config, np.random.default_rng(0))
    file = tmp_path / "trees" / "000000.json"
    assert len(explorer.read(file)) == 2
    monkeypatch.setattr("sys.argv", ["plots.py", "tree", str(file)])
    plots.main()
    assert "2 3 5 10 \\u2192 25" in file.with_suffix(".html").read_text(encoding="utf-8")
    for wrong in ("{}", "[1]", "no json"):
        file.write_text(wrong, encoding="utf-8")
        with pytest.raises(ValueError, match="holds no trees"):
            plots.main()
