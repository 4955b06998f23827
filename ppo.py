"""Tree search distillation: search, keep the search's choice, train the policy on it, repeat.

    python ppo.py --search mcts                    # distil tree search (preset tiny without a GPU, else qwen1.5b)
    python ppo.py --search none                    # plain PPO on single samples, for comparison
    python ppo.py --resume runs/mcts-tiny-seed0    # go on with an interrupted run

One step: `collect` turns problems into trajectories, `update` turns trajectories into new weights. Every method of the
kit (baselines.py too) differs in `collect` alone; optimiser, schedule, KL and losses are shared.

The loss of a trajectory with reward R, averaged over its tokens (the post):
    A_t  = R - V(s_t)                                     advantage, no gradient (GAE with gamma = lambda = 1)
    L    = -min(ratio, 5).detach() * A_t * log pi(a_t)    CISPO (MiniMax 2025, eq. 4), ratio = pi / pi_sampler
         + 1.0 * (V(s_t) - R)^2 + 0.05 * (exp(D) - D - 1) value loss and k3 KL, D = log pi_ref - log pi

Deviations from the post: the ratio uses the log-probabilities recorded while sampling (recomputed ones make it 1, and
the clip inert); trainable weights and optimiser state are fp32; the value loss does not reach the backbone
unless asked; all methods share one trainer; every generated and prefilled token is counted.
"""

import json
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

import runs
from countdown import Problem, make_splits
from evaluate import Score, evaluate
from mcts import CHOICES, SearchConfig, search
from policy import TINY, Policy, load_policy, pick_device
from sampling import Sampler, TorchSampler, Trajectory, Usage, complete

METHODS = ("mcts", "none", "best-of-n", "cispo", "grpo")
Collected = tuple[list[Trajectory], Usage, dict[str, float]]
TINY_TREE = SearchConfig(simulations=32, children=2, prior="sum")  # why K = 2: LOG.md


@dataclass(frozen=True)
class Config:
    """Everything a run depends on. --preset tiny, qwen1.5b or post sets the defaults, any field overrides them."""

    preset: str = "tiny"  # tiny (CPU, minutes), qwen1.5b (one consumer GPU), post (the post's hyper-parameters)
    search: str = "mcts"  # where trajectories come from: mcts, none; baselines.py: best-of-n, cispo, grpo
    model: str = str(TINY)  # Hugging Face name or folder
    out: Path = Path()  # run folder; empty: runs/METHOD-PRESET-seedN
    seed: int = 0

    # task
    size: int = 4  # numbers in a problem
    split: str = "multiset"  # multiset (no leak), post (leaks, for comparison)
    train_problems: int = 20_000
    strict: bool = True  # intermediate results must be positive integers; the post did not check

    # budget: whichever ends first
    tokens: int = 1_500_000  # generated tokens, 0 for no limit
    steps: int = 0  # optimiser steps, 0 for no limit

    # collecting
    problems: int = 64  # problems a step
    samples: int = 16  # completions a problem: best-of-n, cispo, grpo
    temperature: float = 1.0  # of sampling, and of log pi in the loss, so that the ratio is one of like with like
    max_tokens: int = 64  # of a completion
    distill: str = "best-path"  # what a tree gives the trainer: best-path (the post), best-answer
    # --tree.simulations and so on; the tree's temperature and max_tokens are the run's
    tree: SearchConfig = field(default_factory=lambda: TINY_TREE)

    # learning
    lora_rank: int = 0  # 0 trains all weights
    dtype: str = "float32"  # of frozen base weights under LoRA: float32, bfloat16
    learning_rate: float = 3e-4
    value_learning_rate: float = 1e-3  # the value head starts from nothing
    schedule: str = "linear"  # linear (to 0), constant
    warmup: int = 10  # steps
    inner_steps: int = 1  # passes over a step's trajectories
    clip_gradient: float = 1.0
    loss: str = "cispo"  # cispo, ppo
    clip_high: float = 5.0  # CISPO's cap on the ratio
    clip_ppo: float = 0.2  # PPO's epsilon
    normalize: str = (
        "sequence"  # average over tokens, then trajectories (sequence, the post), or over all tokens (token)
    )
    gae_lambda: float = 1.0  # 1 gives A = R - V
    value_coefficient: float = 1.0
    value_gradient: bool = False  # let the value loss train the backbone too (the post)
    kl_coefficient: float = 0.05
    micro_batch_tokens: int = 16_384  # tokens in one forward and backward pass

    # measuring
    evaluations: int = 10  # on the validation split along the run
    eval_problems: int = 200
    eval_samples: int = 4
    test_problems: int = 820  # before and after training
    test_samples: int = 16
    eval_temperature: float = 1.0
    device: str = "auto"  # auto, cpu, cuda

    def __post_init__(self):
        for name, choices in dict(
            preset=tuple(PRESETS), search=METHODS, split=("multiset", "post"), distill=tuple(CHOICES),
            dtype=("float32", "bfloat16"), schedule=("linear", "constant"), loss=("cispo", "ppo"),
            normalize=("sequence", "token"),
        ).items():  # fmt: skip
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} must be one of {', '.join(choices)}, not {getattr(self, name)!r}")
        at_least = dict(
            problems=1, samples=1, max_tokens=1, inner_steps=1, train_problems=1, test_problems=1, test_samples=1,
            eval_problems=1, eval_samples=1, micro_batch_tokens=1, tokens=0, steps=0, lora_rank=0, warmup=0,
            evaluations=0, kl_coefficient=0, value_coefficient=0, learning_rate=0, value_learning_rate=0, seed=0,
        )  # fmt: skip
        for name, least in at_least.items():
            if not getattr(self, name) >= least:
                raise ValueError(f"{name} must be at least {least}, not {getattr(self, name)}")
        if self.tokens == 0 and self.steps == 0:
            raise ValueError("the run would never end: set tokens or steps above 0")
        if not 0 <= self.gae_lambda <= 1:
            raise ValueError(f"gae_lambda must be in [0, 1], not {self.gae_lambda}")
        if min(self.temperature, self.eval_temperature, self.clip_gradient, self.clip_high, self.clip_ppo) <= 0:
            raise ValueError("temperatures, clip_gradient, clip_high and clip_ppo must be above 0")
        if self.search in ("cispo", "grpo") and self.samples < 2:
            raise ValueError(f"{self.search} compares the samples of a problem: samples must be at least 2")

    @property
    def search_config(self) -> SearchConfig:
        """The tree's settings with the run's temperature and token cap."""
        return replace(self.tree, temperature=self.temperature, max_tokens=self.max_tokens)

    @property
    def folder(self) -> Path:
        return self.out if self.out != Path() else Path("runs") / f"{self.search}-{self.preset}-seed{self.seed}"


PRESETS = dict.fromkeys(("tiny", "qwen1.5b", "post"))
QWEN = dict(model="Qwen/Qwen2.5-1.5B-Instruct", dtype="bfloat16", lora_rank=32, max_tokens=512, temperature=0.8)
PRESETS["tiny"] = Config()
PRESETS["qwen1.5b"] = Config(
    preset="qwen1.5b", **QWEN, tokens=50_000_000, problems=16, learning_rate=2e-5, value_learning_rate=1e-4,
    clip_gradient=0.1, eval_temperature=0.2, micro_batch_tokens=4_096, tree=SearchConfig(simulations=64),
)  # fmt: skip
PRESETS["post"] = Config(  # hyper-parameters of the post, not its bugs; 16 problems a step, 1,600 simulations each
    preset="post", **QWEN, tokens=0, steps=2_048, problems=16, samples=64, learning_rate=5e-6, value_learning_rate=5e-6,
    clip_gradient=0.1, warmup=0, value_gradient=True, eval_temperature=0.2, micro_batch_tokens=4_096,
    tree=SearchConfig(simulations=1_600, workers=16, prior="sum", unvisited="zero", virtual_loss="visit"),
)  # fmt: skip


# ------------------------------------------------------------------------------------------------ losses


def gae(reward: Tensor, values: Tensor, mask: Tensor, lam: float) -> Tensor:
    """Advantages [B, T] with gamma = 1 and one reward [B] at the end (Schulman et al. 2016, eq. 16).

    delta_t = V(s_t+1) - V(s_t), with R in place of V(s_t+1) at the last token; A_t = sum_k lam^k delta_t+k.
    values, mask: [B, T], the completion at the right end, so that column T - 1 is every row's last token.
    """
    following = torch.cat([values[:, 1:], reward[:, None]], 1)  # [B, T]
    delta = (following - values) * mask
    advantage, running = torch.zeros_like(values), torch.zeros_like(reward)
    for t in reversed(range(values.shape[1])):
        running = delta[:, t] + lam * running
        advantage[:, t] = running
    return advantage * mask


def cispo_loss(logprobs: Tensor, old: Tensor, advantage: Tensor, clip_high: float) -> Tensor:
    """-min(ratio, clip_high).detach() * A * log pi, a token (MiniMax-M1 2025, eq. 4-5). All [B, T]."""
    ratio = (logprobs - old).exp().clamp(max=clip_high).detach()
    return -ratio * advantage * logprobs


def ppo_loss(logprobs: Tensor, old: Tensor, advantage: Tensor, epsilon: float) -> Tensor:
    """-min(ratio A, clip(ratio, 1 - eps, 1 + eps) A), a token (Schulman et al. 2017, eq. 7). All [B, T]."""
    ratio = (logprobs - old).exp()
    return -torch.min(ratio * advantage, ratio.clamp(1 - epsilon, 1 + epsilon) * advantage)


def kl_k3(logprobs: Tensor, reference: Tensor) -> Tensor:
    """exp(D) - D - 1 >= 0 with D = log pi_ref - log pi: Schulman's k3 estimate of KL(pi || pi_ref), a token."""
    difference = reference - logprobs
    return difference.exp() - difference - 1


def token_weights(mask: Tensor, how: str, trajectories: int, tokens: int) -> Tensor:
    """Weights [B, T] that make a sum over a whole step's tokens the average `how` names: "sequence" averages over the
    tokens of a trajectory and then over trajectories, "token" over all tokens alike."""
    if how == "token":
        return mask / tokens
    return mask / mask.sum(1, keepdim=True).clamp(min=1) / trajectories


# ------------------------------------------------------------------------------------------------ collecting


def collect_mcts(policy: Policy, sampler: Sampler, problems: list[Problem], config: Config, rng) -> Collected:
    """One tree a problem; the trainer gets the tree's choice, right or wrong."""
    seeds = rng.integers(2**63, size=len(problems)).tolist()
    prompts = [policy.encode(problem) for problem in problems]

    def grade(problem, completion):
        return policy.grade(problem, completion, config.strict)

    settings = config.search_config
    trees, usage = search(problems, prompts, sampler, policy.values, grade, settings, seeds)
    chosen = [(tree, CHOICES[config.distill](tree, settings)) for tree in trees]
    trajectories = [
        Trajectory(
            tree.problem,
            tree.prompt,
            node.completion(),
            [logprob for above in node.path() for logprob in above.logprobs],
            node.reward,
            policy.version,
            config.distill,
        )
        for tree, node in chosen
        if node is not None
    ]
    statistics = [tree.statistics() for tree in trees]
    info = {f"tree_{key}": float(np.mean([row[key] for row in statistics])) for key in statistics[0]}
    return trajectories, usage, info


def collect_samples(policy: Policy, sampler: Sampler, problems: list[Problem], config: Config, rng) -> Collected:
    """No search: one sample a problem (plain PPO)."""
    rows, usage = sample_rows(policy, sampler, problems, 1, config, rng)
    return [row[0] for row in rows], usage, {}


def sample_rows(policy, sampler, problems, n: int, config: Config, rng) -> tuple[list[list[Trajectory]], Usage]:
    """`n` graded completions of each problem, as the run's settings say."""
    seeds = rng.integers(2**63, size=len(problems)).tolist()
    return complete(
        policy, sampler, problems, n, seeds, config.max_tokens, config.temperature, config.search, config.strict
    )


# ------------------------------------------------------------------------------------------------ training


def micro_batches(trajectories: list[Trajectory], tokens: int) -> list[list[Trajectory]]:
    """Trajectories of similar length together, at most `tokens` (padding included) in each group."""
    groups: list[list[Trajectory]] = []
    for item in sorted(trajectories, key=lambda t: -len(t.prompt) - len(t.completion)):
        width = len(groups[-1][0].prompt) + len(groups[-1][0].completion) if groups else 0
        if groups and width * (len(groups[-1]) + 1) <= tokens:
            groups[-1].append(item)
        else:
            groups.append([item])
    return groups


def update(policy: Policy, optimizer: torch.optim.Optimizer, trajectories: list[Trajectory], config: Config) -> dict:
    """`inner_steps` optimiser steps on the trajectories; returns the last one's means over tokens."""
    tokens = sum(len(t.completion) for t in trajectories)
    for _ in range(config.inner_steps):
        optimizer.zero_grad(set_to_none=True)
        sums: dict[str, float] = {}
        for group in micro_batches(trajectories, config.micro_batch_tokens):
            loss, means = batch_loss(policy, group, config, len(trajectories), tokens)
            loss.backward()
            for key, value in means.items():
                sums[key] = sums.get(key, 0.0) + value.item()
        trained = [p for group in optimizer.param_groups for p in group["params"]]
        sums["gradient_norm"] = torch.nn.utils.clip_grad_norm_(trained, config.clip_gradient).item()
        optimizer.step()
    policy.version += 1
    return sums


def batch_loss(
    policy: Policy, group: list[Trajectory], config: Config, trajectories: int, tokens: int
) -> tuple[Tensor, dict[str, Tensor]]:
    """The share of the step's loss that falls on one micro-batch, and its parts."""
    batch = policy.batch([t.prompt for t in group], [t.completion for t in group])
    mask, width = batch.completion, batch.completion.shape[1]
    old = torch.tensor([[0.0] * (width - len(t.logprobs)) + t.logprobs for t in group], device=policy.device)  # [B, T]
    reward = torch.tensor([t.reward.value for t in group], device=policy.device)  # [B]
    weights = token_weights(mask, config.normalize, trajectories, tokens)  # [B, T], sums to 1 over the step

    logprobs, values, entropy = policy.logprobs_and_values(batch, config.temperature, config.value_gradient)  # [B, T]
    if group[0].advantage is None:
        advantage = gae(reward, values.detach(), mask, config.gae_lambda)
        value_loss = (values - (advantage + values.detach())) ** 2
    else:  # a group method fixed it: the critic is not used and not trained
        fixed = torch.tensor([t.advantage for t in group], device=policy.device)
        advantage, value_loss = fixed[:, None] * mask, torch.zeros_like(values)
    if config.loss == "cispo":
        policy_loss = cispo_loss(logprobs, old, advantage, config.clip_high)
    else:
        policy_loss = ppo_loss(logprobs, old, advantage, config.clip_ppo)
    parts = {"policy_loss": policy_loss, "value_loss": value_loss, "entropy": entropy}
    parts["ratio"] = (logprobs - old).exp().detach()
    total = policy_loss + config.value_coefficient * value_loss
    if config.kl_coefficient:
        parts["kl"] = kl_k3(logprobs, policy.reference_logprobs(batch, config.temperature))
        total = total + config.kl_coefficient * parts["kl"]
    means = {name: (part.detach() * weights).sum() for name, part in parts.items()}
    return (total * weights).sum(), means


def make_optimizer(policy: Policy, config: Config) -> torch.optim.AdamW:
    """AdamW over the trainable weights of the model and, with a rate of its own, the value head."""
    groups = [
        {"params": [p for p in policy.lm.parameters() if p.requires_grad], "peak": config.learning_rate},
        {"params": list(policy.value_head.parameters()), "peak": config.value_learning_rate},
    ]
    return torch.optim.AdamW(groups, lr=0.0, weight_decay=0.0)


def train(config: Config, collect: Callable[..., Collected], resume: bool = False) -> dict[str, Score]:
    """Run a method to the end of its budget; returns the test scores before and after."""
    device = pick_device(config.device)
    torch.manual_seed(config.seed)
    policy = load_policy(config.model, config.lora_rank, device, config.dtype)
    sampler = TorchSampler(policy)
    optimizer = make_optimizer(policy, config)
    data = make_splits(
        config.split,
        train=config.train_problems,
        validation=config.eval_problems,
        test=config.test_problems,
        size=config.size,
    )
    run = runs.Run(config.folder, config, resume)
    state = {"step": 0, "progress": 0.0, "generated": 0, "prefilled": 0, "seconds": 0.0, "evaluated": 0}
    if resume:
        folder, state = run.restore()
        policy.load_weights(folder)
        optimizer.load_state_dict(torch.load(folder / "optimizer.pt", weights_only=True))
        policy.version = state["step"]

    def save(folder: Path) -> None:
        policy.save(folder)
        torch.save(optimizer.state_dict(), folder / "optimizer.pt")

    def measure(name: str, samples: int) -> Score:
        return evaluate(
            policy, sampler, data[name], samples, config.eval_temperature, config.max_tokens, config.seed, progress=True
        )

    def record(row: dict) -> None:
        counters = {key: state[key] for key in ("step", "generated", "prefilled", "seconds")}
        run.log(counters | row)

    def test(when: str) -> Score:
        score = measure("test", config.test_samples)
        record({f"test_{key}": value for key, value in asdict(score).items() if key != "usage"})
        tqdm.write(f"test {when}: {score.line()}")
        return score

    scores = {"before": Score(**state["before"])} if "before" in state else {"before": test("before")}
    state["before"] = asdict(scores["before"])
    bar = tqdm(total=100, initial=int(100 * state["progress"]), desc=config.search, unit="%", bar_format=BAR)
    shown = {}
    while state["progress"] < 1:
        began = time.perf_counter()
        rng = np.random.default_rng([config.seed, state["step"]])
        problems = [data["train"][i] for i in rng.integers(len(data["train"]), size=config.problems)]
        trajectories, usage, info = collect(policy, sampler, problems, config, rng)
        warmup = min(1.0, (state["step"] + 1) / max(config.warmup, 1))
        decay = 1 - state["progress"] if config.schedule == "linear" else 1.0
        for group in optimizer.param_groups:
            group["lr"] = group["peak"] * warmup * decay
        losses = update(policy, optimizer, trajectories, config) if trajectories else {}

        state["step"] += 1
        state["generated"] += usage.generated
        state["prefilled"] += usage.prefilled
        seconds = time.perf_counter() - began
        state["seconds"] += seconds
        state["progress"] = progress(state, config)
        row = summarize(trajectories) | info | losses
        row |= {"tokens_per_second": usage.generated / usage.seconds, "collect_share": usage.seconds / seconds}
        if (due := int(state["progress"] * config.evaluations)) > state["evaluated"]:
            state["evaluated"] = due
            score = measure("validation", config.eval_samples)
            row |= {"eval_mean": score.mean_at_k, "eval_pass": score.pass_at_k, "eval_reward": score.reward}
            row |= {"eval_parsed": score.parsed, "eval_k": config.eval_samples}
            shown["eval"] = f"{score.mean_at_k:.1%}"
        record(row)
        if "eval_mean" in row or state["progress"] >= 1:
            run.checkpoint(save, state)
        shown |= {"reward": f"{row.get('reward', 0):+.2f}", "tok/s": f"{row['tokens_per_second']:.0f}"}
        bar.set_postfix(shown)
        bar.update(min(100, 100 * state["progress"]) - bar.n)
    bar.close()
    policy.save(run.folder / "policy")
    scores["after"] = test("after")
    print(report(scores, state, config))
    return scores


BAR = "{desc} {percentage:3.0f}% |{bar:20}| {elapsed}<{remaining}{postfix}"


def progress(state: dict, config: Config) -> float:
    """The share of the budget that is spent, in [0, 1]."""
    shares = [state[key] / limit for key, limit in (("generated", config.tokens), ("step", config.steps)) if limit]
    return min(1.0, max(shares))


def summarize(trajectories: list[Trajectory]) -> dict[str, float]:
    """What the trainer was given this step."""
    if not trajectories:
        return {"trajectories": 0}
    return {
        "trajectories": len(trajectories),
        "reward": float(np.mean([t.reward.value for t in trajectories])),
        "correct": float(np.mean([t.reward.correct for t in trajectories])),
        "parsed": float(np.mean([t.reward.parsed for t in trajectories])),
        "length": float(np.mean([len(t.completion) for t in trajectories])),
    }


def report(scores: dict[str, Score], state: dict, config: Config) -> str:
    """The table at the end of a run, and what to do next."""
    lines = [f"\n{config.search} ({config.preset}, seed {config.seed}), {config.test_problems} held-out problems"]
    lines += [f"  {when:7s} {score.line()}" for when, score in scores.items()]
    minutes = state["seconds"] / 60
    lines += [
        f"  {state['step']} steps, {state['generated']:,} tokens generated, {state['prefilled']:,} prefilled, "
        f"{minutes:.1f} min",
        f"  {config.folder}/: metrics.jsonl, config.json, checkpoint/, policy/",
        f"  next: python evaluate.py {config.folder} --search mcts --budget 1024",
    ]
    return "\n".join(lines)


# ------------------------------------------------------------------------------------------------ command line


def parse(args: list[str], method: str) -> tuple[Config, bool]:
    """The configuration of a run, and whether it goes on with an interrupted one."""
    if "--resume" in args:
        if len(args) != 2 or args[0] != "--resume":
            runs.fail("--resume RUN takes no other option: the run's own configuration is used")
        saved = json.loads((Path(args[1]) / "config.json").read_text())
        known = {f.name for f in fields(Config)}
        saved = {key: value for key, value in saved.items() if key in known}
        saved |= {"out": Path(args[1]), "tree": SearchConfig(**saved["tree"])}
        return Config(**saved), True
    name = "qwen1.5b" if torch.cuda.is_available() else "tiny"
    for i, arg in enumerate(args):
        if arg == "--preset" or arg.startswith("--preset="):
            name = arg.partition("=")[2] or (args[i + 1] if i + 1 < len(args) else "")
    if name not in PRESETS:
        runs.fail(f"preset must be one of {', '.join(PRESETS)}, not {name!r}")
    default = replace(PRESETS[name], search=method, loss="ppo" if method == "grpo" else PRESETS[name].loss)
    return runs.read_config(Config, args, default), False


def run(collectors: dict[str, Callable[..., Collected]], args: list[str], method: str) -> None:
    """Parse, refuse what is not this program's, print the configuration, train."""
    config, resume = parse(args, method)
    if config.search not in collectors:
        runs.fail(f"this program runs {', '.join(collectors)}, not {config.search!r}")
    print("\n".join(f"  {key:20s} {value}" for key, value in asdict(config).items()))
    train(config, collectors[config.search], resume)


COLLECTORS = {"mcts": collect_mcts, "none": collect_samples}

if __name__ == "__main__":
    runs.command(lambda: run(COLLECTORS, sys.argv[1:], "mcts"))
