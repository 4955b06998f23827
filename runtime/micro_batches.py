"""Micro-batches: how many of a step's sequences go through the model together. One process; ranks.py has several."""

from collections.abc import Callable
from typing import TypeVar

import torch
from tqdm import tqdm

from policy import group_by_length
from sampling import Trajectory

Result = TypeVar("Result")


class MicroBatches:
    """Cuts a step into micro-batches of at most `tokens` tokens, padding included. `tokens` is halved when the memory
    of a GPU runs out."""

    def __init__(self, tokens: int = 4_096):
        self.tokens = tokens

    def cut(self, trajectories: list[Trajectory]) -> list[list[Trajectory]]:
        """Trajectories of similar length together, at most a tenth of a micro-batch padding."""
        mine = self.own_share(trajectories)
        groups = group_by_length([t.length for t in mine], self.tokens, padding=0.1)
        return [[mine[i] for i in group] for group in groups]

    def fit(self, work: Callable[[], Result]) -> Result:
        """The result of `work`. Where the GPU's memory runs out it is called once more, with half the tokens.
        ValueError if that is too much as well."""
        for attempt in range(2):
            try:
                return work()
            except torch.OutOfMemoryError:
                tqdm.write(f"warning: out of GPU memory with {self.tokens} tokens in a micro-batch")
            torch.cuda.empty_cache()  # outside the except block, where nothing holds the failed pass any more
            if not attempt:
                self.tokens = max(1, self.tokens // 2)
        raise ValueError(
            f"out of GPU memory with {self.tokens} tokens in a micro-batch: pass --quantize nf4, "
            f"--gradient-checkpointing or a smaller --max-tokens; the last checkpoint is kept"
        )

    def own_share(self, trajectories: list[Trajectory]) -> list[Trajectory]:
        """The trajectories that this process runs: all."""
        return trajectories

    def add_up(self, parameters: list[torch.nn.Parameter], metrics: dict[str, float]) -> dict[str, float]:
        """Gradients (in place) and metrics of all processes, added up: those of this one."""
        return metrics


def merge(metrics: dict[str, float], more: dict[str, float]) -> dict[str, float]:
    """Metrics of two parts of a step: the larger maximum, and sums of the others."""
    both = {name: (max if name.endswith("_max") else sum)((metrics[name], more[name])) for name in metrics & more.keys()}
    return metrics | more | both
