"""Micro-batches: the sequences that go through the model together. runtime/ranks.py has those of several processes."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import TypeVar

import torch
from tqdm import tqdm

from policy import Batch as Sequences
from sampling import Trajectory

Result = TypeVar("Result")
Batch = TypeVar("Batch")  # ppo.TrainingBatch


class MicroBatches:
    """Cuts a step into micro-batches of at most `tokens` tokens, padding included; a longer sequence is alone. When the
    GPU's memory runs out, `tokens` is halved, and stays so."""

    def __init__(self, tokens: int = 4_096):
        self.tokens = tokens

    def cut(self, trajectories: list[Trajectory]) -> list[list[Trajectory]]:
        """This process's trajectories in groups of similar length; at most a tenth of a group is padding."""
        mine = self.own_share(trajectories)
        groups = group_by_length([t.length for t in mine], self.tokens, padding=0.1)
        return [[mine[i] for i in group] for group in groups]

    def pieces(self, batches: list[Batch]) -> Iterator[Batch]:
        """The micro-batches, cut again into at most `tokens` tokens each where that has been halved since they were
        made."""
        for batch in batches:
            size, length = batch.sequences.ids.shape
            rows = max(1, self.tokens // length)
            yield from [batch] if size <= rows else [take(batch, slice(i, i + rows)) for i in range(0, size, rows)]

    def fit(self, work: Callable[[], Result]) -> Result:
        """The result of `work`. If the GPU's memory runs out, `work` is called once more, with half the tokens.
        ValueError if it runs out again."""
        for attempt in range(2):
            try:
                return work()
            except torch.OutOfMemoryError:
                tqdm.write(f"warning: out of GPU memory with {self.tokens} tokens in a micro-batch")
            torch.cuda.empty_cache()  # after the except block, because the error holds the tensors of the failed pass
            if not attempt:
                self.tokens = max(1, self.tokens // 2)
        raise ValueError(
            f"out of GPU memory with {self.tokens} tokens in a micro-batch: pass --quantize nf4, "
            f"--gradient-checkpointing or a smaller --max-tokens; the last checkpoint is kept"
        )

    def own_share(self, trajectories: list[Trajectory]) -> list[Trajectory]:
        """The trajectories that this process runs: all of them."""
        return trajectories

    def add_up(self, parameters: list[torch.nn.Parameter], metrics: dict[str, float]) -> dict[str, float]:
        """Add up the gradients of all processes, in place, and their metrics. Here there is one process."""
        return metrics


def take(batch: Batch, rows: slice) -> Batch:
    """Some sequences of a micro-batch, without the padding that the others needed."""
    sequences = batch.sequences
    length, width = (int(mask[rows].sum(1).max()) for mask in (sequences.attention, sequences.completion))
    ids, attention = sequences.ids[rows, -length:], sequences.attention[rows, -length:]
    tensors = {name: x[rows, -width:] for name, x in vars(batch).items() if isinstance(x, torch.Tensor)}
    return replace(batch, sequences=Sequences(ids, attention, sequences.completion[rows, -width:]), **tensors)


def merge(metrics: dict[str, float], more: dict[str, float]) -> dict[str, float]:
    """The metrics of two parts of a step as one: the larger value if a name ends with _max, else the sum."""
    both = {
        name: (max if name.endswith("_max") else sum)((metrics[name], more[name])) for name in metrics & more.keys()
    }
    return metrics | more | both


def right_align(rows: list[list[float]], mask: torch.Tensor) -> torch.Tensor:
    """Rows of numbers, one a token, as a tensor of the mask's shape and device, zeros on the left. [B, T]"""
    width = mask.shape[1]
    return torch.tensor([[0.0] * (width - len(row)) + row for row in rows], device=mask.device)


def group_by_length(lengths: list[int], tokens: int, padding: float = 1.0) -> list[list[int]]:
    """Indices of sequences in groups of similar length, the longest first. A group has at most `tokens` tokens with its
    padding, at most the share `padding` of them padding, and at least one sequence."""
    groups: list[list[int]] = []
    area = filled = 0  # tokens of the last group with and without padding, if the next sequence joins it
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if groups:
            area = lengths[groups[-1][0]] * (len(groups[-1]) + 1)
            filled = sum(lengths[j] for j in groups[-1]) + lengths[i]
        if groups and area <= tokens and area - filled <= padding * area:
            groups[-1].append(i)
        else:
            groups.append([i])
    return groups
