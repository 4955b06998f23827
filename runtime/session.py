"""A training session: all of a run but the learning, which is `train` in ppo.py.

A session loads the policy and the sampler, restores and writes checkpoints, counts tokens, evaluates, and writes
metrics to the run folder and the terminal.
"""

import random
import time
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import numpy as np
import torch

from config import Config
from runtime import memory, model_card, ranks, report, run_report, tasks, trees, watch
from runtime.board import load_tracker
from runtime.files import seal
from runtime.guard import Guard, Stopped
from runtime.loading import load_policy, locate, pick_device, read_chat
from runtime.run_folder import Run, read_metrics
from runtime.samplers import make_sampler
from runtime.scores import Score, score_policy
from runtime.weights import load_weights, read_tensors, save_policy
from sampling import Problem, Progress, Trajectory, Usage, draw


@dataclass
class State(Progress):
    """A run's counters, and the other numbers that a checkpoint holds beside its tensors."""

    best: float = -1.0  # validation mean@k of the best policy so far
    micro_tokens: int = 0  # tokens of a micro-batch at most
    before: dict | None = None  # the Score of the test before training


class Session:
    """A run and its folder, open for one process: `with Session(…) as session`."""

    def __init__(self, config: Config, make_optimizer, resume: bool = False):
        """`make_optimizer(policy, config)` comes from ppo.py, which runtime/ does not import."""
        self.config, self.resume = config, resume
        load_tracker(config.measuring.track)
        self.device = pick_device(config.machine.device)
        for set_seed in (random.seed, np.random.seed, torch.manual_seed):
            set_seed(config.seed)
        task = tasks.load_task(config.task)
        self.problems = tasks.splits(task, config)
        for line in tasks.remarks(self.problems, config):
            print(line)
        chat = read_chat(*locate(config.model), task, config.task.template_options)
        self.plan = memory.plan(config, self.device, chat.longest(sum(self.problems.values(), [])))
        if self.plan.estimate:
            print(self.plan)
        self.policy = load_policy(
            config.model,
            config.machine.lora_rank,
            self.device,
            config.machine.dtype,
            config.machine.quantize,
            config.machine.gradient_checkpointing,
            template_options=config.task.template_options,
            task=task,
        )
        self.sampler = make_sampler(self.plan, self.policy, config.seed)
        self.optimizer = make_optimizer(self.policy, config)
        self.micro = ranks.MicroBatchesOnRanks(self.plan.micro_tokens)
        self.progress = State()
        self.guard = Guard()
        self.stopped_by_guard = False
        self.scores: dict[str, Score] = {}  # of the tests before and after

    # -------------------------------------------------------------------------------------------- begin and end

    def __enter__(self) -> "Session":
        sums, track = tasks.checksums(self.config.task), self.config.measuring.track
        self.run = Run(self.config.folder, asdict(self.config), self.resume, sums, track)
        try:
            self.begin()
        except BaseException:
            self.run.close()
            raise
        return self

    def begin(self) -> None:
        """Restore the last checkpoint. A new run is tested instead, and its start is the first checkpoint."""
        self.restore()
        ranks.synchronize(self.policy, self.optimizer)
        rows = read_metrics(self.run.folder) if self.resume else []
        self.terminal = report.Terminal(self.config.method, self.progress.share, rows)
        for row in rows:
            self.guard.check(row)
        if self.config.measuring.test_before:
            if not self.progress.before:
                self.progress.before = asdict(self.test())
            self.scores["before"] = Score.read(self.progress.before)
            self.terminal.write(f"before training: {self.scores['before'].line()}")
        if not self.run.restored:
            self.watch()
            self.checkpoint()

    def __exit__(self, kind, error, trace) -> None:
        self.terminal.close()
        if kind is Stopped and not self.stopped_by_guard:  # `update` has refused a loss that is not finite
            self.progress.step += 1
            self.log({"stopped": str(error)})
        self.run.close()

    @property
    def finished(self) -> bool:
        return self.progress.share >= 1

    def finish(self) -> dict[str, Score]:
        """Save and test the final policy; returns the test scores before and after training."""
        self.terminal.close()
        self.run.publish("policy", self.save)
        self.scores["after"] = self.test()
        self.write_card(self.run.folder / "policy")
        seal(self.run.folder / "policy")
        print(report.ending(self.scores, self.progress, self.config))
        run_report.write_report(self.run.folder)
        return self.scores

    # -------------------------------------------------------------------------------------------- a step

    def draw(self) -> tuple[list[Problem], np.random.Generator]:
        """The step's problems and random stream."""
        self.began, self.cpu_began = time.perf_counter(), time.process_time()
        return draw(self.problems["train"], self.config.learning.problems, self.config.seed, self.progress.step)

    def hand_over(self, trajectories: list[Trajectory]) -> None:
        """Between collecting and learning: the sampler frees its memory, and the other ranks get the trajectories."""
        self.sampler.rest()
        ranks.broadcast((trajectories, self.progress))
        self.collected = time.perf_counter()

    def record(self, trajectories: list[Trajectory], usage: Usage, metrics: dict[str, float]) -> None:
        """Count and log a step; evaluate and write a checkpoint if one is due. Stopped if the run has collapsed."""
        ended, before, measuring = time.perf_counter(), self.progress.share, self.config.measuring
        self.progress.advance(usage, self.config.budget, ended - self.began)
        row = report.summarize(trajectories) | metrics | report.costs(usage, ended - self.collected, self.device)
        row["cpu_seconds"] = time.process_time() - self.cpu_began
        samples = []
        if is_due(before, self.progress.share, measuring.evaluations):
            row |= self.validate()
            samples = self.watch()
        reason = self.guard.check(row)
        if self.guard.idle_steps == 10 or self.guard.idle_steps == self.guard.all_idle_steps == 1:
            self.terminal.write(f"warning: {report.idle(self.guard.idle_steps, self.config)}")
        elif self.guard.idle_steps >= self.guard.idle:
            reason = report.idle(self.guard.idle_steps, self.config)
        self.log(row | ({"stopped": reason} if reason else {}))
        if reason:
            self.stopped_by_guard = True
            raise Stopped(f"step {self.progress.step}: {reason}")
        if is_due(before, self.progress.share, measuring.checkpoints):
            self.checkpoint()
        self.terminal.show(self.progress.share, row, samples)

    def log(self, row: dict) -> None:
        """Write a line of metrics: the counters, then `row`."""
        counters = ("step", "generated", "decoded", "prefilled", "valued", "seconds")
        self.run.log({name: getattr(self.progress, name) for name in counters} | row)

    # -------------------------------------------------------------------------------------------- measuring

    def score(self, split: str, samples: int) -> Score:
        """The score of the policy, without a search, on a split: `samples` answers of each problem."""
        temperature, max_tokens = self.config.measuring.eval_temperature, self.config.task.max_tokens
        settings = samples, temperature, max_tokens, self.config.seed
        return score_policy(self.policy, self.sampler, self.problems[split], *settings, progress=True)

    def validate(self) -> dict[str, float]:
        """The metrics of the validation problems. The best policy so far is saved as best/."""
        score = self.score("validation", self.config.measuring.eval_samples)
        if score.mean_at_k > self.progress.best:
            self.progress.best = score.mean_at_k
            self.run.publish("best", self.save)
        row = {"eval_mean": score.mean_at_k, "eval_pass": score.pass_at_k, "eval_reward": score.reward}
        return row | {"eval_parsed": score.parsed, "eval_k": score.samples}

    def test(self) -> Score:
        """The score on the test problems; it is also logged."""
        score = self.score("test", self.config.measuring.test_samples)
        self.log({f"test_{name}": value for name, value in asdict(score).items() if name != "usage"})
        return score

    def watch(self) -> list[dict]:
        """Keep answers to the watched problems and, of a search, one tree; returns the answers."""
        if not self.config.measuring.evaluations:
            return []
        parts = self.policy, self.sampler, self.problems["validation"], self.config
        samples = watch.answers(*parts, self.progress)
        self.run.show(samples)
        if self.config.tree:
            step = self.progress.step
            file = self.run.folder / "trees" / f"{step:06d}.json"
            trees.dump([watch.tree(*parts)], self.policy, self.config.search, file, f"step {step}")
        return samples

    # -------------------------------------------------------------------------------------------- checkpoints

    def save(self, folder: Path) -> None:
        """The policy with its model card."""
        save_policy(self.policy, folder)
        self.write_card(folder)

    def write_card(self, folder: Path) -> None:
        scores = {when: score for when, score in self.scores.items() if folder.name.startswith("policy")}
        place = str(self.run.folder / folder.name.removesuffix(".new"))
        example = self.problems["validation"][0]
        text = model_card.card(self.config, self.progress, scores, self.policy.chat, example, place)
        (folder / "README.md").write_text(text, encoding="utf-8")

    def checkpoint(self) -> None:
        """Write all that the run needs to go on."""

        def save(folder: Path) -> None:
            self.save(folder)
            torch.save(self.optimizer.state_dict(), folder / "optimizer.pt")
            torch.save(random_state(), folder / "random.pt")

        self.progress.micro_tokens = self.micro.tokens
        self.run.checkpoint(save, asdict(self.progress))

    def restore(self) -> None:
        """Read the checkpoint, if there is one. Learning rates are those of the settings, not of the checkpoint."""
        folder, saved = self.run.restored, self.run.state
        if not folder:
            return
        self.progress = State(**{field.name: saved[field.name] for field in fields(State)})
        self.progress.share = self.progress.spent(self.config.budget)  # which may have changed (--force)
        self.micro.tokens = min(self.micro.tokens, self.progress.micro_tokens)
        rates = [group["initial_lr"] for group in self.optimizer.param_groups]
        load_weights(self.policy, folder)
        self.policy.version = self.progress.step
        optimizer_state = read_tensors(folder / "optimizer.pt")
        is_adamw = self.config.machine.optimizer == "adamw"
        if all(("exp_avg" in state) == is_adamw for state in optimizer_state["state"].values()):
            self.optimizer.load_state_dict(optimizer_state)
        else:
            print("note: the checkpoint's optimiser was of another kind: this one starts anew")
        for group, rate in zip(self.optimizer.param_groups, rates, strict=True):
            group["initial_lr"] = rate
        set_random_state(read_tensors(folder / "random.pt"))
        self.run.write_config()


def is_due(before: float, after: float, times: int) -> bool:
    """Whether a step has passed one of `times` evenly spaced points of the budget. `before`, `after`: the share of the
    budget that is spent before and after the step."""
    return int(before * times + 1e-9) < int(after * times + 1e-9)  # 0.29 * 100 is 28.999999999999996


def random_state() -> dict:
    """The state of the random streams of Python, NumPy and torch. The kit's own draws depend on seed and step alone; a
    collector of your own may use these streams."""
    kind, keys, *rest = np.random.get_state()
    streams = {"python": random.getstate(), "numpy": (kind, keys.tolist(), *rest)}
    return streams | {"torch": torch.get_rng_state(), "cuda": torch.cuda.get_rng_state_all()}


def set_random_state(streams: dict) -> None:
    """Set the random streams to a state from `random_state`."""
    random.setstate(streams["python"])
    np.random.set_state(streams["numpy"])
    torch.set_rng_state(streams["torch"])
    if len(streams["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(streams["cuda"])
