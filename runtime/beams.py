"""Continuations that are drawn without replacement: stochastic beam search (Kool et al. 2019, arXiv 1903.06059).

Add Gumbel noise to the log-probability of every possible continuation. The n with the highest sums are n draws without
replacement. The search finds them without a list of all continuations. It goes on from the n beginnings with the
highest scores. The score of a beginning is the highest sum that any of its continuations has.

n next tokens are drawn for a beginning, without replacement. The first one inherits the score of the beginning. Each
further one has a Gumbel around the log-probability of all that is left, truncated at the score of the one before.

Shapes: B prefixes with n samples each, R = B n in all; s live samples, with n drawn tokens each.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class Draws:
    """Next tokens of s samples, m different ones each."""

    tokens: Tensor  # [s, m]
    logprobs: Tensor  # [s, m] log pi(token)
    log_mass: Tensor  # [s, m] log of the probability of all tokens that were not drawn before, fp64


@dataclass
class Choice:
    """The n best continuations of each prefix, R in all. s' of them have a new token; the others ended before."""

    source: Tensor  # [R] sample that each goes on from
    dropped: Tensor  # [R] bool, places without a continuation
    alive: Tensor  # [s'] those with a new token
    parent: Tensor  # [s'] row of Draws that has the token of each
    column: Tensor  # [s'] column of Draws that has it


class Beams:
    """The log-probability and the score of each sample, and the choice of those that go on."""

    def __init__(self, prefixes: int, n: int, cutoff: float, device: torch.device | str):
        """Of each prefix, continuations with less than `cutoff` times the probability of the likeliest are dropped."""
        self.n = n
        self.log_cutoff = math.log(cutoff) if cutoff else -math.inf
        self.logprobs = torch.full((n * prefixes,), -torch.inf, dtype=torch.float64, device=device)  # [R]
        self.logprobs[::n] = 0  # each prefix begins as one sample of probability 1
        self.scores = self.logprobs.clone()  # [R] the first may be any number: the order does not depend on it

    def choose(self, alive: Tensor, draws: Draws, uniform: Tensor) -> Choice:
        """Choose the n candidates of each prefix that have the highest scores.

        Candidates are the samples `alive` [s], each with any of its n drawn tokens, and the samples that have ended.
        Scores are made from the numbers `uniform` [s, n].
        """
        n, device = self.n, alive.device
        logprobs = self.candidates(self.logprobs, alive, self.logprobs[alive, None] + draws.logprobs)  # [B, n (n + 1)]
        scores = self.candidates(self.scores, alive, self.new_scores(alive, draws, uniform))  # [B, n (n + 1)]
        likely = logprobs.isfinite() & (logprobs >= logprobs.amax(1, keepdim=True) + self.log_cutoff)
        logprobs = logprobs.where(likely, -torch.inf)  # dropped ones are compared with nothing later
        scores = scores.where(likely, -torch.inf)
        best_scores, best = scores.topk(n)  # [B, n]
        self.scores, self.logprobs = best_scores.flatten(), logprobs.gather(1, best).flatten()  # [R]

        first = torch.arange(0, len(self.scores), n, device=device)[:, None]  # [B, 1] first sample of each prefix
        source = (first + best // (n + 1)).flatten()  # [R]
        column = (best % (n + 1)).flatten()  # [R] n: the sample has ended before
        dropped = self.scores == -torch.inf  # [R]
        now_alive = ((column < n) & ~dropped).nonzero().flatten()  # [s']
        place = torch.empty_like(source)  # [R] sample -> its row of Draws
        place[alive] = torch.arange(len(alive), device=device)
        return Choice(source, dropped, now_alive, place[source[now_alive]], column[now_alive])

    def new_scores(self, alive: Tensor, draws: Draws, uniform: Tensor) -> Tensor:
        """The score of each drawn token, the highest first. [s, n]"""
        scores = [self.scores[alive]]
        for j in range(1, self.n):
            location = self.logprobs[alive] + draws.log_mass[:, j]  # [s] of the Gumbel
            bound = scores[-1]
            scores.append(location - torch.log(torch.exp(location - bound) - torch.log(uniform[:, j])))
        return torch.stack(scores, 1)

    def candidates(self, old: Tensor, alive: Tensor, new: Tensor) -> Tensor:
        """A number for each candidate of each prefix; -inf where there is none. [B, n (n + 1)]

        A live sample with a drawn token has its number in `new` [s, n], a sample that has ended in `old` [R].
        """
        candidates = old.new_full((len(old), self.n + 1), -torch.inf)  # [R, n + 1]
        candidates[:, self.n] = old
        candidates[alive, self.n] = -torch.inf
        candidates[alive, : self.n] = new
        return candidates.view(-1, self.n * (self.n + 1))
