"""Tree search distillation: search, teach the policy what the search has found, repeat (`train`).

    python ppo.py --search mcts                    # distil tree search
    python ppo.py --search none                    # single samples without a search, for comparison
    python ppo.py --resume runs/mcts-tiny-seed0    # go on with an interrupted run, to the same result

The other methods are in baselines.py.
"""

import runtime.threads

import sys

if __name__ == "__main__":
    from runtime.cli import answer_help

    answer_help(__doc__, "mcts")

import math
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from config import Config, LearningConfig, TaskConfig
from distill import LESSONS
from mcts import plant, search
from policy import Batch, Policy
from runtime.cli import command
from runtime.guard import Stopped
from runtime.launch import Trainer, launch
from runtime.micro_batches import MicroBatches, merge, right_align
from runtime.scores import Score
from runtime.session import Session
from sampling import Collect, Collected, Grade, Problem, Progress, Sampler, SamplingParams, Trajectory, Usage, complete

IMPORTANCE_CAP = 2.0  # of pi_trainer / pi_sampler, with old_logprobs "truncated"
MAX_DISAGREEMENT = 0.1  # mean |log pi_sampler - log pi_trainer| above which a step warns, nats a token

# ------------------------------------------------------------------------------------------------ train


def train(config: Config, collect: Collect, resume: bool = False) -> dict[str, Score]:
    """Run a method to the end of its budget; returns the test scores before and after."""
    learning = config.learning
    with Session(config, make_optimizer, resume) as session:
        while not session.finished:
            problems, rng = session.draw()
            trajectories, usage, metrics = collect(session.policy, session.sampler, problems, config, rng)
            session.hand_over(trajectories)
            set_rate(session.optimizer, learning, session.progress)
            losses = update(session.policy, session.optimizer, trajectories, learning, session.micro)
            session.record(trajectories, usage, metrics | losses)
        return session.finish()


# ------------------------------------------------------------------------------------------------ collect


def collect_mcts(policy: Policy, sampler: Sampler, problems: list[Problem], config: Config, rng) -> Collected:
    """Search a tree a problem; the trajectories are what `config.distill.lesson` makes of the trees."""
    trees = plant(policy, problems, rng.integers(2**63, size=len(problems)).tolist())
    usage = search(trees, sampler, grader(policy, config.task), config.search)
    trajectories = [t for tree in trees for t in LESSONS[config.distill.lesson](tree, config.search)]
    statistics = [tree.statistics() for tree in trees]
    metrics = {f"tree_{name}": float(np.mean([row[name] for row in statistics])) for name in statistics[0]}
    return trajectories, usage, metrics


def collect_samples(policy: Policy, sampler: Sampler, problems: list[Problem], config: Config, rng) -> Collected:
    """No search: one sample a problem."""
    rows, usage = sample_answers(policy, sampler, problems, 1, config, rng)
    return [row[0] for row in rows], usage, {}


def sample_answers(policy, sampler, problems, n: int, config: Config, rng) -> tuple[list[list[Trajectory]], Usage]:
    """`n` graded answers of each problem."""
    seeds = rng.integers(2**63, size=len(problems)).tolist()
    params = SamplingParams(n, config.task.max_tokens, config.learning.temperature, cutoff=config.cutoff)
    return complete(policy, sampler, problems, seeds, params, grader(policy, config.task))


def grader(policy: Policy, task: TaskConfig) -> Grade:
    """The verifier, with the task's reward."""
    return partial(policy.grade, exact=task.reward == "exact")


# ------------------------------------------------------------------------------------------------ update

NORMS = ("gradient_norm", "value_gradient_norm")  # of the optimiser's groups


def teaches_policy(trajectory: Trajectory, learning: LearningConfig) -> bool:
    """Right answers alone teach the policy. With `failures` wrong ones do too (the post)."""
    return not trajectory.critic_only and (learning.failures or trajectory.reward.correct)


def update(
    policy: Policy,
    optimizer: torch.optim.Optimizer,
    trajectories: list[Trajectory],
    learning: LearningConfig,
    micro: MicroBatches | None = None,
) -> dict[str, float]:
    """`inner_steps` optimiser steps on a step's trajectories; the policy's version goes up by one.

    Returns the last one's losses, averaged as `learning.normalize` says; the norms of the gradients; and how far the
    sampler's log-probabilities were from the trainer's at first (`disagreement_mean`, `disagreement_max`). Stopped
    where a loss or a gradient is not finite, before that optimiser step.
    """
    micro = micro or MicroBatches()
    batches = micro.fit(lambda: make_batches(policy, trajectories, learning, micro))
    metrics, disagreement = {}, {}
    for _ in range(learning.inner_steps if trajectories else 0):
        metrics = micro.fit(lambda: gradients(policy, optimizer, batches, learning, micro))
        metrics |= clip_gradients(optimizer, learning.clip_gradient)
        for name in ("policy_loss", "value_loss", "kl", *NORMS):
            if not math.isfinite(metrics.get(name, 0.0)):
                raise Stopped(f"{name} is {metrics[name]} in update {policy.version + 1}, which was not made")
        optimizer.step()
        # of the first pass: then the weights are still those that were sampled from
        disagreement = disagreement or {key: metrics[key] for key in metrics if key.startswith("disagreement")}
    policy.version += 1
    if not disagreement.get("disagreement_mean", 0.0) <= MAX_DISAGREEMENT:  # NaN warns too
        tqdm.write(
            f"warning: sampler and trainer differ by {disagreement['disagreement_mean']:.3f} nats a token (mean, above "
            f"{MAX_DISAGREEMENT}): see --old-logprobs truncated, or --sampler torch"
        )
    return metrics | disagreement


def gradients(policy, optimizer, batches: "list[TrainingBatch]", learning, micro: MicroBatches) -> dict[str, float]:
    """Leave the gradient of the step's loss in the weights. Returns the metrics of `batch_loss`, added up."""
    optimizer.zero_grad(set_to_none=True)
    metrics: dict[str, float] = {}
    for batch in micro.pieces(batches):
        loss, parts = batch_loss(policy, batch, learning)
        loss.backward()
        metrics = merge(metrics, {name: part.item() for name, part in parts.items()})
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    return micro.add_up(parameters, metrics) | {"micro_tokens": micro.tokens}


def clip_gradients(optimizer: torch.optim.Optimizer, largest: float) -> dict[str, float]:
    """Scale the gradients of each optimiser group down to a norm of at most `largest`; returns the norms before."""
    norms = {}
    for name, group in zip(NORMS, optimizer.param_groups):
        if any(parameter.grad is not None for parameter in group["params"]):
            norms[name] = torch.nn.utils.clip_grad_norm_(group["params"], largest).item()
    return norms


def set_rate(optimizer: torch.optim.Optimizer, learning: LearningConfig, progress: Progress) -> None:
    """The schedule: linear warm-up over the first training steps, times a linear decay over the budget to 0."""
    warmup = min(1.0, (progress.step + 1) / max(learning.warmup, 1))
    for group in optimizer.param_groups:
        group["lr"] = group["initial_lr"] * warmup * (1 - progress.share)


def make_optimizer(policy: Policy, config: Config) -> torch.optim.Optimizer:
    """AdamW over the trainable weights of the model and, at a rate of its own, the value head. A weight without a
    gradient does not move in that step."""
    rates = [([p for p in policy.lm.parameters() if p.requires_grad], config.learning.learning_rate)]
    if config.learning.critic:
        rates.append((list(policy.value_head.parameters()), config.learning.critic.value_learning_rate))
    groups = [{"params": params, "lr": rate, "initial_lr": rate} for params, rate in rates]
    if config.machine.optimizer == "paged-adamw8bit":
        from bitsandbytes.optim import PagedAdamW8bit

        return PagedAdamW8bit(groups, weight_decay=0.0)
    return torch.optim.AdamW(groups, weight_decay=0.0)


# ------------------------------------------------------------------------------------------------ loss


def batch_loss(policy: Policy, batch: "TrainingBatch", learning: LearningConfig) -> tuple[Tensor, dict[str, Tensor]]:
    """A micro-batch's share of the loss of its training step, and the parts of it for the metrics.

        L = -min(ratio, clip).detach() A_t log pi(a_t) + kl_coefficient (exp(D) - D - 1)     of the policy
          + (V(s_t) - returns_t)^2                                                           of the critic

    each averaged over tokens; ratio = pi / pi_old, D = log pi_ref - log pi. With loss "ppo" the first term is PPO's.
    pi_old is the policy, also where answers are drawn distinct: the ratio does not correct for how they are drawn.
    """
    mask = batch.sequences.completion  # [B, T]
    loss, metrics = 0.0, {}
    value_gradient = bool(learning.critic and learning.critic.value_gradient)
    with torch.set_grad_enabled(batch.teaches_policy or value_gradient):
        hidden, tokens = policy.states(batch.sequences)  # [B, T, H], [B, T]
    if batch.teaches_policy:
        logprobs, entropy = policy.logprobs(hidden, tokens, learning.temperature)  # [B, T] each
        clipped_loss = cispo_loss if learning.loss == "cispo" else ppo_loss
        policy_loss = clipped_loss(logprobs, batch.old, batch.advantage, learning.clip)  # [B, T]
        parts = {"policy_loss": policy_loss, "entropy": entropy, "ratio": (logprobs - batch.old).exp()}
        total = policy_loss
        if learning.kl_coefficient:
            parts["kl"] = kl_k3(logprobs * mask, batch.reference * mask)  # at padding exp() could overflow
            total = total + learning.kl_coefficient * parts["kl"]
        loss = (total * batch.policy_weights).sum()
        metrics = {name: (part.detach() * batch.policy_weights).sum() for name, part in parts.items()}
        disagreement = ((logprobs - batch.sampled) * mask).detach().abs()  # [B, T]
        metrics["disagreement_mean"] = disagreement.sum() / batch.policy_tokens
        metrics["disagreement_max"] = disagreement.max()
    if batch.teaches_critic:
        values = policy.value_head(hidden if value_gradient else hidden.detach())  # [B, T]
        value_loss = ((values - batch.returns) ** 2 * batch.critic_weights).sum()
        loss = loss + value_loss
        metrics["value_loss"] = value_loss.detach()
    return loss, metrics


def cispo_loss(logprobs: Tensor, old: Tensor, advantage: Tensor, clip: float) -> Tensor:
    """-min(ratio, clip).detach() * A * log pi, ratio = pi / pi_old (MiniMax-M1 2025, eq. 4-5). All [B, T]."""
    ratio = (logprobs - old).exp().clamp(max=clip).detach()
    return -ratio * advantage * logprobs


def ppo_loss(logprobs: Tensor, old: Tensor, advantage: Tensor, epsilon: float) -> Tensor:
    """-min(ratio A, clip(ratio, 1 - eps, 1 + eps) A), ratio = pi / pi_old (Schulman et al. 2017, eq. 7). All [B, T]."""
    ratio = (logprobs - old).exp()
    return -torch.min(ratio * advantage, ratio.clamp(1 - epsilon, 1 + epsilon) * advantage)


def kl_k3(logprobs: Tensor, reference: Tensor) -> Tensor:
    """exp(D) - D - 1 >= 0 with D = log pi_ref - log pi: Schulman's k3 estimate of KL(pi || pi_ref). All [B, T]."""
    difference = reference - logprobs
    return difference.exp() - difference - 1


def gae(reward: Tensor, values: Tensor, mask: Tensor, lam: float = 1.0) -> Tensor:
    """Advantages A_t, for one reward R at the end and gamma = 1 (Schulman et al. 2016, eq. 16). [B, T]

    delta_t = V(s_t+1) - V(s_t), with R in place of V(s_t+1) at the last token; A_t = sum_k lam^k delta_t+k. With
    lam = 1 this is R - V(s_t). reward: [B]; values, mask: [B, T], each row's last token in column T - 1.
    """
    following = torch.cat([values[:, 1:], reward[:, None]], 1)  # [B, T]
    delta = (following - values) * mask
    advantage, running = torch.zeros_like(values), torch.zeros_like(reward)
    for t in reversed(range(values.shape[1])):
        running = delta[:, t] + lam * running
        advantage[:, t] = running
    return advantage * mask


def token_weights(mask: Tensor, normalize: str, lengths: list[int]) -> Tensor:
    """Weights that make a sum over the tokens of a step an average. `lengths`: of all the step's answers. [B, T]

    "sequence" averages over the tokens of an answer, then over answers; "token" over all tokens alike.
    """
    if normalize == "token":
        return mask / max(sum(lengths), 1)
    return mask / mask.sum(1, keepdim=True).clamp(min=1) / max(len(lengths), 1)


# ------------------------------------------------------------------------------------------------ batches


@dataclass
class TrainingBatch:
    """A micro-batch of answers with the targets of their tokens. They all teach the same: policy, critic or both.
    Tensors are [B, T] and carry no gradient; what stands at padding has weight 0."""

    sequences: Batch
    teaches_policy: bool
    teaches_critic: bool
    sampled: Tensor  # log pi(a_t) of the sampler
    old: Tensor  # log pi_old(a_t), the ratio's denominator
    reference: Tensor  # log pi_ref(a_t)
    advantage: Tensor  # A_t
    returns: Tensor  # what V(s_t) should be
    policy_weights: Tensor  # of the policy's loss; over the micro-batches of a training step they add up to 1
    critic_weights: Tensor  # of the value loss, likewise
    policy_tokens: int  # that teach the policy, in the whole training step


def make_batches(
    policy: Policy, trajectories: list[Trajectory], learning: LearningConfig, micro: MicroBatches
) -> list[TrainingBatch]:
    """The answers of a training step in micro-batches, those that teach the policy first; this process's share."""
    if len({(t.advantages is None, t.returns is None) for t in trajectories}) > 1:
        raise ValueError("a step's trajectories must all have advantages, or none, and so with returns")
    taught = [t for t in trajectories if teaches_policy(t, learning)]
    critic_only = [t for t in trajectories if t.teaches_critic and not teaches_policy(t, learning)]
    lengths = [len(t.completion) for t in taught], [len(t.completion) for t in trajectories if t.teaches_critic]
    batches = [make_batch(policy, group, learning, True, *lengths) for group in micro.cut(taught)]
    return batches + [make_batch(policy, group, learning, False, *lengths) for group in micro.cut(critic_only)]


@torch.no_grad()
def make_batch(
    policy: Policy,
    group: list[Trajectory],
    learning: LearningConfig,
    teaches_policy: bool,
    policy_lengths: list[int],
    critic_lengths: list[int],
) -> TrainingBatch:
    """The targets of a micro-batch, from the weights before the training step's first update; they serve all its inner
    steps. The lengths are those of all the step's answers that teach the policy, and the critic."""
    batch = policy.batch([t.prompt for t in group], [t.completion for t in group])
    mask = batch.completion  # [B, T]
    by_critic = group[0].advantages is None
    recompute = teaches_policy and learning.old_logprobs != "recorded"
    if by_critic or recompute:
        hidden, tokens = policy.states(batch)  # [B, T, H], [B, T]
    sampled = old = reference = right_align([t.logprobs for t in group], mask)
    if recompute:
        old = policy.logprobs(hidden, tokens, learning.temperature)[0] * mask
    if teaches_policy and learning.kl_coefficient:
        reference = policy.reference_logprobs(batch, learning.temperature)
    if by_critic:
        reward = torch.tensor([t.reward.value for t in group], device=policy.device)  # [B]
        values = policy.value_head(hidden)  # [B, T]
        advantage = gae(reward, values, mask)  # R - V(s_t)
        returns = advantage + values  # R
    else:
        advantage = returns = right_align([t.advantages for t in group], mask)
    if group[0].returns is not None:
        returns = right_align([t.returns for t in group], mask)
    if learning.old_logprobs == "truncated":  # truncated importance sampling (Yao et al. 2025)
        advantage = advantage * (old - sampled).exp().clamp(max=IMPORTANCE_CAP)
    return TrainingBatch(
        sequences=batch,
        teaches_policy=teaches_policy,
        teaches_critic=group[0].teaches_critic and learning.critic is not None,
        sampled=sampled,
        old=old,
        reference=reference,
        advantage=advantage,
        returns=returns,
        policy_weights=token_weights(mask, learning.normalize, policy_lengths),
        critic_weights=token_weights(mask, learning.normalize, critic_lengths),
        policy_tokens=sum(policy_lengths),
    )


COLLECTORS = {"mcts": collect_mcts, "none": collect_samples}

if __name__ == "__main__":
    command(lambda: launch(sys.argv[1:], "mcts", COLLECTORS, Trainer(train, update, make_optimizer, set_rate)))
