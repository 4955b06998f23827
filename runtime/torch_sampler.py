"""The sampler that runs wherever PyTorch does. It uses the trainer's own weights, so that they are never stale.

It starts with one phase. Then each turn of the decode loop adds a token to every live sample, in five phases:

    prefill   run the prefixes, without the tokens that the pool knows
    draw      draw a token for each live sample
    end       mark the samples that end with their new token
    keep      put into the pool what a search may go on from
    compact   take ended samples out; samples of a prefix that are equal so far share a row
    forward   run the new token of each row through the model

The critic reads hidden states that sampling has computed anyway. Each prefix has a random stream of its own, so that
its samples do not depend on the other prefixes of the batch.

Shapes: B prefixes with L columns; n samples a prefix, R = B n in all; s live samples in r rows of the cache; T new
tokens, H hidden size, V vocabulary.
"""

import math
import time
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from policy import Policy, left_pad
from runtime.beams import Beams, Choice, Draws
from runtime.cache import Entry, KVCache, Pool, merge_rows
from runtime.guard import Stopped
from runtime.micro_batches import group_by_length
from sampling import ENDS, STEP_END, Sample, SamplingParams, Usage

CRITIC_TOKENS = 2**15  # tokens, padding included, that the critic reads in one forward pass
KEPT = 2**17  # tokens whose keys and values are kept between calls
DRAW_CHUNK = 2**24  # elements of [rows, V] alive at once while tokens are drawn: about 0.5 GB
NOT_FINITE = "the policy's logits are not finite: its weights are destroyed, try a lower --learning-rate"
LENGTH, STEP, END = range(len(ENDS))  # indices of ENDS


def read_values(policy: Policy, states: list[list[int]]) -> tuple[list[float], Usage]:
    """V(s) of the states. The policy reads every token of them."""
    began = time.perf_counter()
    values = [0.0] * len(states)
    for group in group_by_length([len(state) for state in states], CRITIC_TOKENS):
        for i, value in zip(group, policy.values([states[i] for i in group]), strict=True):
            values[i] = value
    check_values(values)
    return values, Usage(valued=sum(map(len, states)), critic_seconds=time.perf_counter() - began)


def check_values(values: list[float]) -> list[float]:
    """The critic's values. Stopped if they are not finite."""
    if not all(map(math.isfinite, values)):
        raise Stopped("the critic's values are not finite: its weights are destroyed, try a lower learning rate")
    return values


def context_of(model_config) -> int:
    """The positions that a model was made for, by its config.json."""
    return getattr(model_config, "max_position_embeddings", 10**9)


def check_context(limit: int, longest: int, max_tokens: int) -> None:
    """ValueError if `max_tokens` tokens after a prefix of `longest` tokens exceed `limit` positions."""
    if longest + max_tokens > limit:
        raise ValueError(f"{longest} prefix + {max_tokens} new tokens exceed the context of {limit}")


# ------------------------------------------------------------------------------------------------ the loop's state


@dataclass
class DecodeState:
    """What the phases of the decode loop read and write.

    Samples of one prefix that have drawn the same tokens so far share one row of the cache.
    """

    prefixes: list[list[int]]
    params: SamplingParams
    attention: Tensor  # [B, L + T] 1 on tokens
    cache: KVCache  # keys and values, r rows
    hidden: Tensor  # [r, H] hidden state of each row's last token
    beams: Beams | None = field(init=False, default=None)  # where samples are distinct
    # rows
    origin: Tensor = field(init=False)  # [r] prefix of each row
    ids: Tensor = field(init=False)  # [r] token that each row runs next
    # live samples
    alive: Tensor = field(init=False)  # [s] index of each among all samples
    row: Tensor = field(init=False)  # [s] row of each
    token: Tensor = field(init=False)  # [s] newest token of each
    # all samples
    tokens: Tensor = field(init=False)  # [R, T]
    logprobs: Tensor = field(init=False)  # [R, T]
    lengths: Tensor = field(init=False)  # [R] tokens drawn; 0: no such sample
    ended: Tensor = field(init=False)  # [R] index of ENDS

    def __post_init__(self):
        """The state before the first draw: a row for each prefix."""
        n, size, device = self.params.n, len(self.prefixes), self.hidden.device
        distinct = self.params.cutoff is not None
        if distinct:
            self.beams = Beams(size, n, self.params.cutoff, device)
        self.origin = torch.arange(size, device=device)
        step = n if distinct else 1  # distinct samples of a prefix begin as one
        self.alive = torch.arange(0, n * size, step, device=device)
        self.row = self.alive // n
        self.tokens = torch.zeros(n * size, self.params.max_tokens, dtype=torch.long, device=device)
        self.logprobs = torch.zeros(n * size, self.params.max_tokens, device=device)
        self.lengths, self.ended = torch.zeros(2, n * size, dtype=torch.long, device=device)

    def choose(self, choice: Choice) -> None:
        """Let each sample be the continuation that the beams have chosen for its place."""
        self.tokens, self.logprobs = self.tokens[choice.source], self.logprobs[choice.source]
        self.lengths, self.ended = self.lengths[choice.source], self.ended[choice.source]
        self.lengths[choice.dropped] = 0
        self.row = self.row[choice.parent]
        self.alive = choice.alive

    def append(self, t: int, token: Tensor, logprob: Tensor) -> None:
        """Write token t of each live sample and its log-probability. [s] each"""
        self.token = token
        self.tokens[self.alive, t] = token
        self.logprobs[self.alive, t] = logprob
        self.lengths[self.alive] = t + 1

    def samples(self) -> list[list[Sample]]:
        """The samples of each prefix, as records."""
        rows = [[] for _ in self.prefixes]
        columns = self.tokens.tolist(), self.logprobs.tolist(), self.lengths.tolist(), self.ended.tolist()
        for i, (tokens, logprobs, length, ended) in enumerate(zip(*columns, strict=True)):
            if length:
                rows[i // self.params.n].append(Sample(tokens[:length], logprobs[:length], ENDS[ended]))
        return rows


# ------------------------------------------------------------------------------------------------ the sampler


class TorchSampler:
    """Samples for many prefixes in one batch. During a search it keeps the keys and values of all steps."""

    def __init__(self, policy: Policy, batch: int = 1024, kept: int = KEPT):
        """`batch`: samples that are decoded together; `kept`: tokens whose keys and values are kept between calls."""
        self.policy = policy
        self.context = context_of(policy.lm.config)
        self.batch = batch
        self.chunk = max(1, DRAW_CHUNK // policy.lm.config.vocab_size)  # rows whose logits are alive together
        self.stops = torch.tensor(sorted(policy.stop_ids), device=policy.device)
        texts = policy.tokenizer.batch_decode([[i] for i in range(policy.lm.config.vocab_size)])
        closing = [STEP_END[-1] in text for text in texts]
        self.closing = torch.tensor(closing, device=policy.device)  # [V] tokens that </step> may end with
        self.pool = Pool(kept)
        self.states: dict[tuple[int, ...], Tensor] = {}  # the last call's prefixes -> hidden state [H]
        self.version = policy.version  # of the weights that pool and states belong to

    def sample(self, prefixes, seeds, params):
        began = time.perf_counter()
        check_context(self.context, max(map(len, prefixes), default=0), params.max_tokens)
        self._forget_old(prefixes)
        order = sorted(range(len(prefixes)), key=lambda i: len(prefixes[i]))  # neighbours pad little
        size = max(1, self.batch // params.n)  # prefixes decoded together
        samples: list[list[Sample]] = [[] for _ in prefixes]
        usage = Usage()
        for start in range(0, len(order), size):
            group = order[start : start + size]
            drawn, cost = self._decode([prefixes[i] for i in group], [seeds[i] for i in group], params)
            usage += cost
            for i, row in zip(group, drawn, strict=True):
                samples[i] = row
        return samples, usage + Usage(seconds=time.perf_counter() - began)

    @torch.inference_mode()
    def values(self, states):
        began = time.perf_counter()
        hidden = [self.states.get(tuple(state)) for state in states]
        unknown = any(h is None for h in hidden) or self.version != self.policy.version
        if unknown or not states:
            return read_values(self.policy, states)
        values = check_values(self.policy.value_head(torch.stack(hidden)).tolist())
        return values, Usage(critic_seconds=time.perf_counter() - began)

    def rest(self):
        """Free the memory of what was kept. The weights stay, as they are the trainer's."""
        self.pool.forget()
        self.states = {}

    def _forget_old(self, prefixes: list[list[int]]) -> None:
        """Forget the hidden states of the last call. Forget the pool if it is full, if the weights are new, or if it
        knows none of the prefixes: another search has begun."""
        new_weights = self.version != self.policy.version
        new_search = not any(len(self.pool.find(prefix)) for prefix in prefixes)
        if self.pool.full or new_weights or new_search:
            self.pool.forget()
        self.states = {}
        self.version = self.policy.version

    @torch.inference_mode()
    def _decode(self, prefixes: list[list[int]], seeds: list[int], params: SamplingParams):
        """The samples of each prefix, and the tokens drawn, prefilled and decoded for them."""
        uniform = uniform_numbers(seeds, params).to(self.policy.device)  # [R, T, ...]
        state, prefilled = self._prefill(prefixes, params)
        generated = decoded = 0
        for t in range(params.max_tokens):
            last = t + 1 == params.max_tokens
            self._draw(state, t, uniform[state.alive, t])
            generated += len(state.alive)
            done = self._end(state, t)  # [s]
            if params.stop_at_step and (last or done.any()):
                self._keep(state, t, last)
            if last or done.all():
                break
            self._compact(state, done)
            self._forward(state)
            decoded += len(state.ids)
        return state.samples(), Usage(generated, prefilled, decoded=decoded)

    def _prefill(self, prefixes: list[list[int]], params: SamplingParams) -> tuple[DecodeState, int]:
        """Run the prefixes. Returns the state before the first draw, and how many tokens were run.

        One pass runs the last `width` tokens of every prefix. The prefix with the most unknown tokens decides `width`.
        """
        policy = self.policy
        ids, attention = left_pad(prefixes, policy.tokenizer.pad_token_id, policy.device)  # [B, L]
        known = [self.pool.find(prefix) for prefix in prefixes]
        width = max(len(prefix) - len(slots) for prefix, slots in zip(prefixes, known))
        before = ids.shape[1] - width  # columns that the pool fills
        table = np.zeros((len(prefixes), before), int)  # [B, L - width] slots; padding may have any
        for row, prefix, slots in zip(table, prefixes, known):
            loaded = max(0, len(prefix) - width)
            row[before - loaded :] = slots[:loaded]
        cache = self.pool.load(table)
        output = policy.hidden(ids[:, before:], attention, past_key_values=cache, use_cache=True)
        hidden = output.last_hidden_state[:, -1].clone()  # [B, H]; a view would keep [B, L, H] alive
        self.states |= {tuple(prefix): state for prefix, state in zip(prefixes, hidden)}
        if params.stop_at_step:
            entries = [Entry(prefix, row, len(known[row])) for row, prefix in enumerate(prefixes)]
            self.pool.keep(cache, entries)
        attention = torch.cat([attention, attention.new_ones(len(prefixes), params.max_tokens)], 1)  # [B, L + T]
        run = sum(min(len(prefix), width) for prefix in prefixes)
        return DecodeState(prefixes, params, attention, cache, hidden), run

    def _draw(self, state: DecodeState, t: int, uniform: Tensor) -> None:
        """Draw token t of each live sample, from its uniform numbers.

        Independent samples: [s, 1, 1]. Distinct ones: [s, 2, n], for n tokens a sample, among which the beams choose.
        """
        hidden = state.hidden[state.row]  # [s, H]
        draws = self._draw_tokens(hidden, uniform[:, 0], state.params.temperature)  # of [s, 1] or [s, n]
        if (~torch.isfinite(draws.logprobs[:, 0])).any():
            raise Stopped(NOT_FINITE)
        if state.beams is None:
            state.append(t, draws.tokens[:, 0], draws.logprobs[:, 0])
            return
        choice = state.beams.choose(state.alive, draws, uniform[:, 1])
        state.choose(choice)
        token = draws.tokens[choice.parent, choice.column]
        state.append(t, token, draws.logprobs[choice.parent, choice.column])

    def _draw_tokens(self, hidden: Tensor, uniform: Tensor, temperature: float) -> Draws:
        """Draw m different tokens after each hidden state [s, H], from uniform numbers [s, m]. The logits of one chunk
        of rows are alive at a time."""
        chunks = []
        for states, numbers in zip(hidden.split(self.chunk), uniform.split(self.chunk), strict=True):
            logprobs = torch.log_softmax(self.policy.head(states) / temperature, -1)  # [chunk, V]
            chunks.append(draw_without_replacement(logprobs, numbers))
        return Draws(
            torch.cat([chunk.tokens for chunk in chunks]),
            torch.cat([chunk.logprobs for chunk in chunks]),
            torch.cat([chunk.log_mass for chunk in chunks]),
        )

    def _end(self, state: DecodeState, t: int) -> Tensor:
        """Mark the live samples that end with token t. Returns which ones do. [s]"""
        ended = torch.full_like(state.token, LENGTH)  # [s]
        if state.params.stop_at_step:
            first = max(0, t + 1 - len(STEP_END))
            at_step = self._at_step(state.tokens[state.alive, first : t + 1])  # [s]
            ended.masked_fill_(at_step, STEP)
        at_end = torch.isin(state.token, self.stops)  # [s]
        ended.masked_fill_(at_end, END)
        state.ended[state.alive] = ended
        return ended != LENGTH

    def _at_step(self, tails: Tensor) -> Tensor:
        """Which samples end in </step>, by their last tokens [s, 7 or fewer]. [s]

        The text decides, as its tokens differ: Qwen2.5 writes </step> as 522 9520 29 after a digit, as 690 9520 29
        after a space, and as 522 9520 397 before a newline.
        """
        at_step = torch.zeros(len(tails), dtype=torch.bool, device=tails.device)
        for i in self.closing[tails[:, -1]].nonzero().flatten().tolist():
            if STEP_END in self.policy.tokenizer.decode(tails[i]):
                at_step[i] = True
        return at_step

    def _keep(self, state: DecodeState, t: int, last: bool) -> None:
        """Put into the pool the samples that a search may go on from, without token t, which has not been run.

        They are the ones that end with a step at token t. At the last token the ones that are cut off join them.
        """
        ended = state.ended[state.alive]  # [s]
        resumable = ended != END if last else ended == STEP  # [s]
        samples = state.alive[resumable]
        columns = samples.tolist(), state.row[resumable].tolist(), state.tokens[samples, :t].tolist()
        entries = []
        for sample, row, tokens in zip(*columns, strict=True):
            prefix = state.prefixes[sample // state.params.n]
            entries.append(Entry(prefix + tokens, row, known=len(prefix)))
        self.pool.keep(state.cache, entries)

    def _compact(self, state: DecodeState, done: Tensor) -> None:
        """Take the samples that are `done` [s] out of the batch. Let equal samples share a row."""
        if done.any():
            state.alive, state.row, state.token = state.alive[~done], state.row[~done], state.token[~done]
        source, state.ids, state.row = merge_rows(state.row, state.token)
        state.origin = state.origin[source]
        capacity = len(state.tokens) if state.beams else len(state.alive)
        state.cache.reorder(source, capacity)

    def _forward(self, state: DecodeState) -> None:
        """Run the newest token of each row through the model."""
        columns = state.cache.get_seq_length() + 1
        attention = state.attention[state.origin, :columns]  # [r, columns]
        output = self.policy.hidden(state.ids[:, None], attention, past_key_values=state.cache, use_cache=True)
        state.hidden = output.last_hidden_state[:, -1]


# ------------------------------------------------------------------------------------------------ array functions


def uniform_numbers(seeds: list[int], params: SamplingParams) -> Tensor:
    """The numbers in [0, 1) that decide all draws, fp64. Each prefix has a random stream of its own.

    Independent samples: [R, T, 1, 1]. Distinct ones: [R, T, 2, n]; [:, :, 0] draw tokens, [:, :, 1] make scores.
    """
    n, length = params.n, params.max_tokens
    shape = (n, length, 1, 1) if params.cutoff is None else (n, length, 2, n)
    numbers = [np.random.default_rng(seed).random(shape) for seed in seeds]
    return torch.from_numpy(np.concatenate(numbers))


def inverse_cdf(logprobs: Tensor, uniform: Tensor) -> Tensor:
    """Draw an index from each row of probabilities exp(logprobs) [R, V], which need not sum to 1. [R]

    It is the first index whose CDF exceeds the row's uniform number, which is in [0, 1).
    """
    cdf = (logprobs - logprobs.amax(-1, keepdim=True)).double().exp().cumsum(-1)  # [R, V]
    index = torch.searchsorted(cdf, (uniform * cdf[:, -1])[:, None], right=True).squeeze(-1)  # [R]
    return index.clamp(max=logprobs.shape[-1] - 1)


def draw_without_replacement(logprobs: Tensor, uniform: Tensor) -> Draws:
    """Draw m different tokens from each row of `logprobs` [R, V], from uniform numbers [R, m].

    `logprobs` is overwritten: drawn tokens, but for the last, become -inf.
    """
    tokens, chosen, log_mass = [], [], []
    for j, numbers in enumerate(uniform.unbind(1)):
        if j == 0:
            log_mass.append(torch.zeros_like(numbers)[:, None])
        else:
            logprobs.scatter_(1, tokens[-1], -torch.inf)
            log_mass.append(torch.logsumexp(logprobs.double(), 1, keepdim=True))
        tokens.append(inverse_cdf(logprobs, numbers)[:, None])
        chosen.append(logprobs.gather(1, tokens[-1]))
    return Draws(torch.cat(tokens, 1), torch.cat(chosen, 1), torch.cat(log_mass, 1))
