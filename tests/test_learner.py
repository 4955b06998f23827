"""Tests of learner.py: the losses against values by hand and the expressions of TRL, and updates of a random model."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

import learner
from config import Config
from countdown import Reward
from learner import micro_batches
from ppo import batch_loss, cispo_loss, gae, kl_k3, make_optimizer, ppo_loss, token_weights, update
from runtime.loading import load_policy
from runtime.torch_sampler import TorchSampler
from sampling import Trajectory, complete

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


def gradients_of(policy):
    return {name: p.grad.clone() for name, p in policy.named_parameters() if p.grad is not None}


def perturb(items, scale=0.5):
    """Move the recorded log-probabilities, as if another sampler or older weights had drawn; returns by how much."""
    rng = np.random.default_rng(0)
    noise = [scale * rng.normal(size=len(t.logprobs)) for t in items]
    for t, moves in zip(items, noise):
        t.logprobs = [x + move for x, move in zip(t.logprobs, moves.tolist())]
    return np.concatenate(noise)


def optimizer_of(policy, config, rate=1e-3):
    optimizer = make_optimizer(policy, config)
    for group in optimizer.param_groups:
        group["lr"] = rate
    return optimizer


# ------------------------------------------------------------------------------------------------ losses


@given(ROWS, st.floats(0, 1, width=32) | st.just(1.0))
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
            total += token_weights(mask, how, lengths).sum().item()
        assert total == pytest.approx(1)


def test_token_weights_by_hand():
    """Prevents long trajectories from counting more where they should not, or less."""
    mask = torch.tensor([[0.0, 1.0, 1.0], [0.0, 0.0, 1.0]])
    assert_close(token_weights(mask, "sequence", [2, 1]), torch.tensor([[0, 1 / 4, 1 / 4], [0, 0, 1 / 2]]))
    assert_close(token_weights(mask, "token", [2, 1]), mask / 3)


# ------------------------------------------------------------------------------------------------ one update


@given(st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9)), min_size=1, max_size=12), st.integers(1, 60))
def test_micro_batches_lose_nothing_and_fit(lengths, budget):
    """Prevents trajectories left out or trained twice, and a batch that does not fit into memory."""
    items = [Trajectory(None, [0] * p, [0] * c, [], None, 0, "") for p, c in lengths]
    groups = micro_batches(items, budget)
    assert sorted(id(t) for group in groups for t in group) == sorted(map(id, items))
    for group in groups:
        widths = [len(t.prompt) + len(t.completion) for t in group]
        assert len(group) * max(widths) - sum(widths) <= 0.1 * len(group) * max(widths)  # padding
        assert len(group) == 1 or max(widths) * len(group) <= budget


@pytest.mark.parametrize("fixed", [False, True], ids=["critic", "group"])
@pytest.mark.parametrize("normalize", ["sequence", "token"])
@pytest.mark.parametrize("loss", ["cispo", "ppo"])
def test_the_loss_is_the_documented_one_token_by_token(moved, problems, loss, normalize, fixed):
    """Prevents a ratio of recomputed log-probabilities (always 1), a setting that is left out, a reference that moves
    and a mean over the wrong tokens."""
    config = Config(
        loss=loss, normalize=normalize, temperature=0.7, value_coefficient=0.5, kl_coefficient=0.3, clip_high=1.5,
        clip_ppo=0.1, gae_lambda=0.9,
    )  # fmt: skip
    items, rng = trajectories(moved, problems, config.temperature), np.random.default_rng(0)
    tokens, expected, ratios = sum(len(t.completion) for t in items), 0.0, 0.0
    for i, t in enumerate(items):
        t.logprobs = [x + rng.normal() for x in t.logprobs]  # as if older weights had sampled it
        t.advantages = [i - 3.0 + j for j in range(len(t.completion))] if fixed else None
        batch = moved.batch([t.prompt], [t.completion])
        now, values, _ = (x[0].tolist() for x in moved.logprobs_and_values(batch, config.temperature))
        reference = moved.reference_logprobs(batch, config.temperature)[0].tolist()
        deltas = [after - value for value, after in zip(values, [*values[1:], t.reward.value])]
        for j, (logp, old, ref) in enumerate(zip(now, t.logprobs, reference, strict=True)):
            estimate = sum(0.9**k * delta for k, delta in enumerate(deltas[j:]))
            ratio, advantage = math.exp(logp - old), t.advantages[j] if fixed else estimate
            if loss == "cispo":
                part = -min(ratio, 1.5) * advantage * logp
            else:
                part = -min(ratio * advantage, min(max(ratio, 0.9), 1.1) * advantage)
            part += 0.0 if fixed else 0.5 * estimate**2  # V's target is V + A
            part += 0.3 * (math.exp(ref - logp) - (ref - logp) - 1)
            weight = 1 / tokens if normalize == "token" else 1 / len(now) / len(items)
            expected, ratios = expected + weight * part, ratios + weight * ratio
    losses = [batch_loss(moved, group, config, items) for group in micro_batches(items, 60)]
    assert len(losses) > 2
    assert sum(total.item() for total, _ in losses) == pytest.approx(expected, abs=1e-4)
    assert sum(means["ratio"].item() for _, means in losses) == pytest.approx(ratios, abs=1e-4)


def test_gradients_do_not_depend_on_the_size_of_micro_batches(moved, problems):
    """Prevents results that change with the memory of a machine."""
    items, found = trajectories(moved, problems), []
    for tokens in (1, 60, 10_000):
        config = Config(micro_batch_tokens=tokens, clip_gradient=1e9)
        means = update(moved, make_optimizer(moved, config), items, config)  # its rate is 0: nothing moves
        assert means.pop("micro_tokens") == tokens
        found.append(gradients_of(moved) | {name: torch.tensor(mean) for name, mean in means.items()})
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
        t.advantages = [t.reward.value] * len(t.completion)
    before = trained(moved)
    means = update(moved, optimizer_of(moved, config), items, config)
    moves = {name: not torch.equal(before[name], p) for name, p in moved.named_parameters() if name in before}
    assert "value_loss" not in means
    assert all(p.grad is None for p in moved.value_head.parameters())  # it was not run
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


def test_the_gradients_of_model_and_critic_are_clipped_apart(moved, problems):
    """Prevents a clip that is not applied, a report of the clipped norm, and a critic that is far off shortening the
    policy's step."""
    items, found = trajectories(moved, problems), []
    for value_coefficient in (1.0, 1e6):
        config = Config(clip_gradient=1e-3, value_coefficient=value_coefficient)
        means = update(moved, make_optimizer(moved, config), items, config)
        found.append([p.grad.clone() for p in moved.lm.parameters() if p.grad is not None])
        for part, name in (moved.lm, "gradient_norm"), (moved.value_head, "value_gradient_norm"):
            clipped = torch.stack([p.grad.norm() for p in part.parameters() if p.grad is not None]).norm().item()
            assert means[name] > 1e-2 and clipped == pytest.approx(1e-3, rel=1e-2)
    assert_close(*found)


# ------------------------------------------------------------------------------------------------ the critic alone


def for_the_critic(items, *places):
    for i in places:
        items[i].critic_only = True
    return items


@pytest.mark.parametrize("normalize", ["sequence", "token"])
def test_what_teaches_the_critic_alone_does_not_thin_out_the_rest(moved, problems, normalize):
    """Prevents a wrong answer's KL or advantage from moving the policy, and from counting in its averages; the critic
    learns from all of them."""
    config, found = Config(clip_gradient=1e9, normalize=normalize, value_coefficient=0.5), []
    items = for_the_critic(trajectories(moved, problems), 1, 3)
    for some in (items, [t for t in items if not t.critic_only]):
        means = update(moved, make_optimizer(moved, config), some, config)
        found.append((gradients_of(moved), {key: mean for key, mean in means.items() if "value" not in key}, means))
    (both, seen, whole), (alone, seen_alone, part) = found
    assert_close(seen, seen_alone, atol=1e-5, rtol=1e-4)
    heads = {name for name in both if name.startswith("value_head")}
    assert_close({n: both[n] for n in both if n not in heads}, {n: alone[n] for n in both if n not in heads})
    assert abs(whole["value_loss"] - part["value_loss"]) > 1e-3

    lengths, errors = [len(t.completion) for t in items], []
    for t in items:
        values = moved.logprobs_and_values(moved.batch([t.prompt], [t.completion]))[1][0]
        errors.append((values - t.reward.value) ** 2)
    expected = sum(e.mean() for e in errors) / len(items)
    if normalize == "token":
        expected = sum(e.sum() for e in errors) / sum(lengths)
    assert whole["value_loss"] == pytest.approx(expected.item(), abs=1e-5)
    weights = {name: p for name, p in moved.named_parameters() if name in heads}
    gradients = torch.autograd.grad(config.value_coefficient * expected, list(weights.values()))
    assert_close({n: both[n] for n in weights}, dict(zip(weights, gradients)), atol=1e-5, rtol=1e-3)


@pytest.mark.parametrize("kind", ["critic", "group"])
def test_a_step_without_a_right_answer_moves_no_weight_of_the_model(moved, problems, kind):
    """Prevents Adam's momentum from going on where nothing is taught, and figures of 0 that were not measured. A
    group's wrong answers teach nobody and are not even run."""
    items, config = trajectories(moved, problems), Config()
    for t in items:
        t.advantages = [0.5] * len(t.completion) if kind == "group" else None
    optimizer = optimizer_of(moved, config)
    update(moved, optimizer, items, config)
    before = trained(moved)
    means = update(moved, optimizer, for_the_critic(items, *range(len(items))), config)
    changed = {name for name, weight in trained(moved).items() if not torch.equal(weight, before[name])}
    assert changed == ({name for name in before if name.startswith("value_head")} if kind == "critic" else set())
    assert not {"kl", "entropy", "ratio", "disagreement_mean", "gradient_norm"} & set(means)
    assert ("value_loss" in means) == (kind == "critic") and moved.version == 2


def test_the_value_loss_of_a_wrong_answer_reaches_the_backbone_where_asked(moved, problems):
    """Prevents an option, the post's, that right answers alone would get."""
    items, norms = for_the_critic(trajectories(moved, problems), *range(8)), []
    for value_gradient in (False, True):
        config = Config(value_gradient=value_gradient)
        norms.append(update(moved, make_optimizer(moved, config), items, config).get("gradient_norm"))
    assert norms[0] is None and norms[1] > 0


def test_trajectories_of_two_kinds_in_a_step_are_refused(moved, problems):
    """Prevents a collector of one's own whose fixed advantages are ignored."""
    items = trajectories(moved, problems)
    items[0].advantages = [1.0] * len(items[0].completion)
    with pytest.raises(ValueError, match="must all have advantages, or none"):
        update(moved, make_optimizer(moved, Config()), items, Config())


# ------------------------------------------------------------------------------------------------ old log-probabilities


@pytest.mark.parametrize("loss", ["cispo", "ppo"])
@pytest.mark.parametrize("old_logprobs", ["recorded", "recomputed", "truncated"])
def test_each_kind_of_old_logprobs_is_its_formula(moved, problems, old_logprobs, loss):
    """Prevents a ratio or a weight other than the documented one, and a gradient through either. In the first inner
    step recomputed ones give a ratio of 1; truncated ones also weigh a token by min(pi / pi_sampler, cap), as TRL's
    vllm_importance_sampling_mode="token_truncate" does."""
    config = Config(
        loss=loss, old_logprobs=old_logprobs, importance_cap=1.3, temperature=0.7, normalize="token",
        kl_coefficient=0.0, value_coefficient=0.0, clip_gradient=1e9,
    )  # fmt: skip
    items = trajectories(moved, problems, config.temperature)
    perturb(items)
    tokens, expected, weights = sum(len(t.completion) for t in items), 0.0, []
    for t in items:
        now, values, _ = moved.logprobs_and_values(moved.batch([t.prompt], [t.completion]), config.temperature)
        sampler, advantage = torch.tensor([t.logprobs]), t.reward.value - values.detach()
        old_per_token_logps = sampler if old_logprobs == "recorded" else now.detach()
        coef_1 = torch.exp(now - old_per_token_logps)
        if loss == "cispo":
            part = -torch.clamp(coef_1, max=5.0).detach() * advantage * now
        else:
            part = -torch.min(coef_1 * advantage, torch.clamp(coef_1, 0.8, 1.2) * advantage)
        if old_logprobs == "truncated":
            weight = torch.clamp(torch.exp(old_per_token_logps - sampler), max=1.3)
            part, weights = part * weight, weights + weight[0].tolist()
        expected = expected + part.sum() / tokens
    expected.backward()
    wanted = gradients_of(moved)
    found = update(moved, make_optimizer(moved, config), items, config)
    assert found["policy_loss"] == pytest.approx(expected.item(), abs=1e-5)
    assert_close({name: p for name, p in gradients_of(moved).items() if name in wanted}, wanted, atol=1e-6, rtol=1e-3)
    if old_logprobs == "recorded":
        assert abs(found["ratio"] - 1) > 0.01
    else:
        assert found["ratio"] == pytest.approx(1, abs=1e-6)
    if weights:
        assert max(weights) == pytest.approx(1.3) and min(weights) < 0.8


def test_all_kinds_of_old_logprobs_agree_where_sampler_and_trainer_do(moved, problems):
    """Prevents an option that changes results on one engine, where there is nothing to correct."""
    found = []
    for old_logprobs in ("recorded", "recomputed", "truncated"):
        config = Config(old_logprobs=old_logprobs, temperature=0.7, clip_gradient=1e9)
        update(moved, make_optimizer(moved, config), trajectories(moved, problems, 0.7), config)
        found.append(gradients_of(moved))
    assert_close(found[1], found[0], atol=1e-5, rtol=1e-3)
    assert_close(found[2], found[0], atol=1e-5, rtol=1e-3)


@pytest.mark.parametrize("old_logprobs", ["recomputed", "truncated"])
def test_recomputed_logprobs_stay_those_from_before_the_update(moved, problems, old_logprobs):
    """Prevents old log-probabilities that follow the weights from one inner step to the next (a clip that is never
    reached), and those of a neighbour, of the prompt or of padding."""
    items, config = trajectories(moved, problems), Config(old_logprobs=old_logprobs, inner_steps=2)
    with torch.no_grad():
        before = [moved.logprobs_and_values(moved.batch([t.prompt], [t.completion]))[0][0].tolist() for t in items]
    found = update(moved, optimizer_of(moved, config), items, config)
    assert [len(t.trainer_logprobs) for t in items] == list(range(1, 9)) and abs(found["ratio"] - 1) > 1e-3
    assert_close([t.trainer_logprobs for t in items], before, atol=1e-5, rtol=0)


# ------------------------------------------------------------------------------------------------ sampler and trainer


@pytest.mark.parametrize("micro_tokens", [40, 10_000])
@pytest.mark.parametrize("old_logprobs", ["recorded", "truncated"])
def test_disagreement_is_between_sampler_and_trainer_before_the_first_inner_step(
    moved, problems, old_logprobs, micro_tokens
):
    """Prevents a measure that counts padding, forgets a micro-batch, compares the trainer with itself, or takes the
    update's own move for the samplers' difference."""
    items = trajectories(moved, problems)
    noise = np.abs(perturb(items))
    config = Config(old_logprobs=old_logprobs, inner_steps=2, micro_batch_tokens=micro_tokens)
    found = update(moved, optimizer_of(moved, config), items, config)
    assert len(micro_batches(items, micro_tokens)) == (4 if micro_tokens == 40 else 3)
    assert found["disagreement_mean"] == pytest.approx(noise.mean(), abs=1e-4)
    assert found["disagreement_max"] == pytest.approx(noise.max(), abs=1e-4)
    assert abs(found["ratio"] - 1) > 1e-3  # the second inner step's


@pytest.mark.parametrize(("bound", "warns"), [(0.2, True), (0.6, False)])
def test_a_large_disagreement_is_told(moved, problems, capsys, bound, warns):
    """Prevents training on samples of another policy that nobody notices, and a warning at every step."""
    items, config = trajectories(moved, problems), Config(max_disagreement=bound)
    for t in items:
        t.logprobs = [x - 0.4 for x in t.logprobs]
    update(moved, make_optimizer(moved, config), items, config)
    told = capsys.readouterr().out
    assert ("warning: sampler and trainer differ by 0.400 nats a token" in told) == warns
    assert (told.count("\n"), "--old-logprobs truncated" in told) == (int(warns), warns)


def test_log_probabilities_that_are_no_numbers_are_told_where_the_loss_does_without_them(moved, problems, capsys):
    """Prevents a comparison with NaN that is never true."""
    items, config = trajectories(moved, problems), Config(old_logprobs="recomputed")
    for t in items:
        t.logprobs = [math.nan] * len(t.logprobs)
    update(moved, make_optimizer(moved, config), items, config)
    assert "warning: sampler and trainer differ by nan nats" in capsys.readouterr().out


def test_the_kl_of_padding_and_prompts_is_not_counted(moved, problems, monkeypatch):
    """Prevents 0 · inf where the policy and its reference are far apart on a token that nobody teaches."""
    group, config, plain = trajectories(moved, problems), Config(), moved.reference_logprobs

    def far_apart(batch, temperature):
        return plain(batch, temperature) + 999 * ~batch.completion.bool()

    expected, _ = batch_loss(moved, group, config, group)
    monkeypatch.setattr(moved, "reference_logprobs", far_apart)
    found, means = batch_loss(moved, group, config, group)
    assert found.item() == pytest.approx(expected.item()) and math.isfinite(means["kl"])


# ------------------------------------------------------------------------------------------------ memory


@pytest.fixture
def small_gpu(monkeypatch):
    """small_gpu(tokens): a micro-batch of more, padding included, does not fit; the first one of all does."""

    def limit(tokens):
        sizes = []

        def batch_loss_on_a_small_gpu(policy, group, *rest):
            sizes.append(max(len(t.prompt) + len(t.completion) for t in group) * len(group))
            if sizes[-1] > tokens and len(sizes) > 1:
                raise torch.OutOfMemoryError("CUDA out of memory.")
            return batch_loss(policy, group, *rest)

        monkeypatch.setattr(learner, "batch_loss", batch_loss_on_a_small_gpu)
        return sizes

    return limit


@pytest.mark.parametrize(("asked", "used"), [(40, 20), (30, 18)], ids=["half", "longest"])
def test_out_of_memory_halves_the_micro_batch_and_changes_no_gradient(moved, problems, small_gpu, capsys, asked, used):
    """Prevents a run of hours that ends for a long sample, a gradient counted twice, a size that is not remembered, and
    a half too small for the longest trajectory."""
    items, config = trajectories(moved, problems), Config(clip_gradient=1e9)
    assert max(len(t.prompt) + len(t.completion) for t in items) == 18
    found = [update(moved, make_optimizer(moved, config), items, config, 18)]
    undisturbed = gradients_of(moved)
    sizes = small_gpu(used)
    found.append(update(moved, make_optimizer(moved, config), items, config, asked))
    assert any(size > used for size in sizes[1:])  # the first one's gradient was there already
    assert found[1].pop("micro_tokens") == used and found[0].pop("micro_tokens") == 18
    assert_close(found[1], found[0], atol=1e-5, rtol=1e-3)
    assert_close(gradients_of(moved), undisturbed, atol=1e-6, rtol=1e-3)
    assert capsys.readouterr().out == f"warning: out of GPU memory with {asked} tokens in a micro-batch\n"
    assert moved.version == 2


@pytest.mark.parametrize(("asked", "tried", "passes"), [(44, 22, 3), (10, 10, 2)], ids=["half", "no less"])
def test_what_never_fits_is_told_in_one_line(moved, problems, small_gpu, asked, tried, passes):
    """Prevents a traceback of CUDA, an endless retry, one with as many tokens as before or more, and half an update."""
    before, config, sizes = trained(moved), Config(), small_gpu(0)
    with pytest.raises(ValueError, match="--quantize nf4, --gradient-checkpointing or a smaller --max-tokens") as error:
        update(moved, optimizer_of(moved, config), trajectories(moved, problems), config, asked)
    assert "\n" not in str(error.value) and f"with {tried} tokens" in str(error.value) and len(sizes) == passes
    assert_close(trained(moved), before, atol=0, rtol=0)


def test_the_8_bit_optimizer_keeps_large_states_in_bytes_and_still_updates(moved, problems):
    """Prevents an option that is read and dropped, weight decay, and weights that are left out. Parameters of fewer
    than 4,096 elements keep an fp32 state (bitsandbytes)."""
    config = Config(optimizer="paged-adamw8bit")
    optimizer, before, items = optimizer_of(moved, config), trained(moved), trajectories(moved, problems)
    update(moved, optimizer, items, config)
    after = trained(moved)
    assert all(0 < (after[name] - before[name]).abs().max() < 2e-3 for name in before)  # Adam's first step: the rate
    kept = {(p.numel() >= 4096, state["state1"].dtype) for p, state in optimizer.state.items()}
    assert kept == {(False, torch.float32), (True, torch.uint8)}
    assert [group["peak"] for group in optimizer.param_groups] == [config.learning_rate, config.value_learning_rate]
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0, 0]


def test_one_update_a_step_makes_grpo_of_cispo(moved, problems):
    """Prevents the study's claim from going wrong, that both are one method here: on the samples' own policy the ratio
    is 1, where both losses have the gradient of -A log pi."""
    items, found = trajectories(moved, problems), []
    for t in items:
        t.advantages = [t.reward.value] * len(t.completion)
    for loss in ("cispo", "ppo"):
        moved.zero_grad()
        batch_loss(moved, items, Config(loss=loss), items)[0].backward()
        found.append(gradients_of(moved))
    assert_close(*found, rtol=1e-3, atol=1e-6)
