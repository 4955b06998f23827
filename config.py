"""The settings of a training run, by topic, and the presets.

    preset_for("tiny", "mcts")     a preset's settings for a method, a Config
    Config.tree.simulations        topics hold the settings; a function takes the topic that it reads

A method has the topics that it reads. The others are None, and the command line has no options for them.
`python ppo.py --help` lists the dozen settings that a student changes, `--help-all` lists all.
"""

import math
import operator
from collections.abc import Collection
from dataclasses import dataclass, fields, is_dataclass, replace
from pathlib import Path
from typing import SupportsIndex

TINY = "assets/tiny"  # the embedded policy
METHODS = ("mcts", "best-of-n", "cispo", "grpo", "none")
GROUP_METHODS = ("cispo", "grpo")
SAMPLING_METHODS = ("best-of-n", *GROUP_METHODS)
LESSON_NAMES = (
    "best-path", "best-answer", "best-path-q", "best-path-tree", "every-answer", "answers", "steps", "visits",
)  # fmt: skip

# ------------------------------------------------------------------------------------------------ checks

# what a game of Countdown may be; all plays of a problem are enumerated: 737,280 of 5 numbers, 88 million of 6
RANGES = {"size": (2, 5), "highest": (2, 999), "plays": (1, 10**9), "seed": (0, 2**32 - 1)}
RULES = {"at least": operator.ge, "at most": operator.le, "above": operator.gt}


def check(settings: object, rule: str, bound: float, names: str) -> None:
    """check(self, "at least", 1, "steps batch") raises ValueError for the first of these fields that breaks the rule.

    NaN and infinity break every rule. Each value of a tuple is checked. None passes.
    """
    for name in names.split():
        for value in field_values(settings, name):
            if not isinstance(value, int | float) or not math.isfinite(value):
                raise ValueError(f"{name} must be a finite number, not {value!r}")
            if not RULES[rule](value, bound):
                raise ValueError(f"{name} must be {rule} {bound}, not {value}")


def check_ranges(**settings: int) -> None:
    """ValueError for a setting that is out of its range."""
    for name, value in settings.items():
        least, most = RANGES[name]
        if not isinstance(value, SupportsIndex) or not least <= value <= most:  # an integer of Python or of NumPy
            raise ValueError(f"{name} must be from {least} to {most}, not {value!r}")


def check_choices(settings: object, **choices: Collection[str]) -> None:
    """ValueError for the first field whose value is not one of its choices."""
    for name, allowed in choices.items():
        for value in field_values(settings, name):
            if value not in tuple(allowed):
                raise ValueError(f"{name} must be one of {', '.join(allowed)}, not {value!r}")


def field_values(settings: object, name: str) -> tuple:
    """The values of a field: every item of a tuple, nothing for None."""
    value = getattr(settings, name)
    if value == ():
        raise ValueError(f"{name} needs a value")
    if value is None:
        return ()
    return value if isinstance(value, tuple) else (value,)


# ------------------------------------------------------------------------------------------------ topics


@dataclass(frozen=True)
class TaskConfig:
    """The task, its problems and its reward."""

    task: str = "countdown"  # countdown; FILE.py:NAME: a task of your own (docs/your_task.md)
    # None: the kit makes the problems. A folder: its train.jsonl, validation.jsonl and test.jsonl (or .json, .parquet).
    # A file: 65 % of its sets of numbers are for training, 10 % for validation, 25 % for the test
    data: Path | None = None
    size: int = 4  # numbers in a problem
    split: str = "multiset"  # multiset: no leak; post: the post's leaking split, for comparison
    train_problems: int = 20_000  # distinct problems to draw from
    max_tokens: int = 64  # tokens of an answer at most
    reward: str = "exact"  # exact: 1 if right, else -1; dense: the task's value, a near miss earns more (the post)
    template_options: str = ""  # of the chat template, as JSON: {"enable_thinking": false}

    def __post_init__(self):
        check_choices(self, split=("multiset", "post"), reward=("dense", "exact"))
        check_ranges(size=self.size)
        check(self, "at least", 1, "train_problems max_tokens")
        # config.json names places that are the same from everywhere
        object.__setattr__(self, "task", absolute_task(self.task))
        if self.data is not None:
            object.__setattr__(self, "data", Path(self.data).expanduser().absolute())


def absolute_task(task: str) -> str:
    """A task with the whole path of its file. ValueError for what names no task."""
    if task == "countdown":
        return task
    file, _, name = task.rpartition(":")
    if not file.endswith(".py") or not name.isidentifier():
        raise ValueError(f"task must be countdown or FILE.py:NAME, not {task!r}")
    return f"{Path(file).expanduser().absolute()}:{name}"


@dataclass(frozen=True)
class BudgetConfig:
    """When training ends: at the limit that is reached first."""

    tokens: int = 1_500_000  # generated tokens, 0 for no limit
    steps: int = 0  # training steps, 0 for no limit

    def __post_init__(self):
        check(self, "at least", 0, "tokens steps")
        if self.tokens == 0 and self.steps == 0:
            raise ValueError("the run would never end: set tokens or steps above 0")


@dataclass(frozen=True)
class TreeConfig:
    """How a tree is searched."""

    simulations: int = 64  # visits of the root
    children: int = 4  # steps drawn at a node, K
    # None: steps are drawn independently. A number: they are drawn without replacement, and a step whose probability
    # so far is below cutoff times that of the likeliest one is dropped (0 drops none; not with vLLM)
    cutoff: float | None = None
    workers: int = 4  # leaves that a tree selects in one wave
    c_puct: float = 0.5  # exploration constant c
    selection: str = "puct"  # puct, uct, gumbel (sequential halving at the root, improved policy below)
    prior: str = "mean"  # P(a|s): softmax of a step's log-probability a token (mean) or in all (sum), count, uniform
    unvisited: str = "parent"  # Q of an unvisited child: its parent's Q (parent), 0 (zero; the post)
    virtual_loss: str = "value"  # a pending visit counts as a loss (value) or only as a visit (visit; the post)
    step_tokens: int = 64  # tokens of a step at most

    def __post_init__(self):
        check(self, "at least", 1, "simulations children workers step_tokens")
        check(self, "at least", 0, "c_puct cutoff")
        check(self, "at most", 1, "cutoff")
        check_choices(
            self, selection=("puct", "uct", "gumbel"), prior=("mean", "sum", "count", "uniform"),
            unvisited=("parent", "zero"), virtual_loss=("value", "visit"),
        )  # fmt: skip


@dataclass(frozen=True)
class SearchConfig(TreeConfig):
    """All that a search reads: the tree's settings, and what the run or the evaluation around it decides."""

    temperature: float = 1.0  # at which steps are drawn
    max_tokens: int = 512  # tokens of an answer at most; a node at the limit is terminal
    token_budget: int = 0  # tokens that a tree may draw, 0: no limit; a beginning that steps share counts for each
    until_right: bool = False  # a tree ends with its first right answer
    answers: str = "all"  # which answers the verifier grades: all that a tree draws, or those that it has visited

    def __post_init__(self):
        super().__post_init__()
        check(self, "at least", 1, "max_tokens")
        check(self, "at least", 0, "token_budget")
        check(self, "above", 0, "temperature")
        check_choices(self, answers=("all", "visited"))
        if self.selection == "gumbel" and self.token_budget:
            raise ValueError("sequential halving plans its simulations: gumbel takes no token_budget")


@dataclass(frozen=True)
class DistillConfig:
    """What a tree teaches."""

    lesson: str = "best-path"  # best-path (the post) or another lesson of distill.py
    answers: str = "visited"  # those of a tree that are graded: all that it draws, or visited by a simulation

    def __post_init__(self):
        check_choices(self, lesson=LESSON_NAMES, answers=("all", "visited"))


@dataclass(frozen=True)
class GroupConfig:
    """How the answers of a problem are sampled."""

    samples: int = 16  # answers a problem, N
    # None: answers are drawn independently. A number: they are drawn without replacement, and an answer whose
    # probability so far is below cutoff times that of the likeliest one is dropped (0 drops none; not with vLLM)
    cutoff: float | None = None

    def __post_init__(self):
        check(self, "at least", 1, "samples")
        check(self, "at least", 0, "cutoff")
        check(self, "at most", 1, "cutoff")


@dataclass(frozen=True)
class CriticConfig:
    """How the value head learns."""

    value_learning_rate: float = 1e-3  # the value head starts from nothing
    value_gradient: bool = False  # the value loss trains the backbone too (the post)

    def __post_init__(self):
        check(self, "at least", 0, "value_learning_rate")
        check(self, "at most", 1, "value_learning_rate")


@dataclass(frozen=True)
class LearningConfig:
    """A training step, and its loss."""

    problems: int = 16  # problems a step
    temperature: float = 1.0  # of sampling and of log pi in the loss, so that the ratio compares equal temperatures
    failures: bool = False  # wrong answers teach the policy too (the post); else they teach the critic at most
    learning_rate: float = 3e-4  # of the model or its adapter, at the start of the linear decay
    warmup: int = 10  # steps
    inner_steps: int = 1  # passes over a step's answers
    clip_gradient: float = 0.1  # largest gradient norm, of the model and of the value head separately
    loss: str = "cispo"  # cispo, ppo
    clip: float = 5.0  # cispo: the largest ratio; ppo: epsilon
    # the ratio's denominator: recorded (by the sampler), recomputed (by the trainer; the post), truncated (recomputed,
    # and the loss weighted by pi_trainer / pi_sampler, at most 2)
    old_logprobs: str = "recorded"
    normalize: str = "sequence"  # sequence: average over an answer's tokens, then over answers; token: over all tokens
    kl_coefficient: float = 0.05  # weight of the KL divergence from the initial model
    critic: CriticConfig | None = CriticConfig()

    def __post_init__(self):
        check_choices(
            self, loss=("cispo", "ppo"), old_logprobs=("recorded", "recomputed", "truncated"),
            normalize=("sequence", "token"),
        )  # fmt: skip
        check(self, "at least", 1, "problems inner_steps")
        check(self, "at least", 0, "learning_rate warmup kl_coefficient")
        check(self, "at most", 1, "learning_rate")
        check(self, "above", 0, "temperature clip_gradient clip")
        if self.loss == "ppo" and self.clip >= 1:
            raise ValueError(f"with loss ppo clip is epsilon and must be below 1, not {self.clip}: try --clip 0.2")


@dataclass(frozen=True)
class MeasuringConfig:
    """Evaluations without search, and checkpoints."""

    evaluations: int = 10  # on the validation problems, along the run
    eval_problems: int = 200  # validation problems
    eval_samples: int = 4  # of each validation problem
    test_problems: int = 820  # problems of the test, after training and before it
    test_samples: int = 16  # of each test problem
    test_before: bool = True  # test the policy before training too
    eval_temperature: float = 1.0  # of all evaluations
    checkpoints: int = 10  # along the run; --resume goes on from the last one
    track: str = "none"  # where metrics go besides the run folder and TensorBoard: trackio, wandb (pip install them)

    def __post_init__(self):
        check(self, "at least", 1, "eval_problems eval_samples test_problems test_samples checkpoints")
        check(self, "at least", 0, "evaluations")
        check(self, "above", 0, "eval_temperature")
        check_choices(self, track=("none", "trackio", "wandb"))


@dataclass(frozen=True)
class MachineConfig:
    """Sampler, device, precision and memory."""

    sampler: str = "auto"  # torch, vllm; auto: vllm where it is installed, fits the GPU and can draw what is asked
    device: str = "auto"  # cpu, cuda; auto: the GPU where there is one
    lora_rank: int = 0  # rank of the trained adapter; 0 trains all weights
    dtype: str = "float32"  # of frozen base weights under LoRA: float32, bfloat16
    quantize: str = "none"  # linear layers of the frozen base: none, nf4 (4 bits, QLoRA)
    optimizer: str = "adamw"  # adamw, paged-adamw8bit (a quarter of the state, moved to the CPU when memory is short)
    gradient_checkpointing: bool = False  # recompute layers in the backward pass
    gpu_memory: float = 0.0  # GB (2**30 bytes) that the run may take, 8, 12, 16, 24 …; 0: what the GPU has free
    micro_batch_tokens: int = 4_096  # tokens in one forward and backward pass, fewer where memory is short

    def __post_init__(self):
        check_choices(
            self, sampler=("auto", "torch", "vllm"), device=("auto", "cpu", "cuda"), dtype=("float32", "bfloat16"),
            quantize=("none", "nf4"), optimizer=("adamw", "paged-adamw8bit"),
        )  # fmt: skip
        check(self, "at least", 0, "lora_rank gpu_memory")
        check(self, "at least", 1, "micro_batch_tokens")
        if self.lora_rank == 0 and self.dtype != "float32":
            raise ValueError("training all weights needs dtype float32: in bf16 most small updates round to nothing")
        if self.lora_rank == 0 and self.quantize != "none":
            raise ValueError("4-bit weights can't be trained: set lora_rank above 0, or quantize to none")
        if self.sampler == "vllm" and self.quantize != "none":
            raise ValueError("vLLM does not serve NF4 weights: set sampler to torch, or quantize to none")


@dataclass(frozen=True)
class ClusterConfig:
    """Several processes that collect for one trainer (docs/cluster.md)."""

    cluster: str = "none"  # none, local (Ray begins and ends with the run), auto (a running Ray cluster)
    generators: int = 1  # processes that collect, each on a GPU of its own where there are GPUs
    shards: int = 0  # parts that a step is cut into; 0: one a generator
    max_staleness: int = 1  # updates by which the policy that sampled an answer may be older than the trainer's
    generator_timeout: float = 1_800.0  # seconds for a shard, after which a generator is taken for hung

    def __post_init__(self):
        check_choices(self, cluster=("none", "local", "auto"))
        check(self, "at least", 1, "generators")
        check(self, "at least", 0, "shards max_staleness")
        check(self, "above", 0, "generator_timeout")
        ahead = self.step_shards * (self.max_staleness + 1)
        if self.generators > 1 and self.cluster == "none":
            raise ValueError("several generators need a cluster: set cluster to local or auto")
        if self.generators > ahead:
            raise ValueError(f"{self.generators} generators, but at most {ahead} shards in work: set shards higher")

    @property
    def step_shards(self) -> int:
        """The parts that a step is cut into."""
        return self.shards or self.generators


TINY_TREE = TreeConfig(simulations=32, cutoff=0.3, prior="sum")


@dataclass(frozen=True)
class Config:
    """A training run."""

    preset: str = "tiny"  # tiny (a CPU, minutes), qwen1.5b (one consumer GPU), post (the post's hyper-parameters)
    method: str = "mcts"  # where answers come from: mcts, none; baselines.py: best-of-n, cispo, grpo
    model: str = TINY  # Hugging Face name or folder
    seed: int = 0  # of all random draws
    out: Path | None = None  # run folder; else runs/METHOD-PRESET-seedN
    task: TaskConfig = TaskConfig()
    budget: BudgetConfig = BudgetConfig()
    tree: TreeConfig | None = TINY_TREE  # mcts
    distill: DistillConfig | None = DistillConfig()  # mcts
    group: GroupConfig | None = None  # SAMPLING_METHODS
    learning: LearningConfig = LearningConfig()
    measuring: MeasuringConfig = MeasuringConfig()
    machine: MachineConfig = MachineConfig()
    cluster: ClusterConfig = ClusterConfig()

    def __post_init__(self):
        check_choices(self, preset=("tiny", "qwen1.5b", "post"), method=METHODS)
        check_ranges(seed=self.seed)
        searches, samples = self.method == "mcts", self.method in SAMPLING_METHODS
        topics = tuple(topic is not None for topic in (self.tree, self.distill, self.group))
        if topics != (searches, searches, samples):
            raise ValueError(f"{self.method} has other topics than these: start from preset_for(…, {self.method!r})")
        if self.method in GROUP_METHODS:
            if self.group.samples < 2 or self.group.cutoff == 1:  # which leaves one sample
                raise ValueError(
                    f"{self.method} compares the samples of a problem: samples must be at least 2, cutoff below 1"
                )
            if self.learning.loss != (own := "ppo" if self.method == "grpo" else "cispo"):
                raise ValueError(f"the loss of {self.method} is {own}: leave out loss, or take the other method")
        if self.cluster.step_shards > self.learning.problems:
            raise ValueError(
                f"{self.learning.problems} problems a step can't be cut into {self.cluster.step_shards} shards"
            )
        one_process = self.cluster.cluster == "none"
        if self.learning.old_logprobs == "recomputed" and self.cluster.max_staleness and not one_process:
            raise ValueError("recomputed log-probabilities can't correct for age: set max_staleness to 0")

    @property
    def search(self) -> SearchConfig:
        """What a search in training reads."""
        tree, limit, answers = vars(self.tree), self.task.max_tokens, self.distill.answers
        return SearchConfig(**tree, temperature=self.learning.temperature, max_tokens=limit, answers=answers)

    @property
    def cutoff(self) -> float | None:
        """The cutoff of distinct draws; None where draws are independent."""
        topic = self.tree or self.group
        return topic.cutoff if topic else None

    @property
    def folder(self) -> Path:
        return self.out or Path("runs") / f"{self.method}-{self.preset}-seed{self.seed}"

    def change(self, **settings) -> "Config":
        """This configuration with other settings, each given by its name alone: change(seed=1, learning_rate=1e-4).
        TypeError for a setting that the method does not have."""
        return changed(self, settings)


def changed(config: object, settings: dict) -> object:
    """`config` with other settings, its own or those of its topics."""
    wanted = dict(settings)
    own = {}
    for field in fields(config):
        value = getattr(config, field.name)
        if is_dataclass(value):
            names = wanted.keys() & flatten(value).keys()
            own[field.name] = changed(value, {name: wanted.pop(name) for name in names})
    return replace(config, **own | wanted)


def flatten(config: object) -> dict[str, object]:
    """The settings of a configuration and of its topics by their names alone."""
    flat = {}
    for field in fields(config):
        value = getattr(config, field.name)
        flat |= flatten(value) if is_dataclass(value) else {field.name: value}
    return flat


# ------------------------------------------------------------------------------------------------ presets

CHAT = dict(  # Qwen2.5-1.5B-Instruct
    model="Qwen/Qwen2.5-1.5B-Instruct",
    task=TaskConfig(max_tokens=512, reward="dense"),
    machine=MachineConfig(lora_rank=32, dtype="bfloat16", gradient_checkpointing=True),
    measuring=MeasuringConfig(eval_temperature=0.2),
)
PRESETS = {  # for method mcts
    "tiny": Config(),
    "qwen1.5b": Config(
        preset="qwen1.5b",
        **CHAT,
        budget=BudgetConfig(tokens=50_000_000),
        tree=TreeConfig(),
        learning=LearningConfig(temperature=0.8, learning_rate=2e-5, critic=CriticConfig(1e-4)),
    ),
    "post": Config(  # the post's hyper-parameters, not its bugs; 1,600 simulations a problem
        preset="post",
        **CHAT,
        budget=BudgetConfig(tokens=0, steps=2_048),
        tree=TreeConfig(1_600, workers=16, prior="sum", unvisited="zero", virtual_loss="visit"),
        learning=LearningConfig(
            temperature=0.8, failures=True, learning_rate=5e-6, warmup=0, critic=CriticConfig(5e-6, value_gradient=True)
        ),
    ),
}
SAMPLES = {"tiny": 4, "qwen1.5b": 16, "post": 64}


def preset_for(name: str, method: str) -> Config:
    """A preset's settings for a method. KeyError for an unknown preset, ValueError for an unknown method."""
    preset, learning = PRESETS[name], PRESETS[name].learning
    if method == "mcts":
        return preset
    group = GroupConfig(SAMPLES[name])
    if name == "tiny":  # each method's best settings (`python -m experiments.study tune`); GRPO as CISPO
        preset = preset.change(reward="dense")
    if name == "tiny" and method == "none":
        learning = replace(learning, learning_rate=1e-4)
    if name == "post" and method in GROUP_METHODS:
        group = GroupConfig(16)
    if method in GROUP_METHODS:
        learning = replace(learning, critic=None)
    if method == "grpo":
        learning = replace(learning, loss="ppo", clip=0.2)
    return replace(
        preset, method=method, tree=None, distill=None, group=None if method == "none" else group, learning=learning
    )
