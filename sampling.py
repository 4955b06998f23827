"""Sampling: the records that flow from model to trainer, and the engine that draws them anywhere.

A sampler continues prefixes: `sample(prefixes, n, …)` returns, for each prefix, n continuations with the token ids, the
log-probability of every token *under the distribution it was drawn from*, and why it ended. TorchSampler runs
anywhere PyTorch does: siblings share one prefill of their prefix, which inherits what the search has read before, and
every token after it until they differ; finished rows leave the batch; and each prefix has a random stream of its own,
so what is drawn for it does not depend on what else is in the batch. engines.py has vLLM for GPUs;
tests/test_samplers.py holds both to the same contract.
"""

import time
from dataclasses import dataclass, field, fields
from typing import Protocol

import numpy as np
import torch

from cache import Pool, Rows
from countdown import Problem, Reward
from policy import Policy, left_pad

STEP_END = "</step>"
KEPT = 2**17  # tokens whose keys and values TorchSampler keeps between calls
DRAW_CHUNK = 2**24  # elements of [rows, vocabulary] alive at once while tokens are drawn: about 0.5 GB


@dataclass
class Usage:
    """What generation cost, the critic's share apart."""

    generated: int = 0  # tokens drawn
    prefilled: int = 0  # prefix tokens that the sampler ran through the model; those found in its cache don't count
    seconds: float = 0.0  # of the sampler
    valued: int = 0  # tokens that the critic read
    critic_seconds: float = 0.0

    def __add__(self, other: "Usage") -> "Usage":
        return Usage(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(Usage)))


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
    advantages: list[float] | None = None  # a token, if the method fixes them; otherwise the critic's R - V(s_t)
    returns: list[float] | None = None  # a token, the critic's target; otherwise R, or none if advantages are fixed
    critic_only: bool = False  # teaches the critic what a state is worth, and the policy nothing
    trainer_logprobs: list[float] | None = None  # of the trainer before the update, where it recomputes them

    @property
    def teaches_critic(self) -> bool:
        return self.advantages is None or self.returns is not None


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
        """`n` continuations of each prefix, of at most `max_tokens` tokens; prefix i draws from the stream seeds[i].
        The policy's newest weights are served, whatever happened since the last call."""

    def values(self, states: list[list[int]]) -> tuple[list[float], Usage]:
        """The critic's V(s) in [-1, 1] of token sequences, and what they cost."""

    def rest(self) -> None:
        """Give the GPU's memory to the trainer until the next call of `sample`."""


def read_values(policy: Policy, states: list[list[int]]) -> tuple[list[float], Usage]:
    """V(s) by passes of the policy over the states."""
    began = time.perf_counter()
    values = policy.values(states)
    return values, Usage(valued=sum(map(len, states)), critic_seconds=time.perf_counter() - began)


def context_of(model_config) -> int:
    """The positions that a model was made for, by its config.json."""
    return getattr(model_config, "max_position_embeddings", 10**9)


def check_context(limit: int, longest: int, max_tokens: int) -> None:
    """ValueError if the continuation of a prefix of `longest` tokens would outgrow the positions."""
    if longest + max_tokens > limit:
        raise ValueError(f"{longest} prefix + {max_tokens} new tokens exceed the context of {limit}")


class TorchSampler:
    """Batched ragged sampling on the trainer's own weights: never stale. During a search the keys and values of every
    step are kept, so no prefix is run twice, and the critic judges from hidden states that sampling had to compute."""

    def __init__(self, policy: Policy, batch: int = 1024, kept: int = KEPT):
        """`batch`: sequences decoded together; `kept`: tokens whose keys and values are kept between calls."""
        self.policy = policy
        self.context = context_of(policy.lm.config)
        self.batch = batch
        self.chunk = max(1, DRAW_CHUNK // policy.lm.config.vocab_size)  # rows whose logits are alive together
        pieces = policy.tokenizer.batch_decode([[i] for i in range(policy.lm.config.vocab_size)])
        self.closes = torch.tensor([STEP_END[-1] in piece for piece in pieces], device=policy.device)  # [V]
        self.pool = Pool(kept)
        self.read: dict[tuple[int, ...], torch.Tensor] = {}  # the last call's prefixes, and their hidden states [H]
        self.version = policy.version  # whose states these are

    def sample(self, prefixes, n, seeds, max_tokens, temperature=1.0, stop_at_step=False):
        began = time.perf_counter()
        check_context(self.context, max(map(len, prefixes), default=0), max_tokens)
        if self.pool.full or self.version != self.policy.version or not any(len(self.pool.find(p)) for p in prefixes):
            self.pool.forget()  # where no prefix is known, another search has begun
        self.read, self.version = {}, self.policy.version
        order = sorted(range(len(prefixes)), key=lambda i: len(prefixes[i]))  # neighbours pad little
        rows: list[list[Sample]] = [[] for _ in prefixes]
        size, prefilled = max(1, self.batch // n), 0
        for start in range(0, len(order), size):
            some = order[start : start + size]
            streams = [seeds[i] for i in some]
            drawn, run = self._decode([prefixes[i] for i in some], n, streams, max_tokens, temperature, stop_at_step)
            prefilled += run
            for i, samples in zip(some, drawn, strict=True):
                rows[i] = samples
        generated = sum(len(s.tokens) for row in rows for s in row)
        return rows, Usage(generated, prefilled, time.perf_counter() - began)

    @torch.inference_mode()
    def values(self, states):
        began = time.perf_counter()
        hidden = [self.read.get(tuple(state)) for state in states]
        if not hidden or self.version != self.policy.version or any(h is None for h in hidden):
            return read_values(self.policy, states)
        values = self.policy.value_head(torch.stack(hidden)).tolist()
        return values, Usage(critic_seconds=time.perf_counter() - began)

    def rest(self):
        """Forget what was kept; the weights are the trainer's."""
        self.pool.forget()
        self.read = {}

    @torch.inference_mode()
    def _decode(self, prefixes, n, seeds, max_tokens, temperature, stop_at_step) -> tuple[list[list[Sample]], int]:
        """`n` samples of each prefix, and how many of the prefixes' tokens were run."""
        policy, device, total = self.policy, self.policy.device, n * len(prefixes)
        # u[row, t] decides token t of a row: a stream a prefix, whatever the batch around it
        uniform = np.concatenate([np.random.default_rng(seed).random((n, max_tokens)) for seed in seeds])
        uniform = torch.from_numpy(uniform).to(device)  # [R, T], fp64
        cache, hidden, attention, run = self._prefill(prefixes, stop_at_step)  # a row a prefix, hidden [B, H]
        length = attention.shape[1]
        attention = torch.cat([attention, attention.new_ones(len(prefixes), max_tokens)], 1)  # [B, L + T]

        tokens = torch.zeros(total, max_tokens, dtype=torch.long, device=device)  # [R, T]
        logprobs = torch.zeros(total, max_tokens, device=device)  # [R, T]
        lengths, ended = [max_tokens] * total, ["length"] * total
        alive = torch.arange(total, device=device)  # the samples that are not done, [s]
        row = alive // n  # of the cache, for each of them [s]: siblings share one until they differ
        origin = torch.arange(len(prefixes), device=device)  # the prefix of each row, [r]
        stops = torch.tensor(sorted(policy.stop_ids), device=device)
        for t in range(max_tokens):
            token, logprobs[alive, t] = self._draw(hidden[row], uniform[alive, t], temperature)  # [s], [s]
            tokens[alive, t] = token
            done = at_end = torch.isin(token, stops)  # [s]
            if stop_at_step:
                done = at_end | self._at_step(tokens[alive, max(0, t + 1 - len(STEP_END)) : t + 1])
            some, last = bool(done.any()), t + 1 == max_tokens
            if some:
                for i, is_end in zip(alive[done].tolist(), at_end[done].tolist(), strict=True):
                    lengths[i], ended[i] = t + 1, "end" if is_end else "step"
            if stop_at_step and (some or last):  # searches go on from here; the last token has not been run
                steps = (~at_end if last else done & ~at_end).nonzero().flatten()
                starts = [(prefixes[i // n], tokens[i, :t].tolist()) for i in alive[steps].tolist()]
                self.pool.keep(cache, {r: (p + step, len(p)) for r, (p, step) in zip(row[steps].tolist(), starts)})
            if last or (some and bool(done.all())):
                break
            if some:
                alive, row, token = alive[~done], row[~done], token[~done]
            parent, moved, place, row, token = share(row, token)
            cache.move(parent[moved], place[moved], len(alive))
            origin = torch.empty_like(parent).scatter_(0, place, origin[parent])
            ids = torch.empty_like(parent).scatter_(0, place, token)  # [r]
            seen = attention[origin, : length + t + 1]  # [r, L + t + 1]
            hidden = policy.hidden(ids[:, None], seen, past_key_values=cache, use_cache=True).last_hidden_state[:, -1]

        table = zip(tokens.tolist(), logprobs.tolist(), lengths, ended, strict=True)
        samples = [Sample(row[:length], logp[:length], why) for row, logp, length, why in table]
        return [samples[i : i + n] for i in range(0, total, n)], run

    def _prefill(self, prefixes, keep: bool) -> tuple[Rows, torch.Tensor, torch.Tensor, int]:
        """The prefixes' cache, their last hidden states [B, H] and attention mask [B, L], and how many tokens were run:
        of each prefix as many as the one needs of which the fewest are known."""
        policy = self.policy
        ids, attention = left_pad(prefixes, policy.tokenizer.pad_token_id, policy.device)  # [B, L]
        known = [self.pool.find(prefix) for prefix in prefixes]
        width, length = max(len(p) - len(k) for p, k in zip(prefixes, known)), ids.shape[1]
        slots = np.zeros((len(prefixes), length - width), int)  # [B, L - width], in the padding any
        for row, prefix, found in zip(slots, prefixes, known):
            row[length - len(prefix) :] = found[: max(0, len(prefix) - width)]
        cache = self.pool.load(slots)
        output = policy.hidden(ids[:, length - width :], attention, past_key_values=cache, use_cache=True)
        hidden = output.last_hidden_state[:, -1].clone()  # [B, H]; a view would keep [B, L, H] alive
        self.read |= {tuple(prefix): state for prefix, state in zip(prefixes, hidden)}
        if keep:
            self.pool.keep(cache, {row: (p, len(k)) for row, (p, k) in enumerate(zip(prefixes, known))})
        return cache, hidden, attention, sum(min(len(prefix), width) for prefix in prefixes)

    def _draw(self, hidden: torch.Tensor, uniform: torch.Tensor, temperature: float):
        """A token and its log-probability for each row of hidden states [r, H], a chunk of rows at a time."""
        drawn = []
        for states, u in zip(hidden.split(self.chunk), uniform.split(self.chunk), strict=True):
            logp = torch.log_softmax(self.policy.head(states) / temperature, -1)  # [chunk, V]
            token = inverse_cdf(logp, u)  # [chunk]
            drawn.append((token, logp.gather(-1, token[:, None]).squeeze(-1)))
        return (torch.cat(parts) for parts in zip(*drawn, strict=True))

    def _at_step(self, tails: torch.Tensor) -> torch.Tensor:
        """Which rows [r] end in </step>, given their last tokens [r, <= 7]. The text decides: Qwen2.5 writes it as 522
        9520 29 after a digit, but 690 9520 29 after a space and 522 9520 397 before a newline."""
        rows = self.closes[tails[:, -1]].nonzero().flatten().tolist()
        at_step = torch.zeros(len(tails), dtype=torch.bool, device=tails.device)
        at_step[[row for row in rows if STEP_END in self.policy.tokenizer.decode(tails[row])]] = True
        return at_step


def share(row: torch.Tensor, token: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Rows for samples [s] that have read the cache's `row` and drawn `token`: one for all that have drawn the same.

    Returns for each new row [r] the row it goes on from, which of them [m] must be copied, its place and its token;
    and for each sample its new row [s]. The first that goes on from a row stays there; others fill the free places, so
    that new rows are 0 … r - 1.
    """
    size = int(token.max()) + 1
    keys, which = torch.unique(row * size + token, return_inverse=True)  # [r] in the order of rows, [s]
    parent, count = keys // size, len(keys)
    stays = parent < count
    stays[1:] &= parent[1:] != parent[:-1]  # the first one of each row
    free = torch.ones(count, dtype=torch.bool, device=row.device)
    free[parent[stays]] = False
    moved, place = (~stays).nonzero().flatten(), parent.clone()
    place[moved] = free.nonzero().flatten()
    return parent, moved, place, place[which], keys % size


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
