"""What a run tells: the numbers of a step, the bar on the terminal, the table at the end."""

import numpy as np
import torch
from tqdm import tqdm

from config import GROUP_METHODS, Config, flatten, preset_for
from runtime.evaluation import TreeEvaluation
from runtime.files import typed, typed_program
from runtime.scores import Score
from sampling import Progress, Trajectory, Usage

BAR = "{desc} {percentage:3.0f}% |{bar:20}| {elapsed}<{remaining}{postfix}"


def beginning(config: Config) -> str:
    """What a run is about to do, and which settings are not its preset's."""
    limits = [(config.budget.tokens, "generated tokens"), (config.budget.steps, "steps")]
    budget = " or ".join(f"{limit:,} {unit}" for limit, unit in limits if limit)
    usual, shown = flatten(preset_for(config.preset, config.method)), flatten(config)
    changed = [f"{name} {value}" for name, value in shown.items() if value != usual[name] and name != "out"]
    return "\n".join(
        [
            f"{config.method}, preset {config.preset}, {config.model}: {budget}, into {config.folder}/",
            f"changed settings: {', '.join(changed) or 'none'}",
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
    advice = f"more {more.get(config.method, '--samples')}, or scripts/warm_up.py first"
    if config.method in GROUP_METHODS:
        need = "a group with unequal rewards"
        advice += ", or --reward dense" if config.task.reward == "exact" else ""
    return f"{which} taught the policy nothing, for want of {need}: try {advice}"


def bar(method: str, share: float) -> tqdm:
    """The bar of a run that has spent a share of its budget."""
    return tqdm(total=100, desc=method, bar_format=BAR, initial=int(100 * share))


def show(bar: tqdm, progress: Progress, row: dict) -> None:
    """How far the run is, its best evaluation, the step's reward."""
    shown = {"best": f"{progress.best:.1%}"} if progress.best >= 0 else {}
    shown |= {"reward": f"{row.get('reward', 0):+.2f}", "tok/s": f"{row['tokens_per_second']:.0f}"}
    bar.set_postfix(shown)
    bar.update(min(100, 100 * progress.share) - bar.n)


def ending(scores: dict[str, Score], progress: Progress, config: Config) -> str:
    """The table at the end of a run, and what to do next."""
    folder, best = typed(config.folder), "best/, " if config.measuring.evaluations else ""
    tested = min([config.measuring.test_problems, *(score.problems for score in scores.values())])
    lines = [
        f"\n{config.method} ({config.preset}, seed {config.seed}), {tested} held-out problems",
        *(f"  {when:7s} {score.line()}" for when, score in scores.items()),
        f"  {progress.step} steps, {progress.generated:,} tokens generated, {progress.decoded:,} decoded, "
        f"{progress.prefilled:,} prefilled, {progress.valued:,} read by the critic, {progress.seconds / 60:.1f} min",
        f"  {folder}/: metrics.jsonl, config.json, checkpoint/, {best}policy/",
    ]
    if config.task.split != "post":  # whose test problems the policy has seen
        lines.append(f"  next: {typed_program('evaluate.py')} {folder} {search_options(config)}")
    return "\n".join(lines)


def search_options(config: Config) -> str:
    """evaluate.py's options for a search with a run's policy: those that are not its defaults."""
    usual = flatten(TreeEvaluation())
    own = flatten(config) | {"children": 8, "cutoff": None if config.cutoff is None else 0.02}
    names = ("prior", "size", "max_tokens", "temperature", "dtype", "quantize", "children", "cutoff")
    options = [f"--{name.replace('_', '-')} {own[name]}" for name in names if own.get(name, usual[name]) != usual[name]]
    return " ".join(["--search mcts --budget 1024", *options])
