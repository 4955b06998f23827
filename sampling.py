"""Sampling: the records that flow from model to trainer, and the engine that draws them.

A sampler continues prefixes: `sample(prefixes, n, …)` returns, for each prefix, n continuations with the token ids, the
log-probability of every token *under the distribution it was drawn from*, and why it ended. TorchSampler runs
anywhere PyTorch does: siblings share one prefill of their prefix, finished rows leave the batch, and each prefix
has a random stream of its own, so what is drawn for it does not depend on what else is in the batch.
"""

import time
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import torch
from transformers import DynamicCache

from countdown import Problem, Reward
from policy import Policy, left_pad

STEP_END = "</step>"


@dataclass
class Usage:
    """What generation cost: tokens drawn, prompt tokens run through the model (the critic's too), seconds."""

    generated: int = 0
    prefilled: int = 0
    seconds: float = 0.0

    def __add__(self, other: "Usage") -> "Usage":
        return Usage(self.generated + other.generated, self.prefilled + other.prefilled, self.seconds + other.seconds)


@dataclass
class Sample:
    """One continuation. `logprobs[i]` belongs to `tokens[i]`, the stop tokens included."""

    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    ended: str = "length"  # "step": </step> was written, "end": the model ended its turn, "length": out of tokens


@dataclass
class Trajectory:
    """One whole completion with its reward, ready for the trainer."""

    problem: Problem
    prompt: list[int]
    completion: list[int]
    logprobs: list[float]  # of the sampling policy, a token
    reward: Reward
    version: int  # of the policy that sampled it
    source: str  # the method that made it
    advantage: float | None = None  # fixed by group methods; otherwise the critic's R - V(s_t)


class Sampler(Protocol):
    def sample(
        self,
        prefixes: list[list[int]],
        n: int,
        seeds: list[int],
        max_tokens: int,
        temperature: float,
        stop_at_step: bool,
    ) -> tuple[list[list[Sample]], Usage]:
        """`n` continuations of each prefix, of at most `max_tokens` tokens; prefix i draws from the stream seeds[i]."""


class TorchSampler:
    """Batched ragged sampling with a KV cache, on the trainer's own weights: never stale."""

    def __init__(self, policy: Policy, batch: int = 1024):
        self.policy = policy
        self.batch = batch  # rows decoded together
        pieces = policy.tokenizer.batch_decode([[i] for i in range(policy.lm.config.vocab_size)])
        self.closes = torch.tensor([STEP_END[-1] in piece for piece in pieces], device=policy.device)  # [V]

    def sample(self, prefixes, n, seeds, max_tokens, temperature=1.0, stop_at_step=False):
        began = time.perf_counter()
        limit = getattr(self.policy.lm.config, "max_position_embeddings", 10**9)
        if (longest := max(map(len, prefixes), default=0)) + max_tokens > limit:
            raise ValueError(f"{longest} prefix + {max_tokens} new tokens exceed the model's context of {limit}")
        order = sorted(range(len(prefixes)), key=lambda i: len(prefixes[i]))  # neighbours pad little
        rows: list[list[Sample]] = [[] for _ in prefixes]
        size = max(1, self.batch // n)
        for start in range(0, len(order), size):
            some = order[start : start + size]
            streams = [seeds[i] for i in some]
            drawn = self._decode([prefixes[i] for i in some], n, streams, max_tokens, temperature, stop_at_step)
            for i, samples in zip(some, drawn, strict=True):
                rows[i] = samples
        usage = Usage(
            generated=sum(len(s.tokens) for row in rows for s in row),
            prefilled=sum(map(len, prefixes)),
            seconds=time.perf_counter() - began,
        )
        return rows, usage

    @torch.inference_mode()
    def _decode(self, prefixes, n, seeds, max_tokens, temperature, stop_at_step) -> list[list[Sample]]:
        policy, device = self.policy, self.policy.device
        # u[row, t] decides token t of a row: a stream a prefix, whatever the batch around it
        uniform = np.concatenate([np.random.default_rng(seed).random((n, max_tokens)) for seed in seeds])
        uniform = torch.from_numpy(uniform).to(device)  # [R, T], fp64
        ids, attention = left_pad(prefixes, policy.tokenizer.pad_token_id, device)  # [B, L]
        cache = DynamicCache(config=policy.lm.config)
        hidden = policy.hidden(ids, attention, past_key_values=cache, use_cache=True).last_hidden_state[:, -1]  # [B, H]
        cache.batch_repeat_interleave(n)
        hidden, attention = hidden.repeat_interleave(n, 0), attention.repeat_interleave(n, 0)  # [R, H], [R, L]

        total = len(hidden)
        tokens = torch.zeros(total, max_tokens, dtype=torch.long, device=device)  # [R, T]
        logprobs = torch.zeros(total, max_tokens, device=device)  # [R, T]
        lengths = torch.full((total,), max_tokens, device=device)  # [R]
        ended = ["length"] * total
        alive = torch.arange(total, device=device)  # rows still being written, in the order of the cache
        stops = torch.tensor(sorted(policy.stop_ids), device=device)
        for t in range(max_tokens):
            logp = torch.log_softmax(policy.head(hidden) / temperature, -1)  # [r, V]
            token = inverse_cdf(logp, uniform[alive, t])  # [r]
            tokens[alive, t] = token
            logprobs[alive, t] = logp.gather(-1, token[:, None]).squeeze(-1)
            done = at_end = torch.isin(token, stops)
            if stop_at_step:
                done = at_end | self._at_step(tokens[alive, max(0, t + 1 - len(STEP_END)) : t + 1])
            if done.any():
                for row, is_end in zip(alive[done].tolist(), at_end[done].tolist(), strict=True):
                    ended[row] = "end" if is_end else "step"
                lengths[alive[done]] = t + 1
                keep = (~done).nonzero().squeeze(-1)
                alive, token, attention = alive[keep], token[keep], attention[keep]
                if len(alive) == 0 or t + 1 == max_tokens:
                    break
                cache.batch_select_indices(keep)
            attention = torch.cat([attention, attention.new_ones(len(alive), 1)], 1)  # [r, L + t + 1]
            if t + 1 < max_tokens:
                output = policy.hidden(token[:, None], attention, past_key_values=cache, use_cache=True)
                hidden = output.last_hidden_state[:, -1]  # [r, H]

        table = zip(tokens.tolist(), logprobs.tolist(), lengths.tolist(), ended, strict=True)
        samples = [Sample(row[:length], logp[:length], why) for row, logp, length, why in table]
        return [samples[i : i + n] for i in range(0, total, n)]

    def _at_step(self, tails: torch.Tensor) -> torch.Tensor:
        """Which rows [r] end in </step>, given their last tokens [r, <= 7]. The text decides: Qwen2.5 writes it as 522
        9520 29 after a digit, but 690 9520 29 after a space and 522 9520 397 before a newline."""
        rows = self.closes[tails[:, -1]].nonzero().flatten().tolist()
        at_step = torch.zeros(len(tails), dtype=torch.bool, device=tails.device)
        at_step[[row for row in rows if STEP_END in self.policy.tokenizer.decode(tails[row])]] = True
        return at_step


def inverse_cdf(logprobs: torch.Tensor, uniform: torch.Tensor) -> torch.Tensor:
    """Draw from softmax rows [R, V] with one uniform number in [0, 1) each: the first index whose CDF exceeds it."""
    cdf = logprobs.double().exp().cumsum(-1)  # [R, V]
    index = torch.searchsorted(cdf, (uniform * cdf[:, -1])[:, None], right=True).squeeze(-1)  # [R]
    return index.clamp(max=logprobs.shape[-1] - 1)


def stream(*keys: int) -> int:
    """A seed made of several numbers (run, step, problem …), the same in every process."""
    return int(np.random.SeedSequence(keys).generate_state(1, np.uint64)[0] >> 1)


def complete(
    policy: Policy,
    sampler: Sampler,
    problems: list[Problem],
    n: int,
    seeds: list[int],
    max_tokens: int,
    temperature: float,
    source: str,
    strict: bool = True,
) -> tuple[list[list[Trajectory]], Usage]:
    """`n` whole completions of each problem, graded: plain sampling, groups, best-of-N and evaluation use it."""
    prompts = [policy.encode(problem) for problem in problems]
    rows, usage = sampler.sample(prompts, n, seeds, max_tokens, temperature, stop_at_step=False)
    return [
        [
            Trajectory(
                problem, start, s.tokens, s.logprobs, policy.grade(problem, s.tokens, strict), policy.version, source
            )
            for s in row
        ]
        for problem, start, row in zip(problems, prompts, rows, strict=True)
    ], usage
