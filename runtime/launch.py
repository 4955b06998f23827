"""From a command line to a training run: in one process, under torchrun, or with a Ray cluster."""

import sys
from collections.abc import Callable
from dataclasses import dataclass

import torch

from config import Config
from runtime import ranks, report
from runtime.cli import fail, parse
from runtime.cluster import collecting
from runtime.files import typed
from runtime.guard import Stopped
from runtime.loading import pick_device, recorded
from runtime.run_folder import check_unused, finished
from runtime.session import Session


@dataclass
class Trainer:
    """The functions of ppo.py that a launch needs."""

    train: Callable  # (config, collect, resume)
    update: Callable
    make_optimizer: Callable
    set_rate: Callable


def launch(args: list[str], method: str, collectors: dict[str, Callable], trainer: Trainer) -> None:
    """Parse, refuse what is not this program's, print the settings, train."""
    config, resume = parse(args, method)
    if config.method not in collectors:
        fail(f"this program runs {', '.join(collectors)}, not {config.method!r}: see ppo.py, baselines.py")
    if not resume:
        check_unused(config.folder)
        config = recorded(config)
    elif finished(config.folder):
        if "--force" in args:
            fail(f"{config.folder} is finished: a new run can start from its policy, --model {typed(config.folder)}")
        print(f"{config.folder} is finished: nothing is left to do")
        return
    if ranks.join(pick_device(config.machine.device)):  # one of several processes of torchrun, and not the first
        return follow(config, trainer)
    print(report.beginning(config))
    try:
        with collecting(config, collectors[config.method]) as collect:
            trainer.train(config, collect, resume)
        ranks.leave()
    except torch.OutOfMemoryError as error:
        fail(f"out of GPU memory, the last checkpoint is kept: pass a smaller --gpu-memory ({str(error)[:80]} …)")
    except Stopped as reason:
        raise Stopped(f"{reason}; the last checkpoint is kept in {config.folder}") from None
    except KeyboardInterrupt:
        if (config.folder / "config.json").exists():
            print(
                f"\ninterrupted; to go on: python {typed(sys.argv[0])} --resume {typed(config.folder)}", file=sys.stderr
            )
        raise


def follow(config: Config, trainer: Trainer) -> None:
    """What the other ranks do: the same updates as the first, until it ends."""
    session = Session(config, trainer.make_optimizer)
    ranks.synchronize(session.policy, session.optimizer)
    while message := ranks.broadcast():
        trajectories, progress = message
        trainer.set_rate(session.optimizer, config.learning, progress)
        trainer.update(session.policy, session.optimizer, trajectories, config.learning, session.micro)
    ranks.leave()
