"""What a run depends on: one dataclass, its presets, and how the command line reads them.

    python ppo.py --preset tiny --tree.simulations 64 --learning-rate 1e-4

A preset is a Config; every field can be overridden, unknown ones are errors.
"""

from dataclasses import asdict, dataclass, field, fields, replace
from itertools import chain
from pathlib import Path

import torch

import runs
from checks import check, check_choices, check_writable, differing
from countdown import check_game
from distill import LESSONS
from loading import TINY
from mcts import SearchConfig

PRESET_NAMES = ("tiny", "qwen1.5b", "post")
METHODS = ("mcts", "none", "best-of-n", "cispo", "grpo")
# options that the other methods have no use for
READ_BY = {
    METHODS[:1]: "--tree.",
    METHODS[:3]: "--loss --gae-lambda --value-learning-rate --value-coefficient --value-gradient",
    METHODS[2:]: "--samples --min-p",
}
EARLIER = {"sampler": "torch", "failures": True, "reward": "dense"}  # of runs from before these were settings
EARLIER_TREE = {"distinct": False, "min_p": 0.0}  # of their trees
# where and how, not what
ANYWHERE = (
    "tree", "out", "checkpoints", "gpu_memory", "micro_batch_tokens", "max_disagreement",
    "cluster", "generator_timeout",
)  # fmt: skip
TINY_TREE = SearchConfig(simulations=32, children=4, distinct=True, min_p=0.3, prior="sum")


@dataclass(frozen=True)
class Config:
    """Everything a run depends on. --preset tiny, qwen1.5b or post sets the defaults, any field overrides them.
    baselines.py takes --method in place of --search. --resume RUN goes on with an interrupted run, with --force under
    other settings too."""

    preset: str = "tiny"  # tiny (CPU, minutes), qwen1.5b (one consumer GPU), post (the post's hyper-parameters)
    search: str = "mcts"  # where trajectories come from: mcts, none; baselines.py --method: best-of-n, cispo, grpo
    model: str = str(TINY)  # Hugging Face name or folder
    out: Path | None = None  # run folder; else runs/METHOD-PRESET-seedN
    seed: int = 0

    # task
    size: int = 4  # numbers in a problem
    split: str = "multiset"  # multiset (no leak), post (leaks, for comparison)
    train_problems: int = 20_000
    strict: bool = True  # the training reward wants positive integers between steps too, as every test; the post didn't

    # budget: whichever ends first
    tokens: int = 1_500_000  # generated tokens, 0 for no limit
    steps: int = 0  # of collecting and learning, 0 for no limit

    # collecting
    problems: int = 16  # problems a step
    samples: int = 16  # completions a problem: best-of-n, cispo, grpo
    # above 0 they are drawn without replacement, at most so many: those less likely, token by token, than this share of
    # the likeliest are not (--tree.min-p in whole completions)
    min_p: float = 0.0
    temperature: float = 1.0  # of sampling, and of log pi in the loss, so that the ratio is one of like with like
    max_tokens: int = 64  # of a completion
    distill: str = "best-path"  # what a tree teaches, best-path (the post) or another of distill.py
    reward: str = "exact"  # of search and loss: dense (the post: a near miss earns something), exact (1 right, else -1)
    failures: bool = False  # distil wrong answers too (the post); off, they teach the critic at most
    dump_trees: int = 0  # of each step, as RUN/trees/STEP.json for plots.py tree
    # --tree.simulations and so on; the tree's temperature and max_tokens are the run's
    tree: SearchConfig = field(default_factory=lambda: TINY_TREE)

    # auto (vllm where it is installed and fits a GPU, but for nf4 and distinct steps), torch, vllm
    sampler: str = "auto"

    # several processes: cluster.py. A step's problems are collected in shards, each apart
    cluster: str = "none"  # none, local (Ray begins and ends with the run), auto (a running Ray cluster)
    generators: int = 1  # processes that collect for the trainer, each on a GPU of its own where there are GPUs
    shards: int = 0  # that a step is cut into; 0: one a generator
    max_staleness: int = 1  # updates that a cluster's trajectory may be behind the trainer; 0: as one process
    generator_timeout: float = 1_800.0  # seconds for a shard, after which a generator is taken for hung

    # memory
    lora_rank: int = 0  # 0 trains all weights
    dtype: str = "float32"  # of frozen base weights under LoRA: float32, bfloat16
    quantize: str = "none"  # linear layers of the frozen base: none, nf4 (4 bits, QLoRA)
    optimizer: str = "adamw"  # adamw, paged-adamw8bit (a quarter of the state, moved to the CPU when memory is short)
    gradient_checkpointing: bool = False  # recompute layers in the backward pass
    gpu_memory: float = 0.0  # GB (2**30 bytes) that the run may take, 8, 12, 16, 24 …; 0: what the GPU has
    micro_batch_tokens: int = 4_096  # tokens in one forward and backward pass, fewer where memory is short

    # learning
    learning_rate: float = 3e-4  # of the model's weights or its adapter, at the peak
    value_learning_rate: float = 1e-3  # the value head starts from nothing
    schedule: str = "linear"  # linear (to 0), constant
    warmup: int = 10  # steps
    inner_steps: int = 1  # passes over a step's trajectories; in each, R - V is of the critic as it is by then
    clip_gradient: float = 0.1  # norm of the model's gradient, and of the value head's, each apart
    loss: str = "cispo"  # cispo, ppo
    # the ratio's denominator: recorded (by the sampler), recomputed (by the trainer: the post, ratio 1 at first),
    # truncated (recomputed, and the loss weighted by min(pi_trainer / pi_sampler, importance_cap))
    old_logprobs: str = "recorded"
    importance_cap: float = 2.0  # of old_logprobs "truncated"
    max_disagreement: float = 0.1  # mean |log pi_sampler - log pi_trainer| a token above which a step warns
    clip_high: float = 5.0  # CISPO's cap on the ratio
    clip_ppo: float = 0.2  # PPO's epsilon
    normalize: str = "sequence"  # average over tokens, then trajectories (sequence, the post); over all tokens (token)
    gae_lambda: float = 1.0  # 1 gives A = R - V
    value_coefficient: float = 1.0
    value_gradient: bool = False  # let the value loss train the backbone too (the post)
    kl_coefficient: float = 0.05

    # stopping early: guard.py
    max_kl: float = 5.0  # nats a token of what the policy learns from, above which a step is bad
    patience: int = 5  # bad steps in a row after which a run is stopped

    # keeping
    checkpoints: int = 10  # along the run, from which --resume goes on

    # measuring
    evaluations: int = 10  # on the validation split along the run
    eval_problems: int = 200
    eval_samples: int = 4
    test_problems: int = 820  # after training, and before it
    test_before: bool = True  # off where many runs start from one policy
    test_samples: int = 16
    eval_temperature: float = 1.0
    device: str = "auto"  # auto, cpu, cuda

    def __post_init__(self):
        check_choices(
            self, preset=PRESET_NAMES, search=METHODS, split=("multiset", "post"), distill=LESSONS,
            reward=("dense", "exact"), sampler=("auto", "torch", "vllm"), dtype=("float32", "bfloat16"),
            quantize=("none", "nf4"), optimizer=("adamw", "paged-adamw8bit"),
            old_logprobs=("recorded", "recomputed", "truncated"), schedule=("linear", "constant"),
            loss=("cispo", "ppo"), normalize=("sequence", "token"),
            cluster=("none", "local", "auto"),
        )  # fmt: skip
        check_game(size=self.size, seed=self.seed)
        check(self, "at least", 1, "problems samples max_tokens inner_steps train_problems eval_problems eval_samples")
        check(self, "at least", 1, "test_problems test_samples micro_batch_tokens checkpoints patience")
        check(self, "at least", 0, "tokens steps min_p lora_rank warmup evaluations dump_trees gpu_memory")
        check(self, "at least", 0, "kl_coefficient value_coefficient learning_rate value_learning_rate gae_lambda")
        check(self, "at most", 1, "gae_lambda min_p")
        check(self, "above", 0, "temperature eval_temperature clip_gradient clip_high clip_ppo importance_cap")
        check(self, "above", 0, "max_disagreement max_kl")
        check_cluster(self)
        if self.tokens == 0 and self.steps == 0:
            raise ValueError("the run would never end: set tokens or steps above 0")
        if self.lora_rank == 0 and self.dtype != "float32":
            raise ValueError("training all weights needs dtype float32: in bf16 most small updates round to nothing")
        if self.lora_rank == 0 and self.quantize != "none":
            raise ValueError("4-bit weights can't be trained: set lora_rank above 0, or quantize to none")
        if self.sampler == "vllm" and self.quantize != "none":
            raise ValueError("vLLM does not serve NF4 weights: set sampler to torch, or quantize to none")
        if self.search in ("cispo", "grpo") and (self.samples < 2 or self.min_p == 1):  # which leaves one of them
            raise ValueError(
                f"{self.search} compares the samples of a problem: samples must be at least 2, min_p below 1"
            )
        if self.search != "mcts" and (self.distill != "best-path" or self.dump_trees):
            raise ValueError(f"distill and dump_trees are about searched trees: {self.search} makes none")
        for name in "temperature", "max_tokens":
            if getattr(self.tree, name) not in (getattr(SearchConfig(), name), getattr(self, name)):
                raise ValueError(f"tree.{name} is the run's: set {name}")

    @property
    def search_config(self) -> SearchConfig:
        """The tree's settings with the run's temperature and token cap."""
        return replace(self.tree, temperature=self.temperature, max_tokens=self.max_tokens)

    @property
    def distinct(self) -> bool:
        """Whether what is drawn from a prefix is drawn without replacement."""
        return self.tree.distinct if self.search == "mcts" else self.min_p > 0

    @property
    def drawn_tokens(self) -> int:
        """Tokens of a completion, before a search cuts its last step to the cap."""
        return self.search_config.drawn_tokens if self.search == "mcts" else self.max_tokens

    @property
    def cut(self) -> int:
        """The shards of a step."""
        return self.shards or self.generators

    @property
    def folder(self) -> Path:
        return self.out or Path("runs") / f"{self.search}-{self.preset}-seed{self.seed}"

    def unread(self) -> dict[str, str]:
        """The options that the method has no use for."""
        others = (options.split() for methods, options in READ_BY.items() if self.search not in methods)
        return dict.fromkeys(chain(*others), self.search)


def check_cluster(config: Config) -> None:
    """ValueError for what several processes can't do."""
    check(config, "at least", 1, "generators")
    check(config, "at least", 0, "shards max_staleness")
    check(config, "above", 0, "generator_timeout")
    alone, ahead = config.cluster == "none", config.cut * (config.max_staleness + 1)
    if config.generators > 1 and alone:
        raise ValueError("several generators need a cluster: set cluster to local or auto")
    if config.cut > config.problems:
        raise ValueError(f"{config.problems} problems a step can't be cut into {config.cut} shards")
    if config.generators > ahead:
        raise ValueError(f"{config.generators} generators, but at most {ahead} shards in work: set shards higher")
    if config.dump_trees and not (alone and config.cut == 1):
        raise ValueError("dump_trees needs one process and one shard")
    if config.max_staleness and config.old_logprobs == "recomputed" and not alone:
        raise ValueError("recomputed log-probabilities can't correct for age: set max_staleness to 0")


def settings(saved: dict) -> dict:
    """The settings in a config.json that decide a run's result, flat: a field that was not there yet had its default,
    a tree is the search's alone, and a model is known by its name, wherever its folder lies."""
    whole = asdict(Config()) | EARLIER | saved
    tree = asdict(TINY_TREE) | (EARLIER_TREE | saved.get("tree", {}) if whole["search"] == "mcts" else {})
    if whole["cluster"] == "none":
        whole["max_staleness"] = 0
    kept = {f.name: whole[f.name] for f in fields(Config) if f.name not in ANYWHERE}
    return kept | {f"tree.{key}": value for key, value in tree.items()} | {"model": Path(whole["model"]).name}


def differences(saved: dict, config: Config) -> list[str]:
    """Which settings of a saved config.json are not `config`'s, a piece of text each."""
    return differing(settings(saved), settings(asdict(config)))


QWEN = dict(
    model="Qwen/Qwen2.5-1.5B-Instruct", dtype="bfloat16", lora_rank=32, gradient_checkpointing=True, max_tokens=512,
    temperature=0.8, problems=16, eval_temperature=0.2, reward="dense",
)  # fmt: skip
PRESETS = {
    "tiny": Config(),
    "qwen1.5b": Config(
        preset="qwen1.5b", **QWEN, tokens=50_000_000, learning_rate=2e-5, value_learning_rate=1e-4,
        tree=SearchConfig(simulations=64),
    ),
    "post": Config(  # hyper-parameters of the post, not its bugs; 1,600 simulations a problem
        preset="post", **QWEN, tokens=0, steps=2_048, samples=64, learning_rate=5e-6, value_learning_rate=5e-6,
        warmup=0, value_gradient=True, failures=True,
        tree=SearchConfig(simulations=1_600, workers=16, prior="sum", unvisited="zero", virtual_loss="visit"),
    ),
}  # fmt: skip
OWN = {  # what a method has of its own in a preset
    "tiny": {  # beside the search's, each method's best (`python study.py tune`, `samples`; GRPO as CISPO)
        "none": dict(reward="dense", learning_rate=1e-4),
        **dict.fromkeys(("best-of-n", "cispo", "grpo"), dict(reward="dense", samples=4)),
    },
    "post": dict.fromkeys(("cispo", "grpo"), dict(samples=16)),
}


def parse(args: list[str], method: str) -> tuple[Config, bool]:
    """The configuration of a run, and whether it goes on with an interrupted one."""
    args = [part for arg in args for part in (arg.split("=", 1) if arg.startswith("--resume=") else [arg])]
    if "--resume" in args:
        return resumed(args), True
    name = given(args, "--preset", "qwen1.5b" if torch.cuda.is_available() else "tiny")
    if name not in PRESETS:
        runs.fail(f"preset must be one of {', '.join(PRESETS)}, not {name!r}")
    config = runs.read_config(Config, args, preset_for(name, given(args, "--search", method)))
    check_writable(config.folder, folder=True)
    return config, False


def given(args: list[str], option: str, default: str) -> str:
    """What a command line says of an option."""
    for i, arg in enumerate(args):
        if arg == option or arg.startswith(f"{option}="):
            default = arg.partition("=")[2] or (args[i + 1] if i + 1 < len(args) else "")
    return default


def preset_for(name: str, method: str) -> Config:
    """A preset's settings for a method. KeyError for an unknown preset, ValueError for an unknown method."""
    preset = replace(PRESETS[name], search=method)
    own = OWN.get(name, {}).get(method, {})
    return replace(preset, loss="ppo" if method == "grpo" else preset.loss, **own)


def resumed(args: list[str]) -> Config:
    """The settings of an interrupted run; others, and a folder of another version, are refused without --force."""
    at = args.index("--resume")
    if len(args) == at + 1:
        runs.fail("--resume needs the folder of a run")
    folder = Path(args[at + 1])
    options = [arg for arg in args[:at] + args[at + 2 :] if arg != "--force"]
    if given(options, "--out", ""):
        runs.fail("--resume goes on in the run's own folder: leave out --out, or copy the folder first")
    saved = runs.read_settings(folder)
    if not isinstance(tree := saved.get("tree", {}), dict):
        runs.fail(f"{folder}/config.json is damaged: its tree is no JSON object")
    known, known_tree = ({f.name for f in fields(kind)} for kind in (Config, SearchConfig))
    gone = sorted(saved.keys() - known - {"provenance"}) + [f"tree.{name}" for name in sorted(tree.keys() - known_tree)]
    kept = EARLIER | {key: value for key, value in saved.items() if key in known}
    tree = SearchConfig(**{key: value for key, value in tree.items() if key in known_tree})
    config = default = Config(**kept | {"out": folder, "tree": tree})
    if options:
        config = runs.read_config(Config, options, default)
    differ = [f"{name} is no setting here" for name in gone] + differences(asdict(default), config)
    if differ and "--force" not in args:
        runs.fail(f"{folder} has other settings ({'; '.join(differ)}): --force goes on all the same")
    return replace(config, out=folder)
