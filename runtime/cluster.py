"""A cluster: generators in processes of their own, on other cores, GPUs or machines, collect for one trainer. By Ray.

    pip install -r requirements-ray.txt
    python ppo.py --search mcts --cluster local --generators 2    # Ray begins and ends with the run
    python ppo.py --search mcts --cluster auto --generators 14    # on a running cluster: docs/cluster.md

A step's problems are cut into shards. A generator (policy, critic and sampler in an actor) takes a shard and the newest
weights and runs the `collect` that one process would run. The trainer has the shards of `max_staleness` steps beyond
its own in work, and trains on those that come first.

A shard is the unit of all that can go wrong. What it draws depends on run, step and shard alone. One thread and one
generator have it at a time, and only what a generator answers is counted: when one has died, or takes too long and is
killed, the shard goes back to the others. So nothing is lost or counted twice. With max_staleness 0 the result is that
of one process that collects the shards one after another (`in_shards`), on CPUs with as many threads to the last bit.
"""

import logging
import os
import queue
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, field, replace
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from config import Config
from countdown import Problem, draw
from policy import Policy
from runtime import memory, ranks
from runtime.loading import load_policy, pick_device
from runtime.provenance import identity
from runtime.run_folder import read_metrics
from runtime.samplers import make_sampler
from runtime.session import splits
from runtime.torch_sampler import TorchSampler
from sampling import Sampler, Trajectory, Usage

TRIES = 5  # generators that may be lost with one shard, or one after another while they start
START_SECONDS = 600  # that a start may take beyond a shard
Collected = tuple[list[Trajectory], Usage, dict[str, float]]
Collect = Callable[..., Collected]  # (policy, sampler, problems, config, rng)


class Lost(Exception):
    """A generator died, or took too long and was killed."""


@dataclass(order=True)
class Shard:
    """A part of a step's problems, and the stream that it draws from."""

    step: int
    number: int
    problems: list[Problem] = field(compare=False)
    rng: np.random.Generator = field(compare=False)
    losses: int = field(default=0, compare=False)  # generators that were lost with it


@dataclass
class Harvest:
    """What a shard brought."""

    shard: Shard
    version: int  # of the policy that it was collected with
    trajectories: list[Trajectory]
    usage: Usage
    info: dict[str, float]


def cut(problems: list[Problem], rng: np.random.Generator, config: Config, step: int) -> list[Shard]:
    """A step in shards. Shard k has the step's stream, jumped ahead k times: one shard is the step as it was."""
    pieces = np.array_split(np.arange(len(problems)), config.cluster.step_shards)
    streams = [np.random.Generator(rng.bit_generator.jumped(k)) for k in range(config.cluster.step_shards)]
    return [Shard(step, k, [problems[i] for i in piece], streams[k]) for k, piece in enumerate(pieces)]


def merge(harvests: list[Harvest]) -> Collected:
    """Shards as one step; figures are averaged over problems."""
    sizes = [len(h.shard.problems) for h in harvests]
    info = {name: float(np.average([h.info[name] for h in harvests], weights=sizes)) for name in harvests[0].info}
    return [t for h in harvests for t in h.trajectories], sum((h.usage for h in harvests), Usage()), info


def collect_shard(collect: Collect, policy: Policy, sampler: Sampler, shard: Shard, config: Config) -> Collected:
    collected = collect(policy, sampler, shard.problems, config, shard.rng)
    if isinstance(sampler, TorchSampler):  # what it keeps may change the last bit of the next shard
        sampler.rest()
    return collected


def in_shards(collect: Collect) -> Collect:
    """A collector that collects the shards of a step one after another, in this process."""

    def collected(policy: Policy, sampler: Sampler, problems: list[Problem], config: Config, rng) -> Collected:
        shards = cut(problems, rng, config, policy.version)
        found = [collect_shard(collect, policy, sampler, shard, config) for shard in shards]
        return merge([Harvest(shard, policy.version, *one) for shard, one in zip(shards, found)])

    return collected


@contextmanager
def collecting(config: Config, collect: Collect) -> Iterator[Collect]:
    """The collector that the configuration asks for: `collect` as it is, in shards, or by a cluster's generators."""
    if config.cluster.cluster == "none":
        yield collect if config.cluster.step_shards == 1 else in_shards(collect)
        return
    with closing(Cluster(config, collect, connect(config))) as cluster:
        yield cluster


class Generator:
    """In an actor: policy, critic and sampler, and the newest weights before every shard, never within one."""

    def load(self, config: Config, collect: Collect) -> dict[str, str]:
        """Make ready for work; what this process runs."""
        machine, device = config.machine, pick_device(config.machine.device)
        policy = load_policy(config.model, machine.lora_rank, device, machine.dtype, machine.quantize, train=False)
        policy.version = -1  # the trainer's weights come with the first shard
        self.sampler = make_sampler(memory.plan(config, device), policy, config.seed)
        self.config, self.collector, self.policy = config, collect, policy
        return identity()

    def collect(self, shard: Shard, version: int, weights: dict[str, np.ndarray]) -> Collected:
        if version != self.policy.version:
            self.policy.set_weights({name: torch.tensor(array) for name, array in weights.items()})
            self.policy.version = version
        return collect_shard(self.collector, self.policy, self.sampler, shard, self.config)


def connect(config: Config) -> bool:
    """Start Ray, which makes a token for itself, or join a cluster; whether Ray is to end with the run. ValueError if
    there is too little of it."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nothing is sent to Ray's makers
    os.environ.setdefault("RAY_NUM_REDIS_GET_RETRIES", "1")  # a minute for a cluster that is gone, not a quarter hour
    if not find_spec("ray"):
        raise ValueError("Ray is not installed: pip install -r requirements-ray.txt")
    import ray

    quiet = dict(log_to_driver=False, logging_level=logging.ERROR)
    wanted, kind = config.cluster.generators, "GPU" if pick_device(config.machine.device) == "cuda" else "CPU"
    began = not ray.is_initialized()
    if config.cluster.cluster == "local":
        seen = os.environ.get("CUDA_VISIBLE_DEVICES")
        gpus = seen.split(",") if seen else [str(i) for i in range(torch.cuda.device_count())]
        free = gpus[ranks.world() :]  # the first are the trainer's
        if (have := len(free) if kind == "GPU" else os.cpu_count()) < wanted:
            raise ValueError(f"{wanted} generators, but {have} {kind}s for them: pass fewer --generators")
        os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(free)  # what Ray's processes are to see
        ray.init("local", num_cpus=wanted, num_gpus=len(free), include_dashboard=False, **quiet)
        os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(gpus)
    elif began:
        try:
            ray.init(address="auto", **quiet)
        except (ConnectionError, RuntimeError):
            raise ValueError("no Ray cluster is running here: ray start --head, or pass --cluster local") from None
    if (have := ray.cluster_resources().get(kind, 0)) < wanted:
        raise ValueError(f"{wanted} generators, but {have:.0f} {kind}s in the cluster: pass fewer --generators")
    return began


def trained_on(config: Config) -> set[tuple[int, int]]:
    """The shards that an interrupted run has trained on; a step that was cut otherwise counts as a whole."""
    found = set()
    for row in read_metrics(config.folder):
        shards = [tuple(shard) for shard in row.get("shards", [])]
        found |= set(shards if len(shards) == config.cluster.step_shards else [(row["step"] - 1, k) for k in range(config.cluster.step_shards)])
    return found


class Cluster:
    """A collector whose generators work ahead while the trainer trains."""

    def __init__(self, config: Config, collect: Collect, began: bool):
        """`began`: Ray ends with this."""
        import ray

        self.ray, self.began, self.collector = ray, began, collect
        model = Path(config.model).expanduser()
        self.config = replace(config, model=str(model.resolve()) if model.exists() else config.model)
        resources = dict(num_cpus=1, num_gpus=int(pick_device(config.machine.device) == "cuda"))
        self.actor = self.ray.remote(Generator).options(**resources, max_restarts=0, max_task_retries=0)
        self.data = splits(config)["train"]
        self.weights: tuple = ()  # the newest version, and where its weights are
        self.ahead = 0  # the first step whose shards are not in work yet
        self.todo: queue.PriorityQueue = queue.PriorityQueue()  # shards, the oldest first
        self.done: queue.Queue = queue.Queue()  # harvests, and errors
        self.lost: list[Lost] = []  # why generators had to be started again, since the last step
        self.left = config.cluster.generators  # that are not given up
        self.actors: dict[int, object] = {}  # one a thread
        self.closing = False
        self.threads = [threading.Thread(target=self.serve, args=[i], daemon=True) for i in range(config.cluster.generators)]
        for thread in self.threads:
            thread.start()

    def __call__(self, policy: Policy, sampler: Sampler, problems: list[Problem], config: Config, rng) -> Collected:
        """A step's worth of trajectories. `problems` and `rng` are as `draw` makes them, for the steps ahead too."""
        began, step = time.perf_counter(), policy.version
        self.weights = step, self.ray.put({name: w.numpy() for name, w in policy.trained_weights().items()})
        trained = trained_on(config) if step and not self.ahead else ()
        first, self.ahead = self.ahead, step + config.cluster.max_staleness + 1
        for number in range(first, min(self.ahead, config.budget.steps or self.ahead)):
            for shard in cut(*draw(self.data, config.learning.problems, config.seed, number), config, number):
                if (number, shard.number) not in trained:
                    self.todo.put(shard)
        harvests, dropped = self.take(step)
        trajectories, usage, info = merge(harvests)
        ages = [step - harvest.version for harvest in harvests for _ in harvest.trajectories] or [0]
        info |= {"age_mean": float(np.mean(ages)), "age_max": max(ages), "restarts": len(self.lost)}
        info |= {"dropped": sum(len(old.trajectories) for old in dropped)}
        info |= {"shards": [(harvest.shard.step, harvest.shard.number) for harvest in harvests]}
        info |= {"waited_seconds": time.perf_counter() - began}
        del self.lost[: info["restarts"]]
        return trajectories, sum((old.usage for old in dropped), usage), info

    def take(self, step: int) -> tuple[list[Harvest], list[Harvest]]:
        """As many shards as a step has, as they come, and those that are too old: their problems are done again."""
        taken: list[Harvest] = []
        dropped: list[Harvest] = []
        while len(taken) < self.config.cluster.step_shards:
            harvest = self.receive()
            if step - harvest.version <= self.config.cluster.max_staleness:
                taken.append(harvest)
            else:
                dropped.append(harvest)
                self.todo.put(harvest.shard)
        return sorted(taken, key=lambda harvest: harvest.shard), dropped

    def receive(self) -> Harvest:
        """The next harvest; an error that waiting can't cure is raised."""
        while not isinstance(found := self.done.get(), Harvest):
            self.left -= 1
            if not isinstance(found, Lost):
                raise found
            if not self.left:
                raise ValueError(f"no generator is left, the last one: {found}")
        return found

    def serve(self, number: int) -> None:
        """A thread: one generator, which is started again when it is lost, and one shard after another."""
        failed = 0  # starts in a row
        while not self.closing and failed < TRIES:
            shard, failed = None, failed + 1
            actor = self.actors[number] = self.actor.remote()
            try:
                if (theirs := self.ask(actor, "load", self.config, self.collector)) != (ours := identity()):
                    raise ValueError(f"a generator runs {theirs}, the trainer {ours}: install the same everywhere")
                failed = 0
                while (shard := self.todo.get()).problems and not self.closing:
                    version, weights = self.weights
                    self.done.put(Harvest(shard, version, *self.ask(actor, "collect", shard, version, weights)))
                    shard = None
            except Lost as reason:
                if not self.closing:
                    self.recover(shard, reason, failed)
            except Exception as error:  # the collector's own, or a machine that must not take part
                return self.done.put(error)
            finally:
                self.ray.kill(actor)

    def ask(self, actor, method: str, *args):
        """A generator's answer. Lost if it dies or takes too long; what it raised is raised here."""
        seconds = self.config.cluster.generator_timeout + (START_SECONDS if method == "load" else 0)
        try:
            return self.ray.get(getattr(actor, method).remote(*args), timeout=seconds)
        except self.ray.exceptions.RayTaskError as error:
            raise error.cause from error
        except self.ray.exceptions.RayError as error:
            raise Lost(f"{type(error).__name__} in {method}") from error

    def recover(self, shard: Shard | None, reason: Lost, failed: int) -> None:
        """A generator was lost, with a shard in its hands or after `failed` starts in vain."""
        self.lost.append(reason)
        tqdm.write(f"warning: a generator is lost ({reason})")
        if shard and shard.losses + 1 < TRIES:
            self.todo.put(replace(shard, losses=shard.losses + 1))
        elif shard:
            self.done.put(ValueError(f"{TRIES} generators were lost with the same problems, the last one: {reason}"))
        elif failed == TRIES:  # the thread ends
            self.done.put(reason)

    def close(self) -> None:
        """End the generators, whatever they are at."""
        self.closing = True
        for _ in self.threads:
            self.todo.put(Shard(-1, 0, [], np.random.default_rng()))  # comes first, and wakes a thread that waits
        for actor in list(self.actors.values()):
            self.ray.kill(actor)
        for thread in self.threads:
            thread.join(timeout=10)
        if self.began:
            self.ray.shutdown()
