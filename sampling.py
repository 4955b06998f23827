"""The records that travel from the model to the trainer, what a task is, and what a sampler is.

    Problem -> prompt ids -> Sampler.sample -> Sample -> graded: Trajectory -> the trainer's batch

A task makes problems, writes their prompts and grades answers; docs/your_task.md shows how to write one. A sampler
continues token sequences, its prefixes. runtime/torch_sampler.py runs anywhere PyTorch does, runtime/vllm_sampler.py is
for GPUs. tests/test_samplers.py holds both to the same contract.
"""

from collections.abc import Callable, Hashable
from dataclasses import dataclass, field, fields, replace
from typing import Protocol

import numpy as np

from config import BudgetConfig

STEP_END = "</step>"
ENDS = ("length", "step", "end")  # why a continuation ended
Problem = Hashable  # a problem of a task; str(problem) is what a person reads

# ------------------------------------------------------------------------------------------------ task


@dataclass(frozen=True)
class Reward:
    """What a verifier says of an answer. `value` is the dense reward in [-1, 1] for training, `correct` the sparse one
    for evaluation (correct <=> value == 1), `parsed` whether an answer that keeps the rules was read."""

    value: float
    correct: bool
    parsed: bool
    reason: str

    def exact(self) -> "Reward":
        """With value 1 for a right answer and -1 for all others: a near miss earns nothing more."""
        return replace(self, value=1.0 if self.correct else -1.0)


class Task(Protocol):
    """What the policy learns to do. Countdown is one; --task FILE.py:NAME takes another.

    A task may also have these methods, which `ask` calls for play.py and the explorer:

        parse(text) -> Problem                          a line that a person typed; ValueError says what is wrong
        solution(problem) -> str | None                 one right answer
        reachable(problem, steps) -> bool | None        whether a right answer is in reach after these steps, if known
    """

    def problems(self, split: str, count: int) -> list[Problem]:
        """The first `count` problems of a split (train, validation, test), or all; the same in every process."""

    def prompt(self, problem: Problem) -> list[dict[str, str]]:
        """The chat messages of a problem: system text (or none), then user text, each with `role` and `content`."""

    def grade(self, problem: Problem, text: str) -> Reward:
        """The reward of a completion's text. The text is hostile input."""


def ask(task: Task, method: str, *arguments) -> object:
    """What an optional method of a task returns; None where the task has no such method."""
    return getattr(task, method)(*arguments) if hasattr(task, method) else None


def draw(problems: list[Problem], count: int, seed: int, step: int) -> tuple[list[Problem], np.random.Generator]:
    """`count` problems for a training step, drawn with replacement, and the generator that drew them, for the
    step's later draws. Both depend on seed and step alone."""
    rng = np.random.default_rng([seed, step])
    return [problems[i] for i in rng.integers(len(problems), size=count)], rng


# ------------------------------------------------------------------------------------------------ samples


@dataclass(frozen=True)
class SamplingParams:
    """What is drawn from each prefix."""

    n: int  # continuations
    max_tokens: int  # of a continuation
    temperature: float = 1.0  # softmax(logits / temperature) is drawn from
    stop_at_step: bool = False  # end a continuation at </step>
    # None: continuations are drawn independently. A number: they are drawn without replacement, so that no two are the
    # same, and a continuation whose probability so far is below cutoff times that of the likeliest one is dropped.
    # It compares whole continuations so far; the min-p of other samplers compares single tokens
    cutoff: float | None = None


@dataclass
class Sample:
    """One continuation. `logprobs[i]` belongs to `tokens[i]`; the tokens that end it are included."""

    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)  # log pi(token) of the policy, also where draws are distinct
    ended: str = "length"  # of ENDS: out of tokens, </step> was written, the model ended its turn


@dataclass
class Usage:
    """What sampling and the critic cost."""

    generated: int = 0  # tokens drawn; a beginning that distinct continuations share counts once
    prefilled: int = 0  # prefix tokens that the sampler ran through the model; those in its cache do not count
    seconds: float = 0.0  # of the sampler
    valued: int = 0  # tokens that the critic read
    critic_seconds: float = 0.0
    decoded: int = 0  # rows that the sampler ran to decode, a token each; equal beginnings of a prefix may share a row

    def __add__(self, other: "Usage") -> "Usage":
        return Usage(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(Usage)))


@dataclass
class Trajectory:
    """One whole answer with its reward, and what it teaches. Lists have an item for each token of the completion."""

    problem: Problem
    prompt: list[int]
    completion: list[int]
    logprobs: list[float]  # log pi of the policy that sampled it
    reward: Reward
    advantages: list[float] | None = None  # None: the critic's R - V(s_t)
    # the critic's targets; None: R; with `advantages` given the critic then learns nothing
    returns: list[float] | None = None
    critic_only: bool = False  # teaches the critic, not the policy

    @property
    def length(self) -> int:
        return len(self.prompt) + len(self.completion)

    @property
    def teaches_critic(self) -> bool:
        return self.advantages is None or self.returns is not None


@dataclass
class Progress:
    """How far a run is. Tokens are counted as in Usage."""

    step: int = 0
    generated: int = 0
    prefilled: int = 0
    valued: int = 0
    seconds: float = 0.0  # of collecting and learning
    share: float = 0.0  # of the budget that is spent, in [0, 1]
    decoded: int = 0

    def advance(self, usage: Usage, budget: BudgetConfig, seconds: float = 0.0) -> None:
        """Count a training step and what it cost."""
        self.step += 1
        self.seconds += seconds
        self.generated += usage.generated
        self.prefilled += usage.prefilled
        self.valued += usage.valued
        self.decoded += usage.decoded
        self.share = self.spent(budget)

    def spent(self, budget: BudgetConfig) -> float:
        """The share of a budget that the counters have spent, in [0, 1]."""
        limits = (self.generated, budget.tokens), (self.step, budget.steps)
        return min(1.0, max(done / limit for done, limit in limits if limit))


class Sampler(Protocol):
    """Draws continuations with the current weights of its policy."""

    def sample(
        self, prefixes: list[list[int]], seeds: list[int], params: SamplingParams
    ) -> tuple[list[list[Sample]], Usage]:
        """`params.n` continuations of each prefix; fewer where distinct ones run out. Prefix i draws from the random
        stream seeds[i] alone. ValueError if prefix and continuation exceed the model's context."""

    def values(self, states: list[list[int]]) -> tuple[list[float], Usage]:
        """The critic's V(s) in [-1, 1] of token sequences."""

    def rest(self) -> None:
        """Give the GPU's memory to the trainer until the next call of `sample`."""


Grade = Callable[[Problem, list[int]], Reward]  # of a completion's token ids
Collected = tuple[list[Trajectory], Usage, dict[str, float]]  # what to learn from, its cost, metrics
Collect = Callable[..., Collected]  # (policy, sampler, problems, config, rng), once a training step


def stream(*keys: int) -> int:
    """A seed made of several numbers (run, step, problem …), the same in every process."""
    return int(np.random.SeedSequence(keys).generate_state(1, np.uint64)[0] >> 1)


def shared_rows(completions: list[list[int]]) -> int:
    """The rows that a sampler decodes for these completions of one prefix, where equal beginnings share a row. The last
    token of a completion is not run."""
    return len({tuple(tokens[:t]) for tokens in completions for t in range(1, len(tokens))})


def complete(
    policy, sampler: Sampler, problems: list[Problem], seeds: list[int], params: SamplingParams, grade: Grade
) -> tuple[list[list[Trajectory]], Usage]:
    """`params.n` graded answers of each problem. Problem i draws from the random stream seeds[i]."""
    prompts = [policy.encode(problem) for problem in problems]
    rows, usage = sampler.sample(prompts, seeds, params)
    graded = [
        [Trajectory(problem, prompt, s.tokens, s.logprobs, grade(problem, s.tokens)) for s in row]
        for problem, prompt, row in zip(problems, prompts, rows, strict=True)
    ]
    return graded, usage
