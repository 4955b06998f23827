"""Evaluation: mean@k and pass@k with 95 % intervals, and search at test time against best-of-N at equal tokens.

    python evaluate.py runs/mcts                                       # the trained policy alone, no search
    python evaluate.py assets/tiny --search mcts --budget 1024         # a tree a problem, up to 1,024 tokens each
    python evaluate.py assets/tiny --search best-of-n --budget 1024    # its rival at the same budget; several: 64 256

mean@k is the post's metric: the share of k samples a problem that are exactly right, averaged over problems.
With search, one answer a problem is chosen by the verifier's dense reward, among samples or among a tree's answers:
Countdown's verifier needs no secret, so a deployed solver has it too. Inside a tree any wrong answer is -1: one that
is near would draw all visits to itself, and leave the budget unspent.
"""

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
import tyro
from tqdm import tqdm

import runs
from checks import check, check_choices, check_writable
from countdown import Problem, check_game, make_problems, read_problems
from engines import make_sampler, pick_sampler
from loading import TINY, load_policy, locate, pick_device, read_model_config, read_tokenizer
from mcts import SearchConfig, search
from policy import Policy, encode
from sampling import KEPT, Sampler, Trajectory, Usage, check_context, complete, context_of, stream

CHUNK = 64  # problems sampled between two updates of the progress bar
DRAWS, BLOCK = 10_000, 250  # of a bootstrap, in all and at a time
OF_TREES = "--simulations --children --distinct --min-p --prior --workers"
UNREAD = {"none": f"--budget {OF_TREES}", "best-of-n": f"--samples {OF_TREES}", "mcts": "--samples"}  # by a search


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
            f"pass@{self.samples} {self.pass_at_k:.2%}  reward {self.reward:+.3f}  format {self.parsed:.1%}"
        )


def evaluate(
    policy: Policy,
    sampler: Sampler,
    problems: list[Problem],
    samples: int = 16,
    temperature: float = 1.0,
    max_tokens: int = 512,
    seed: int = 0,
    progress: bool = False,
) -> Score:
    """mean@k and pass@k of the policy alone, k = `samples`. Sample j of problem i depends on (seed, i) alone."""
    rewards, usage = [], Usage()
    starts = tqdm(range(0, len(problems), CHUNK), desc="evaluate", leave=False, disable=not progress)
    for start in starts:
        some = problems[start : start + CHUNK]
        seeds = [stream(seed, start + i) for i in range(len(some))]
        rows, used = complete(policy, sampler, some, samples, seeds, max_tokens, temperature, "evaluate")
        rewards += [[t.reward for t in row] for row in rows]
        usage += used
    return Score.of(rewards, usage)


def evaluate_search(
    policy: Policy,
    sampler: Sampler,
    problems: list[Problem],
    method: str,
    config: SearchConfig,
    seed: int = 0,
    progress: bool = False,
) -> Score:
    """One answer a problem, the best that `method` ("mcts" or "best-of-n") finds with config.token_budget tokens. The
    verifier is at hand, so that both are over with a right one (mcts: if config.until_right)."""
    rewards, usage = [], Usage()
    for start in tqdm(range(0, len(problems), CHUNK), desc=method, leave=False, disable=not progress):
        some = problems[start : start + CHUNK]
        seeds = [stream(seed, start + i) for i in range(len(some))]
        if method == "mcts":
            prompts = [policy.encode(problem) for problem in some]
            exact = partial(policy.grade, exact=True)
            trees, used = search(some, prompts, sampler, sampler.values, exact, config, seeds)
            found = [[policy.grade(tree.problem, node.completion()) for node in tree.answers()] for tree in trees]
        else:
            rows, used = best_of_budget(policy, sampler, some, config, seeds)
            found = [[t.reward for t in row] for row in rows]
        for problem, answers in zip(some, found, strict=True):
            rewards.append([max(answers or [policy.grade(problem, [])], key=lambda reward: reward.value)])
        usage += used
    return Score.of(rewards, usage)


def best_of_budget(
    policy: Policy, sampler: Sampler, problems: list[Problem], config: SearchConfig, seeds: list[int]
) -> tuple[list[list[Trajectory]], Usage]:
    """For each problem the samples that are `paid` from config.token_budget. They are drawn in blocks of 8; usage
    counts the tokens of those that are paid."""
    rows: list[list[Trajectory]] = [[] for _ in problems]
    going, seconds, block = list(range(len(problems))), 0.0, 0
    while going:
        some, streams = [problems[i] for i in going], [stream(seeds[i], block) for i in going]
        drawn, used = complete(policy, sampler, some, 8, streams, config.max_tokens, config.temperature, "best-of-n")
        for i, more in zip(going, drawn, strict=True):
            rows[i] = paid(rows[i] + more, config.token_budget)
        block, seconds = block + 1, seconds + used.seconds
        going = [i for i in going if len(rows[i]) == 8 * block and not rows[i][-1].reward.correct]
    generated = sum(len(t.completion) for row in rows for t in row)
    return rows, Usage(generated, sum(len(row[0].prompt) for row in rows), seconds)


def paid(samples: list[Trajectory], budget: int) -> list[Trajectory]:
    """The first samples that fit into a budget of tokens, at least one, and none after a right one."""
    spent = 0
    for count, sample in enumerate(samples):
        spent += len(sample.completion)
        if count and spent > budget:
            return samples[:count]
        if sample.reward.correct:
            return samples[: count + 1]
    return samples


@dataclass
class EvaluateConfig:
    """Evaluate a run, a saved policy or a Hugging Face model on Countdown, with or without search."""

    model: tyro.conf.Positional[str] = str(TINY)  # a run folder, a policy's folder or a Hugging Face name
    search: str = "none"  # none, mcts, best-of-n
    budget: tuple[int, ...] = (1024,)  # tokens a problem, with search; a search for each
    data: Path | None = None  # JSONL problems, all of them; default: the test split
    problems: int = 820  # of the test split
    skip: int = 0  # before them; those after the first 820 have decided nothing yet
    size: int = 4  # numbers in one of its problems
    samples: int = 16  # completions a problem, without search
    temperature: float = 1.0
    max_tokens: int = 64  # of a completion
    simulations: int = 1024  # visits a tree at most, with mcts
    children: int = 3
    distinct: bool = False  # children drawn without replacement
    min_p: float = 0.0  # of distinct children: as in training (mcts.py)
    prior: str = "sum"  # mean, sum, count, uniform
    workers: int = 1
    sampler: str = "auto"  # auto (vllm where it is installed with a GPU, but for nf4 and distinct), torch, vllm
    dtype: str = "float32"  # of the weights: float32, bfloat16
    quantize: str = "none"  # linear layers: none, nf4
    rows: int = 1024  # sequences that the torch sampler decodes together
    kept: int = KEPT  # tokens whose keys and values it keeps during a search: 28 kB each with Qwen2.5-1.5B in bf16
    cache_gb: float = 1.0  # GB of vLLM's KV cache
    device: str = "auto"  # auto, cpu, cuda
    seed: int = 0
    out: Path | None = None  # write the result as JSON here

    def __post_init__(self):
        check_choices(
            self, search=("none", "mcts", "best-of-n"), sampler=("auto", "torch", "vllm"),
            dtype=("float32", "bfloat16"), quantize=("none", "nf4"),
        )  # fmt: skip
        check_game(size=self.size, seed=self.seed)
        check(self, "at least", 1, "problems samples budget rows")
        check(self, "at least", 0, "kept skip")
        check(self, "above", 0, "cache_gb")
        self.tree(self.budget[0])
        if self.out:
            check_writable(self.out)

    def unread(self) -> dict[str, str]:
        """The options that this search, or problems from a file, have no use for."""
        of_split = ("--problems", "--skip", "--size") if self.data else ()
        return dict.fromkeys(UNREAD[self.search].split(), f"--search {self.search}") | dict.fromkeys(of_split, "--data")

    def tree(self, budget: int) -> SearchConfig:
        """The settings of a search with so many tokens a problem."""
        shared = ("simulations", "children", "distinct", "min_p", "prior", "workers", "temperature", "max_tokens")
        return SearchConfig(token_budget=budget, until_right=True, **{name: getattr(self, name) for name in shared})


def scores(config: EvaluateConfig) -> Iterator[Score]:
    """What the command line asks for, a score a budget. ValueError, before weights are loaded, for what can't be."""
    folders = Path(config.model), Path(config.model).parent  # RUN/best and the like too
    run = next((runs.read_settings(folder) for folder in folders if runs.log_of(folder)), {})
    if run.get("split") == "post" and not config.data:
        raise ValueError(f"{config.model} was trained with --split post, on the test's own numbers: pass --data")
    if (most := run.get("max_tokens", 0)) > config.max_tokens:
        raise ValueError(f"{config.model} has learnt answers of up to {most} tokens: pass --max-tokens {most}")
    if (size := run.get("size", config.size)) != config.size and not config.data:
        raise ValueError(f"{config.model} has learnt the game with {size} numbers: pass --size {size}")
    if config.data:
        problems = read_problems(config.data)
    else:
        problems = make_problems(config.skip + config.problems, "test", size=config.size)[config.skip :]
    device = pick_device(config.device)
    engine = pick_sampler(config, device, config.search == "mcts" and config.distinct)
    folder, base = locate(config.model)
    tokenizer = read_tokenizer(folder, base)
    longest = max(len(encode(tokenizer, problem)) for problem in problems)
    drawn = config.tree(1).drawn_tokens if config.search == "mcts" else config.max_tokens
    check_context(context_of(read_model_config(folder, base)), longest, drawn)
    policy = load_policy(config.model, 0, device, config.dtype, config.quantize, train=False)
    context = longest + config.max_tokens
    sampler = make_sampler(engine, policy, context, config.rows, config.kept, config.cache_gb, config.seed)
    if config.search == "none":
        yield evaluate(
            policy, sampler, problems, config.samples, config.temperature, config.max_tokens, config.seed, True
        )
        return
    for budget in config.budget:
        yield evaluate_search(policy, sampler, problems, config.search, config.tree(budget), config.seed, True)


def main() -> None:
    config = runs.read_config(EvaluateConfig)
    found = []
    try:
        for score in scores(config):
            found.append(asdict(score))
            if config.out:  # first: what reads the lines below may be gone
                used = {"problems": score.problems, "size": None, "skip": None} if config.data else {}
                told = asdict(config) | used | {"scores": found, "provenance": runs.provenance()}
                runs.write(config.out, json.dumps(told, default=str))
            tell(config, score)
    except torch.OutOfMemoryError:
        runs.fail(f"out of GPU memory: pass less than --rows {config.rows} or --kept {config.kept}, or --quantize nf4")


def tell(config: EvaluateConfig, score: Score) -> None:
    usage = score.usage
    print(f"{config.model}, search={config.search}: {score.line()}")
    print(
        f"{usage.generated / score.problems:.0f} tokens generated a problem, "
        f"{usage.prefilled / score.problems:.0f} prefilled, {usage.valued / score.problems:.0f} read by the critic; "
        f"{usage.seconds:.0f} s of sampling, {usage.critic_seconds:.0f} s of the critic"
    )


if __name__ == "__main__":
    runs.command(main)
