"""Tests of ppo.py: the losses against values by hand and the expressions of TRL, one update, and whole runs of every
method on a random model with a toy reward that can be learnt in seconds."""

import json
import math
from dataclasses import fields, replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch.testing import assert_close
from transformers import AutoModelForCausalLM

import baselines
import ppo
import runs
from countdown import Reward
from mcts import SearchConfig
from policy import Policy, load_policy
from ppo import (
    PRESETS,
    Config,
    batch_loss,
    cispo_loss,
    collect_mcts,
    collect_samples,
    gae,
    kl_k3,
    make_optimizer,
    micro_batches,
    parse,
    ppo_loss,
    progress,
    token_weights,
    train,
    update,
)  # fmt: skip
from runs import read_metrics
from sampling import TorchSampler, Trajectory, Usage, complete

COLLECTORS = ppo.COLLECTORS | baselines.COLLECTORS
UNIT = st.floats(-1, 1, width=32)
LOGPROBS = st.floats(-6, 0, width=32)
ROWS = st.lists(st.tuples(st.lists(UNIT, min_size=1, max_size=5), UNIT), min_size=1, max_size=4)  # values, reward
TOKENS = st.lists(st.tuples(LOGPROBS, LOGPROBS, UNIT), min_size=1, max_size=8)  # log pi, recorded log pi, advantage


def right_aligned(rows):
    width = max(map(len, rows))
    return torch.tensor([[0.0] * (width - len(row)) + list(row) for row in rows])


def trajectories(policy, problems, temperature=1.0):
    """Eight trajectories of 1 to 8 tokens that the policy has just sampled, with rewards of both signs."""
    rows, _ = complete(policy, TorchSampler(policy), problems, 2, [1, 2, 3, 4], 8, temperature, "none")
    found = [t for row in rows for t in row]
    for i, t in enumerate(found):
        t.completion, t.logprobs = t.completion[: i + 1], t.logprobs[: i + 1]
        t.reward = Reward(round(math.cos(i), 2), False, True, "made up")
    return found


def trained(policy):
    return {name: p.detach().clone() for name, p in policy.named_parameters() if p.requires_grad}


def optimizer_of(policy, config, rate=1e-3):
    optimizer = make_optimizer(policy, config)
    for group in optimizer.param_groups:
        group["lr"] = rate
    return optimizer


# ------------------------------------------------------------------------------------------------ losses


@given(ROWS, st.floats(0, 1, width=32))
def test_gae_is_the_sum_of_its_definition(rows, lam):
    """Prevents advantages that leak over padding or rows, or count a delta twice (a literal double sum)."""
    values, rewards = zip(*rows)
    mask = right_aligned([[1.0] * len(row) for row in values])
    found = gae(torch.tensor(rewards), right_aligned(values), mask, lam)
    for row, v, reward in zip(found.tolist(), values, rewards):
        following = [*v[1:], reward]
        deltas = [after - before for before, after in zip(v, following)]
        naive = [sum(lam ** (k - t) * deltas[k] for k in range(t, len(v))) for t in range(len(v))]
        assert row == pytest.approx([0.0] * (len(row) - len(v)) + naive, abs=1e-5)


@given(ROWS)
def test_gae_with_lambda_1_is_the_reward_less_the_value(rows):
    """Prevents an advantage other than the post's A = R - V(s_t)."""
    values, rewards = zip(*rows)
    mask = right_aligned([[1.0] * len(row) for row in values])
    expected = (torch.tensor(rewards)[:, None] - right_aligned(values)) * mask
    assert_close(gae(torch.tensor(rewards), right_aligned(values), mask, 1.0), expected, atol=1e-6, rtol=0)


# probability now, the recorded one, advantage -> CISPO loss (cap 5) and its slope, PPO loss (epsilon 0.2) and its slope
BY_HAND = [
    (0.5, 0.5, 1.0, math.log(2), -1.0, -1.0, -1.0),
    (0.5, 0.25, 1.5, 3 * math.log(2), -3.0, -1.8, 0.0),
    (0.5, 0.25, -1.5, -3 * math.log(2), 3.0, 3.0, 3.0),
    (0.5, 0.05, 1.0, 5 * math.log(2), -5.0, -1.2, 0.0),
    (0.25, 0.5, 1.0, math.log(2), -0.5, -0.5, -0.5),
    (0.25, 0.5, -1.0, -math.log(2), 0.5, 0.8, 0.0),
]


@pytest.mark.parametrize(("now", "then", "advantage", "cispo", "cispo_slope", "clipped", "clipped_slope"), BY_HAND)
def test_policy_losses_and_their_gradients_by_hand(now, then, advantage, cispo, cispo_slope, clipped, clipped_slope):
    """Prevents a wrong sign, a clip on the wrong side, CISPO's gradient through the ratio, and a PPO gradient where
    the ratio is clipped."""
    logprob, old = torch.tensor([[now]]).log().requires_grad_(), torch.tensor([[then]]).log()
    for loss, value, slope in (
        (cispo_loss(logprob, old, torch.tensor([[advantage]]), 5.0), cispo, cispo_slope),
        (ppo_loss(logprob, old, torch.tensor([[advantage]]), 0.2), clipped, clipped_slope),
    ):
        assert loss.item() == pytest.approx(value)
        assert torch.autograd.grad(loss, logprob)[0].item() == pytest.approx(slope)


@given(TOKENS, st.floats(1, 6), st.floats(0.05, 0.5))
def test_policy_losses_are_those_of_trl(tokens, clip_high, epsilon):
    """Prevents a baseline that is not the one the post compared with (expressions of TRL 1.16, GRPOTrainer)."""
    per_token_logps, old_per_token_logps, advantages = torch.tensor(tokens).T[:, None]
    coef_1 = torch.exp(per_token_logps - old_per_token_logps)
    expected = -torch.clamp(coef_1, max=clip_high).detach() * advantages * per_token_logps
    assert_close(cispo_loss(per_token_logps, old_per_token_logps, advantages, clip_high), expected)
    coef_2 = torch.clamp(coef_1, 1 - epsilon, 1 + epsilon)
    expected = -torch.min(coef_1 * advantages, coef_2 * advantages)
    assert_close(ppo_loss(per_token_logps, old_per_token_logps, advantages, epsilon), expected)


@given(st.lists(st.tuples(UNIT, UNIT), min_size=2, max_size=6))
def test_kl_is_never_negative_and_in_expectation_the_divergence(logits):
    """Prevents the divergence in the wrong direction: E_pi[k3] = KL(pi || pi_ref), computed in full."""
    pi, reference = torch.log_softmax(5 * torch.tensor(logits, dtype=torch.float64), 0).T
    estimate = kl_k3(pi, reference)
    assert (estimate > -1e-12).all()
    assert_close((pi.exp() * estimate).sum(), (pi.exp() * (pi - reference)).sum())
    assert kl_k3(torch.tensor(0.5).log(), torch.tensor(0.25).log()).item() == pytest.approx(0.5 + math.log(2) - 1)


@given(st.lists(st.integers(1, 6), min_size=1, max_size=6), st.integers(1, 6))
def test_token_weights_sum_to_1_over_all_micro_batches(lengths, size):
    """Prevents a learning rate that depends on how a step is cut into micro-batches."""
    for how in ("sequence", "token"):
        total = 0.0
        for start in range(0, len(lengths), size):
            mask = right_aligned([[1.0] * n for n in lengths[start : start + size]])
            total += token_weights(mask, how, len(lengths), sum(lengths)).sum().item()
        assert total == pytest.approx(1)


def test_token_weights_by_hand():
    """Prevents long trajectories from counting more where they should not, or less."""
    mask = torch.tensor([[0.0, 1.0, 1.0], [0.0, 0.0, 1.0]])
    assert_close(token_weights(mask, "sequence", 2, 3), torch.tensor([[0, 1 / 4, 1 / 4], [0, 0, 1 / 2]]))
    assert_close(token_weights(mask, "token", 2, 3), mask / 3)


# ------------------------------------------------------------------------------------------------ one update


@given(st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9)), min_size=1, max_size=12), st.integers(1, 60))
def test_micro_batches_lose_nothing_and_fit(lengths, budget):
    """Prevents trajectories left out or trained twice, and a batch that does not fit into memory."""
    items = [Trajectory(None, [0] * p, [0] * c, [], None, 0, "") for p, c in lengths]
    groups = micro_batches(items, budget)
    assert sorted(id(t) for group in groups for t in group) == sorted(map(id, items))
    for group in groups:
        widths = [len(t.prompt) + len(t.completion) for t in group]
        assert len(group) == 1 or max(widths) * len(group) <= budget


@pytest.mark.parametrize("fixed", [False, True], ids=["critic", "group"])
@pytest.mark.parametrize("normalize", ["sequence", "token"])
@pytest.mark.parametrize("loss", ["cispo", "ppo"])
def test_the_loss_is_the_documented_one_token_by_token(moved, problems, loss, normalize, fixed):
    """Prevents a ratio of recomputed log-probabilities (always 1), a temperature that is left out, a reference that
    moves and a mean over the wrong tokens."""
    config = Config(loss=loss, normalize=normalize, temperature=0.7, value_coefficient=0.5, kl_coefficient=0.3)
    items, rng = trajectories(moved, problems, config.temperature), np.random.default_rng(0)
    tokens, expected, ratios = sum(len(t.completion) for t in items), 0.0, 0.0
    for i, t in enumerate(items):
        t.logprobs = [x + rng.normal() for x in t.logprobs]  # as if older weights had sampled it
        t.advantage = i - 3.0 if fixed else None
        batch = moved.batch([t.prompt], [t.completion])
        now, values, _ = (x[0].tolist() for x in moved.logprobs_and_values(batch, config.temperature))
        reference = moved.reference_logprobs(batch, config.temperature)[0].tolist()
        for logp, old, ref, value in zip(now, t.logprobs, reference, values, strict=True):
            ratio, advantage = math.exp(logp - old), t.advantage if fixed else t.reward.value - value
            if loss == "cispo":
                part = -min(ratio, 5.0) * advantage * logp
            else:
                part = -min(ratio * advantage, min(max(ratio, 0.8), 1.2) * advantage)
            part += 0.0 if fixed else 0.5 * (value - t.reward.value) ** 2
            part += 0.3 * (math.exp(ref - logp) - (ref - logp) - 1)
            weight = 1 / tokens if normalize == "token" else 1 / len(now) / len(items)
            expected, ratios = expected + weight * part, ratios + weight * ratio
    losses = [batch_loss(moved, group, config, len(items), tokens) for group in micro_batches(items, 60)]
    assert len(losses) > 2
    assert sum(total.item() for total, _ in losses) == pytest.approx(expected, abs=1e-4)
    assert sum(means["ratio"].item() for _, means in losses) == pytest.approx(ratios, abs=1e-4)


def test_gradients_do_not_depend_on_the_size_of_micro_batches(moved, problems):
    """Prevents results that change with the memory of a machine."""
    items, found = trajectories(moved, problems), []
    for tokens in (1, 60, 10_000):
        config = Config(micro_batch_tokens=tokens, clip_gradient=1e9)
        means = update(moved, make_optimizer(moved, config), items, config)  # its rate is 0: nothing moves
        gradients = {name: p.grad.clone() for name, p in moved.named_parameters() if p.requires_grad}
        found.append(gradients | {name: torch.tensor(mean) for name, mean in means.items()})
    assert all(gradient.any() for gradient in found[0].values())
    for other in found[1:]:
        assert_close(found[0], other, atol=1e-6, rtol=1e-3)


def test_the_advantage_carries_no_gradient(moved, problems):
    """Prevents a critic that is trained to make the policy loss small instead of to predict the reward."""
    items, config = trajectories(moved, problems), Config(value_coefficient=0.0, gae_lambda=0.5)
    update(moved, make_optimizer(moved, config), items, config)
    assert not any(p.grad is not None and p.grad.any() for p in moved.value_head.parameters())


@pytest.mark.parametrize("rank", [0, 4])
def test_two_updates_move_every_trained_weight_and_nothing_else(checkpoint, problems, rank):
    """Prevents a layer, an adapter or a value head outside of the optimiser, and a reference inside. The first update
    reaches only what is next to the zeros that value head and adapters start with."""
    policy, config = load_policy(checkpoint, lora_rank=rank), Config()
    before, items = trained(policy), trajectories(policy, problems)
    frozen = {name: p.clone() for name, p in policy.named_parameters() if not p.requires_grad}
    optimizer = optimizer_of(policy, config)
    for _ in range(2):
        update(policy, optimizer, items, config)
    after = dict(policy.named_parameters())
    assert [name for name in before if torch.equal(before[name], after[name])] == []
    assert frozen and all(torch.equal(frozen[name], after[name]) for name in frozen)
    assert policy.version == 2


def test_group_methods_leave_the_critic_alone(moved, problems):
    """Prevents a value loss on rewards whose advantage is fixed, and compute that is not the method's."""
    items, config = trajectories(moved, problems), Config()
    for t in items:
        t.advantage = t.reward.value
    before = trained(moved)
    means = update(moved, optimizer_of(moved, config), items, config)
    moves = {name: not torch.equal(before[name], p) for name, p in moved.named_parameters() if name in before}
    assert means["value_loss"] == 0
    assert not any(moves[name] for name in moves if name.startswith("value_head"))
    assert all(moves[name] for name in moves if not name.startswith("value_head"))


@pytest.mark.parametrize("loss", ["cispo", "ppo"])
def test_updates_favour_what_was_better_than_expected(moved, problems, loss):
    """Prevents a policy that is trained away from its rewards, and a critic that does not approach them."""
    items = trajectories(moved, problems)[-2:]
    items[0].reward, items[1].reward = Reward(1.0, True, True, ""), Reward(-1.0, False, True, "")
    batch = moved.batch([t.prompt for t in items], [t.completion for t in items])
    config = Config(loss=loss, kl_coefficient=0.0)
    optimizer = optimizer_of(moved, config, 1e-4)

    def state():
        with torch.no_grad():
            logprobs, values, _ = moved.logprobs_and_values(batch)
        sums = (logprobs * batch.completion).sum(1)
        return *sums.tolist(), ((values - torch.tensor([[1.0], [-1.0]])) ** 2 * batch.completion).sum().item()

    before = state()
    for _ in range(3):
        update(moved, optimizer, items, config)
    after = state()
    assert after[0] > before[0] and after[1] < before[1] and after[2] < before[2]


def test_inner_steps_leave_the_sampling_policy_and_are_one_version(moved, problems):
    """Prevents old log-probabilities that follow the weights: the ratio is 1 in the first pass, not in the third."""
    items = trajectories(moved, problems)
    ratios = []
    for inner_steps in (1, 3):
        config = Config(inner_steps=inner_steps)
        ratios.append(update(moved, optimizer_of(moved, config), items, config)["ratio"])
    assert ratios[0] == pytest.approx(1, abs=1e-5) and abs(ratios[1] - 1) > 1e-3
    assert moved.version == 2


def test_gradients_are_clipped_and_their_norm_reported(moved, problems):
    """Prevents a clip that is not applied, or a report of the clipped norm."""
    config = Config(clip_gradient=1e-3)
    norm = update(moved, make_optimizer(moved, config), trajectories(moved, problems), config)["gradient_norm"]
    clipped = torch.stack([p.grad.norm() for p in moved.parameters() if p.grad is not None]).norm().item()
    assert norm > 1e-2 and clipped == pytest.approx(1e-3, rel=1e-2)


# ------------------------------------------------------------------------------------------------ collecting


@pytest.mark.parametrize("distill", ["best-path", "best-answer"])
def test_search_hands_over_graded_trajectories_of_the_policy(moved, problems, tiny_config, distill):
    """Prevents rewards or log-probabilities of another path, and a ratio other than 1 at a temperature below 1."""
    config = tiny_config(distill=distill, temperature=0.7)
    moved.version = 5
    found, usage, info = collect_mcts(moved, TorchSampler(moved), problems, config, np.random.default_rng(0))
    assert [t.problem for t in found] == problems and {t.source for t in found} == {distill}
    for t in found:
        assert t.prompt == moved.encode(t.problem) and t.reward == moved.grade(t.problem, t.completion)
        assert (t.version, t.advantage) == (5, None)
        assert len(t.completion) == 8 or t.completion[-1] in moved.stop_ids
        logprobs = moved.logprobs_and_values(moved.batch([t.prompt], [t.completion]), 0.7)[0][0].detach()
        assert_close(torch.tensor(t.logprobs), logprobs, atol=1e-4, rtol=0)
    assert usage.generated >= 4 * 8 and usage.prefilled > 0 and usage.seconds > 0
    assert info["tree_visits"] == 8 and 0 < info["tree_answers"] < 8
    again, _, _ = collect_mcts(moved, TorchSampler(moved), problems, config, np.random.default_rng(0))
    assert [t.completion for t in again] == [t.completion for t in found]


def test_a_tree_without_an_answer_is_left_out(policy, fake_sampler, problems, tiny_config):
    """Prevents training on a path that ends before its answer, and a crash where no tree has one."""
    sampler = fake_sampler(lambda prefix: [([40, 6], 1.0, "step")])
    config = tiny_config(tree=SearchConfig(simulations=2))
    found, usage, info = collect_mcts(policy, sampler, problems, config, np.random.default_rng(0))
    assert found == [] and usage.generated > 0 and info["tree_answers"] == 0


def test_plain_sampling_is_one_whole_completion_a_problem(moved, problems, tiny_config):
    """Prevents samples that stop at the first step, and a run that is the same at every seed."""
    found = [
        collect_samples(moved, TorchSampler(moved), problems, tiny_config(), np.random.default_rng(seed))[0]
        for seed in (0, 0, 1)
    ]
    assert [t.problem for t in found[0]] == problems
    assert all(len(t.completion) == 8 or t.completion[-1] in moved.stop_ids for t in found[0])
    assert found[0] == found[1] != found[2]


# ------------------------------------------------------------------------------------------------ whole runs


@pytest.fixture
def toy(monkeypatch):
    """A reward that a random model can learn: the share of even tokens, from -1 to 1."""

    def grade(self, problem, completion, strict=True):
        even = sum(token % 2 == 0 for token in completion) / len(completion)
        return Reward(2 * even - 1, even == 1, True, "toy")

    monkeypatch.setattr(Policy, "grade", grade)


TIMES = {"seconds", "tokens_per_second", "collect_share"}
STEP = {"step", "generated", "prefilled", "trajectories", "reward", "correct", "parsed", "length", "policy_loss"}
STEP |= {"value_loss", "entropy", "ratio", "kl", "gradient_norm", *TIMES}
EVAL = {"eval_mean", "eval_pass", "eval_reward", "eval_parsed", "eval_k"}
METHOD = {"best-of-n": {"solved"}, "cispo": {"sample_reward", "solved"}, "grpo": {"sample_reward", "solved"}}
METHOD["mcts"] = {f"tree_{key}" for key in "visits nodes merged depth root_q root_value answers solved".split()}


def weights(folder):
    names = ("model.safetensors", "adapter_model.safetensors", "value_head.safetensors")
    return [load_file(folder / name) for name in names if (folder / name).exists()]


def history(folder):
    return [{key: value for key, value in row.items() if key not in TIMES} for row in read_metrics(folder)]


@pytest.mark.parametrize("method", COLLECTORS)
def test_every_method_learns_records_its_run_and_saves_a_policy(toy, tiny_config, method, capsys):
    """Prevents a method that does not run, or learns nothing, or the opposite; and a run that can't be plotted."""
    config = tiny_config(
        search=method, tokens=0, steps=12, problems=8, evaluations=3, learning_rate=3e-3, schedule="constant",
        kl_coefficient=0.01, test_problems=16, test_samples=8, loss="ppo" if method == "grpo" else "cispo",
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
    assert {row["eval_k"] for row in steps if "eval_k" in row} == {2} and steps[0]["ratio"] == pytest.approx(
        1, abs=1e-4
    )

    policy = load_policy(config.folder / "policy")
    plain = AutoModelForCausalLM.from_pretrained(config.folder / "policy")
    assert_close(plain.state_dict(), policy.lm.state_dict())
    saved = json.loads((config.folder / "config.json").read_text())
    assert (saved["search"], saved["tree"]["simulations"], saved["seed"]) == (method, 8, 0)
    printed = capsys.readouterr().out
    assert f"{method} (tiny, seed 0), 16 held-out problems" in printed and "12 steps" in printed


def test_a_run_ends_with_its_token_budget_and_counts_it(toy, tiny_config):
    """Prevents methods compared at unequal compute."""
    config = tiny_config(lora_rank=2, dtype="bfloat16", schedule="linear", value_gradient=True)
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


@pytest.mark.parametrize(("method", "rank"), [("mcts", 0), ("cispo", 2)])
def test_a_resumed_run_ends_like_an_uninterrupted_one(toy, tiny_config, tmp_path, method, rank):
    """Prevents a resume that loses optimiser state, value head, random stream, counters or metrics."""
    settings = dict(search=method, lora_rank=rank, tokens=0, steps=4, evaluations=2, learning_rate=1e-3)
    train(tiny_config(out=tmp_path / "a", **settings), COLLECTORS[method])
    calls = []

    def interrupted(*args):
        calls.append(args)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return COLLECTORS[method](*args)

    config = tiny_config(out=tmp_path / "b", **settings)
    with pytest.raises(KeyboardInterrupt):
        train(config, interrupted)
    assert [row["step"] for row in read_metrics(tmp_path / "b")] == [0, 1, 2, 3]
    assert json.loads((tmp_path / "b" / "checkpoint" / "state.json").read_text())["step"] == 2
    resumed, resume = parse(["--resume", str(tmp_path / "b")], method)
    assert (resumed, resume) == (config, True)
    train(resumed, COLLECTORS[method], resume)
    assert_close(weights(tmp_path / "b" / "policy"), weights(tmp_path / "a" / "policy"), atol=0, rtol=0)
    assert history(tmp_path / "b") == history(tmp_path / "a")


@pytest.mark.parametrize(
    ("limits", "state", "share"),
    [
        (dict(tokens=100), dict(generated=25, step=9), 0.25),
        (dict(tokens=0, steps=10), dict(generated=25, step=9), 0.9),
        (dict(tokens=100, steps=10), dict(generated=25, step=9), 0.9),
        (dict(tokens=100, steps=10), dict(generated=120, step=1), 1.0),
    ],
)
def test_progress_is_the_share_of_the_budget_that_ends_first(limits, state, share):
    """Prevents a learning rate below zero and a run past its budget."""
    assert progress(state, Config(**limits)) == share


# ------------------------------------------------------------------------------------------------ configuration


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(preset="huge"), "preset must be one of tiny, qwen1.5b, post, not 'huge'"),
        (dict(search="beam"), "search must be one of mcts, none, best-of-n, cispo, grpo"),
        (dict(split="random"), "split must be"),
        (dict(distill="all"), "distill must be"),
        (dict(dtype="float16"), "dtype must be"),
        (dict(schedule="cosine"), "schedule must be"),
        (dict(loss="dpo"), "loss must be"),
        (dict(normalize="batch"), "normalize must be"),
        (dict(problems=0), "problems must be at least 1, not 0"),
        (dict(test_samples=0), "test_samples must be at least 1"),
        (dict(steps=-1), "steps must be at least 0"),
        (dict(learning_rate=-1.0), "learning_rate must be at least 0"),
        (dict(learning_rate=math.nan), "learning_rate must be at least 0"),
        (dict(tokens=0, steps=0), "never end"),
        (dict(gae_lambda=1.5), "gae_lambda must be in"),
        (dict(temperature=0.0), "above 0"),
        (dict(clip_gradient=0.0), "above 0"),
        (dict(search="cispo", samples=1), "at least 2"),
    ],
)
def test_a_bad_setting_is_refused_with_a_reason(change, message):
    """Prevents hours of a run that can't work."""
    with pytest.raises(ValueError, match=message):
        Config(**change)


def test_presets_are_valid_and_the_post_keeps_the_posts_numbers():
    """Prevents a preset under another's name, and a reproduction with other hyper-parameters than the post's."""
    for name, preset in PRESETS.items():
        assert replace(preset) == preset and preset.preset == name
    post = PRESETS["post"]
    found = (post.problems, post.steps, post.learning_rate, post.clip_gradient, post.inner_steps, post.samples)
    assert found == (16, 2_048, 5e-6, 0.1, 1, 64) and (post.max_tokens, post.eval_temperature) == (512, 0.2)
    assert (post.clip_high, post.value_coefficient, post.kl_coefficient, post.schedule) == (5.0, 1.0, 0.05, "linear")
    tree = post.search_config
    assert (tree.simulations, tree.workers, tree.children, tree.c_puct) == (1_600, 16, 4, 0.5)
    assert (tree.prior, tree.unvisited, tree.virtual_loss) == ("sum", "zero", "visit")
    assert (tree.temperature, tree.max_tokens, tree.step_tokens) == (0.8, 512, 64)


def test_the_command_line_starts_from_a_preset_and_overrides_it(monkeypatch):
    """Prevents an option or a preset that is read and dropped; without --preset the machine decides."""
    args = ["--preset=post", "--seed", "3", "--tree.simulations", "9", "--no-value-gradient"]
    config, resume = parse(args, "mcts")
    expected = replace(PRESETS["post"], seed=3, tree=replace(PRESETS["post"].tree, simulations=9), value_gradient=False)
    assert (config, resume) == (expected, False)
    assert parse(["--preset", "tiny"], "none")[0] == replace(PRESETS["tiny"], search="none")
    assert (parse(["--preset", "tiny"], "grpo")[0].loss, parse(["--preset", "tiny"], "cispo")[0].loss) == (
        "ppo",
        "cispo",
    )
    for present, preset in ((True, "qwen1.5b"), (False, "tiny")):
        monkeypatch.setattr(torch.cuda, "is_available", lambda present=present: present)
        assert parse([], "mcts")[0] == PRESETS[preset]


def test_a_run_has_a_folder_of_its_own():
    """Prevents runs of two methods, presets or seeds in one folder."""
    assert str(Config(search="cispo", seed=3).folder) == "runs/cispo-tiny-seed3"
    assert str(Config(out="elsewhere").folder) == "elsewhere"


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--preset", "huge"], "preset must be one of tiny, qwen1.5b, post, not 'huge'"),
        (["--preset"], "preset must be one of"),
        (["--preset", "tiny", "--learning-rat", "1"], "--learning-rat"),
        (["--preset", "tiny", "--tree.children", "0"], "children must be at least 1"),
        (["--preset", "tiny", "--problems", "0"], "problems must be at least 1"),
        (["--preset", "tiny", "--search", "cispo"], "this program runs mcts, none, not 'cispo'"),
        (["--resume"], "--resume RUN takes no other option"),
        (["--resume", "there", "--seed", "1"], "--resume RUN takes no other option"),
        (["--resume", "/no/such/run"], "/no/such/run"),
    ],
)
def test_a_bad_command_is_one_line_and_exit_code_2(args, message, capsys):
    """Prevents a traceback, and a typo that trains something else."""
    with pytest.raises(SystemExit) as stop:
        runs.command(lambda: ppo.run(ppo.COLLECTORS, args, "mcts"))
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.startswith("error: ") and error.count("\n") == 1 and message in error


def test_the_program_shows_its_configuration_and_runs_the_method(monkeypatch, capsys):
    """Prevents a method that runs under another's name."""
    seen = []
    monkeypatch.setattr(ppo, "train", lambda *args: seen.append(args))
    ppo.run(ppo.COLLECTORS, ["--preset", "tiny", "--search", "none"], "mcts")
    assert seen == [(replace(PRESETS["tiny"], search="none"), collect_samples, False)]
    shown = [line.split()[0] for line in capsys.readouterr().out.splitlines()]
    assert shown == [field.name for field in fields(Config)]
