"""Tests of evaluate.py: the estimators against theory, evaluation against a sampler that is known."""

import json
import math
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch

import evaluate as module
from config import SearchConfig
from countdown import Problem, Reward
from evaluate import best_of_budget, score_policy, score_search
from runtime import evaluation, scores
from runtime.scores import Score, bootstrap
from runtime.torch_sampler import TorchSampler
from sampling import Usage

WRONG = Reward(-0.5, False, True, "wrong value")


@pytest.fixture
def writer(policy, fake_sampler):
    """A sampler that draws whole answers, given as text with their probabilities."""

    def make(*answers):
        rows = [(policy.tokenizer(f"{text} <|end|>")["input_ids"], p, "end") for text, p in answers]
        return fake_sampler(lambda prefix: rows)

    return make


# ------------------------------------------------------------------------------------------------ estimators


def test_bootstrap_interval_is_the_normal_one_where_that_is_right():
    """Prevents an interval of another width or level: mean +- 1.96 s / sqrt(n) for many problems."""
    values = np.random.default_rng(1).normal(0.3, 2.0, 2_000)
    half = 1.96 * values.std() / math.sqrt(len(values))
    assert bootstrap(values) == pytest.approx((values.mean() - half, values.mean() + half), abs=half / 15)
    assert bootstrap(values) == bootstrap(values) != bootstrap(values, seed=1)
    assert bootstrap(np.full(5, 0.25)) == (0.25, 0.25)


def test_bootstrap_interval_covers_the_truth_about_95_times_in_100(monkeypatch):
    """Prevents error bars that promise too much."""
    monkeypatch.setattr(scores, "DRAWS", 500)
    rng = np.random.default_rng(0)
    intervals = [bootstrap(rng.binomial(4, 0.3, 60) / 4) for _ in range(300)]
    assert 0.91 <= np.mean([low <= 0.3 <= high for low, high in intervals]) <= 0.98


def test_a_score_by_hand():
    """Prevents shares over the wrong axis, and a table line that says something else than the record."""
    right = Reward(1.0, True, True, "correct")
    none = Reward(-1.0, False, False, "no answer")
    score = Score.of([[right, right, none, WRONG], [none] * 4, [right, WRONG, WRONG, WRONG]], Usage(7, 8, 9.0))
    assert (score.problems, score.samples, score.usage) == (3, 4, Usage(7, 8, 9.0))
    assert (score.mean_at_k, score.pass_at_k) == pytest.approx((3 / 12, 2 / 3))
    assert (score.reward, score.parsed) == pytest.approx((-4 / 12, 7 / 12))
    assert 0 <= score.mean_low < score.mean_at_k < score.mean_high <= 0.5
    assert 0 <= score.pass_low < score.pass_at_k < score.pass_high <= 1
    score.mean_low, score.mean_high = 0.0, 0.5
    assert score.line() == "mean@4 25.00% [0.00%, 50.00%]  pass@4 66.67%  dense reward -0.333  format 58.3%"


# ------------------------------------------------------------------------------------------------ policy alone


def test_evaluation_counts_problems_samples_and_tokens(policy, writer, problems):
    """Prevents answers graded against another problem, and tokens that are not counted."""
    sampler = writer(("<answer> 2 + 3 </answer>", 1.0))
    score = score_policy(policy, sampler, problems[:2], samples=3)
    assert (score.problems, score.samples, score.mean_at_k, score.pass_at_k) == (2, 3, 0.5, 0.5)
    assert (score.parsed, score.reward) == (1.0, pytest.approx((1 + 1 - 2 * 20 / 25) / 2))
    assert score.usage.generated == 6 * 6
    assert score.usage.prefilled == sum(len(policy.encode(p)) for p in problems[:2])


def test_the_samples_of_a_problem_depend_on_seed_and_place_alone(policy, writer, monkeypatch):
    """Prevents scores that change with the size of a block of problems, and the same draws for every problem."""
    sampler = writer(("<answer> 2 + 3 </answer>", 0.5), ("", 0.5))
    problems = [Problem((2, 3), 5)] * 20
    first, second = [], []
    for chunk, results in ((64, first), (7, second)):
        monkeypatch.setattr(scores, "CHUNK", chunk)
        results.append(score_policy(policy, sampler, problems, samples=4))
    assert first == second and first[0].mean_low < first[0].mean_at_k < first[0].mean_high
    assert score_policy(policy, sampler, problems, samples=4, seed=1) != first[0]


@pytest.mark.parametrize(("method", "budget"), [("mcts", 40), ("best-of-n", 9)])
def test_so_do_its_searches(policy, writer, monkeypatch, method, budget):
    """Prevents blocks of problems that share their random numbers."""
    sampler = writer(("<answer> 2 + 3 </answer>", 0.5), ("", 0.5))
    config, found = SearchConfig(simulations=2, children=1, token_budget=budget, max_tokens=64), []
    for chunk in (64, 7):
        monkeypatch.setattr(scores, "CHUNK", chunk)
        found.append(score_search(policy, sampler, [Problem((2, 3), 5)] * 40, method, config).right)
    assert found[0] == found[1] and 0 < sum(found[0]) < 40


# ------------------------------------------------------------------------------------------------ with search


@pytest.mark.parametrize("budget", [1, 6, 20, 90])
def test_best_of_n_spends_its_budget_until_it_is_right(policy, writer, problems, budget):
    """Prevents a rival that gets more tokens than the tree, or fewer than it could use, or that pays for samples after
    a right one."""
    sampler = writer(("<answer> 2 + 3 </answer>", 0.5), ("<answer> 2 </answer>", 0.3), ("", 0.2))
    config, sample, seconds = SearchConfig(token_budget=budget, temperature=0.7), sampler.sample, []

    def timed(prompts, seeds, params):
        assert params.temperature == 0.7
        rows, used = sample(prompts, seeds, params)
        seconds.append(0.25)
        return rows, replace(used, seconds=0.25)

    sampler.sample = timed
    rows, usage = best_of_budget(policy, sampler, problems, config, [1, 2, 3, 4])
    spent = [sum(len(t.completion) for t in row) for row in rows]
    for row, tokens in zip(rows, spent, strict=True):
        assert tokens <= budget or len(row) == 1
        assert not any(t.reward.correct for t in row[:-1])
        assert row[-1].reward.correct or tokens > budget - 6  # the longest answer would not have fitted
    assert budget < 90 or any(row[-1].reward.correct and tokens <= budget - 6 for row, tokens in zip(rows, spent))
    assert (usage.generated, usage.prefilled) == (sum(spent), sum(len(policy.encode(p)) for p in problems))
    completions = [(i, t.completion) for i, row in enumerate(rows) for t in row]
    assert usage.decoded == len({(i, *c[:t]) for i, c in completions for t in range(1, len(c))})
    assert usage.seconds == sum(seconds) > 0
    shorter, _ = best_of_budget(
        policy, sampler, problems, replace(config, token_budget=max(1, budget // 2)), [1, 2, 3, 4]
    )
    assert [row[: len(short)] for row, short in zip(rows, shorter)] == shorter
    if budget == 90:  # more than one block of 8, and not the same one again
        assert any([t.completion for t in row[:8]] != [t.completion for t in row[8:16]] for row in rows)


@pytest.mark.parametrize("method", ["mcts", "best-of-n"])
def test_search_finds_the_answer_that_sampling_often_misses(policy, writer, problems, method, monkeypatch):
    """Prevents a search whose best answer is lost, or charged to another problem."""
    monkeypatch.setattr(scores, "CHUNK", 1)
    sampler = writer(("<answer> 2 + 3 </answer>", 0.3), ("<answer> 3 </answer>", 0.7))
    config = SearchConfig(simulations=200, children=8, token_budget=100, max_tokens=64)
    score = score_search(policy, sampler, problems[:2], method, config)
    assert (score.problems, score.samples, score.mean_at_k) == (2, 1, 0.5)
    assert score.reward == pytest.approx((1 + 1 - 2 * 20 / 25) / 2)
    assert 0 < score.usage.generated <= 2 * 100 and score.usage.prefilled > 0


@pytest.mark.parametrize("budget", [1, 30, 200])
def test_trees_and_samples_are_charged_alike(policy, writer, budget):
    """Prevents a rival that pays less for the same draws: where a tree's steps are whole answers, and it is not deep,
    both draw one answer after the other, count its tokens, and stop at the first right one or before the first that
    does not fit."""
    texts = "<answer> 2 + 3 </answer>", "<answer> 2 </answer>"
    lengths = {len(policy.tokenizer(text)["input_ids"]) + 1 for text in texts}  # the end's token too
    sampler = writer((texts[0], 0.1), (texts[1], 0.9))
    config = SearchConfig(simulations=1, children=60, workers=1, token_budget=budget, max_tokens=64, until_right=True)
    for seed in range(20):
        for method in ("mcts", "best-of-n"):
            score = score_search(policy, sampler, [Problem((2, 3), 5)], method, config, seed)
            used = score.usage.generated
            assert used <= budget or used in lengths
            assert score.right == [1] or used > budget - max(lengths) or used == 60 * min(lengths)


def test_a_near_miss_does_not_draw_the_search_to_itself(policy, fake_sampler):
    """Prevents a budget that is left unspent, its visits going to a wrong answer whose dense reward is high."""
    near, right = (policy.tokenizer(f"<answer> 2 {sign} 3 </answer>")["input_ids"] for sign in "*+")
    prompt, step = policy.encode(Problem((2, 3), 5)), [40, 6]
    below = {len(prompt): [(near, 0.7, "end"), (step, 0.3, "step")], len(prompt) + 4: [(right, 1.0, "end")]}
    sampler = fake_sampler(lambda prefix: below.get(len(prefix), [(step, 1.0, "step")]))
    config = SearchConfig(simulations=60, children=16, workers=1, max_tokens=64)
    assert score_search(policy, sampler, [Problem((2, 3), 5)], "mcts", config).mean_at_k == 1


def test_a_tree_without_an_answer_counts_as_no_answer(policy, fake_sampler, problems):
    """Prevents unanswered problems from leaving the average."""
    sampler = fake_sampler(lambda prefix: [([40, 6], 1.0, "step")])
    score = score_search(policy, sampler, problems, "mcts", SearchConfig(simulations=2, workers=1, max_tokens=64))
    assert (score.problems, score.mean_at_k, score.reward, score.parsed) == (4, 0.0, -1.0, 0.0)


def test_a_search_keeps_nothing_of_the_one_before_it(policy, problems, monkeypatch):
    """Prevents a cache full of finished trees, in which nothing of the running ones finds room."""
    monkeypatch.setattr(scores, "CHUNK", 1)
    config = SearchConfig(simulations=12, children=2, step_tokens=4, max_tokens=16)
    used = []
    for problem in problems[:3]:
        sampler = TorchSampler(policy)
        score_search(policy, sampler, [problem], "mcts", config)
        used.append(sampler.pool.used)
    sampler = TorchSampler(policy)
    score_search(policy, sampler, problems[:3], "mcts", config)
    assert min(used) > 20 and sampler.pool.used <= 1.5 * max(used)


# ------------------------------------------------------------------------------------------------ command line


def command(monkeypatch, *args):
    monkeypatch.setattr(sys, "argv", ["evaluate.py", *map(str, args), "--device", "cpu", "--max-tokens", "8"])
    evaluation.run(evaluation.parse(sys.argv[1:]), module.score_policy, module.score_search)


@pytest.mark.parametrize(
    ("search", "more"),
    [
        ("none", ""),
        ("none", "--dtype bfloat16"),
        ("none", "--quantize nf4"),
        ("mcts", ""),
        ("mcts", "--cutoff 0.02 --children 8 --workers 2 --prior mean"),
        ("best-of-n", ""),
    ],
)
def test_command_line_prints_and_writes_a_result_for_each_budget(
    checkpoint, tmp_path, monkeypatch, capsys, search, more
):
    """Prevents a result file whose settings overwrite what was found (it counts the problems that were graded), and a
    budget that is left out."""
    data, out = tmp_path / "problems.jsonl", tmp_path / "result.json"
    data.write_text('{"numbers": [2, 3], "target": 5}\n' * 3, encoding="utf-8")
    own = ("--samples", 2) if search == "none" else ("--budget", 40, 800)
    command(monkeypatch, checkpoint, "--search", search, "--data", data, "--out", out, *own, *more.split())
    result, printed = json.loads(out.read_text(encoding="utf-8")), capsys.readouterr().out
    assert (result["method"], result["max_tokens"]) == (search, 8)
    assert result.get("budget") == (None if search == "none" else [40, 800])
    assert (result["problems"], result["size"]) == (3, None)
    assert {"torch", "commit"} <= result["provenance"].keys()
    assert len(result["scores"]) == (1 if search == "none" else 2)
    for score in result["scores"]:
        assert (score["problems"], score["samples"], score["mean_at_k"]) == (3, 2 if search == "none" else 1, 0.0)
        assert f"search={search}: mean@{score['samples']} 0.00%" in printed
        assert f"{score['usage']['generated'] / 3:.0f} generated, " in printed
    if search == "best-of-n":  # the trees here are searched out
        smaller, larger = (score["usage"]["generated"] for score in result["scores"])
        assert smaller < larger


def test_a_run_folder_is_evaluated_by_its_policy_on_the_test_split(checkpoint, tmp_path, monkeypatch, capsys):
    """Prevents an evaluation on training problems, of another policy than the run's, or of answers cut in silence."""
    (tmp_path / "policy").symlink_to(checkpoint)
    asked = []
    monkeypatch.setattr(
        "countdown.make_problems", lambda *args, **game: asked.append((args, game)) or [Problem((1, 2), 3)] * 3
    )
    command(monkeypatch, tmp_path, "--problems", 5)
    command(monkeypatch, tmp_path, "--problems", 5, "--skip", 2)
    tested = [call for call in asked if call[0][1] == "test"]
    assert tested == [((5, "test"), {"size": 4}), ((7, "test"), {"size": 4})]
    assert capsys.readouterr().out.count("mean@16") == 2
    (tmp_path / "metrics.jsonl").touch()
    (tmp_path / "config.json").write_text('{"task": {"max_tokens": 512}}', encoding="utf-8")
    for model in (tmp_path, tmp_path / "policy"):
        with pytest.raises(ValueError, match="answers of up to 512 tokens: pass --max-tokens 512"):
            command(monkeypatch, model)
    (tmp_path / "config.json").write_text('{"task": {"size": 3, "max_tokens": 8}}', encoding="utf-8")
    with pytest.raises(ValueError, match="has learnt the game with 3 numbers: pass --size 3"):
        command(monkeypatch, tmp_path)
    (tmp_path / "config.json").write_text('{"task": {"split": "post"}}', encoding="utf-8")
    with pytest.raises(ValueError, match="was trained with --split post, on the test's own numbers: pass --data"):
        command(monkeypatch, tmp_path)
    for damaged, message in (("3", "is damaged"), ('{"max_tokens": "x"}', "max_tokens must be a finite number")):
        (tmp_path / "config.json").write_text(f'{{"task": {damaged}}}', encoding="utf-8")
        with pytest.raises(ValueError, match=message):
            command(monkeypatch, tmp_path)


def test_what_is_measured_is_what_was_asked_for(checkpoint, monkeypatch):
    """Prevents a seed, a temperature or a choice of problems that is read and not used."""
    asked, score = [], Score.of([[WRONG]], Usage())
    monkeypatch.setattr("countdown.make_problems", lambda n, *_, **__: [Problem((1, 2), i + 1) for i in range(n)])
    for name in ("score_policy", "score_search"):
        monkeypatch.setattr(
            module, name, lambda policy, sampler, *args, progress: asked.append((*args, progress)) or score
        )
    options = ("--problems", 2, "--skip", 3, "--temperature", 0.5, "--seed", 7)
    command(monkeypatch, checkpoint, *options, "--samples", 5)
    command(monkeypatch, checkpoint, *options, "--search", "mcts", "--budget", 9)
    chosen = [Problem((1, 2), 4), Problem((1, 2), 5)]
    assert asked[0] == (chosen, 5, 0.5, 8, 7, True)
    problems, method, tree, seed, _ = asked[1]
    assert (problems, method, seed) == (chosen, "mcts", 7)
    assert (tree.token_budget, tree.temperature, tree.max_tokens, tree.until_right) == (9, 0.5, 8, True)


def test_a_result_outlives_its_reader(checkpoint, tmp_path, monkeypatch):
    """Prevents an hour's result lost to `| head`."""

    def gone(*_):
        raise BrokenPipeError

    monkeypatch.setattr(evaluation, "show", gone)
    with pytest.raises(BrokenPipeError):
        command(monkeypatch, checkpoint, "--problems", 2, "--samples", 1, "--out", tmp_path / "result.json")
    result = json.loads((tmp_path / "result.json").read_text(encoding="utf-8"))
    assert len(result["scores"]) == 1 and (result["problems"], result["size"]) == (2, 4)


def test_memory_that_runs_out_is_one_line(checkpoint, monkeypatch, capsys):
    """Prevents a traceback of CUDA's for a cache that is too large, without a word of what to lower."""

    def run_out(*args, **options):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 3.50 GiB.")

    monkeypatch.setattr(TorchSampler, "sample", run_out)
    with pytest.raises(SystemExit) as stop:
        command(monkeypatch, checkpoint, "--search", "mcts", "--kept", 1000, "--rows", 8)
    assert stop.value.code == 2
    assert capsys.readouterr().err.splitlines()[-1] == (
        "error: out of GPU memory: pass less than --rows 8 or --kept 1000, or --quantize nf4"
    )
