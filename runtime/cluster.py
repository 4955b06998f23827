"""A cluster: generators, processes on other cores, GPUs or machines, collect for one trainer. By Ray.

    pip install "ray>=2.60,<2.61"
    python ppo.py --search mcts --cluster local --generators 2    # Ray starts and ends with the run
    python ppo.py --search mcts --cluster auto --generators 14    # on a running Ray cluster: docs/cluster.md

A step's problems are split into shards. A generator is a Ray actor with a policy, a critic and a sampler. It takes a
shard and the newest weights, and calls the same `collect` that one process would call. The trainer hands out the shards
of `max_staleness` steps beyond its own, and trains on the shards that are collected first.

A failure costs one shard's work. What a shard draws depends on run, step and shard alone. One thread and one generator
work on a shard at a time. A generator that dies, or takes too long and is killed, has delivered nothing: its shard goes
to another one. So no problem is lost or counted twice. With max_staleness 0 the result is that of one process that
collects the shards one after another (`in_shards`): on CPUs with as many threads to the last bit.
"""

import logging
import os
import queue
import threading
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, field, replace
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from config import Config
from policy import Policy
from runtime import memory, ranks, tasks
from runtime.files import sha256
from runtime.loading import load_policy, locate, pick_device, read_chat
from runtime.provenance import identity
from runtime.run_folder import read_metrics
from runtime.samplers import make_sampler
from runtime.torch_sampler import TorchSampler
from runtime.weights import set_weights, trained_weights
from sampling import Collect, Collected, Problem, Sampler, Trajectory, Usage, draw

TRIES = 5  # generators that may be lost with one shard, or one after another while they start
START_SECONDS = 600  # that a start may take beyond a shard


class GeneratorLost(Exception):
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
class ShardResult:
    """What was collected of a shard."""

    shard: Shard
    version: int  # of the policy that it was collected with
    trajectories: list[Trajectory]
    usage: Usage
    metrics: dict[str, float]


def split_step(problems: list[Problem], rng: np.random.Generator, config: Config, step: int) -> list[Shard]:
    """A step in shards. Shard k has the step's stream, jumped ahead k times: a single shard is the step unchanged."""
    count = config.cluster.step_shards
    indices = np.array_split(np.arange(len(problems)), count)
    streams = [np.random.Generator(rng.bit_generator.jumped(k)) for k in range(count)]
    return [Shard(step, k, [problems[i] for i in indices[k]], streams[k]) for k in range(count)]


def merge_shards(results: list[ShardResult]) -> Collected:
    """Shards as one step; metrics are averaged over problems."""
    sizes = [len(result.shard.problems) for result in results]
    metrics = {
        name: float(np.average([result.metrics[name] for result in results], weights=sizes))
        for name in results[0].metrics
    }
    trajectories = [trajectory for result in results for trajectory in result.trajectories]
    return trajectories, sum((result.usage for result in results), Usage()), metrics


def collect_shard(collect: Collect, policy: Policy, sampler: Sampler, shard: Shard, config: Config) -> Collected:
    collected = collect(policy, sampler, shard.problems, config, shard.rng)
    if isinstance(sampler, TorchSampler):  # its cache may change the last bit of the next shard
        sampler.rest()
    return collected


def in_shards(collect: Collect) -> Collect:
    """A collector that collects the shards of a step one after another, in this process."""

    def collect_step(policy: Policy, sampler: Sampler, problems: list[Problem], config: Config, rng) -> Collected:
        results = []
        for shard in split_step(problems, rng, config, policy.version):
            collected = collect_shard(collect, policy, sampler, shard, config)
            results.append(ShardResult(shard, policy.version, *collected))
        return merge_shards(results)

    return collect_step


@contextmanager
def collecting(config: Config, collect: Collect) -> Iterator[Collect]:
    """The collector that the configuration asks for: `collect` itself, in shards, or by a cluster's generators."""
    if config.cluster.cluster == "none":
        yield collect if config.cluster.step_shards == 1 else in_shards(collect)
        return
    with closing(Cluster(config, collect, connect(config))) as cluster:
        yield cluster


class Generator:
    """In a Ray actor: policy, critic and sampler. New weights come before a shard, never within one."""

    def load(self, config: Config, collect: Collect, prompt: int) -> dict[str, object]:
        """Load the model; returns what this process runs, as `running` says. `prompt`: tokens of the longest prompt."""
        machine, device = config.machine, pick_device(config.machine.device)
        options = dict(train=False, template_options=config.task.template_options, task=tasks.load_task(config.task))
        policy = load_policy(config.model, machine.lora_rank, device, machine.dtype, machine.quantize, **options)
        policy.version = -1  # the trainer's weights come with the first shard
        self.sampler = make_sampler(memory.plan(config, device, prompt), policy, config.seed)
        self.config, self.collector, self.policy = config, collect, policy
        return running(config)

    def collect(self, shard: Shard, version: int, weights: dict[str, np.ndarray]) -> Collected:
        if version != self.policy.version:
            set_weights(self.policy, {name: torch.tensor(array) for name, array in weights.items()})
            self.policy.version = version
        return collect_shard(self.collector, self.policy, self.sampler, shard, self.config)


def running(config: Config) -> dict[str, object]:
    """The versions, the code of the kit and the file of the task that this process runs."""
    own = {} if config.task.task == "countdown" else {"task": sha256(tasks.file_of(config.task.task))}
    return identity() | own


def connect(config: Config) -> bool:
    """Start Ray, which makes a token for itself, or join a cluster. Returns whether Ray is to end with the run.
    ValueError if there are too few CPUs or GPUs."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nothing is sent to Ray's makers
    os.environ.setdefault("RAY_NUM_REDIS_GET_RETRIES", "1")  # a minute for a cluster that is gone, not a quarter hour
    if not find_spec("ray"):
        raise ValueError('Ray is not installed: pip install "ray>=2.60,<2.61"')
    import ray

    quiet = dict(log_to_driver=False, logging_level=logging.ERROR)
    generators, kind = config.cluster.generators, "GPU" if pick_device(config.machine.device) == "cuda" else "CPU"
    starts_ray = not ray.is_initialized()
    if config.cluster.cluster == "local":
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        gpus = visible.split(",") if visible else [str(i) for i in range(torch.cuda.device_count())]
        free = gpus[ranks.world() :]  # the first are the trainer's
        available = len(free) if kind == "GPU" else os.cpu_count()
        if available < generators:
            raise ValueError(f"{generators} generators, but {available} {kind}s for them: pass fewer --generators")
        os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(free)  # what Ray's processes are to see
        ray.init("local", num_cpus=generators, num_gpus=len(free), include_dashboard=False, **quiet)
        os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(gpus)
    elif starts_ray:
        try:
            ray.init(address="auto", **quiet)
        except (ConnectionError, RuntimeError):
            raise ValueError("no Ray cluster is running here: ray start --head, or pass --cluster local") from None
    available = ray.cluster_resources().get(kind, 0)
    if available < generators:
        raise ValueError(
            f"{generators} generators, but {available:.0f} {kind}s in the cluster: pass fewer --generators"
        )
    return starts_ray


def trained_shards(config: Config) -> set[tuple[int, int]]:
    """The shards, as (step, number), that an interrupted run has trained on. A step that was split into another number
    of shards counts as a whole."""
    trained, count = set(), config.cluster.step_shards
    for row in read_metrics(config.folder):
        shards = [tuple(shard) for shard in row.get("shards", [])]
        trained |= set(shards if len(shards) == count else [(row["step"] - 1, k) for k in range(count)])
    return trained


class Cluster:
    """A collector whose generators work ahead while the trainer trains."""

    def __init__(self, config: Config, collect: Collect, owns_ray: bool):
        """`owns_ray`: Ray ends when this cluster closes."""
        import ray

        self.ray, self.owns_ray, self.collector = ray, owns_ray, collect
        model = Path(config.model).expanduser()
        self.config = replace(config, model=str(model.resolve()) if model.exists() else config.model)
        resources = dict(num_cpus=1, num_gpus=int(pick_device(config.machine.device) == "cuda"))
        self.actor_class = self.ray.remote(Generator).options(**resources, max_restarts=0, max_task_retries=0)
        task = tasks.load_task(config.task)
        self.train_problems = tasks.splits(task, config)["train"]
        chat = read_chat(*locate(config.model), task, config.task.template_options)
        self.longest_prompt = chat.longest(self.train_problems)
        self.weights: tuple = ()  # the newest version, and where its weights are
        self.next_step = 0  # the first step whose shards are not in the queue yet
        self.waiting: queue.PriorityQueue = queue.PriorityQueue()  # shards, the oldest first
        self.results: queue.Queue = queue.Queue()  # ShardResults, and errors
        self.losses: list[GeneratorLost] = []  # why generators had to be started again, since the last step
        self.actors: dict[int, object] = {}  # the generator of each thread
        self.closing = False
        numbers = range(config.cluster.generators)
        self.running = len(numbers)  # generators that are not given up
        self.threads = [threading.Thread(target=self.run_generator, args=[i], daemon=True) for i in numbers]
        for thread in self.threads:
            thread.start()

    # -------------------------------------------------------------------------------------------- the trainer's side

    def __call__(self, policy: Policy, sampler: Sampler, problems: list[Problem], config: Config, rng) -> Collected:
        """A step's worth of trajectories. `problems` and `rng` are not read: `draw` makes them for later steps too."""
        started, step = time.perf_counter(), policy.version
        self.weights = step, self.ray.put({name: w.numpy() for name, w in trained_weights(policy).items()})
        self.hand_out(step, config)
        results, dropped = self.gather(step)
        trajectories, usage, metrics = merge_shards(results)
        ages = [step - result.version for result in results for _ in result.trajectories] or [0]
        metrics |= {"age_mean": float(np.mean(ages)), "age_max": max(ages), "restarts": len(self.losses)}
        metrics |= {"dropped": sum(len(old.trajectories) for old in dropped)}
        metrics |= {"shards": [(result.shard.step, result.shard.number) for result in results]}
        metrics |= {"waited_seconds": time.perf_counter() - started}
        del self.losses[: metrics["restarts"]]
        return trajectories, sum((old.usage for old in dropped), usage), metrics

    def hand_out(self, step: int, config: Config) -> None:
        """Put the shards up to `max_staleness` steps beyond `step` into the queue, unless the run has trained on them
        before it was interrupted."""
        trained = trained_shards(config) if step and not self.next_step else ()
        first, self.next_step = self.next_step, step + config.cluster.max_staleness + 1
        for number in range(first, min(self.next_step, config.budget.steps or self.next_step)):
            problems, rng = draw(self.train_problems, config.learning.problems, config.seed, number)
            for shard in split_step(problems, rng, config, number):
                if (number, shard.number) not in trained:
                    self.waiting.put(shard)

    def gather(self, step: int) -> tuple[list[ShardResult], list[ShardResult]]:
        """The next results, as many as a step has shards; and the results that are too old, whose shards are collected
        again."""
        taken: list[ShardResult] = []
        dropped: list[ShardResult] = []
        while len(taken) < self.config.cluster.step_shards:
            result = self.next_result()
            if step - result.version <= self.config.cluster.max_staleness:
                taken.append(result)
            else:
                dropped.append(result)
                self.waiting.put(result.shard)
        return sorted(taken, key=lambda result: result.shard), dropped

    def next_result(self) -> ShardResult:
        """The next shard that is collected. Raises an error that waiting can't cure."""
        while not isinstance(result := self.results.get(), ShardResult):
            self.running -= 1
            if not isinstance(result, GeneratorLost):
                raise result
            if not self.running:
                raise ValueError(f"no generator is left, the last one: {result}")
        return result

    # -------------------------------------------------------------------------------------------- a generator's thread

    def run_generator(self, number: int) -> None:
        """A thread: one generator, which is started again when it is lost, collects one shard after another."""
        failed = 0  # starts in a row
        while not self.closing and failed < TRIES:
            shard, failed = None, failed + 1
            actor = self.actors[number] = self.actor_class.remote()
            try:
                theirs = self.call(actor, "load", self.config, self.collector, self.longest_prompt)
                if theirs != (ours := running(self.config)):
                    raise ValueError(f"a generator runs {theirs}, the trainer {ours}: install the same everywhere")
                failed = 0
                while (shard := self.waiting.get()).problems and not self.closing:
                    version, weights = self.weights
                    collected = self.call(actor, "collect", shard, version, weights)
                    self.results.put(ShardResult(shard, version, *collected))
                    shard = None
            except GeneratorLost as reason:
                if not self.closing:
                    self.recover(shard, reason, failed)
            except Exception as error:  # the collector's own, or a machine that must not take part
                return self.results.put(error)
            finally:
                self.ray.kill(actor)

    def call(self, actor, method: str, *args):
        """A generator's answer. GeneratorLost if it dies or takes too long; what it raised is raised here."""
        seconds = self.config.cluster.generator_timeout + (START_SECONDS if method == "load" else 0)
        try:
            return self.ray.get(getattr(actor, method).remote(*args), timeout=seconds)
        except self.ray.exceptions.RayTaskError as error:
            raise error.cause from error
        except self.ray.exceptions.RayError as error:
            raise GeneratorLost(f"{type(error).__name__} in {method}") from error

    def recover(self, shard: Shard | None, reason: GeneratorLost, failed: int) -> None:
        """A generator was lost while it collected `shard`, or (None) while it started, for the `failed`-th time in a
        row. The shard goes back into the queue."""
        self.losses.append(reason)
        tqdm.write(f"warning: a generator is lost ({reason})")
        if shard and shard.losses + 1 < TRIES:
            self.waiting.put(replace(shard, losses=shard.losses + 1))
        elif shard:
            self.results.put(ValueError(f"{TRIES} generators were lost with the same problems, the last one: {reason}"))
        elif failed == TRIES:  # the thread ends
            self.results.put(reason)

    def close(self) -> None:
        """End the generators, whatever they are doing."""
        self.closing = True
        for _ in self.threads:
            self.waiting.put(Shard(-1, 0, [], np.random.default_rng()))  # comes first, and wakes a thread that waits
        for actor in list(self.actors.values()):
            self.ray.kill(actor)
        for thread in self.threads:
            thread.join(timeout=10)
        if self.owns_ray:
            self.ray.shutdown()
