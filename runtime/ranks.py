"""Ranks: several processes that compute one update together, a GPU each, started by torchrun.

    torchrun --nproc-per-node 2 ppo.py --search mcts

Rank 0 is the run: it collects, evaluates and writes. It sends its trajectories to the other ranks, and all ranks make
the same update. Each computes the gradient of its share of the trajectories; the gradients are summed over ranks once
an update; clipping and optimiser then do the same on every rank. The result is that of one process, up to the order in
which numbers are added.

Why not DDP: it averages gradients in every backward pass, so all ranks would need equally many micro-batches. Here the
loss is a sum over a step's trajectories, so one sum an update is enough. Why not FSDP2: with LoRA the frozen weights
fill a GPU, and NF4 makes them smaller. Every rank holds the whole policy.

In one process these functions do nothing. Ranks send each other pickles: their network must be a trusted one.
"""

import os
import sys
from datetime import timedelta
from functools import reduce

import torch
import torch.distributed as dist
from torch import nn

from policy import Policy
from runtime.micro_batches import MicroBatches, merge
from runtime.weights import set_weights, trained_weights
from sampling import Trajectory


def join(device: str) -> int:
    """Join the other ranks, if torchrun has started this process; returns its rank. Rank 0 alone prints. ValueError for
    too few GPUs."""
    if int(os.environ.get("WORLD_SIZE", 1)) > 1 and not dist.is_initialized():
        backend = "gloo"
        if device == "cuda":
            local, gpus = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
            if local >= gpus:
                raise ValueError(f"torchrun started more processes here than there are GPUs ({gpus}): see --device cpu")
            torch.cuda.set_device(local)
            backend = "cpu:gloo,cuda:nccl"
        dist.init_process_group(backend, timeout=timedelta(days=1))  # the others wait while rank 0 collects
        if rank():
            sys.stdout = open(os.devnull, "w", encoding="utf-8")
    return rank()


def leave() -> None:
    """End the run: rank 0 tells the others, and every rank closes its connections. A process that exits with open ones
    may abort, because gloo's threads still run."""
    if world() > 1:
        if rank() == 0:
            broadcast(None)
        dist.destroy_process_group()


def world() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def broadcast(message: object = None) -> object:
    """Rank 0's message, on all ranks."""
    messages = [message]
    if world() > 1:
        dist.broadcast_object_list(messages, device=torch.device("cpu"))
    return messages[0]


def synchronize(policy: Policy, optimizer: torch.optim.Optimizer) -> None:
    """Rank 0's weights and optimiser state, on all ranks."""
    if world() == 1:
        return
    set_weights(policy, broadcast(trained_weights(policy)))
    saved = optimizer.state_dict()
    saved["state"] = on_cpu(saved["state"])
    optimizer.load_state_dict(broadcast(saved))


def on_cpu(state):
    """An optimiser's state, with its tensors on the CPU. Those of bitsandbytes are one level deeper than torch's."""
    if isinstance(state, dict):
        return {key: on_cpu(value) for key, value in state.items()}
    return state.cpu() if torch.is_tensor(state) else state


class MicroBatchesOnRanks(MicroBatches):
    """Each rank runs a share of the trajectories; gradients are summed over ranks."""

    def own_share(self, trajectories: list[Trajectory]) -> list[Trajectory]:
        """Every `world()`-th trajectory by length, so that all ranks get about as many tokens."""
        if world() == 1:
            return trajectories
        return sorted(trajectories, key=lambda t: t.length, reverse=True)[rank() :: world()]

    def add_up(self, parameters: list[nn.Parameter], metrics: dict[str, float]) -> dict[str, float]:
        """Sum the gradients over ranks, in place, and merge the metrics. A weight that no rank has a gradient of gets
        none. The ranks go on with the smallest micro-batch."""
        if world() == 1:
            return metrics
        reports: list = [None] * world()  # one of each rank
        dist.all_gather_object(reports, ([p.grad is not None for p in parameters], metrics, self.tokens))
        flags, metrics_of_ranks, tokens = zip(*reports)
        for parameter, has_gradient in zip(parameters, zip(*flags)):
            if any(has_gradient):
                if parameter.grad is None:  # this rank had no share
                    parameter.grad = torch.zeros_like(parameter)
                dist.all_reduce(parameter.grad)
        self.tokens = min(tokens)
        return reduce(merge, metrics_of_ranks)
