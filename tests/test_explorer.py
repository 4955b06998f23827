"""Tests of runtime/trees.py and runtime/explorer.py: a page shows and replays the search that was made, and a model's
text stays text."""

import json
import math
import re
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from shutil import which

import pytest

from config import TINY, Config
from countdown import Problem
from distill import most_visited_path
from experiments import plots
from mcts import plant, search
from runtime import explorer, trees
from runtime.loading import load_policy
from runtime.torch_sampler import TorchSampler

HOSTILE = "</script><script>hacked = 1</script><img src=x onerror=hacked=1>\u2028\u2029\"'&quot;<!--\x1b[31m"
chromium = pytest.mark.skipif(not which("chromium"), reason="needs chromium (Debian's package)")


@pytest.fixture(scope="module")
def policy():
    return load_policy(TINY, train=False)


def searched(policy, seed=0, **changes):
    """A tree of the embedded policy, and its settings."""
    config = Config().change(**changes).search
    (tree,) = plant(policy, [Problem((5, 4, 5, 12), 116)], [seed])
    search([tree], TorchSampler(policy), policy.grade, config)
    return tree, config


def every(node):
    return [node, *(below for child in node["children"] for below in every(child))]


def test_the_record_holds_the_tree(policy):
    """Prevents numbers of another node, a lost child, a best path that is not the search's, an oracle that reads other
    numbers."""
    tree, config = searched(policy)
    made = trees.tree_to_dict(tree, policy, config, "step 3")
    nodes = every(made["root"])
    assert (made["problem"], made["moment"]) == ("5 4 5 12 → 116", "step 3")
    assert {n["id"]: (n["visits"], n["q"], n["prior"], n["value"]) for n in nodes} == {
        i: (n.visits, n.q, n.prior, n.value) for i, n in enumerate(tree.nodes())
    }
    assert any(n["visits"] == 0 for n in nodes)
    best = [n["text"] for n in nodes if n["best"]]
    assert best == [policy.decode(n.tokens) for n in most_visited_path(tree, config).path()]
    by_text = {n["text"]: n for n in nodes}
    assert by_text["<step> 12 + 5 = 17 left 4 5 17 </step>"]["solvable"] == "no"
    assert made["root"]["solvable"] == "yes" and {n["solvable"] for n in nodes} <= {"yes", "no", "unknown"}
    for n in nodes:
        assert (n["reward"] is None) == (n["reason"] is None) == (n["right"] is None)
        assert n["reward"] is None or (n["solvable"] == "yes") == n["right"]


@pytest.mark.parametrize(
    "changes",
    [
        {"workers": 1},
        {"workers": 4},
        {"workers": 6, "virtual_loss": "visit", "unvisited": "zero"},
        {"workers": 4, "answers": "all"},
        {"workers": 3, "selection": "uct"},
        {"workers": 4, "selection": "gumbel"},
    ],
)
def test_the_record_replays_the_search(policy, changes):
    """Prevents a replay that tells another story than the search: at every simulation the selected child has the
    highest Q + U of what the search knew then, and the last N and Q are the tree's, bit for bit."""
    tree, config = searched(policy, **changes)
    made = json.loads(json.dumps(trees.tree_to_dict(tree, policy, config)))
    nodes = {n["id"]: n for n in every(made["root"])}
    parents = {child["id"]: n["id"] for n in nodes.values() for child in n["children"]}
    visits, totals = dict.fromkeys(nodes, 0), dict.fromkeys(nodes, 0.0)
    settings, record = made["settings"], made["simulations"]

    def path(leaf):
        return [leaf] if leaf == 0 else [*path(parents[leaf]), leaf]

    def score(parent, child, pending):
        n, parent_n = visits[child["id"]] + pending.count(child["id"]), visits[parent] + pending.count(parent)
        loss = pending.count(child["id"]) if settings["virtual_loss"] == "value" else 0
        first = totals[parent] / visits[parent] if settings["unvisited"] == "parent" else 0.0
        if child["ended"] and settings["answers"] == "all":
            first = child["reward"]
        q = (totals[child["id"]] - loss) / n if n else first
        if settings["selection"] == "puct":
            return q + settings["c_puct"] * child["prior"] * math.sqrt(parent_n) / (1 + n)
        return q + settings["c_puct"] * math.sqrt(math.log(parent_n) / n) if n else math.inf

    backed_up = 0
    for i, (before, leaf) in enumerate(record):
        for _, ready in record[backed_up:before]:
            for node in path(ready):
                visits[node] += 1
                totals[node] += nodes[ready]["value"]
        backed_up = before
        pending = [node for _, waiting in record[before:i] for node in path(waiting)]
        for parent, child in zip(path(leaf), path(leaf)[1:]):
            scores = [score(parent, sibling, pending) for sibling in nodes[parent]["children"]]
            selected = [sibling["id"] for sibling in nodes[parent]["children"]].index(child)
            assert settings["selection"] == "gumbel" or selected == scores.index(max(scores))
    for _, leaf in record[backed_up:]:
        for node in path(leaf):
            visits[node] += 1
            totals[node] += nodes[leaf]["value"]
    assert len(record) == made["root"]["visits"] == 32
    for i, n in nodes.items():
        assert visits[i] == n["visits"] and (not visits[i] or totals[i] / visits[i] == n["q"])


def opened(page, script, tmp_path):
    """What `script` returns (JSON) after the page's own script has run in Chromium."""
    script = f"<script>document.title = JSON.stringify((() => {{ {script} }})())</script>"
    (tmp_path / "page.html").write_text(page.replace("</body>", script + "</body>"), encoding="utf-8")
    args = ["--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path}/profile", "--dump-dom"]
    done = subprocess.run(
        ["chromium", *args, f"file://{tmp_path}/page.html"],
        capture_output=True,
        text=True,
        timeout=120,
        encoding="utf-8",
    )
    titles = re.findall("<title>(.*?)</title>", done.stdout)
    return json.loads(titles[0].replace("&amp;", "&").replace("&lt;", "<").replace("&gt;", ">"))


@chromium
def test_the_page_answers_a_reader(policy, tmp_path):
    """Prevents a page with a broken script, keys and sliders that do nothing, a replay that ends in another tree, and
    scores by which the search would have gone elsewhere."""
    tree, config = searched(policy)
    other, _ = searched(policy, seed=1)
    made = [trees.tree_to_dict(t, policy, config, f"step {i}") for i, t in enumerate((tree, other))]
    variants = {"virtual_loss": "visit", "unvisited": "zero"}, {"answers": "all"}, {"selection": "uct"}
    for changes in variants:
        variant, settings = searched(policy, **changes)
        made.append(trees.tree_to_dict(variant, policy, settings) | {"problem": "2 3 → 6"})
    page = explorer.page(made)
    seen = opened(
        page,
        """
        const text = (id) => document.getElementById(id).textContent, seen = {};
        const change = (id, value, event) => {
            document.getElementById(id).value = value;
            document.getElementById(id).dispatchEvent(new Event(event));
        };
        const press = (key) => document.dispatchEvent(new KeyboardEvent("keydown", { key }));
        const nodes = () => document.querySelectorAll(".node").length, frames = trees[0].frames.length;
        document.querySelector('.node[data-id="1"]').dispatchEvent(new MouseEvent("click"));
        seen.clicked = text("text");
        press("ArrowLeft"); seen.parent = text("kind");
        press("ArrowRight"); seen.child = text("text");
        press("ArrowUp"); press("ArrowDown"); seen.same = text("text");
        change("frame", 0, "input"); seen.start = [nodes(), text("sentence")];
        document.getElementById("next").click(); seen.selection = [nodes(), text("sentence")];
        document.getElementById("play").click(); seen.playing = text("play");
        change("frame", frames - 1, "input");
        seen.end = [nodes(), text("play"), state.map((node) => [node.visits, node.q])];
        change("moment", 1, "input"); seen.moment = [text("moment-name"), nodes()];
        change("problem", 1, "change"); seen.problem = [view.tree.problem, document.getElementById("moment").max];
        const wrong = (tree, i) => { // selections of another child than the one with the highest score
            const { phase, leaf } = tree.frames[i], parents = phase === "selection" ? leaf.path.slice(0, -1) : [];
            const scores = parents.map((parent) => compare(tree, replay(tree, i), parent));
            const highest = (rows) => rows.find((row) => rows.every((other) => row.score >= other.score)).child;
            return scores.filter((rows, depth) => highest(rows) !== leaf.path[depth + 1]);
        };
        seen.wrong = trees.map((tree) => tree.frames.flatMap((_, i) => wrong(tree, i)).length);
        return seen;
        """,
        tmp_path,
    )
    first = max(tree.root.children, key=lambda child: child.visits)
    assert seen["clicked"] == policy.decode(tree.nodes()[1].tokens)
    assert seen["parent"].startswith("Root") and seen["child"] == seen["same"] == policy.decode(first.tokens)
    assert seen["start"][0] == 1 and "root alone" in seen["start"][1]
    assert seen["selection"][0] == 1 and seen["selection"][1].startswith("Selection: the root has no children yet")
    assert seen["playing"] == "pause" and seen["end"][:2] == [len(tree.nodes()), "play"]
    expected = [(node.visits, node.q if node.visits else 0) for node in tree.nodes()]
    assert [tuple(numbers) for numbers in seen["end"][2]] == expected
    assert seen["moment"] == ["step 1", len(other.nodes())] and seen["problem"] == ["2 3 → 6", "2"]
    assert seen["wrong"] == [0] * 5


@chromium
def test_hostile_text_does_not_run(policy, tmp_path):
    """Prevents a completion that runs as a script when somebody looks at it, or plays it."""
    tree, config = searched(policy)
    made = trees.tree_to_dict(tree, policy, config)
    for node in every(made["root"]):
        node["text"] = HOSTILE
        node["reason"] = node["reason"] and HOSTILE
    made["problem"] = made["moment"] = HOSTILE
    script = """
        const images = [];
        for (const frame of trees[0].frames.keys()) { go(frame); images.push(document.images.length); }
        for (const node of trees[0].nodes) { select(node); images.push(document.images.length); }
        return [typeof hacked, Math.max(...images), document.scripts.length, view.tree.root.children[0].text];
        """
    assert opened(explorer.page([made, made | {"problem": "2"}]), script, tmp_path) == [
        "undefined", 0, 3, HOSTILE,
    ]  # fmt: skip


def test_a_models_text_is_never_markup(policy):
    """Prevents the same where no browser is at hand, and a page that loads something."""
    tree, config = searched(policy)
    made = trees.tree_to_dict(tree, policy, config)
    made["root"]["children"][0]["text"] = made["problem"] = HOSTILE
    page = explorer.page([made])
    tags = []

    class Tags(HTMLParser):
        def handle_starttag(self, tag, attrs):
            tags.append(tag)

    Tags().feed(page)
    assert tags.count("script") == 2 and "img" not in tags
    data = re.search(r'<script id="trees" type="application/json">(.*?)</script>', page, re.S)[1]
    assert json.loads(data)[0]["problem"] == HOSTILE
    assert data.isascii() and "\x1b" not in data
    assert "innerHTML" not in page and not re.search(r"(src|href)=\"?http", page) and not re.search(r"\bimport\b", page)


def test_plots_makes_one_page_of_a_run(policy, tmp_path, monkeypatch, capsys):
    """Prevents a page without some of a run's moments or with them in disorder, and a traceback for another file."""
    tree, config = searched(policy)
    files = [tmp_path / "trees" / f"{step:06d}.json" for step in (0, 20, 100)]
    files[0].parent.mkdir()
    for file in files:
        made = trees.tree_to_dict(tree, policy, config, f"step {int(file.stem)}")
        file.write_text(json.dumps([made]), encoding="utf-8")

    def made_page(*paths):
        """The page's file, and the moments in it."""
        monkeypatch.setattr("sys.argv", ["plots.py", "tree", *map(str, paths)])
        plots.main()
        page = Path(capsys.readouterr().out.strip())
        return page, re.findall(r'"moment": "(.*?)"', page.read_text(encoding="utf-8"))

    whole = tmp_path / "trees.html", ["step 0", "step 20", "step 100"]
    assert made_page(tmp_path) == made_page(*files) == whole
    assert made_page(files[1]) == (files[1].with_suffix(".html"), ["step 20"])
    for wrong in ("{}", "[]", "[1]", "no json", '[{"problem": "2 3", "root": {}}]'):
        files[0].write_text(wrong, encoding="utf-8")
        with pytest.raises(ValueError, match="holds no trees"):
            made_page(files[0])
