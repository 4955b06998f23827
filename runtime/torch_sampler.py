"""The sampler that runs anywhere PyTorch does, on the trainer's own weights.

Siblings share one prefill of their prefix, and every token after it until they differ. Rows that are done leave the
batch. During a search the keys and values of every step are kept, so no prefix is run twice, and the critic reads
hidden states that sampling had to compute anyway. Each prefix has a random stream of its own: what is drawn for it
does not depend on what else is in the batch.
"""

import math
import time

import numpy as np
import torch

from policy import Policy, left_pad
from runtime.cache import Pool, Rows
from sampling import ENDS, STEP_END, Sample, SamplingParams, Usage

KEPT = 2**17  # tokens whose keys and values are kept between calls
DRAW_CHUNK = 2**24  # elements of [rows, vocabulary] alive at once while tokens are drawn: about 0.5 GB


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

    def sample(self, prefixes, seeds, params):
        began = time.perf_counter()
        check_context(self.context, max(map(len, prefixes), default=0), params.max_tokens)
        if self.pool.full or self.version != self.policy.version or not any(len(self.pool.find(p)) for p in prefixes):
            self.pool.forget()  # where no prefix is known, another search has begun
        self.read, self.version = {}, self.policy.version
        order = sorted(range(len(prefixes)), key=lambda i: len(prefixes[i]))  # neighbours pad little
        rows: list[list[Sample]] = [[] for _ in prefixes]
        size, usage = max(1, self.batch // params.n), Usage()
        for start in range(0, len(order), size):
            some = order[start : start + size]
            starts, streams = ([items[i] for i in some] for items in (prefixes, seeds))
            drawn, used = self._decode(starts, streams, params)
            usage += used
            for i, samples in zip(some, drawn, strict=True):
                rows[i] = samples
        return rows, usage + Usage(seconds=time.perf_counter() - began)

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
    def _decode(self, prefixes: list[list[int]], seeds: list[int], params: SamplingParams):
        """The samples of each prefix, and what was drawn and run for them."""
        policy, device, total = self.policy, self.policy.device, params.n * len(prefixes)
        n, max_tokens, stop_at_step = params.n, params.max_tokens, params.stop_at_step
        beams = Beams(len(prefixes), n, params.cutoff, device) if params.cutoff is not None else None
        # u[row, t] decides token t of a row: a stream a prefix, whatever the batch around it
        shape = (n, max_tokens, 2, n) if beams else (n, max_tokens, 1, 1)
        uniform = np.concatenate([np.random.default_rng(seed).random(shape) for seed in seeds])
        uniform = torch.from_numpy(uniform).to(device)  # [R, T, …], fp64
        cache, hidden, attention, run = self._prefill(prefixes, stop_at_step)  # a row a prefix, hidden [B, H]
        length = attention.shape[1]
        attention = torch.cat([attention, attention.new_ones(len(prefixes), max_tokens)], 1)  # [B, L + T]

        tokens = torch.zeros(total, max_tokens, dtype=torch.long, device=device)  # [R, T]
        logprobs = torch.zeros(total, max_tokens, device=device)  # [R, T]
        lengths, ended = torch.zeros(2, total, dtype=torch.long, device=device)  # [R] each, the second of ENDS
        alive = torch.arange(0, total, n if beams else 1, device=device)  # the samples that are not done, [s]
        row = alive // n  # of the cache, for each of them [s]: siblings share one until they differ
        origin = torch.arange(len(prefixes), device=device)  # the prefix of each row, [r]
        stops = torch.tensor(sorted(policy.stop_ids), device=device)
        generated = 0
        for t in range(max_tokens):
            token, logprob, left = self._draw(hidden[row], uniform[alive, t, 0], params.temperature)  # [s, 1 or n] each
            which = slice(None)
            if beams:
                source, alive, which = beams.choose(alive, logprob, left, uniform[alive, t, 1])
                tokens, logprobs, lengths, ended = (x[source] for x in (tokens, logprobs, lengths, ended))
                lengths[beams.score == -torch.inf] = 0  # dropped
                row = row[which // n]
            token, logprob = token.flatten()[which], logprob.flatten()[which]  # [s]
            tokens[alive, t], logprobs[alive, t], lengths[alive] = token, logprob, t + 1
            generated += len(alive)
            done = at_end = torch.isin(token, stops)  # [s]
            if stop_at_step:
                done = at_end | self._at_step(tokens[alive, max(0, t + 1 - len(STEP_END)) : t + 1])
            some, last = bool(done.any()), t + 1 == max_tokens
            if some:
                ended[alive[done]] = 1 + at_end[done].long()
            if stop_at_step and (some or last):  # searches go on from here; the last token has not been run
                steps = (~at_end if last else done & ~at_end).nonzero().flatten()
                starts = [(prefixes[i // n], tokens[i, :t].tolist()) for i in alive[steps].tolist()]
                self.pool.keep(cache, {r: (p + step, len(p)) for r, (p, step) in zip(row[steps].tolist(), starts)})
            if last or bool(done.all()):
                break
            if some:
                alive, row, token = alive[~done], row[~done], token[~done]
            parent, moved, place, row, token = share(row, token)
            cache.move(parent[moved], place[moved], total if beams else len(alive))
            origin = torch.empty_like(parent).scatter_(0, place, origin[parent])
            ids = torch.empty_like(parent).scatter_(0, place, token)  # [r]
            seen = attention[origin, : length + t + 1]  # [r, L + t + 1]
            hidden = policy.hidden(ids[:, None], seen, past_key_values=cache, use_cache=True).last_hidden_state[:, -1]

        table = zip(tokens.tolist(), logprobs.tolist(), lengths.tolist(), ended.tolist(), strict=True)
        samples = [Sample(row[:length], logp[:length], ENDS[why]) for row, logp, length, why in table]
        found = [[sample for sample in samples[i : i + n] if sample.tokens] for i in range(0, total, n)]
        return found, Usage(generated, run)

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
        """m different tokens for each row of hidden states [r, H] from uniform numbers [r, m], their log-probabilities
        and the log of the probability that each was drawn from; a chunk of rows at a time. All [r, m]."""
        drawn = []
        for states, numbers in zip(hidden.split(self.chunk), uniform.split(self.chunk), strict=True):
            logp, found = torch.log_softmax(self.policy.head(states) / temperature, -1), []  # [chunk, V]
            for u in numbers.unbind(1):
                token = inverse_cdf(logp, u)[:, None]  # [chunk, 1]
                left = torch.logsumexp(logp.double(), 1, keepdim=True) if found else torch.zeros_like(token)
                found.append((token, logp.gather(1, token), left))
                if len(found) < numbers.shape[1]:
                    logp = logp.scatter(1, token, -torch.inf)
            drawn.append([torch.cat(parts, 1) for parts in zip(*found)])
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


class Beams:
    """Which continuations go on when n of each prefix are drawn without replacement: stochastic beam search (Kool et
    al. 2019). Each that could be drawn has a log-probability perturbed by a Gumbel; those with the n highest are a draw
    without replacement. Scores are made from the top down: a continuation hands its own to the first of its next
    tokens, and each further one has a Gumbel truncated at the score before."""

    def __init__(self, prefixes: int, n: int, cutoff: float, device):
        self.n, self.cut = n, math.log(cutoff) if cutoff else -math.inf
        self.logp = torch.full((n * prefixes,), -torch.inf, dtype=torch.float64, device=device)  # [R], -inf: not in use
        self.logp[::n] = 0  # a prefix is one continuation; which score it has changes nothing
        self.score = self.logp.clone()  # [R]

    def choose(self, alive, logprobs, left, uniform) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Each sample `alive` [s] may go on with n next tokens, of `logprobs` and `left` [s, n] as `_draw` has them.

        Returns the sample that each one of the n best goes on from [R], those that are alive now [s'], and which of the
        s * n next tokens they have drawn [s']."""
        scores = [self.score[alive]]
        for j in range(1, self.n):
            location = self.logp[alive] + left[:, j]
            scores.append(location - torch.log(torch.exp(location - scores[-1]) - torch.log(uniform[:, j])))
        score = self.beside_ended(self.score, alive, torch.stack(scores, 1))
        logp = self.beside_ended(self.logp, alive, self.logp[alive, None] + logprobs)
        likely = logp.isfinite() & (logp >= logp.amax(1, keepdim=True) + self.cut)
        logp, score = (x.where(likely, -torch.inf) for x in (logp, score))  # what is dropped measures nothing later
        score, best = score.topk(self.n)  # [B, n]
        self.score, self.logp = score.flatten(), logp.gather(1, best).flatten()
        first = torch.arange(0, len(self.score), self.n, device=best.device)[:, None]
        source, column = (first + best // (self.n + 1)).flatten(), (best % (self.n + 1)).flatten()  # [R]
        place = torch.empty_like(source).scatter_(0, alive, torch.arange(len(alive), device=best.device))
        alive = ((column < self.n) & (self.score > -torch.inf)).nonzero().flatten()
        return source, alive, place[source[alive]] * self.n + column[alive]

    def beside_ended(self, old: torch.Tensor, alive: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
        """For each prefix what its samples may become: `new` [s, n] for those alive, the `old` [R] for those that have
        ended. [B, n * (n + 1)]"""
        every = old.new_full((len(old), self.n + 1), -torch.inf)
        every[:, self.n] = old
        every[alive, self.n] = -torch.inf
        every[alive, : self.n] = new
        return every.view(-1, self.n * (self.n + 1))


def inverse_cdf(logprobs: torch.Tensor, uniform: torch.Tensor) -> torch.Tensor:
    """Draw from rows exp(logprobs) [R, V], whatever their sum, with one uniform number in [0, 1) each: the first index
    whose CDF exceeds it."""
    cdf = (logprobs - logprobs.amax(-1, keepdim=True)).double().exp().cumsum(-1)  # [R, V]
    index = torch.searchsorted(cdf, (uniform * cdf[:, -1])[:, None], right=True).squeeze(-1)  # [R]
    return index.clamp(max=logprobs.shape[-1] - 1)
