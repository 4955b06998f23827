"""The learner: trajectories in, new weights out. The losses are pure functions of [B, T] tensors.

The loss of a trajectory with reward R, averaged over its tokens (the post):
    A_t  = R - V(s_t)                                     advantage, no gradient (GAE with gamma = lambda = 1)
    L    = -min(ratio, 5).detach() * A_t * log pi(a_t)    CISPO (MiniMax 2025, eq. 4), ratio = pi / pi_sampler
         + 1.0 * (V(s_t) - R)^2 + 0.05 * (exp(D) - D - 1) value loss and k3 KL, D = log pi_ref - log pi

Deviations from the post: the ratio uses the log-probabilities recorded while sampling (recomputed ones make it 1, and
the clip inert); trainable weights and optimiser state are fp32; the value loss does not reach the backbone unless
asked; the gradients of model and value head are clipped apart, so that a critic that is far off does not shorten the
policy's step. What teaches the critic alone (wrong answers, with --no-failures) is not run through the vocabulary
head, and moves no weight of the model unless the value loss may. How far sampler and trainer are apart is measured on
what each step teaches the policy.
"""

import math

import torch
from torch import Tensor
from tqdm import tqdm

import ranks
from config import Config
from policy import Batch, Policy, batches
from runs import Stopped
from sampling import Trajectory

# ------------------------------------------------------------------------------------------------ losses


def gae(reward: Tensor, values: Tensor, mask: Tensor, lam: float) -> Tensor:
    """Advantages [B, T] with gamma = 1 and one reward [B] at the end (Schulman et al. 2016, eq. 16).

    delta_t = V(s_t+1) - V(s_t), with R in place of V(s_t+1) at the last token; A_t = sum_k lam^k delta_t+k.
    values, mask: [B, T], the completion at the right end, so that column T - 1 is every row's last token.
    """
    following = torch.cat([values[:, 1:], reward[:, None]], 1)  # [B, T]
    delta = (following - values) * mask
    advantage, running = torch.zeros_like(values), torch.zeros_like(reward)
    for t in reversed(range(values.shape[1])):
        running = delta[:, t] + lam * running
        advantage[:, t] = running
    return advantage * mask


def cispo_loss(logprobs: Tensor, old: Tensor, advantage: Tensor, clip_high: float) -> Tensor:
    """-min(ratio, clip_high).detach() * A * log pi, a token (MiniMax-M1 2025, eq. 4-5). All [B, T]."""
    ratio = (logprobs - old).exp().clamp(max=clip_high).detach()
    return -ratio * advantage * logprobs


def ppo_loss(logprobs: Tensor, old: Tensor, advantage: Tensor, epsilon: float) -> Tensor:
    """-min(ratio A, clip(ratio, 1 - eps, 1 + eps) A), a token (Schulman et al. 2017, eq. 7). All [B, T]."""
    ratio = (logprobs - old).exp()
    return -torch.min(ratio * advantage, ratio.clamp(1 - epsilon, 1 + epsilon) * advantage)


def kl_k3(logprobs: Tensor, reference: Tensor) -> Tensor:
    """exp(D) - D - 1 >= 0 with D = log pi_ref - log pi: Schulman's k3 estimate of KL(pi || pi_ref), a token."""
    difference = reference - logprobs
    return difference.exp() - difference - 1


def token_weights(mask: Tensor, how: str, lengths: list[int]) -> Tensor:
    """Weights [B, T] that make a sum over the tokens of a step, trajectories of these lengths, the average `how` names:
    "sequence" averages over the tokens of a trajectory and then over trajectories, "token" over all tokens alike."""
    if how == "token":
        return mask / max(sum(lengths), 1)
    return mask / mask.sum(1, keepdim=True).clamp(min=1) / max(len(lengths), 1)


# ------------------------------------------------------------------------------------------------ updating

NORMS = ("gradient_norm", "value_gradient_norm")  # of the optimiser's groups: the model's weights, the value head's


def update(
    policy: Policy,
    optimizer: torch.optim.Optimizer,
    trajectories: list[Trajectory],
    config: Config,
    micro_tokens: int = 0,
) -> dict[str, float]:
    """`inner_steps` optimiser steps on the trajectories. Returns the last one's averages, as `config.normalize` names
    them, over what the policy learns from (`value_loss`: the critic); the norms of the gradients; how far the sampler's
    log-probabilities were from the trainer's before the first (`disagreement_mean`, `disagreement_max`); and the tokens
    of a micro-batch (`micro_tokens`; 0: the config's), halved if the GPU's memory ran out. Stopped where loss or
    gradient isn't finite, before that inner step touches weights and optimiser."""
    if len({t.advantages is None for t in trajectories}) > 1 or len({t.returns is None for t in trajectories}) > 1:
        raise ValueError("a step's trajectories must all have advantages, or none, and so with returns")
    micro_tokens, sums = micro_tokens or config.micro_batch_tokens, {}
    if ranks.rank() == 0:  # the others wait for it in `follow_updates`
        ranks.broadcast((trajectories, [group["lr"] for group in optimizer.param_groups], micro_tokens))
    if config.old_logprobs != "recorded":
        recompute(policy, [t for t in trajectories if not t.critic_only], config, micro_tokens)
    trained = [p for group in optimizer.param_groups for p in group["params"]]
    for _ in range(config.inner_steps):
        before = sums
        sums, micro_tokens = gradients_that_fit(policy, optimizer, trajectories, config, micro_tokens)
        sums = ranks.add_up(trained, sums | {"micro_tokens": micro_tokens})
        micro_tokens = sums["micro_tokens"]
        if before:  # the weights have moved since they were sampled from
            sums |= {key: before[key] for key in before if key.startswith("disagreement")}
        for name, group in zip(NORMS, optimizer.param_groups, strict=True):
            if any(parameter.grad is not None for parameter in group["params"]):
                sums[name] = torch.nn.utils.clip_grad_norm_(group["params"], config.clip_gradient).item()
        for name in ("policy_loss", "value_loss", "kl", *NORMS):
            if not math.isfinite(sums.get(name, 0.0)):
                raise Stopped(f"{name} is {sums[name]} in update {policy.version + 1}, which was not made")
        optimizer.step()
    policy.version += 1
    if not sums.get("disagreement_mean", 0.0) <= config.max_disagreement:  # NaN warns too
        tqdm.write(
            f"warning: sampler and trainer differ by {sums['disagreement_mean']:.3f} nats a token (mean, above "
            f"{config.max_disagreement}): see --old-logprobs truncated, or --sampler torch"
        )
    return sums


def follow_updates(policy: Policy, optimizer: torch.optim.Optimizer, config: Config) -> None:
    """What a rank but the first does: the same updates, until the first one ends."""
    ranks.synchronize(policy, optimizer)
    while told := ranks.broadcast():
        trajectories, rates, micro_tokens = told
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate
        update(policy, optimizer, trajectories, config, micro_tokens)


def gradients_that_fit(policy, optimizer, trajectories, config: Config, micro_tokens: int) -> tuple[dict, int]:
    """`gradients`; if the GPU's memory runs out, once more with half the tokens in a micro-batch, but no fewer than
    the longest trajectory has. Returns the size that did it too. ValueError if even that is too much."""
    longest = max(map(length, trajectories))
    for size in dict.fromkeys((micro_tokens, max(micro_tokens // 2, min(micro_tokens, longest)))):
        try:
            return gradients(policy, optimizer, trajectories, config, size), size
        except torch.OutOfMemoryError:
            tqdm.write(f"warning: out of GPU memory with {size} tokens in a micro-batch")
        torch.cuda.empty_cache()  # out of the except block, so that the failed pass is free
    raise ValueError(
        f"out of GPU memory with {size} tokens in a micro-batch: pass --quantize nf4, --gradient-checkpointing or a "
        f"smaller --max-tokens; the last checkpoint is kept"
    )


def gradients(policy: Policy, optimizer, trajectories: list[Trajectory], config: Config, micro_tokens: int) -> dict:
    """Leave in the weights the gradient of the step's loss, this rank's share of it; returns the loss's parts."""
    optimizer.zero_grad(set_to_none=True)
    sums: dict[str, float] = {}
    taught = [t for t in trajectories if not t.critic_only]
    judged = [t for t in trajectories if t.critic_only and t.teaches_critic]
    for some, loss_of in (taught, batch_loss), (judged, critic_batch_loss):
        for group in micro_batches(ranks.own_share(some, length), micro_tokens):
            loss, means = loss_of(policy, group, config, trajectories)
            loss.backward()
            for key, value in means.items():
                sums[key] = ranks.HOW.get(key, sum)([sums.get(key, 0.0), value.item()])
    return sums


def length(trajectory: Trajectory) -> int:
    return len(trajectory.prompt) + len(trajectory.completion)


def micro_batches(trajectories: list[Trajectory], tokens: int) -> list[list[Trajectory]]:
    """Trajectories of similar length together, at most `tokens` in each group, a tenth of them padding."""
    groups = batches([length(t) for t in trajectories], tokens, padding=0.1)
    return [[trajectories[i] for i in group] for group in groups]


def right_align(rows: list[list[float]], width: int, device: torch.device) -> Tensor:
    """[B, T = width], zeros on the left."""
    return torch.tensor([[0.0] * (width - len(row)) + row for row in rows], device=device)


@torch.no_grad()
def recompute(policy: Policy, trajectories: list[Trajectory], config: Config, micro_tokens: int) -> None:
    """Give each trajectory of this rank's share the trainer's own log-probabilities before the update."""
    for group in micro_batches(ranks.own_share(trajectories, length), micro_tokens):
        logprobs, _, _ = policy.logprobs_and_values(batch_of(policy, group), config.temperature, critic=False)  # [B, T]
        for trajectory, row in zip(group, logprobs.tolist(), strict=True):
            trajectory.trainer_logprobs = row[len(row) - len(trajectory.completion) :]


def batch_of(policy: Policy, group: list[Trajectory]) -> Batch:
    return policy.batch([t.prompt for t in group], [t.completion for t in group])


Loss = tuple[Tensor, dict[str, Tensor]]  # and its parts, for the metrics


def batch_loss(policy: Policy, group: list[Trajectory], config: Config, step: list[Trajectory]) -> Loss:
    """The share of the loss of `step` that falls on `group`, one of its micro-batches that teach the policy, and the
    critic too where that learns."""
    batch = batch_of(policy, group)
    mask, width = batch.completion, batch.completion.shape[1]
    recorded = old = right_align([t.logprobs for t in group], width, policy.device)  # [B, T]
    if config.old_logprobs != "recorded":
        old = right_align([t.trainer_logprobs for t in group], width, policy.device)  # [B, T]
    lengths = [len(t.completion) for t in step if not t.critic_only]
    weights = token_weights(mask, config.normalize, lengths)  # [B, T], sums to 1 over what teaches the policy

    critic = group[0].teaches_critic
    # each [B, T]
    logprobs, values, entropy = policy.logprobs_and_values(batch, config.temperature, config.value_gradient, critic)
    advantage, value_loss = advantages_and_value_loss(values, mask, group, config, step)
    if config.loss == "cispo":
        policy_loss = cispo_loss(logprobs, old, advantage, config.clip_high)
    else:
        policy_loss = ppo_loss(logprobs, old, advantage, config.clip_ppo)
    if config.old_logprobs == "truncated":  # truncated importance sampling (Yao et al. 2025)
        policy_loss = policy_loss * (old - recorded).exp().clamp(max=config.importance_cap)
    parts = {"policy_loss": policy_loss, "entropy": entropy, "ratio": (logprobs - old).exp()}  # [B, T]
    total = policy_loss
    if config.kl_coefficient:
        reference = policy.reference_logprobs(batch, config.temperature)  # [B, T]
        parts["kl"] = kl_k3(logprobs * mask, reference * mask)  # elsewhere they may be far apart
        total = total + config.kl_coefficient * parts["kl"]
    means = {name: (part.detach() * weights).sum() for name, part in parts.items()}
    disagreement = ((logprobs - recorded) * mask).detach().abs()  # [B, T]
    means |= {"disagreement_mean": disagreement.sum() / sum(lengths), "disagreement_max": disagreement.max()}
    means |= {"value_loss": value_loss.detach()} if critic else {}
    return (total * weights).sum() + config.value_coefficient * value_loss, means


def critic_batch_loss(policy: Policy, group: list[Trajectory], config: Config, step: list[Trajectory]) -> Loss:
    """The same of a micro-batch that teaches the critic alone."""
    batch = batch_of(policy, group)
    values = policy.state_values(batch, config.value_gradient)  # [B, T]
    _, value_loss = advantages_and_value_loss(values, batch.completion, group, config, step)
    return config.value_coefficient * value_loss, {"value_loss": value_loss.detach()}


def advantages_and_value_loss(
    values: Tensor, mask: Tensor, group: list[Trajectory], config: Config, step: list[Trajectory]
) -> tuple[Tensor, Tensor]:
    """A_t [B, T], from the critic or fixed by the method, and the share of (V(s_t) - target)^2, averaged over what
    teaches the critic in `step`, that falls on `group`: 0 if that fixed its advantages and has no target. values, mask:
    [B, T]."""
    width, device = values.shape[1], values.device
    if group[0].advantages is None:
        reward = torch.tensor([t.reward.value for t in group], device=device)  # [B]
        advantage = gae(reward, values.detach(), mask, config.gae_lambda)
        target = advantage + values.detach()
    else:  # a group method fixed them, and trains no critic
        advantage, target = right_align([t.advantages for t in group], width, device), values.detach()
    if group[0].returns is not None:  # a tree knows better
        target = right_align([t.returns for t in group], width, device)
    lengths = [len(t.completion) for t in step if t.teaches_critic]
    weights = token_weights(mask, config.normalize, lengths)  # [B, T], sums to 1 over what teaches the critic
    return advantage, ((values - target) ** 2 * weights).sum()


def make_optimizer(policy: Policy, config: Config) -> torch.optim.Optimizer:
    """AdamW over the trainable weights of the model and, with a rate of its own, the value head. What has no gradient
    in a step does not move in it, momentum or not."""
    groups = [
        {"params": [p for p in policy.lm.parameters() if p.requires_grad], "peak": config.learning_rate},
        {"params": list(policy.value_head.parameters()), "peak": config.value_learning_rate},
    ]
    if config.optimizer == "paged-adamw8bit":
        from bitsandbytes.optim import PagedAdamW8bit

        return PagedAdamW8bit(groups, lr=0.0, weight_decay=0.0)
    return torch.optim.AdamW(groups, lr=0.0, weight_decay=0.0)
