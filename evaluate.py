"""Evaluation: a policy alone, or with search at test time against best-of-N at an equal budget of tokens.

    python evaluate.py runs/mcts-tiny-seed0                            # the policy alone: mean@16 and pass@16
    python evaluate.py assets/tiny --search mcts --budget 1024         # a tree a problem, up to 1,024 tokens each
    python evaluate.py assets/tiny --search best-of-n --budget 1024    # samples at the same budget; several: 64 256

mean@k is the post's metric: the share of k samples a problem that are exactly right, averaged over problems.
With a search one answer a problem is chosen, the one with the highest dense reward. The verifier of Countdown needs no
secret, so a deployed solver has it too. Inside a tree every wrong answer counts -1: a near miss would draw all visits
to itself and leave the budget unspent.
"""

import json
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import torch
import tyro
from tqdm import tqdm

from config import TINY, SearchConfig, TreeConfig, check, check_choices
from countdown import Problem, check_game, make_problems, read_problems
from mcts import plant, search
from policy import Policy, encode
from runtime.cli import command, fail, given, normalized, option_names, read_config
from runtime.files import check_writable, write
from runtime.loading import load_policy, locate, pick_device, read_model_config, read_tokenizer
from runtime.provenance import provenance
from runtime.run_folder import log_of, read_settings
from runtime.samplers import SamplerPlan, make_sampler, pick_sampler
from runtime.scores import Score
from runtime.torch_sampler import KEPT, check_context, context_of
from sampling import Sampler, SamplingParams, Trajectory, Usage, complete, stream

CHUNK = 64  # problems sampled between two updates of the progress bar

# ------------------------------------------------------------------------------------------------ scores


def score_policy(
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
    rewards, usage, params = [], Usage(), SamplingParams(samples, max_tokens, temperature)
    for chunk, seeds in chunks(problems, seed, "evaluate", progress):
        rows, used = complete(policy, sampler, chunk, seeds, params, policy.grade)
        rewards += [[t.reward for t in row] for row in rows]
        usage += used
    return Score.of(rewards, usage)


def score_search(
    policy: Policy,
    sampler: Sampler,
    problems: list[Problem],
    method: str,
    config: SearchConfig,
    seed: int = 0,
    progress: bool = False,
) -> Score:
    """One answer a problem, the best that `method` ("mcts" or "best-of-n") finds with config.token_budget tokens. Both
    end with a right answer (mcts: if config.until_right)."""
    rewards, usage = [], Usage()
    for chunk, seeds in chunks(problems, seed, method, progress):
        if method == "mcts":
            trees = plant(policy, chunk, seeds)
            used = search(trees, sampler, partial(policy.grade, exact=True), config)
            rows = [[policy.grade(tree.problem, node.completion()) for node in tree.answers()] for tree in trees]
        else:
            samples, used = best_of_budget(policy, sampler, chunk, config, seeds)
            rows = [[t.reward for t in row] for row in samples]
        for problem, row in zip(chunk, rows, strict=True):
            rewards.append([max(row or [policy.grade(problem, [])], key=lambda reward: reward.value)])
        usage += used
    return Score.of(rewards, usage)


def chunks(problems: list[Problem], seed: int, what: str, progress: bool) -> Iterator[tuple[list[Problem], list[int]]]:
    """Some problems at a time, and a seed for each."""
    for start in tqdm(range(0, len(problems), CHUNK), desc=what, leave=False, disable=not progress):
        chunk = problems[start : start + CHUNK]
        yield chunk, [stream(seed, start + i) for i in range(len(chunk))]


def best_of_budget(
    policy: Policy, sampler: Sampler, problems: list[Problem], config: SearchConfig, seeds: list[int]
) -> tuple[list[list[Trajectory]], Usage]:
    """For each problem the samples that config.token_budget pays for, drawn 8 at a time. Usage counts the tokens of
    those samples alone."""
    rows: list[list[Trajectory]] = [[] for _ in problems]
    params = SamplingParams(8, config.max_tokens, config.temperature)
    unfinished, seconds, block = list(range(len(problems))), 0.0, 0
    while unfinished:
        chunk, streams = [problems[i] for i in unfinished], [stream(seeds[i], block) for i in unfinished]
        drawn, used = complete(policy, sampler, chunk, streams, params, policy.grade)
        for i, more in zip(unfinished, drawn, strict=True):
            rows[i] = within_budget(rows[i] + more, config.token_budget)
        block, seconds = block + 1, seconds + used.seconds
        unfinished = [i for i in unfinished if len(rows[i]) == 8 * block and not rows[i][-1].reward.correct]
    generated = sum(len(t.completion) for row in rows for t in row)
    return rows, Usage(generated, sum(len(row[0].prompt) for row in rows), seconds)


def within_budget(samples: list[Trajectory], budget: int) -> list[Trajectory]:
    """The first samples that fit into a budget of tokens, at least one, and none after a right one."""
    spent = 0
    for count, sample in enumerate(samples):
        spent += len(sample.completion)
        if count and spent > budget:
            return samples[:count]
        if sample.reward.correct:
            return samples[: count + 1]
    return samples


# ------------------------------------------------------------------------------------------------ command line


@dataclass
class Evaluation:
    """Evaluate a run, a saved policy or a Hugging Face model on Countdown. --search none, mcts or best-of-n."""

    model: tyro.conf.Positional[str] = TINY  # a run folder, a policy's folder or a Hugging Face name
    method: str = "none"  # none (the policy alone), mcts, best-of-n; --search is the same
    data: Path | None = None  # JSONL problems, all of them; default: the test split
    problems: int = 820  # of the test split
    skip: int = 0  # before them; problems after the first 820 have decided nothing yet
    size: int = 4  # numbers in a problem of the test split
    temperature: float = 1.0
    max_tokens: int = 64  # tokens of an answer at most
    sampler: str = "auto"  # torch, vllm; auto: vllm where it is installed with a GPU and can draw what is asked
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
            self, sampler=("auto", "torch", "vllm"), dtype=("float32", "bfloat16"), quantize=("none", "nf4")
        )
        check_game(size=self.size, seed=self.seed)
        check(self, "at least", 1, "problems rows max_tokens")
        check(self, "at least", 0, "kept skip")
        check(self, "above", 0, "cache_gb temperature")
        if self.data and (self.problems, self.skip, self.size) != (820, 0, 4):
            raise ValueError("--data brings its own problems: leave out --problems, --skip and --size")
        if self.out:
            check_writable(self.out)

    @property
    def cutoff(self) -> float | None:
        return None

    @property
    def drawn_tokens(self) -> int:
        """Tokens of an answer, before a search cuts its last step to the limit."""
        return self.max_tokens

    def search(self, token_budget: int) -> SearchConfig:
        """What a search with so many tokens a problem reads."""
        return SearchConfig(temperature=self.temperature, max_tokens=self.max_tokens, token_budget=token_budget)


@dataclass
class PolicyEvaluation(Evaluation):
    __doc__ = Evaluation.__doc__
    samples: int = 16  # answers a problem, k

    def __post_init__(self):
        super().__post_init__()
        check(self, "at least", 1, "samples")


@dataclass
class BestOfNEvaluation(Evaluation):
    __doc__ = Evaluation.__doc__
    budget: tuple[int, ...] = (1024,)  # tokens a problem; a search for each

    def __post_init__(self):
        super().__post_init__()
        check(self, "at least", 1, "budget")


@dataclass
class TreeEvaluation(BestOfNEvaluation):
    __doc__ = Evaluation.__doc__
    tree: TreeConfig = TreeConfig(simulations=1024, children=3, workers=1, prior="sum")

    def __post_init__(self):
        super().__post_init__()
        self.search(self.budget[0])  # settings that do not go together

    @property
    def cutoff(self) -> float | None:
        return self.tree.cutoff

    @property
    def drawn_tokens(self) -> int:
        return self.max_tokens + self.tree.step_tokens - 1

    def search(self, token_budget: int) -> SearchConfig:
        return replace(
            SearchConfig(**vars(self.tree), temperature=self.temperature, max_tokens=self.max_tokens),
            token_budget=token_budget,
            until_right=True,
        )


EVALUATIONS = {"none": PolicyEvaluation, "mcts": TreeEvaluation, "best-of-n": BestOfNEvaluation}


def parse(args: list[str]) -> Evaluation:
    """The settings of an evaluation from a command line."""
    args = normalized(args)
    method = given(args, "--method", "none")
    if method not in EVALUATIONS:
        fail(f"search must be one of {', '.join(EVALUATIONS)}, not {method!r}")
    others = {name for kind in EVALUATIONS.values() for name in option_names(kind())}
    default = EVALUATIONS[method](method=method)
    return read_config(type(default), args, default, {name: f"--search {method}" for name in others})


def scores(config: Evaluation) -> Iterator[Score]:
    """What the command line asks for, a score a budget. ValueError, before weights are loaded, for what can't be."""
    check_run(config)
    if config.data:
        problems = read_problems(config.data)
    else:
        problems = make_problems(config.skip + config.problems, "test", size=config.size)[config.skip :]
    device = pick_device(config.device)
    engine = pick_sampler(config, config.model, device, config.cutoff is not None)
    folder, base = locate(config.model)
    tokenizer = read_tokenizer(folder, base)
    longest = max(len(encode(tokenizer, problem)) for problem in problems)
    check_context(context_of(read_model_config(folder, base)), longest, config.drawn_tokens)
    policy = load_policy(config.model, 0, device, config.dtype, config.quantize, train=False)
    plan = SamplerPlan(engine, longest + config.max_tokens, config.rows, config.kept, config.cache_gb)
    sampler, seed = make_sampler(plan, policy, config.seed), config.seed
    if config.method == "none":
        yield score_policy(
            policy, sampler, problems, config.samples, config.temperature, config.max_tokens, seed, progress=True
        )
        return
    for budget in config.budget:
        yield score_search(policy, sampler, problems, config.method, config.search(budget), seed, progress=True)


def check_run(config: Evaluation) -> None:
    """ValueError if the model is a run that was trained on another game than the one it is to be evaluated on."""
    folders = Path(config.model), Path(config.model).parent  # RUN/best and the like too
    task = next((read_settings(folder).get("task", {}) for folder in folders if log_of(folder)), {})
    if task.get("split") == "post" and not config.data:
        raise ValueError(f"{config.model} was trained with --split post, on the test's own numbers: pass --data")
    if (most := task.get("max_tokens", 0)) > config.max_tokens:
        raise ValueError(f"{config.model} has learnt answers of up to {most} tokens: pass --max-tokens {most}")
    if (size := task.get("size", config.size)) != config.size and not config.data:
        raise ValueError(f"{config.model} has learnt the game with {size} numbers: pass --size {size}")


def show(config: Evaluation, score: Score) -> None:
    usage = score.usage
    print(f"{config.model}, search={config.method}: {score.line()}")
    print(
        f"{usage.generated / score.problems:.0f} tokens generated a problem, "
        f"{usage.prefilled / score.problems:.0f} prefilled, {usage.valued / score.problems:.0f} read by the critic; "
        f"{usage.seconds:.0f} s of sampling, {usage.critic_seconds:.0f} s of the critic"
    )


def main() -> None:
    config = parse(sys.argv[1:])
    done = []
    try:
        for score in scores(config):
            done.append(asdict(score))
            if config.out:  # before the lines below: whoever reads them may be gone
                used = {"problems": score.problems, "size": None, "skip": None} if config.data else {}
                result = asdict(config) | used | {"scores": done, "provenance": provenance()}
                write(config.out, json.dumps(result, default=str))
            show(config, score)
    except torch.OutOfMemoryError:
        fail(f"out of GPU memory: pass less than --rows {config.rows} or --kept {config.kept}, or --quantize nf4")


if __name__ == "__main__":
    command(main)
