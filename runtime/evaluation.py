"""All of evaluate.py but the search: settings, policy, sampler and problems, and the program around a score."""

import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
import tyro

from config import TINY, SearchConfig, TaskConfig, TreeConfig, absolute_task, check, check_choices, check_ranges
from policy import Policy
from runtime import data, tasks
from runtime.cli import fail, given, normalized, option_names, read_config, restore
from runtime.files import check_writable, write
from runtime.loading import load_policy, locate, pick_device, read_chat, read_model_config
from runtime.provenance import provenance
from runtime.run_folder import log_of, read_settings
from runtime.samplers import SamplerPlan, make_sampler, pick_sampler
from runtime.scores import Score
from runtime.torch_sampler import KEPT, check_context, context_of
from runtime.unread import check_stated
from sampling import Problem, Sampler, Task


@dataclass
class Evaluation:
    """Evaluate a run, a saved policy or a Hugging Face model on its task. --search none, mcts or best-of-n."""

    model: tyro.conf.Positional[str] = TINY  # a run folder, a policy's folder or a Hugging Face name
    method: str = "none"  # none (the policy alone), mcts, best-of-n; --search is the same
    task: str = "countdown"  # countdown; FILE.py:NAME: a task of your own; default: the one that the run has learnt
    data: Path | None = None  # a file of problems, all of them; a folder's test; default: the test split
    problems: int = 820  # of the test split
    skip: int = 0  # before them; problems after the first 820 have decided nothing yet
    size: int = 4  # numbers in a problem of the test split
    temperature: float = 1.0
    max_tokens: int = 64  # tokens of an answer at most
    sampler: str = "auto"  # torch, vllm; auto: vllm where it is installed with a GPU and can draw what is asked
    dtype: str = "float32"  # of the weights: float32, bfloat16
    quantize: str = "none"  # linear layers: none, nf4
    template_options: str = ""  # of the chat template, as JSON: {"enable_thinking": false}; a run's policy has its own
    rows: int = 1024  # sequences that the torch sampler decodes together
    kept: int = KEPT  # tokens whose keys and values it keeps during a search: 28 kB each with Qwen2.5-1.5B in bf16
    cache_gb: float = 1.0  # GB of vLLM's KV cache
    device: str = "auto"  # auto, cpu, cuda
    seed: int = 0
    out: Path | None = None  # write the result as JSON here

    def __post_init__(self):
        check_choices(self, sampler=("auto", "torch", "vllm"), dtype=("float32", "bfloat16"), quantize=("none", "nf4"))
        check_ranges(size=self.size, seed=self.seed)
        check(self, "at least", 1, "problems rows max_tokens")
        check(self, "at least", 0, "kept skip")
        check(self, "above", 0, "cache_gb temperature")
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
    config = read_config(type(default), args, default, {name: f"--search {method}" for name in others})
    config = replace(config, task=absolute_task(given(args, "--task", "") or learnt_task(config.model)))
    check_stated(args, config, default)
    return config


def learnt_task(model: str) -> str:
    """The task that a run has learnt; countdown for another model. ValueError if the task's file has changed since."""
    run = run_of(model)
    task = settings_of(run).task if run else "countdown"
    if run and not tasks.is_that_of(task, run):
        raise ValueError(f"{tasks.file_of(task)} has changed since {run} learnt it: pass --task to take it as it is")
    return task


def load(config: Evaluation) -> tuple[Policy, Sampler, list[Problem]]:
    """What an evaluation works with. ValueError, before weights are loaded, for what can't be evaluated."""
    task = tasks.load_task(TaskConfig(config.task, size=config.size))
    problems = choose_problems(config, task)
    device = pick_device(config.device)
    engine = pick_sampler(config, config.model, device, config.cutoff is not None)
    folder, base = locate(config.model)
    longest = read_chat(folder, base, task, config.template_options).longest(problems)
    check_context(context_of(read_model_config(folder, base)), longest, config.drawn_tokens)
    options = dict(train=False, template_options=config.template_options, task=task)
    policy = load_policy(config.model, 0, device, config.dtype, config.quantize, **options)
    plan = SamplerPlan(engine, longest + config.max_tokens, config.rows, config.kept, config.cache_gb)
    return policy, make_sampler(plan, policy, config.seed), problems


def choose_problems(config: Evaluation, task: Task) -> list[Problem]:
    """The problems of an evaluation: those of --data; of a run that had --data, its test; else the task's test.
    ValueError if the model is a run that was trained on another game than the one it is to be evaluated on."""
    run = run_of(config.model)
    learnt = settings_of(run) if run else None
    own = None  # what the run was trained with
    if learnt and learnt.task == config.task:
        own = learnt.data
        check_settings(config, learnt)
    if own and data.are_those_of(config.data or own, run):
        test = data.read_splits(config.data or own)["test"]
        problems = test[config.skip : config.skip + config.problems]
        if not problems:
            raise ValueError(f"{own} has {len(test)} test problems: pass a smaller --skip")
        remarks = [f"{len(problems):,} of {len(test):,} test problems of {own}, which {run} was trained with"]
    elif config.data:
        problems = data.read_test(config.data)
        remarks = data.remarks({"test": problems}, config.model)
        if own and own.exists():
            remarks += data.leak("test", problems, data.read_splits(own)["train"])
    elif own:
        raise ValueError(f"{own} has changed since {run} was trained with it: pass --data with other problems")
    else:
        problems = task.problems("test", config.skip + config.problems)[config.skip :]
        if not problems:
            raise ValueError(f"{config.task} has no more test problems: pass a smaller --skip")
        remarks = data.unfamiliar(problems, config.model) if config.task == "countdown" else []
    for line in remarks:
        print(line)
    return problems


def run_of(model: str) -> Path | None:
    """The folder of the run that a model is, or is part of, as RUN/best is; None for another model."""
    return next((folder for folder in (Path(model), Path(model).parent) if log_of(folder)), None)


def settings_of(run: Path) -> TaskConfig:
    """The settings of the task that a run has learnt."""
    return restore(TaskConfig, read_settings(run).get("task", {}), run)[0]


def check_settings(config: Evaluation, task: TaskConfig) -> None:
    """ValueError for an evaluation that does not fit the game that a run has learnt."""
    if task.split == "post" and not config.data:
        raise ValueError(f"{config.model} was trained with --split post, on the test's own numbers: pass --data")
    if task.max_tokens > config.max_tokens:
        raise ValueError(
            f"{config.model} has learnt answers of up to {task.max_tokens} tokens: pass --max-tokens {task.max_tokens}"
        )
    if task.size != config.size and not config.data:
        if task.data:
            raise ValueError(f"{config.model} was trained with --data {task.data}: leave out --size")
        raise ValueError(f"{config.model} has learnt the game with {task.size} numbers: pass --size {task.size}")


# ------------------------------------------------------------------------------------------------ the program


def run(config: Evaluation, score_policy: Callable[..., Score], score_search: Callable[..., Score]) -> None:
    """Measure, print and write what the command line asks for, by the functions of evaluate.py."""
    done = []
    try:
        for score in scores(config, score_policy, score_search):
            done.append(asdict(score))
            if config.out:  # before the lines below: whoever reads them may be gone
                used = {"problems": score.problems, "size": None, "skip": None} if config.data else {}
                result = asdict(config) | used | {"scores": done, "provenance": provenance()}
                write(config.out, json.dumps(result, default=str))
            show(config, score)
    except torch.OutOfMemoryError:
        kept = f" or --kept {config.kept}" if config.method == "mcts" else ""
        fail(f"out of GPU memory: pass less than --rows {config.rows}{kept}, or --quantize nf4")


def scores(config: Evaluation, score_policy, score_search) -> Iterator[Score]:
    """A score of the policy alone, or one of a search for each budget."""
    policy, sampler, problems = load(config)
    if config.method == "none":
        settings = config.samples, config.temperature, config.max_tokens, config.seed
        yield score_policy(policy, sampler, problems, *settings, progress=True)
        return
    for budget in config.budget:
        settings = config.method, config.search(budget), config.seed
        yield score_search(policy, sampler, problems, *settings, progress=True)


def show(config: Evaluation, score: Score) -> None:
    """Print a score and what it cost."""
    usage = score.usage
    counts = [f"{getattr(usage, name) / score.problems:.0f} {name}" for name in ("generated", "decoded", "prefilled")]
    print(f"{config.model}, search={config.method}: {score.line()}")
    print(
        f"tokens a problem: {', '.join(counts)}, {usage.valued / score.problems:.0f} read by the critic; "
        f"{usage.seconds:.0f} s of sampling, {usage.critic_seconds:.0f} s of the critic"
    )
