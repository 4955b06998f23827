"""What a run tells: the numbers of a step, the bar on the terminal, the table at the end."""

import sys

import numpy as np
import torch
from tqdm import tqdm

from config import GROUP_METHODS, Config
from runtime import drawing
from runtime.files import typed, typed_program
from runtime.scores import Score
from runtime.settings import changed_settings
from sampling import Progress, Trajectory, Usage

BAR = "{desc} {percentage:3.0f}% |{bar:20}| {elapsed}<{remaining}{postfix}"
SMOOTH = 0.95  # weight of the steps before, in what the bar shows
BLOCKS = "▁▂▃▄▅▆▇█"


def beginning(config: Config) -> str:
    """What a run is about to do, and which settings are not its preset's."""
    limits = [(config.budget.tokens, "generated tokens"), (config.budget.steps, "steps")]
    budget = " or ".join(f"{limit:,} {unit}" for limit, unit in limits if limit)
    changed = [f"{name} {value}" for name, value, _ in changed_settings(config)]
    return "\n".join(
        [
            f"{config.method} on {config.model}, seed {config.seed}, into {config.folder}/",
            f"budget: {budget}",
            f"settings that differ from preset {config.preset}: {', '.join(changed) or 'none'}",
        ]
    )


def summarize(trajectories: list[Trajectory]) -> dict[str, float]:
    """What the trainer was given in a step."""
    if not trajectories:
        return {"trajectories": 0}
    row = {
        "trajectories": len(trajectories),
        "reward": float(np.mean([t.reward.value for t in trajectories])),
        "correct": float(np.mean([t.reward.correct for t in trajectories])),
        "parsed": float(np.mean([t.reward.parsed for t in trajectories])),
        "length": float(np.mean([len(t.completion) for t in trajectories])),
        "identical": 1 - len({tuple(t.completion) for t in trajectories}) / len(trajectories),
    }
    if wrong := [t.reward.value for t in trajectories if not t.reward.correct]:
        row["wrong_reward"] = float(np.mean(wrong))
    return row


def costs(usage: Usage, update_seconds: float, device: str) -> dict[str, float]:
    """Where a step's time went, and the most of the GPU's memory that was held since the last step."""
    row = {"tokens_per_second": usage.generated / max(usage.seconds, 1e-9), "sampler_seconds": usage.seconds}
    row |= {"critic_seconds": usage.critic_seconds, "update_seconds": update_seconds}
    if device.startswith("cuda"):
        # PyTorch's memory, without CUDA's own; vLLM's sleeping share counts too
        row["gpu_peak_gb"] = torch.cuda.max_memory_allocated() / 2**30
        torch.cuda.reset_peak_memory_stats()
    return row


def idle(steps: int, config: Config) -> str:
    """What is wrong, and what to do, after some steps in a row that have taught the policy nothing."""
    which = "this step has" if steps == 1 else f"{steps} steps in a row have"
    need, more = "a right answer", {"mcts": "--simulations or --children", "none": "--problems"}
    advice = f"more {more.get(config.method, '--samples')}, or "
    advice += "scripts/warm_up.py first" if config.task.task == "countdown" else "easier problems"
    if config.method in GROUP_METHODS:
        need = "a group with unequal rewards"
        advice += ", or --reward dense" if config.task.reward == "exact" else ""
    return f"{which} taught the policy nothing, for want of {need}: try {advice}"


class Terminal:
    """What a run shows while it learns: a line that stays for every evaluation, and a bar below them."""

    def __init__(self, method: str, share: float, rows: list[dict]):
        """A run that has spent a share of its budget. `rows`: the metrics of a resumed one."""
        self.bar = tqdm(total=100, desc=method, bar_format=BAR, initial=int(100 * share), disable=None)  # not in a pipe
        self.scores = [row["eval_mean"] for row in rows if "eval_mean" in row]
        self.averages: dict[str, float] = {}

    def write(self, line: str) -> None:
        tqdm.write(line)
        sys.stdout.flush()

    def close(self) -> None:
        self.bar.close()

    def show(self, share: float, row: dict, samples: list[dict]) -> None:
        """A step's row of metrics. After an evaluation: its score, and the first of the watched answers."""
        if "eval_mean" in row:
            self.scores.append(row["eval_mean"])
            curve = f"{100 * share:3.0f} %  validation {self.scores[-1]:6.1%}  {sparkline(self.scores)}"
            self.write("  ".join([curve, *(told(sample) for sample in samples[:1])]))
        solved = self.average("solved", row.get("tree_solved", row.get("solved", row.get("correct", 0.0))))
        speed = self.average("speed", row["tokens_per_second"])
        self.bar.set_postfix_str(f"{solved:.0%} of the problems solved, {speed:,.0f} tokens/s", refresh=False)
        self.bar.update(min(100, 100 * share) - self.bar.n)

    def average(self, name: str, value: float) -> float:
        """The exponential average of a number over steps."""
        before = self.averages.get(name, value)
        self.averages[name] = SMOOTH * before + (1 - SMOOTH) * value
        return self.averages[name]


def sparkline(values: list[float]) -> str:
    """A curve as blocks of text, from 0 to its highest value."""
    highest = max([*values, 1e-9])
    return "".join(BLOCKS[round(value / highest * (len(BLOCKS) - 1))] for value in values)


def told(sample: dict) -> str:
    """A watched answer on the terminal: the problem, the answer's end, and the verdict."""
    return (
        f"{sample['problem']}:  {drawing.answer(sample['text'])}  {drawing.verdict(sample['right'], sample['reason'])}"
    )


def ending(scores: dict[str, Score], progress: Progress, config: Config) -> str:
    """The table at the end of a run, and what to do next."""
    folder = typed(config.folder)
    tested = min([config.measuring.test_problems, *(score.problems for score in scores.values())])
    lines = [
        f"\n{config.method} ({config.preset}, seed {config.seed}), {tested} held-out problems",
        *(f"  {when:7s} {score.line()}" for when, score in scores.items()),
        f"  {progress.step} steps, {progress.generated:,} tokens generated, {progress.decoded:,} decoded, "
        f"{progress.prefilled:,} prefilled, {progress.valued:,} read by the critic, {progress.seconds / 60:.1f} min",
        f"play:    {typed_program('play.py')} {folder}",
        f"look:    tensorboard --logdir {folder}",
        f"report:  {config.folder / 'report.html'}",
    ]
    return "\n".join(lines)
