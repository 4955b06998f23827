"""Tests of the losses and of `update` in ppo.py: losses against values by hand and the expressions of TRL, updates of a
random model against sums over single tokens."""

import copy
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

import ppo
from config import Config, CriticConfig, LearningConfig, MachineConfig
from countdown import Reward
from ppo import (
    batch_loss,
    cispo_loss,
    gae,
    kl_k3,
    make_batch,
    make_batches,
    make_optimizer,
    ppo_loss,
    teaches_policy,
    token_weights,
    update,
)
from runtime.loading import load_policy
from runtime.micro_batches import MicroBatches
from runtime.torch_sampler import TorchSampler
from sampling import SamplingParams, Trajectory, complete

UNIT = st.floats(-1, 1, width=32)
LOGPROBS = st.floats(-6, 0, width=32)
ROWS = st.lists(st.tuples(st.lists(UNIT, min_size=1, max_size=5), UNIT), min_size=1, max_size=4)  # values, reward
TOKENS = st.lists(st.tuples(LOGPROBS, LOGPROBS, UNIT), min_size=1, max_size=8)  # log pi, recorded log pi, advantage


def right_aligned(rows):
    width = max(map(len, rows))
    return torch.tensor([[0.0] * (width - len(row)) + list(row) for row in rows])


def settings(**changes) -> LearningConfig:
    """Settings of learning under which the wrong answers of these tests teach the policy too."""
    return LearningConfig(**(dict(failures=True) | changes))


def optimizer_for(policy, learning, rate=1e-3, **machine):
    """An optimiser that moves model and value head at the same rate; at rate 0 an update leaves gradients alone."""
    optimizer = make_optimizer(policy, Config(learning=learning, machine=MachineConfig(**machine)))
    for group in optimizer.param_groups:
        group["lr"] = rate
    return optimizer


def trajectories(policy, problems, temperature=1.0):
    """Eight trajectories of 1 to 8 tokens that the policy has just sampled, with rewards of both signs."""
    params = SamplingParams(2, 8, temperature)
    rows, _ = complete(policy, TorchSampler(policy), problems, [1, 2, 3, 4], params, policy.grade)
    items = [t for row in rows for t in row]
    for i, t in enumerate(items):
        t.completion, t.logprobs = t.completion[: i + 1], t.logprobs[: i + 1]
        t.reward = Reward(round(math.cos(i), 2), False, True, "made up")
    return items


def logprobs_of(policy, trajectory, temperature=1.0):
    """log pi(a_t | s_t) of one trajectory alone, which needs no padding. [T]"""
    batch = policy.batch([trajectory.prompt], [trajectory.completion])
    return policy.logprobs(*policy.states(batch), temperature)[0][0]


def values_of(policy, trajectory):
    """V(s_t) of one trajectory alone. The value loss does not reach the model. [T]"""
    hidden, _ = policy.states(policy.batch([trajectory.prompt], [trajectory.completion]))
    return policy.value_head(hidden.detach())[0]


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
    items = [Trajectory(None, [0] * p, [0] * c, [], None) for p, c in lengths]
    groups = MicroBatches(budget).cut(items)
    assert sorted(id(t) for group in groups for t in group) == sorted(map(id, items))
    for group in groups:
        widths = [t.length for t in group]
        assert len(group) * max(widths) - sum(widths) <= 0.1 * len(group) * max(widths)  # padding
        assert len(group) == 1 or max(widths) * len(group) <= budget


@pytest.mark.parametrize("fixed", [False, True], ids=["critic", "group"])
@pytest.mark.parametrize("normalize", ["sequence", "token"])
@pytest.mark.parametrize("loss", ["cispo", "ppo"])
def test_the_loss_is_the_documented_one_token_by_token(moved, problems, loss, normalize, fixed):
    """Prevents a ratio of recomputed log-probabilities (always 1), a setting that is left out, a reference that moves
    and a mean over the wrong tokens."""
    learning = settings(
        loss=loss, normalize=normalize, temperature=0.7, kl_coefficient=0.3, clip=1.5 if loss == "cispo" else 0.1
    )
    items, rng = trajectories(moved, problems, learning.temperature), np.random.default_rng(0)
    tokens, expected, ratios = sum(len(t.completion) for t in items), 0.0, 0.0
    for i, t in enumerate(items):
        t.logprobs = [x + rng.normal() for x in t.logprobs]  # as if older weights had sampled it
        t.advantages = [i - 3.0 + j for j in range(len(t.completion))] if fixed else None
        now, values = logprobs_of(moved, t, learning.temperature).tolist(), values_of(moved, t).tolist()
        batch = moved.batch([t.prompt], [t.completion])
        reference = moved.reference_logprobs(batch, learning.temperature)[0].tolist()
        for j, (logp, old, ref) in enumerate(zip(now, t.logprobs, reference, strict=True)):
            error = t.reward.value - values[j]  # R - V(s_t)
            ratio, advantage = math.exp(logp - old), t.advantages[j] if fixed else error
            if loss == "cispo":
                part = -min(ratio, 1.5) * advantage * logp
            else:
                part = -min(ratio * advantage, min(max(ratio, 0.9), 1.1) * advantage)
            part += 0.0 if fixed else error**2
            part += 0.3 * (math.exp(ref - logp) - (ref - logp) - 1)
            weight = 1 / tokens if normalize == "token" else 1 / len(now) / len(items)
            expected, ratios = expected + weight * part, ratios + weight * ratio
    batches = make_batches(moved, items, learning, MicroBatches(60))
    losses = [batch_loss(moved, batch, learning) for batch in batches]
    assert len(losses) > 2
    assert sum(total.item() for total, _ in losses) == pytest.approx(expected, abs=1e-4)
    assert sum(means["ratio"].item() for _, means in losses) == pytest.approx(ratios, abs=1e-4)


def test_gradients_do_not_depend_on_the_size_of_micro_batches(moved, problems):
    """Prevents results that change with the memory of a machine."""
    items, learning, found = trajectories(moved, problems), settings(clip_gradient=1e9), []
    for tokens in (1, 60, 10_000):
        means = update(moved, optimizer_for(moved, learning, 0.0), items, learning, MicroBatches(tokens))
        assert means.pop("micro_tokens") == tokens
        found.append(gradients_of(moved) | {name: torch.tensor(mean) for name, mean in means.items()})
    assert all(gradient.any() for gradient in found[0].values())
    for other in found[1:]:
        assert_close(found[0], other, atol=1e-6, rtol=1e-3)


@pytest.mark.parametrize("tokens", [1, 40, 60])
def test_a_smaller_micro_batch_keeps_the_targets_of_its_tokens(moved, problems, tokens):
    """Prevents targets of a neighbour, of another token or of padding after a micro-batch was cut into pieces."""
    items, learning = trajectories(moved, problems), settings(old_logprobs="recomputed")
    perturb(items)
    whole = make_batch(moved, items, learning, True, [1] * 8, [1] * 8)
    pieces = list(MicroBatches(tokens).pieces([whole]))

    def rows(batch):
        """Of each trajectory its tokens, and the numbers of its completion's tokens."""
        mask = batch.sequences.completion.bool()
        targets = {name: x for name, x in vars(batch).items() if isinstance(x, torch.Tensor)}
        for i, attention in enumerate(batch.sequences.attention.bool()):
            yield batch.sequences.ids[i][attention].tolist(), {name: x[i][mask[i]] for name, x in targets.items()}

    assert len(pieces) > 1 and list(MicroBatches().pieces([whole])) == [whole]
    found = [row for piece in pieces for row in rows(piece)]
    assert [ids for ids, _ in found] == [t.prompt + t.completion for t in items]
    for (_, numbers), (_, expected) in zip(found, rows(whole), strict=True):
        assert len(numbers) == 7
        assert_close(numbers, expected, atol=0, rtol=0)
    for piece in pieces:
        assert piece.sequences.ids.shape[0] == 1 or piece.sequences.ids.numel() <= tokens
        assert piece.sequences.attention[:, 0].any() and piece.sequences.completion[:, 0].any()  # no column of padding
        assert (piece.teaches_policy, piece.teaches_critic, piece.policy_tokens) == (True, True, 8)


def test_the_advantage_carries_no_gradient(moved, problems):
    """Prevents a critic that is trained to make the policy loss small instead of to predict the reward."""
    items, learning = trajectories(moved, problems), settings(critic=None)
    update(moved, optimizer_for(moved, learning, 0.0), items, learning)
    assert not any(p.grad is not None and p.grad.any() for p in moved.value_head.parameters())
    (batch,) = make_batches(moved, items[:1], settings(), MicroBatches())
    assert batch.advantage.any() and not any(getattr(x, "requires_grad", False) for x in vars(batch).values())


@pytest.mark.parametrize("rank", [0, 4])
def test_two_updates_move_every_trained_weight_and_nothing_else(checkpoint, problems, rank):
    """Prevents a layer, an adapter or a value head outside of the optimiser, and a reference inside. The first update
    reaches only what is next to the zeros that value head and adapters start with."""
    policy, learning = load_policy(checkpoint, lora_rank=rank), settings()
    before, items = trained(policy), trajectories(policy, problems)
    frozen = {name: p.clone() for name, p in policy.named_parameters() if not p.requires_grad}
    optimizer = optimizer_for(policy, learning)
    for _ in range(2):
        update(policy, optimizer, items, learning)
    after = dict(policy.named_parameters())
    assert [name for name in before if torch.equal(before[name], after[name])] == []
    assert frozen and all(torch.equal(frozen[name], after[name]) for name in frozen)
    assert policy.version == 2


@pytest.mark.parametrize("kind", ["adamw", "paged-adamw8bit"])
def test_a_new_optimiser_has_the_rates_of_the_settings(moved, problems, kind):
    """Prevents a loop of one's own, without a schedule, that trains at rate 0."""
    learning, before = settings(learning_rate=0.25, critic=CriticConfig(0.5)), trained(moved)
    config = Config(learning=learning, machine=MachineConfig(optimizer=kind))
    optimizer = make_optimizer(moved, config)
    assert [(group["lr"], group["initial_lr"]) for group in optimizer.param_groups] == [(0.25, 0.25), (0.5, 0.5)]
    optimizer = make_optimizer(moved, config.change(learning_rate=1e-3, value_learning_rate=1e-2))
    update(moved, optimizer, trajectories(moved, problems), learning)
    moves = {name: (weight - before[name]).abs().max().item() for name, weight in trained(moved).items()}
    for name, move in moves.items():  # AdamW's first step is as long as its rate
        assert move == pytest.approx(1e-2 if name.startswith("value_head") else 1e-3, rel=0.05)


def test_group_methods_leave_the_critic_alone(moved, problems):
    """Prevents a value loss on rewards whose advantage is fixed, and compute that is not the method's."""
    items, learning = trajectories(moved, problems), settings()
    for t in items:
        t.advantages = [t.reward.value] * len(t.completion)
    before = trained(moved)
    means = update(moved, optimizer_for(moved, learning), items, learning)
    moves = {name: not torch.equal(before[name], p) for name, p in moved.named_parameters() if name in before}
    assert "value_loss" not in means
    assert all(p.grad is None for p in moved.value_head.parameters())  # it was not run
    assert not any(moves[name] for name in moves if name.startswith("value_head"))
    assert all(moves[name] for name in moves if not name.startswith("value_head"))


def test_without_settings_of_a_critic_none_is_trained(moved, problems):
    """Prevents the value head of a method without a critic from moving, in a loss or in the optimiser."""
    learning, before = settings(critic=None), trained(moved)
    optimizer = optimizer_for(moved, learning)
    means = update(moved, optimizer, trajectories(moved, problems), learning)
    after = trained(moved)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {name for name in before if not name.startswith("value_head")}
    assert len(optimizer.param_groups) == 1 and not {"value_loss", "value_gradient_norm"} & means.keys()


@pytest.mark.parametrize("loss", ["cispo", "ppo"])
def test_updates_favour_what_was_better_than_expected(moved, problems, loss):
    """Prevents a policy that is trained away from its rewards, and a critic that does not approach them."""
    items = trajectories(moved, problems)[-2:]
    items[0].reward, items[1].reward = Reward(1.0, True, True, ""), Reward(-1.0, False, True, "")
    batch = moved.batch([t.prompt for t in items], [t.completion for t in items])
    learning = settings(loss=loss, clip=5.0 if loss == "cispo" else 0.2, kl_coefficient=0.0)
    optimizer = optimizer_for(moved, learning, 1e-4)

    def state():
        with torch.no_grad():
            hidden, tokens = moved.states(batch)
            logprobs, values = moved.logprobs(hidden, tokens, 1.0)[0], moved.value_head(hidden)
        sums = (logprobs * batch.completion).sum(1)
        return *sums.tolist(), ((values - torch.tensor([[1.0], [-1.0]])) ** 2 * batch.completion).sum().item()

    before = state()
    for _ in range(3):
        update(moved, optimizer, items, learning)
    after = state()
    assert after[0] > before[0] and after[1] < before[1] and after[2] < before[2]


def test_inner_steps_leave_the_sampling_policy_and_are_one_version(moved, problems):
    """Prevents old log-probabilities that follow the weights: the ratio is 1 in the first pass, not in the third."""
    items = trajectories(moved, problems)
    ratios = []
    for inner_steps in (1, 3):
        learning = settings(inner_steps=inner_steps)
        ratios.append(update(moved, optimizer_for(moved, learning), items, learning)["ratio"])
    assert ratios[0] == pytest.approx(1, abs=1e-5) and abs(ratios[1] - 1) > 1e-3
    assert moved.version == 2


@pytest.mark.parametrize("old_logprobs", ["recorded", "truncated"])
def test_the_second_inner_step_has_the_targets_of_the_first(moved, problems, old_logprobs):
    """Prevents advantages, returns and old log-probabilities that follow the weights from one inner step to the next,
    which would be another loss than PPO's."""
    learning, items = settings(old_logprobs=old_logprobs, critic=CriticConfig(value_gradient=True)), []
    items = trajectories(moved, problems)
    perturb(items)
    batches, twin = make_batches(moved, items, learning, MicroBatches()), copy.deepcopy(moved)
    found = update(moved, optimizer_for(moved, learning, 1e-2), items, replace(learning, inner_steps=2))
    update(twin, optimizer_for(twin, learning, 1e-2), items, learning)  # the weights between the two
    later = make_batches(twin, items, learning, MicroBatches())

    def policy_loss(batches):
        return sum(batch_loss(twin, batch, learning)[1]["policy_loss"].item() for batch in batches)

    assert found["policy_loss"] == pytest.approx(policy_loss(batches), abs=1e-5)
    for name in ("advantage", "old") if old_logprobs == "truncated" else ("advantage",):
        with_later = [replace(now, **{name: getattr(then, name)}) for now, then in zip(batches, later, strict=True)]
        assert abs(policy_loss(with_later) - found["policy_loss"]) > 1e-3


def test_a_step_without_trajectories_is_an_update_too(moved):
    """Prevents a version that falls behind the step, so that a resumed run or a generator reads another one."""
    before, learning = trained(moved), settings()
    assert update(moved, optimizer_for(moved, learning), [], learning) == {}
    assert moved.version == 1
    assert_close(trained(moved), before, atol=0, rtol=0)


def test_the_gradients_of_model_and_critic_are_clipped_apart(moved, problems):
    """Prevents a clip that is not applied, a report of the clipped norm, and a critic that is far off shortening the
    policy's step."""
    items, found, learning = trajectories(moved, problems), [], settings(clip_gradient=1e-3)
    for error in (1.0, 1e6):
        for t in items:
            t.returns = [error] * len(t.completion)
        means = update(moved, optimizer_for(moved, learning, 0.0), items, learning)
        found.append([p.grad.clone() for p in moved.lm.parameters() if p.grad is not None])
        for part, name in (moved.lm, "gradient_norm"), (moved.value_head, "value_gradient_norm"):
            clipped = torch.stack([p.grad.norm() for p in part.parameters() if p.grad is not None]).norm().item()
            assert means[name] > 1e-2 and clipped == pytest.approx(1e-3, rel=1e-2)
    assert means["value_gradient_norm"] > 1e4
    assert_close(*found)


# ------------------------------------------------------------------------------------------------ who teaches


def for_the_critic(items, *places):
    """The trajectories, those at `places` for the critic alone."""
    for i in places:
        items[i].critic_only = True
    return items


def wrong(items, *places):
    """The trajectories, all right but those at `places`; their values stay."""
    for i, t in enumerate(items):
        t.reward = replace(t.reward, correct=i not in places)
    return items


@pytest.mark.parametrize(
    ("correct", "critic_only", "failures", "teaches"),
    [
        (True, False, False, True),
        (False, False, False, False),
        (False, False, True, True),
        (True, True, True, False),
        (False, True, True, False),
    ],
)
def test_right_answers_teach_the_policy_and_wrong_ones_where_asked(correct, critic_only, failures, teaches):
    """Prevents a rule about who teaches that depends on the caller."""
    item = Trajectory(None, [], [], [], Reward(0.0, correct, True, ""), critic_only=critic_only)
    assert teaches_policy(item, LearningConfig(failures=failures)) == teaches


@pytest.mark.parametrize("mark", [for_the_critic, wrong])
@pytest.mark.parametrize("normalize", ["sequence", "token"])
def test_what_teaches_the_critic_alone_does_not_thin_out_the_rest(moved, problems, normalize, mark):
    """Prevents a wrong answer's KL or advantage from moving the policy, and from counting in its averages; the critic
    learns from all of them."""
    learning, found = settings(clip_gradient=1e9, normalize=normalize, failures=mark is not wrong), []
    items = mark(trajectories(moved, problems), 1, 3)
    taught = [t for t in items if teaches_policy(t, learning)]
    assert len(taught) == 6
    for some in (items, taught):
        means = update(moved, optimizer_for(moved, learning, 0.0), some, learning)
        found.append((gradients_of(moved), {key: mean for key, mean in means.items() if "value" not in key}, means))
    (both, seen, whole), (alone, seen_alone, part) = found
    assert_close(seen, seen_alone, atol=1e-5, rtol=1e-4)
    heads = {name for name in both if name.startswith("value_head")}
    assert_close({n: both[n] for n in both if n not in heads}, {n: alone[n] for n in both if n not in heads})
    assert abs(whole["value_loss"] - part["value_loss"]) > 1e-3

    lengths, errors = [len(t.completion) for t in items], []
    for t in items:
        errors.append((values_of(moved, t) - t.reward.value) ** 2)
    expected = sum(e.mean() for e in errors) / len(items)
    if normalize == "token":
        expected = sum(e.sum() for e in errors) / sum(lengths)
    assert whole["value_loss"] == pytest.approx(expected.item(), abs=1e-5)
    weights = {name: p for name, p in moved.named_parameters() if name in heads}
    gradients = torch.autograd.grad(expected, list(weights.values()))
    assert_close({n: both[n] for n in weights}, dict(zip(weights, gradients)), atol=1e-5, rtol=1e-3)


@pytest.mark.parametrize("mark", [for_the_critic, wrong])
@pytest.mark.parametrize("kind", ["critic", "group"])
def test_a_step_without_a_right_answer_moves_no_weight_of_the_model(moved, problems, kind, mark):
    """Prevents Adam's momentum from going on where nothing is taught, and figures of 0 that were not measured. A
    group's wrong answers teach nobody and are not even run."""
    items, learning = trajectories(moved, problems), settings()
    for t in items:
        t.advantages = [0.5] * len(t.completion) if kind == "group" else None
    optimizer = optimizer_for(moved, learning)
    update(moved, optimizer, items, learning)
    before = trained(moved)
    means = update(moved, optimizer, mark(items, *range(len(items))), replace(learning, failures=mark is not wrong))
    changed = {name for name, weight in trained(moved).items() if not torch.equal(weight, before[name])}
    assert changed == ({name for name in before if name.startswith("value_head")} if kind == "critic" else set())
    assert not {"kl", "entropy", "ratio", "disagreement_mean", "gradient_norm"} & set(means)
    assert ("value_loss" in means) == (kind == "critic") and moved.version == 2


@pytest.mark.parametrize("mark", [for_the_critic, wrong])
def test_the_value_loss_of_a_wrong_answer_reaches_the_backbone_where_asked(moved, problems, mark):
    """Prevents an option, the post's, that right answers alone would get."""
    items, norms = mark(trajectories(moved, problems), *range(8)), []
    for value_gradient in (False, True):
        learning = settings(failures=mark is not wrong, critic=CriticConfig(value_gradient=value_gradient))
        norms.append(update(moved, optimizer_for(moved, learning, 0.0), items, learning).get("gradient_norm"))
    assert norms[0] is None and norms[1] > 0


@pytest.mark.parametrize("through", [False, True])
def test_the_value_loss_reaches_the_backbone_only_if_asked(moved, problems, through):
    """Prevents a critic that wrecks a small policy, and an option that does nothing."""
    items, found = trajectories(moved, problems), []
    for critic in None, CriticConfig(value_gradient=through):
        learning = settings(critic=critic, clip_gradient=1e9)
        update(moved, optimizer_for(moved, learning, 0.0), items, learning)
        found.append([p.grad.clone() for p in moved.lm.parameters() if p.grad is not None])
    assert sum(p.grad is not None and p.grad.any().item() for p in moved.value_head.parameters()) == 8
    assert all(torch.allclose(*pair, atol=1e-6) for pair in zip(*found, strict=True)) != through


def test_what_teaches_the_critic_alone_is_not_run_through_the_vocabulary(moved, problems, monkeypatch):
    """Prevents the largest part of a pass for answers that have no use for it."""
    items = for_the_critic(trajectories(moved, problems), *range(8))
    monkeypatch.setattr(moved, "head", lambda *_: pytest.fail("the vocabulary head was run"))
    update(moved, optimizer_for(moved, settings()), items, settings())


@pytest.mark.parametrize("field", ["advantages", "returns"])
def test_trajectories_of_two_kinds_in_a_step_are_refused(moved, problems, field):
    """Prevents a collector of one's own whose fixed advantages are ignored."""
    items = trajectories(moved, problems)
    setattr(items[0], field, [1.0] * len(items[0].completion))
    with pytest.raises(ValueError, match="must all have advantages, or none, and so with returns"):
        update(moved, optimizer_for(moved, settings()), items, settings())


# ------------------------------------------------------------------------------------------------ old log-probabilities


@pytest.mark.parametrize("loss", ["cispo", "ppo"])
@pytest.mark.parametrize("old_logprobs", ["recorded", "recomputed", "truncated"])
def test_each_kind_of_old_logprobs_is_its_formula(moved, problems, monkeypatch, old_logprobs, loss):
    """Prevents a ratio or a weight other than the documented one, and a gradient through either. In the first inner
    step recomputed ones give a ratio of 1; truncated ones also weigh a token by min(pi / pi_sampler, cap), as TRL's
    vllm_importance_sampling_mode="token_truncate" does."""
    monkeypatch.setattr(ppo, "IMPORTANCE_CAP", 1.3)
    learning = settings(
        loss=loss, old_logprobs=old_logprobs, clip=5.0 if loss == "cispo" else 0.2, temperature=0.7, normalize="token",
        kl_coefficient=0.0, critic=None, clip_gradient=1e9,
    )  # fmt: skip
    items = trajectories(moved, problems, learning.temperature)
    perturb(items)
    tokens, expected, weights = sum(len(t.completion) for t in items), 0.0, []
    for t in items:
        now, values = logprobs_of(moved, t, learning.temperature), values_of(moved, t)
        sampler, advantage = torch.tensor(t.logprobs), t.reward.value - values.detach()
        old_per_token_logps = sampler if old_logprobs == "recorded" else now.detach()
        coef_1 = torch.exp(now - old_per_token_logps)
        if loss == "cispo":
            part = -torch.clamp(coef_1, max=5.0).detach() * advantage * now
        else:
            part = -torch.min(coef_1 * advantage, torch.clamp(coef_1, 0.8, 1.2) * advantage)
        if old_logprobs == "truncated":
            weight = torch.clamp(torch.exp(old_per_token_logps - sampler), max=1.3)
            part, weights = part * weight, weights + weight.tolist()
        expected = expected + part.sum() / tokens
    expected.backward()
    wanted = gradients_of(moved)
    found = update(moved, optimizer_for(moved, learning, 0.0), items, learning)
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
        learning = settings(old_logprobs=old_logprobs, temperature=0.7, clip_gradient=1e9)
        update(moved, optimizer_for(moved, learning, 0.0), trajectories(moved, problems, 0.7), learning)
        found.append(gradients_of(moved))
    assert_close(found[1], found[0], atol=1e-5, rtol=1e-3)
    assert_close(found[2], found[0], atol=1e-5, rtol=1e-3)


@pytest.mark.parametrize("old_logprobs", ["recomputed", "truncated"])
def test_recomputed_logprobs_are_those_of_their_tokens_before_the_update(moved, problems, old_logprobs):
    """Prevents old log-probabilities of a neighbour, of the prompt or of padding, and those that follow the weights
    from one inner step to the next (a clip that is never reached)."""
    items, learning = trajectories(moved, problems), settings(old_logprobs=old_logprobs, inner_steps=2)
    perturb(items)
    with torch.no_grad():
        before = [logprobs_of(moved, t) for t in items]
    old = {}
    for batch in make_batches(moved, items, learning, MicroBatches(60)):
        for row, mask in zip(batch.old, batch.sequences.completion.bool(), strict=True):
            old[int(mask.sum())] = row[mask]
            assert not row[~mask].any()
    assert old.keys() == set(range(1, 9))
    assert_close([old[len(t.completion)] for t in items], before, atol=1e-5, rtol=0)
    found = update(moved, optimizer_for(moved, learning), items, learning)
    assert abs(found["ratio"] - 1) > 1e-3


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
    learning, micro = settings(old_logprobs=old_logprobs, inner_steps=2), MicroBatches(micro_tokens)
    found = update(moved, optimizer_for(moved, learning), items, learning, micro)
    assert len(micro.cut(items)) == (4 if micro_tokens == 40 else 3)
    assert found["disagreement_mean"] == pytest.approx(noise.mean(), abs=1e-4)
    assert found["disagreement_max"] == pytest.approx(noise.max(), abs=1e-4)
    assert abs(found["ratio"] - 1) > 1e-3  # the second inner step's


@pytest.mark.parametrize(("bound", "warns"), [(0.2, True), (0.6, False)])
def test_a_large_disagreement_is_told(moved, problems, monkeypatch, capsys, bound, warns):
    """Prevents training on samples of another policy that nobody notices, and a warning at every step."""
    monkeypatch.setattr(ppo, "MAX_DISAGREEMENT", bound)
    items, learning = trajectories(moved, problems), settings()
    for t in items:
        t.logprobs = [x - 0.4 for x in t.logprobs]
    update(moved, optimizer_for(moved, learning, 0.0), items, learning)
    told = capsys.readouterr().out
    assert ("warning: sampler and trainer differ by 0.400 nats a token" in told) == warns
    assert (told.count("\n"), "--old-logprobs truncated" in told) == (int(warns), warns)


def test_log_probabilities_that_are_no_numbers_are_told_where_the_loss_does_without_them(moved, problems, capsys):
    """Prevents a comparison with NaN that is never true."""
    items, learning = trajectories(moved, problems), settings(old_logprobs="recomputed")
    for t in items:
        t.logprobs = [math.nan] * len(t.logprobs)
    update(moved, optimizer_for(moved, learning, 0.0), items, learning)
    assert "warning: sampler and trainer differ by nan nats" in capsys.readouterr().out


def test_the_kl_of_padding_and_prompts_is_not_counted(moved, problems, monkeypatch):
    """Prevents 0 · inf where the policy and its reference are far apart on a token that nobody teaches."""
    items, learning, plain = trajectories(moved, problems), settings(), moved.reference_logprobs

    def loss():
        return batch_loss(moved, make_batch(moved, items, learning, True, [1] * 8, [1] * 8), learning)

    def far_apart(batch, temperature):
        return plain(batch, temperature) + 999 * ~batch.completion.bool()

    expected, _ = loss()
    monkeypatch.setattr(moved, "reference_logprobs", far_apart)
    found, means = loss()
    assert found.item() == pytest.approx(expected.item()) and math.isfinite(means["kl"])


# ------------------------------------------------------------------------------------------------ memory


@pytest.fixture(params=["make_batch", "batch_loss"])
def small_gpu(request, monkeypatch):
    """small_gpu(tokens): a micro-batch of more, padding included, does not fit; the first one of all does. Memory runs
    out while targets are made, or while the loss is."""

    def limit(tokens):
        function, sizes = getattr(ppo, request.param), []

        def on_a_small_gpu(policy, batch, *rest):
            if request.param == "make_batch":
                sizes.append(max(t.length for t in batch) * len(batch))
            else:
                sizes.append(batch.sequences.ids.numel())
            if sizes[-1] > tokens and len(sizes) > 1:
                raise torch.OutOfMemoryError("CUDA out of memory.")
            return function(policy, batch, *rest)

        monkeypatch.setattr(ppo, request.param, on_a_small_gpu)
        return sizes

    return limit


@pytest.mark.parametrize(("asked", "half", "fits"), [(40, 20, 20), (30, 15, 18)], ids=["half", "longest"])
def test_out_of_memory_halves_the_micro_batch_and_changes_no_gradient(
    moved, problems, small_gpu, capsys, asked, half, fits
):
    """Prevents a run of hours that ends for a long sample, a gradient counted twice, a size that is not remembered, and
    a half too small for the longest trajectory."""
    items, learning = trajectories(moved, problems), settings(clip_gradient=1e9)
    assert max(t.length for t in items) == 18
    found = [update(moved, optimizer_for(moved, learning, 0.0), items, learning, MicroBatches(18))]
    undisturbed = gradients_of(moved)
    sizes, micro = small_gpu(fits), MicroBatches(asked)
    found.append(update(moved, optimizer_for(moved, learning, 0.0), items, learning, micro))
    assert any(size > fits for size in sizes[1:])  # the first one's gradient was there already
    assert found[1].pop("micro_tokens") == micro.tokens == half and found[0].pop("micro_tokens") == 18
    assert_close(found[1], found[0], atol=1e-5, rtol=1e-3)
    assert_close(gradients_of(moved), undisturbed, atol=1e-6, rtol=1e-3)
    assert capsys.readouterr().out == f"warning: out of GPU memory with {asked} tokens in a micro-batch\n"
    assert moved.version == 2
    update(moved, optimizer_for(moved, learning, 0.0), items, learning, micro)
    assert capsys.readouterr().out == ""  # the next step begins with what fits


@pytest.mark.parametrize("asked", [44, 10])
def test_what_never_fits_is_told_in_one_line(moved, problems, small_gpu, asked):
    """Prevents a traceback of CUDA, an endless retry, and half an update."""
    before, learning, sizes = trained(moved), settings(), small_gpu(0)
    items = trajectories(moved, problems)
    with pytest.raises(ValueError, match="--quantize nf4, --gradient-checkpointing or a smaller --max-tokens") as error:
        update(moved, optimizer_for(moved, learning), items, learning, MicroBatches(asked))
    assert "\n" not in str(error.value) and f"with {asked // 2} tokens" in str(error.value) and len(sizes) == 3
    assert_close(trained(moved), before, atol=0, rtol=0)
    assert moved.version == 0


def test_the_8_bit_optimizer_keeps_large_states_in_bytes_and_still_updates(moved, problems):
    """Prevents an option that is read and dropped, weight decay, and weights that are left out. Parameters of fewer
    than 4,096 elements keep an fp32 state (bitsandbytes)."""
    learning, before = settings(), trained(moved)
    optimizer, items = optimizer_for(moved, learning, optimizer="paged-adamw8bit"), trajectories(moved, problems)
    update(moved, optimizer, items, learning)
    after = trained(moved)
    assert all(0 < (after[name] - before[name]).abs().max() < 2e-3 for name in before)  # Adam's first step: the rate
    kept = {(p.numel() >= 4096, state["state1"].dtype) for p, state in optimizer.state.items()}
    assert kept == {(False, torch.float32), (True, torch.uint8)}
    rates = [learning.learning_rate, learning.critic.value_learning_rate]
    assert [group["initial_lr"] for group in optimizer.param_groups] == rates
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0, 0]


def test_one_update_a_step_makes_grpo_of_cispo(moved, problems):
    """Prevents the study's claim from going wrong, that both are one method here: on the samples' own policy the ratio
    is 1, where both losses have the gradient of -A log pi."""
    items, found = trajectories(moved, problems), []
    for t in items:
        t.advantages = [t.reward.value] * len(t.completion)
    for learning in settings(), settings(loss="ppo", clip=0.2):
        moved.zero_grad()
        for batch in make_batches(moved, items, learning, MicroBatches()):
            batch_loss(moved, batch, learning)[0].backward()
        found.append(gradients_of(moved))
    assert_close(*found, rtol=1e-3, atol=1e-6)
