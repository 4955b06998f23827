"""What a run tells: the numbers of a step, the bar on the terminal, the table at the end."""

import shlex

import numpy as np
import torch
from tqdm import tqdm

from config import Config
from runtime.scores import Score
from sampling import Progress, Trajectory, Usage

BAR = "{desc} {percentage:3.0f}% |{bar:20}| {elapsed}<{remaining}{postfix}"


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
    folder, best = shlex.quote(str(config.folder)), "best/, " if config.measuring.evaluations else ""
    lines = [
        f"\n{config.method} ({config.preset}, seed {config.seed}), {config.measuring.test_problems} held-out problems",
        *(f"  {when:7s} {score.line()}" for when, score in scores.items()),
        f"  {progress.step} steps, {progress.generated:,} tokens generated, {progress.prefilled:,} prefilled, "
        f"{progress.valued:,} read by the critic, {progress.seconds / 60:.1f} min",
        f"  {folder}/: metrics.jsonl, config.json, checkpoint/, {best}policy/",
    ]
    if config.task.split != "post":  # whose test problems the policy has seen
        tree = " --children 8 --cutoff 0.02" if config.cutoff is not None else ""
        prior = config.tree.prior if config.tree else "sum"
        lines.append(
            f"  next: python evaluate.py {folder} --search mcts --budget 1024{tree} "
            f"--prior {prior} --size {config.task.size} --max-tokens {config.task.max_tokens} "
            f"--temperature {config.learning.temperature} --dtype {config.machine.dtype} "
            f"--quantize {config.machine.quantize}"
        )
    return "\n".join(lines)
