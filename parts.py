"""What a run works with, policy, sampler, optimiser, problems: loaded, kept in checkpoints and read back, measured."""

import random
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import memory
import runs
from config import Config
from countdown import Problem, make_splits
from engines import make_sampler
from evaluate import Score, evaluate
from learner import make_optimizer
from loading import load_policy, pick_device
from policy import Policy, read_tensors
from sampling import Sampler

COUNTERS = ("step", "generated", "prefilled", "valued", "seconds")
START = dict.fromkeys(COUNTERS, 0) | {"seconds": 0.0, "progress": 0.0, "best": -1.0}


@dataclass
class Parts:
    """What a run works with, and how that is kept, read back and measured."""

    config: Config
    device: str
    policy: Policy
    sampler: Sampler
    optimizer: torch.optim.Optimizer
    data: dict[str, list[Problem]]  # train, validation, test
    micro_tokens: int  # tokens of a micro-batch

    def save(self, folder: Path) -> None:
        """All that a run needs to go on, but for its counters."""
        self.policy.save(folder)
        torch.save(self.optimizer.state_dict(), folder / "optimizer.pt")
        torch.save(random_state(), folder / "random.pt")

    def load(self, run: runs.Run) -> dict:
        """A run's counters: those of the start, or the checkpoint's, which is read back. Rates stay the config's."""
        state = START | {"micro_tokens": self.micro_tokens} | run.state
        state["micro_tokens"] = min(state["micro_tokens"], self.micro_tokens)
        if run.restored:
            peaks = [group["peak"] for group in self.optimizer.param_groups]
            self.policy.load_weights(run.restored)
            self.policy.version = state["step"]
            saved = read_tensors(run.restored / "optimizer.pt")
            if all(("exp_avg" in kept) == (self.config.optimizer == "adamw") for kept in saved["state"].values()):
                self.optimizer.load_state_dict(saved)
            else:
                print("note: the checkpoint's optimiser was of another kind: this one starts anew")
            for group, peak in zip(self.optimizer.param_groups, peaks, strict=True):
                group["peak"] = peak
            if (run.restored / "random.pt").exists():  # not in an earlier version's
                set_random_state(read_tensors(run.restored / "random.pt"))
        return state

    def measure(self, name: str, samples: int) -> Score:
        """The policy alone, without search, on one of the splits."""
        c, problems = self.config, self.data[name]
        return evaluate(
            self.policy, self.sampler, problems, samples, c.eval_temperature, c.max_tokens, c.seed, progress=True
        )

    def validate(self, run: runs.Run, state: dict) -> dict[str, float]:
        """What a row of metrics says of the validation split; the best policy so far is kept."""
        score = self.measure("validation", self.config.eval_samples)
        if score.mean_at_k > state["best"]:
            state["best"] = score.mean_at_k
            run.publish("best", self.policy.save)
        row = {"eval_mean": score.mean_at_k, "eval_pass": score.pass_at_k, "eval_reward": score.reward}
        return row | {"eval_parsed": score.parsed, "eval_k": score.samples}

    def test(self, run: runs.Run, state: dict, when: str) -> Score:
        score = self.measure("test", self.config.test_samples)
        record(run, state, {f"test_{key}": value for key, value in asdict(score).items() if key != "usage"})
        tqdm.write(f"test {when}: {score.line()}")
        return score


def prepare(config: Config) -> Parts:
    """Load and make what a run works with, or say what is in the way."""
    device = pick_device(config.device)
    for seed in (random.seed, np.random.seed, torch.manual_seed):
        seed(config.seed)
    plan = memory.plan(config, device)
    if plan.parts:
        print(plan)
    data = splits(config)
    policy = load_policy(
        config.model, config.lora_rank, device, config.dtype, config.quantize, config.gradient_checkpointing
    )
    sampler = make_sampler(plan.engine, policy, plan.context, plan.rows, plan.kept, plan.cache_gb, config.seed)
    return Parts(config, device, policy, sampler, make_optimizer(policy, config), data, plan.micro_tokens)


def splits(config: Config) -> dict[str, list[Problem]]:
    """The run's problems: train, validation, test."""
    sizes = dict(train=config.train_problems, validation=config.eval_problems, test=config.test_problems)
    return make_splits(config.split, **sizes, size=config.size)


def draw(data: list[Problem], config: Config, step: int) -> tuple[list[Problem], np.random.Generator]:
    """A step's problems, and its random stream, which goes on from there."""
    rng = np.random.default_rng([config.seed, step])
    return [data[i] for i in rng.integers(len(data), size=config.problems)], rng


def random_state() -> dict:
    """Where the random streams of Python, NumPy and torch stand. What the kit draws depends on seed and step alone;
    this is for collectors of one's own."""
    kind, keys, *rest = np.random.get_state()
    streams = {"python": random.getstate(), "numpy": (kind, keys.tolist(), *rest)}
    return streams | {"torch": torch.get_rng_state(), "cuda": torch.cuda.get_rng_state_all()}


def set_random_state(streams: dict) -> None:
    random.setstate(streams["python"])
    np.random.set_state(streams["numpy"])
    torch.set_rng_state(streams["torch"])
    if len(streams["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(streams["cuda"])


def record(run: runs.Run, state: dict, row: dict) -> None:
    """A line of metrics, after the counters."""
    run.log({key: state[key] for key in COUNTERS} | row)
