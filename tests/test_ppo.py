"""Tests of ppo.py: collecting, and whole runs of every method on a random model with a toy reward that can be learnt
in seconds."""

import json
import math
import random
import re
import time
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch.testing import assert_close
from transformers import AutoModelForCausalLM

import baselines
import ppo
from config import BudgetConfig, LearningConfig, TreeConfig, preset_for
from countdown import Reward
from policy import Policy
from ppo import collect_mcts, collect_samples, make_optimizer, set_rate, train, update
from runtime import cli, guard, launch, report, run_folder, session
from runtime.cli import parse
from runtime.loading import load_policy
from runtime.run_folder import read_metrics
from runtime.torch_sampler import TorchSampler
from sampling import Progress, Trajectory, Usage

COLLECTORS = ppo.COLLECTORS | baselines.COLLECTORS


def program(args=(), collectors=ppo.COLLECTORS):
    """What the command line of ppo.py does."""
    launch.launch(list(args), "mcts", collectors, launch.Trainer(ppo.train, update, make_optimizer, set_rate))


# ------------------------------------------------------------------------------------------------ collecting


@pytest.mark.parametrize("lesson", ["best-path", "best-answer", "steps"])
def test_search_hands_over_graded_trajectories_of_the_policy(moved, problems, tiny_config, lesson):
    """Prevents rewards or log-probabilities of another path, and a ratio other than 1 at a temperature below 1."""
    config = tiny_config(lesson=lesson, temperature=0.7)
    found, usage, info = collect_mcts(moved, TorchSampler(moved), problems, config, np.random.default_rng(0))
    if lesson in ("best-path", "best-answer"):
        assert [t.problem for t in found] == problems and {t.advantages for t in found} == {None}
    else:
        assert len(found) > len(problems)
        assert all(len(t.advantages) == len(t.returns) == len(t.completion) for t in found)
    for t in found:
        assert t.prompt == moved.encode(t.problem) and t.reward == moved.grade(t.problem, t.completion)
        assert len(t.completion) == 8 or t.completion[-1] in moved.stop_ids
        states = moved.states(moved.batch([t.prompt], [t.completion]))
        logprobs = moved.logprobs(*states, 0.7)[0][0].detach()
        assert_close(torch.tensor(t.logprobs), logprobs, atol=1e-4, rtol=0)
    assert usage.generated >= 4 * 8 and usage.prefilled > 0 and usage.seconds > 0
    assert info["tree_visits"] == 8 and 0 < info["tree_answers"] < info["tree_nodes"]
    again, _, _ = collect_mcts(moved, TorchSampler(moved), problems, config, np.random.default_rng(0))
    assert [t.completion for t in again] == [t.completion for t in found]


def test_a_tree_without_an_answer_is_left_out(policy, fake_sampler, problems, tiny_config):
    """Prevents training on a path that ends before its answer, and a crash where no tree has one."""
    sampler = fake_sampler(lambda prefix: [([40, 6], 1.0, "step")])
    config = tiny_config(tree=TreeConfig(simulations=2))
    found, usage, info = collect_mcts(policy, sampler, problems, config, np.random.default_rng(0))
    assert found == [] and usage.generated > 0 and info["tree_answers"] == 0


@pytest.mark.parametrize("method, advice", [
    ("mcts", "a right answer: try more --simulations or --children, or scripts/warm_up.py first"),
    ("none", "a right answer: try more --problems, or scripts/warm_up.py first"),
    ("best-of-n", "a right answer: try more --samples, or scripts/warm_up.py first"),
    ("grpo", "a group with unequal rewards: try more --samples, or scripts/warm_up.py first, or --reward dense"),
    ("cispo", "a group with unequal rewards: try more --samples, or scripts/warm_up.py first, or --reward dense"),
])  # fmt: skip
def test_steps_that_teach_nothing_are_told_and_end_a_run(tiny_config, monkeypatch, capsys, method, advice):
    """Prevents a budget that is spent on answers that are all wrong without a word."""
    monkeypatch.setattr(Policy, "grade", lambda *_, **__: Reward(-1.0, False, False, "wrong"))
    monkeypatch.setattr(session, "Guard", partial(guard.Guard, idle=12))
    more = dict(tokens=0, steps=40, problems=2, failures=False, evaluations=0, reward="exact")
    config = tiny_config(method, **more)
    reason = f"steps in a row have taught the policy nothing, for want of {advice}"
    with pytest.raises(guard.Stopped) as stop:
        train(config, COLLECTORS[method])
    said = capsys.readouterr().out
    assert f"warning: this step has taught the policy nothing, for want of {advice}\n" in said
    assert f"warning: 10 {reason}\n" in said and said.count("warning: ") == 2
    assert str(stop.value) == f"step 12: 12 {reason}"
    assert read_metrics(config.folder)[-1]["stopped"] == f"12 {reason}"


@pytest.mark.parametrize("method", ["best-of-n", "cispo", "grpo"])
def test_a_policy_that_solves_all_problems_ends_its_budget(tiny_config, monkeypatch, capsys, method):
    """Prevents a run that has nothing left to learn from ending as a failure, without its final policy."""
    monkeypatch.setattr(Policy, "grade", lambda *_, **__: Reward(1.0, True, True, "right"))
    monkeypatch.setattr(session, "Guard", partial(guard.Guard, idle=3))
    config = tiny_config(method, tokens=0, steps=5, problems=2, failures=False, evaluations=0, test_before=False)
    assert train(config, COLLECTORS[method])["after"].mean_at_k == 1
    assert "warning" not in capsys.readouterr().out and (config.folder / "policy").is_dir()


def test_plain_sampling_is_one_whole_completion_a_problem(moved, problems, tiny_config):
    """Prevents samples that stop at the first step, and a run that is the same at every seed."""
    found = [
        collect_samples(moved, TorchSampler(moved), problems, tiny_config(), np.random.default_rng(seed))[0]
        for seed in (0, 0, 1)
    ]
    assert [t.problem for t in found[0]] == problems
    assert all(len(t.completion) == 8 or t.completion[-1] in moved.stop_ids for t in found[0])
    assert found[0] == found[1] != found[2]


@pytest.mark.parametrize(
    ("answers", "identical", "wrong"),
    [
        ([([1, 2], 1.0), ([1, 3], 1.0)], 0.0, None),
        ([([1, 2], 1.0), ([1, 2], 0.5), ([1, 2], -1.0), ([4], 0.0)], 0.5, -1 / 6),
    ],
)
def test_a_policy_that_repeats_itself_or_earns_without_being_right_is_seen(problems, answers, identical, wrong):
    """Prevents a collapse onto one answer, or a reward that is cheated, from hiding behind a good mean reward."""
    found = [
        Trajectory(problem, [0], answer, [], Reward(value, value == 1, True, ""))
        for problem, (answer, value) in zip(problems, answers)
    ]
    row = report.summarize(found)
    assert (row["identical"], row.get("wrong_reward")) == (identical, wrong if wrong is None else pytest.approx(wrong))


# ------------------------------------------------------------------------------------------------ whole runs


@pytest.fixture
def toy(monkeypatch):
    """A reward that a random model can learn: the share of even tokens, from -1 to 1."""

    def grade(self, problem, completion, exact=False):
        even = sum(token % 2 == 0 for token in completion) / len(completion)
        return Reward(2 * even - 1, even == 1, True, "toy")

    monkeypatch.setattr(Policy, "grade", grade)


TIMES = {"seconds", "tokens_per_second", "sampler_seconds", "critic_seconds", "update_seconds", "cpu_seconds"}
STEP = {"step", "generated", "decoded", "prefilled", "valued", "trajectories", "reward", "correct", "parsed", "length"}
STEP |= {"identical", "wrong_reward"}
STEP |= {"policy_loss", "entropy", "ratio", "kl", "gradient_norm", *TIMES}
STEP |= {"disagreement_mean", "disagreement_max", "micro_tokens"}
EVAL = {"eval_mean", "eval_pass", "eval_reward", "eval_parsed", "eval_k"}
METHOD = {"best-of-n": {"solved"}, "cispo": {"sample_reward", "solved"}, "grpo": {"sample_reward", "solved"}}
METHOD |= {
    name: METHOD.get(name, set()) | {"value_loss", "value_gradient_norm"} for name in ("best-of-n", "mcts", "none")
}
METHOD["mcts"] |= {f"tree_{key}" for key in "visits nodes merged depth root_q root_value answers solved".split()}


def weights(folder):
    names = ("model.safetensors", "adapter_model.safetensors", "value_head/weights.safetensors")
    return [load_file(folder / name) for name in names if (folder / name).exists()]


def history(folder):
    return [{key: value for key, value in row.items() if key not in TIMES} for row in read_metrics(folder)]


@pytest.mark.parametrize("method", COLLECTORS)
def test_every_method_learns_records_its_run_and_saves_a_policy(toy, tiny_config, method, capsys):
    """Prevents a method that does not run, or learns nothing, or the opposite; and a run that can't be plotted."""
    config = tiny_config(
        method, tokens=0, steps=12, problems=8, evaluations=3, learning_rate=1e-2, kl_coefficient=0.01,
        test_problems=16, test_samples=8,
    )  # fmt: skip
    scores = train(config, COLLECTORS[method])
    assert scores["after"].reward > scores["before"].reward + 0.15

    first, *steps, last = read_metrics(config.folder)
    assert [row["step"] for row in (first, *steps, last)] == [0, *range(1, 13), 12]
    assert (first["test_reward"], last["test_reward"]) == pytest.approx(
        (scores["before"].reward, scores["after"].reward), abs=1e-5
    )
    expected = STEP | METHOD.get(method, set())
    assert [set(row) ^ expected for row in steps] == [EVAL if row["step"] % 4 == 0 else set() for row in steps]
    for counter in ("generated", "prefilled", "seconds"):
        assert np.all(np.diff([first[counter], *(row[counter] for row in steps)]) > 0)
    assert last["valued"] == 0  # the critic judges from what the sampler has read
    assert {row["eval_k"] for row in steps if "eval_k" in row} == {2} and steps[0]["ratio"] == pytest.approx(
        1, abs=1e-4
    )

    policy = load_policy(config.folder / "policy")
    plain = AutoModelForCausalLM.from_pretrained(config.folder / "policy")
    assert_close(plain.state_dict(), policy.lm.state_dict())
    saved = json.loads((config.folder / "config.json").read_text(encoding="utf-8"))
    assert (saved["method"], saved["seed"], saved["learning"]["problems"]) == (method, 0, 8)
    assert (saved["tree"]["simulations"] if saved["tree"] else None) == (8 if method == "mcts" else None)
    printed = capsys.readouterr().out
    assert f"{method} (tiny, seed 0), 16 held-out problems" in printed and "12 steps" in printed


@pytest.mark.parametrize("method", COLLECTORS)
def test_an_exact_reward_pays_nothing_for_a_near_miss(moved, problems, tiny_config, monkeypatch, method):
    """Prevents one method that is still paid for near misses where the others are not."""

    def near(text, problem):
        return Reward(0.5, False, True, "near") if len(text) % 2 else Reward(1.0, True, True, "right")

    monkeypatch.setattr("countdown.verify", near)
    for name, values in {"dense": {0.5, 1.0}, "exact": {-1.0, 1.0}}.items():
        config = tiny_config(method, reward=name, **({"lesson": "answers"} if method == "mcts" else {}))
        found, _, _ = COLLECTORS[method](moved, TorchSampler(moved), problems * 8, config, np.random.default_rng(0))
        assert {t.reward.value for t in found} <= values and all(
            t.reward.correct == (t.reward.value == 1) for t in found
        )
        if method in ("cispo", "grpo", "none"):
            assert {t.reward.value for t in found} == values


@pytest.mark.parametrize("right", [False, True])
@pytest.mark.parametrize("method", COLLECTORS)
def test_right_answers_alone_move_the_policy(tiny_config, checkpoint, monkeypatch, method, right):
    """Prevents wrong answers from moving a policy that is to see right ones only; they teach the critic at most."""

    def grade(self, problem, completion, exact=False):
        good = right and completion[0] % 2 == 0
        return Reward(1.0 if good else completion[-1] % 3 / 3 - 1, good, True, "toy")

    monkeypatch.setattr(Policy, "grade", grade)
    config = tiny_config(method, failures=False, steps=2, tokens=0)
    train(config, COLLECTORS[method])
    learnt, start = load_policy(config.folder / "policy"), load_policy(checkpoint)
    pairs = zip(learnt.lm.state_dict().values(), start.lm.state_dict().values(), strict=True)
    assert any(not torch.equal(now, then) for now, then in pairs) == right
    assert (learnt.value_head.layers[-1].weight.abs().max() > 0) == (method not in ("cispo", "grpo"))


@pytest.mark.parametrize(
    ("step", "spent", "share"), [(0, 0.0, 0.25), (1, 0.1, 0.5 * 0.9), (9, 0.6, 0.4), (9, 1.0, 0.0)]
)
def test_rates_warm_up_by_steps_and_decay_by_the_budget(step, spent, share):
    """Prevents a run at its first rate from beginning to end; each group has a rate of its own."""
    optimizer = SimpleNamespace(param_groups=[{"initial_lr": 1.0}, {"initial_lr": 0.01}])
    for _ in range(2):
        set_rate(optimizer, LearningConfig(warmup=4), Progress(step=step, share=spent))
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([share, 0.01 * share])


def test_evaluations_sample_as_the_run_asks(tiny_config, monkeypatch):
    """Prevents scores at another temperature or length than config.json says."""
    seen = []
    monkeypatch.setattr(session, "score_policy", lambda *args, **_: seen.append(args[2:]))
    found = session.Session(tiny_config(eval_temperature=0.2, seed=3), make_optimizer)
    found.score("validation", 5)
    assert seen == [(found.problems["validation"], 5, 0.2, 8, 3)]


def test_the_best_policy_is_kept_and_no_later_one(tiny_config, monkeypatch):
    """Prevents a best/ that holds the last policy."""
    scores, kept = iter([0.2, 0.1, 0.2, 0.3]), []
    rest = dict(pass_at_k=0.0, reward=0.0, parsed=0.0, samples=1)
    monkeypatch.setattr(session, "score_policy", lambda *_, **__: SimpleNamespace(mean_at_k=next(scores), **rest))
    found = session.Session(tiny_config(), make_optimizer)
    found.run = SimpleNamespace(publish=lambda name, save: kept.append((name, found.progress.best)))
    assert [found.validate()["eval_mean"] for _ in range(4)] == [0.2, 0.1, 0.2, 0.3]
    assert kept == [("best", 0.2), ("best", 0.3)]


def test_cpu_seconds_are_those_of_the_process(toy, tiny_config):
    """Prevents a cost that grows with what else the machine does."""

    def slow(*args):
        time.sleep(0.5)
        return collect_samples(*args)

    config = tiny_config("none", steps=3, tokens=0, evaluations=0, test_before=False)
    train(config, slow)
    *steps, last = read_metrics(config.folder)
    assert last["seconds"] > sum(row["cpu_seconds"] for row in steps) + 3 * 0.25


def test_a_run_ends_with_its_token_budget_and_counts_it(toy, tiny_config):
    """Prevents methods compared at unequal compute."""
    config = tiny_config(lora_rank=2, dtype="bfloat16", value_gradient=True)
    train(config, collect_mcts)
    generated = [row["generated"] for row in read_metrics(config.folder)]
    assert generated[-3] < 2_000 <= generated[-2] == generated[-1]
    policy = load_policy(config.folder / "policy", dtype="bfloat16")
    assert policy.lora and set(weights(config.folder / "policy")[0]) == {
        name.replace(".default", "") for name in dict(policy.lm.named_parameters()) if "lora_" in name
    }


def test_a_step_without_trajectories_costs_tokens_and_changes_nothing(tiny_config, checkpoint):
    """Prevents a crash, or a run without end, where all rewards of all groups are equal."""
    config = tiny_config(steps=3, warmup=2)
    train(config, lambda policy, sampler, problems, config, rng: ([], Usage(500, 7, 0.1), {}))
    rows = read_metrics(config.folder)
    assert [row["trajectories"] for row in rows[1:-1]] == [0, 0, 0] and rows[-1]["generated"] == 1_500
    assert not any({"reward", "gradient_norm"} & set(row) for row in rows)
    assert_close(load_policy(config.folder / "policy").lm.state_dict(), load_policy(checkpoint).lm.state_dict())


def test_a_seed_decides_a_whole_run(toy, tiny_config, tmp_path):
    """Prevents results that nobody can reproduce, and error bars over seeds that are one run."""
    found = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        train(tiny_config(out=tmp_path / name, seed=seed), collect_mcts)
        found.append((weights(tmp_path / name / "policy"), history(tmp_path / name)))
    assert_close(found[0][0], found[1][0], atol=0, rtol=0)
    assert found[0][1] == found[1][1] and found[0][1][1]["policy_loss"] != found[2][1][1]["policy_loss"]


@pytest.mark.parametrize(
    ("method", "rank", "optimizer"), [("mcts", 0, "adamw"), ("cispo", 2, "adamw"), ("none", 0, "paged-adamw8bit")]
)
def test_a_resumed_run_ends_like_an_uninterrupted_one(toy, tiny_config, tmp_path, method, rank, optimizer):
    """Prevents a resume that loses optimiser state, value head, random stream, counters or metrics."""
    settings = dict(method=method, lora_rank=rank, optimizer=optimizer, tokens=0, steps=4, evaluations=1)
    settings |= dict(learning_rate=1e-3, checkpoints=2)
    calls = []

    def interrupted(*args):
        calls.append(args)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return noisy(*args)

    def noisy(*args):
        random.random(), np.random.rand(), torch.rand(1)
        return COLLECTORS[method](*args)

    train(tiny_config(out=tmp_path / "a", **settings), noisy)
    streams = random.random(), np.random.rand(), torch.rand(1)
    config = tiny_config(out=tmp_path / "b", **settings)
    with pytest.raises(KeyboardInterrupt):
        train(config, interrupted)
    assert [row["step"] for row in read_metrics(tmp_path / "b")] == [0, 1, 2, 3]
    assert json.loads((tmp_path / "b" / "checkpoint" / "state.json").read_text(encoding="utf-8"))["step"] == 2
    assert json.loads((tmp_path / "b" / "checkpoint.old" / "state.json").read_text(encoding="utf-8"))["step"] == 0
    resumed, resume = parse(["--resume", str(tmp_path / "b")], method)
    assert (resumed, resume) == (config, True)
    train(resumed, noisy, resume)
    for folder in ("policy", "best", "checkpoint"):
        assert_close(weights(tmp_path / "b" / folder), weights(tmp_path / "a" / folder), atol=0, rtol=0)
    assert history(tmp_path / "b") == history(tmp_path / "a")
    assert (random.random(), np.random.rand(), torch.rand(1)) == streams


def test_a_finished_run_is_left_as_it_is(toy, tiny_config, capsys):
    """Prevents a second final test, which would change a published result's file."""
    config = tiny_config("none", tokens=0, steps=1)
    train(config, collect_samples)
    before = (config.folder / "metrics.jsonl").read_text(encoding="utf-8")
    capsys.readouterr()
    program(["--resume", str(config.folder)])
    assert capsys.readouterr().out == f"{config.folder} is finished: nothing is left to do\n"
    with pytest.raises(SystemExit):  # not a larger budget that is dropped in silence
        program(["--resume", str(config.folder), "--steps", "2", "--force"])
    assert f"is finished: a new run can start from its policy, --model {config.folder}" in capsys.readouterr().err
    assert (config.folder / "metrics.jsonl").read_text(encoding="utf-8") == before


def test_a_run_killed_in_its_final_test_does_that_test_only(toy, tiny_config, monkeypatch):
    """Prevents a run without a result, and one that trains beyond its budget."""
    config = tiny_config("none", tokens=0, steps=2)
    train(config, collect_samples)
    whole = history(config.folder)
    lines = (config.folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    (config.folder / "metrics.jsonl").write_text("".join(lines[:-1]) + lines[-1][:-9], encoding="utf-8")
    train(config, lambda *_: pytest.fail("trained on"), resume=True)
    assert history(config.folder) == whole


@pytest.fixture
def interrupted(toy, tiny_config):
    """A run of two steps that was interrupted in its second; settings -> its configuration."""

    def run(**settings):
        config = tiny_config("none", tokens=0, steps=2, checkpoints=2, **settings)

        def collect(policy, sampler, problems, config, rng):
            if policy.version == 1:
                raise KeyboardInterrupt
            return collect_samples(policy, sampler, problems, config, rng)

        with pytest.raises(KeyboardInterrupt):
            train(config, collect)
        return config

    return run


def force(config, options):
    """Go on with a run with other settings."""
    train(parse(["--resume", str(config.folder), *options.split(), "--force"], "none")[0], collect_samples, resume=True)


def test_forced_settings_hold_after_a_resume(interrupted):
    """Prevents --learning-rate from being overruled by what the optimiser's checkpoint remembers."""
    config = interrupted()
    kept = weights(config.folder / "checkpoint")
    force(config, "--learning-rate 0 --value-learning-rate 0")
    assert_close(weights(config.folder / "policy"), kept, atol=0, rtol=0)
    assert parse(["--resume", str(config.folder)], "none")[0].learning.learning_rate == 0


@pytest.mark.parametrize(("before", "after"), [("adamw", "paged-adamw8bit"), ("paged-adamw8bit", "adamw")])
def test_another_optimiser_starts_anew(interrupted, capsys, before, after):
    """Prevents one that takes another's state and fails in its first update."""
    config = interrupted(optimizer=before)
    force(config, f"--optimizer {after}")
    assert run_folder.finished(config.folder) and "optimiser was of another kind" in capsys.readouterr().out


def test_a_larger_budget_is_spent(interrupted):
    """Prevents a run that goes on with another budget (--force) and ends where the old one did."""
    config = interrupted()
    force(config, "--steps 4")
    assert [row["step"] for row in read_metrics(config.folder)] == [0, 1, 2, 3, 4, 4]
    force(config, "--steps 5")
    assert [row["step"] for row in read_metrics(config.folder)] == [
        0,
        1,
        2,
        3,
        4,
        4,
        5,
        5,
    ]  # the test at the end of four too


def test_the_rate_of_a_resumed_step_is_that_of_the_budget(interrupted, monkeypatch):
    """Prevents a rate from the share of another budget."""
    config, rates = interrupted(), []
    plain = ppo.update
    monkeypatch.setattr(ppo, "update", lambda p, o, *rest: rates.append(o.param_groups[0]["lr"]) or plain(p, o, *rest))
    force(config, "--steps 4")
    assert rates == pytest.approx([config.learning.learning_rate * (1 - step / 4) for step in (1, 2, 3)])


def test_settings_that_the_checkpoint_does_not_fit_are_not_kept(interrupted):
    """Prevents a traceback for another --lora-rank, and a run that then can't go on with its own either."""
    config = interrupted(lora_rank=2)
    with pytest.raises(ValueError, match="weights do not fit the model: go on with its own settings"):
        force(config, "--lora-rank 4")
    assert parse(["--resume", str(config.folder)], "none")[0].machine.lora_rank == 2
    force(config, "--learning-rate 0")


def test_evaluations_and_checkpoints_are_evenly_spaced_along_the_budget():
    """Prevents one that is left out or made twice, and a run that goes on with a larger budget (--force) unmeasured."""
    shares = np.arange(101) / 100
    due = [after for before, after in zip(shares, shares[1:]) if session.is_due(before, after, 10)]
    assert due == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0])
    assert sum(session.is_due(i / 100, (i + 1) / 100, 100) for i in range(100)) == 100
    assert session.is_due(0.3, 0.45, 10) and not session.is_due(0.3, 0.35, 10) and not session.is_due(0.0, 1.0, 0)


def test_a_loss_that_is_not_finite_never_reaches_the_weights(toy, tiny_config, monkeypatch, capsys):
    """Prevents a run whose weights are NaN, and one that ends in a traceback."""
    config = tiny_config("none", tokens=0, steps=4, checkpoints=4)

    def poisoned(policy, *rest):
        rows, usage, info = collect_samples(policy, *rest)
        if policy.version == 2:
            rows[0].logprobs[0] = math.nan
        return rows, usage, info

    monkeypatch.setattr(launch, "parse", lambda *_: (config, False))
    with pytest.raises(SystemExit) as stop:
        cli.command(lambda: program(collectors={"none": poisoned}))
    told = capsys.readouterr().err.splitlines()[-1]
    assert stop.value.code == 3 and re.fullmatch(
        r"error: \w+ is (nan|inf|-inf) in update 3, which was not made; .*", told
    )
    assert [row["step"] for row in read_metrics(config.folder)] == [0, 1, 2, 3]
    assert run_folder.ending(read_metrics(config.folder)) == "stopped"  # or the study would run it again and again
    state = json.loads((config.folder / "checkpoint" / "state.json").read_text(encoding="utf-8"))
    assert state["step"] == 2 and all(w.isfinite().all() for w in weights(config.folder / "checkpoint")[0].values())


def test_a_collapsed_run_is_stopped_before_its_weights_are_kept(toy, tiny_config, monkeypatch):
    """Prevents the rest of a budget spent on a policy that is lost, and its last good checkpoint overwritten."""
    config = tiny_config("none", tokens=0, steps=9, checkpoints=9, learning_rate=1e-3)
    with monkeypatch.context() as patch:
        patch.setattr(session, "Guard", lambda: guard.Guard(max_kl=1e-9, patience=2))
        with pytest.raises(guard.Stopped, match=r"step 3: collapsed, 2 bad steps in a row: KL .* the limit is 1e-09"):
            train(config, collect_samples)  # of the first step the policy is its own reference
        assert [row["step"] for row in read_metrics(config.folder)] == [0, 1, 2, 3]
        assert run_folder.ending(read_metrics(config.folder)) == "stopped" and not run_folder.finished(config.folder)
        assert json.loads((config.folder / "checkpoint" / "state.json").read_text(encoding="utf-8"))["step"] == 2
        with pytest.raises(guard.Stopped, match="step 3"):
            train(config, collect_samples, resume=True)
        assert [row["step"] for row in read_metrics(config.folder)] == [0, 1, 2, 3]
    train(config, collect_samples, resume=True)
    assert [row["step"] for row in read_metrics(config.folder)] == [0, *range(1, 10), 9]


def test_ctrl_c_says_how_to_go_on(tiny_config, monkeypatch, capsys):
    """Prevents an interrupted run that is begun anew because nobody knew better, and advice to resume what never was
    there."""

    def interrupted(*_, **__):
        raise KeyboardInterrupt

    config = tiny_config("none")
    monkeypatch.setattr(launch, "parse", lambda *_: (config, False))
    monkeypatch.setattr("sys.argv", ["/somewhere/ppo.py"])
    with pytest.raises(SystemExit) as stop:
        cli.command(lambda: program(collectors={"none": interrupted}))
    assert stop.value.code == 130
    assert capsys.readouterr().err.endswith(
        f"interrupted; to go on: python /somewhere/ppo.py --resume {config.folder}\n"
    )
    monkeypatch.setattr(launch, "parse", lambda *_: (replace(config, out=config.folder / "other"), False))
    monkeypatch.setattr(session, "load_policy", interrupted)
    with pytest.raises(SystemExit):
        cli.command(lambda: program(collectors={"none": interrupted}))
    assert "to go on" not in capsys.readouterr().err


def test_a_run_that_was_short_of_memory_stays_small(tiny_config, tmp_path, monkeypatch, capsys):
    """Prevents a run that fails and is halved again at every step, or after every --resume."""

    def on_a_small_gpu(policy, batch, *rest):
        if batch.sequences.ids.numel() > 40:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return plain(policy, batch, *rest)

    def interrupted(*args):
        if len(read_metrics(config.folder)) == 4:
            raise KeyboardInterrupt
        return collect_samples(*args)

    plain = ppo.batch_loss
    monkeypatch.setattr(ppo, "batch_loss", on_a_small_gpu)
    config = tiny_config("none", micro_batch_tokens=80, tokens=0, steps=4, checkpoints=2)
    with pytest.raises(KeyboardInterrupt):
        train(config, interrupted)
    assert capsys.readouterr().out.count("warning: out of GPU memory with 80 tokens in a micro-batch") == 1
    assert json.loads((config.folder / "checkpoint" / "state.json").read_text(encoding="utf-8"))["micro_tokens"] == 40
    train(config, collect_samples, resume=True)
    assert [row.get("micro_tokens") for row in read_metrics(config.folder)] == [None, 40, 40, 40, 40, None]
    assert "out of GPU memory" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("limits", "generated", "step", "share"),
    [
        (dict(tokens=100), 25, 9, 0.25),
        (dict(tokens=0, steps=10), 25, 9, 0.9),
        (dict(tokens=100, steps=10), 25, 9, 0.9),
        (dict(tokens=100, steps=10), 120, 1, 1.0),
    ],
)
def test_progress_is_the_share_of_the_budget_that_ends_first(limits, generated, step, share):
    """Prevents a learning rate below zero and a run past its budget."""
    progress = Progress(step=step - 1, generated=generated - 20)
    progress.advance(Usage(generated=20, prefilled=3, valued=4), BudgetConfig(**limits), seconds=0.5)
    assert progress == Progress(step, generated, 3, 4, 0.5, share)


# ------------------------------------------------------------------------------------------------ command line


def test_the_program_shows_its_configuration_and_runs_the_method(monkeypatch, capsys):
    """Prevents a method that runs under another's name."""
    seen = []
    monkeypatch.setattr(ppo, "train", lambda *args: seen.append(args))
    program(["--preset", "tiny", "--search", "none"])
    assert seen == [(preset_for("tiny", "none"), collect_samples, False)]
    assert capsys.readouterr().out.splitlines() == [
        "none on assets/tiny, seed 0, into runs/none-tiny-seed0/",
        "budget: 1,500,000 generated tokens",
        "settings that differ from preset tiny: none",
    ]
    program(["--search", "none", "--seed", "3", "--learning-rate", "0.5", "--tokens", "0", "--steps", "7"])
    assert capsys.readouterr().out.splitlines()[1:] == [
        "budget: 7 steps",
        "settings that differ from preset tiny: tokens 0, steps 7, learning_rate 0.5",
    ]


def test_a_method_of_another_program_is_refused(capsys):
    """Prevents a run of a rival under the name of the search."""
    with pytest.raises(SystemExit) as stop:
        program(["--method", "grpo"])
    assert stop.value.code == 2
    assert capsys.readouterr().err == ("error: this program runs mcts, none, not 'grpo': see ppo.py, baselines.py\n")
