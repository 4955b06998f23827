"""Scores of an evaluation: mean@k and pass@k with 95 % intervals."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from tqdm import tqdm

from sampling import Problem, Sampler, SamplingParams, Usage, complete, stream

DRAWS, BLOCK = 10_000, 250  # of a bootstrap, in all and at a time
CHUNK = 64  # problems sampled between two updates of the progress bar


def resampled(per_problem: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Means over as many problems, drawn with replacement: the bootstrap. [DRAWS]"""
    size = BLOCK, len(per_problem)
    return np.concatenate([per_problem[rng.integers(size[1], size=size)].mean(1) for _ in range(DRAWS // BLOCK)])


def interval(draws: np.ndarray) -> tuple[float, float]:
    """The 95 % percentile interval."""
    low, high = np.quantile(draws, [0.025, 0.975])
    return float(low), float(high)


def bootstrap(per_problem: np.ndarray, seed: int = 0) -> tuple[float, float]:
    """The 95 % interval of a mean over problems."""
    return interval(resampled(per_problem, np.random.default_rng(seed)))


@dataclass
class Score:
    """What an evaluation found. Shares in [0, 1]; intervals are 95 % bootstrap over problems."""

    problems: int
    samples: int  # k
    mean_at_k: float
    mean_low: float
    mean_high: float
    pass_at_k: float
    pass_low: float
    pass_high: float
    reward: float  # mean dense reward in [-1, 1]
    parsed: float  # share of completions that keep the format and the number rule
    usage: Usage
    right: list[int]  # samples of each problem that are right

    @classmethod
    def of(cls, rewards: list[list], usage: Usage) -> "Score":
        """From k rewards a problem."""
        correct = np.array([[r.correct for r in row] for row in rewards], float)  # [problems, k]
        passed = correct.max(1)  # [problems]
        flat = [r for row in rewards for r in row]
        return cls(
            len(rewards),
            correct.shape[1],
            float(correct.mean()),
            *bootstrap(correct.mean(1)),
            float(passed.mean()),
            *bootstrap(passed),
            float(np.mean([r.value for r in flat])),
            float(np.mean([r.parsed for r in flat])),
            usage,
            [sum(r.correct for r in row) for row in rewards],
        )

    @classmethod
    def read(cls, saved: dict) -> "Score":
        """From `asdict` of one."""
        return cls(**saved | {"usage": Usage(**saved["usage"])})

    def line(self) -> str:
        return (
            f"mean@{self.samples} {self.mean_at_k:.2%} [{self.mean_low:.2%}, {self.mean_high:.2%}]  "
            f"pass@{self.samples} {self.pass_at_k:.2%}  dense reward {self.reward:+.3f}  format {self.parsed:.1%}"
        )


# ------------------------------------------------------------------------------------------------ measuring


def score_policy(
    policy,
    sampler: Sampler,
    problems: list[Problem],
    samples: int = 16,
    temperature: float = 1.0,
    max_tokens: int = 512,
    seed: int = 0,
    progress: bool = False,
) -> Score:
    """mean@k and pass@k of the policy alone, k = `samples`. Sample j of problem i depends on (seed, i) alone."""
    rewards, usage, params = [], Usage(), SamplingParams(samples, max_tokens, temperature)
    for chunk, seeds in chunks(problems, seed, "evaluate", progress):
        rows, used = complete(policy, sampler, chunk, seeds, params, policy.grade)
        rewards += [[t.reward for t in row] for row in rows]
        usage += used
    return Score.of(rewards, usage)


def chunks(problems: list[Problem], seed: int, what: str, progress: bool) -> Iterator[tuple[list[Problem], list[int]]]:
    """Some problems at a time, and a seed for each."""
    for start in tqdm(range(0, len(problems), CHUNK), desc=what, leave=False, disable=None if progress else True):
        chunk = problems[start : start + CHUNK]
        yield chunk, [stream(seed, start + i) for i in range(len(chunk))]
