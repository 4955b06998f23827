"""The cost of a cluster: Ray's overhead, a simulation of 1 to 64 generators, the bytes of new weights.

    python -m benchmarks.cluster    # needs Ray, an idle machine and one thread a process; minutes

Overhead: steps of preset tiny are collected in this process and by one generator through Ray, in turn; both must give
the same trajectories. Simulation: the rules of runtime/cluster.py (shards in work, newest weights before each, age,
first come first served) with service times recorded in this run: a shard of 64 / g problems for g generators, an
update, the publishing of weights. It assumes that generators don't slow each other down, as on a machine each. Weights:
bytes are counted from the shapes of Qwen2.5-1.5B and 7B; rates of `put` and copy are measured here, those of networks
are nominal.
"""

import heapq
import json
import random
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, median

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # for `python benchmarks/cluster.py`

import runtime.threads

import numpy as np
import torch
from torch import nn
from transformers import Qwen2Config, Qwen2ForCausalLM

from config import Config, check
from policy import ValueHead
from ppo import collect_mcts, make_optimizer, update
from runtime import cli, files, provenance
from runtime.cluster import collect_shard, collecting, split_step
from runtime.files import check_writable
from runtime.loading import load_policy
from runtime.tasks import load_task, splits
from runtime.torch_sampler import TorchSampler
from runtime.weights import trained_weights
from sampling import draw

GENERATORS = (1, 2, 4, 8, 16, 32, 64)
RANK = 32  # of the adapter
SHAPES = {
    "1.5B": Qwen2Config(
        hidden_size=1536, num_hidden_layers=28, num_attention_heads=12, num_key_value_heads=2, intermediate_size=8960,
        vocab_size=151_936, tie_word_embeddings=True,
    ),
    "7B": Qwen2Config(
        hidden_size=3584, num_hidden_layers=28, num_attention_heads=28, num_key_value_heads=4, intermediate_size=18_944,
        vocab_size=152_064, tie_word_embeddings=False,
    ),
}  # fmt: skip


@dataclass
class Bench:
    """Measure Ray's overhead and service times, and simulate larger clusters."""

    rounds: int = 5  # of each side
    steps: int = 3  # in a round
    recorded: int = 8  # shards of each size, updates
    simulated: int = 500  # steps
    networks: tuple[float, ...] = (10, 25, 100, 400)  # Gbit/s
    nodes: int = 8  # that generate, beside the trainer's
    out: Path = Path("runs/cluster.json")

    def __post_init__(self):
        check(self, "at least", 1, "rounds steps recorded simulated nodes")
        check(self, "above", 0, "networks")
        check_writable(self.out)


# ------------------------------------------------------------------------------------------------ measured


def draw_step(config: Config, data, step: int):
    """A step's problems and random stream."""
    return draw(data, config.learning.problems, config.seed, step)


def overhead(bench: Bench, config: Config, policy, sampler, data, collect) -> list[tuple[float, float]]:
    """Seconds a step in this process and through one generator, a pair a round; the first round is a warm-up."""
    pairs, collectors = [], {"process": collect_mcts, "generator": collect}
    for number in range(bench.rounds + 1):
        seconds, completions = {}, {}
        for name in ("process", "generator") if number % 2 else ("generator", "process"):
            began = time.perf_counter()
            for step in range(number * bench.steps, (number + 1) * bench.steps):
                policy.version = step
                problems, rng = draw_step(config, data, step)
                trajectories, _, _ = collectors[name](policy, sampler, problems, config, rng)
                sampler.rest()
            seconds[name] = (time.perf_counter() - began) / bench.steps
            completions[name] = [t.completion for t in trajectories]
        if completions["process"] != completions["generator"]:
            raise ValueError("one generator has collected other trajectories than one process")
        pairs.append((seconds["process"], seconds["generator"]))
    return pairs[1:]


def service_times(bench: Bench, config: Config, policy, sampler, data) -> dict[int, list[float]]:
    """Seconds of shards when a step is split for so many generators."""
    service = {}
    for generators in GENERATORS:
        times = []
        for step in range(bench.recorded):
            problems, rng = draw_step(config, data, 1_000 + step)
            size = config.learning.problems // generators
            [shard] = split_step(problems[:size], rng, config, step)
            began = time.perf_counter()
            collect_shard(collect_mcts, policy, sampler, shard, config)
            times.append(time.perf_counter() - began)
        service[generators] = times
    return service


def update_times(bench: Bench, config: Config, policy, sampler, data) -> list[float]:
    """Seconds of updates; the first one is a warm-up."""
    optimizer = make_optimizer(policy, config)
    problems, rng = draw_step(config, data, 0)
    trajectories, _, _ = collect_mcts(policy, sampler, problems, config, rng)
    times = []
    for _ in range(bench.recorded + 1):
        began = time.perf_counter()
        update(policy, optimizer, trajectories, config.learning)
        times.append(time.perf_counter() - began)
    return times[1:]


def overlapped(bench: Bench, config: Config, policy) -> float:
    """Seconds a step when one generator and this trainer work at once, with staleness 1, for comparison with the
    simulation. The first two steps are warm-up."""
    optimizer, seconds, policy.version = make_optimizer(policy, config), [], 0
    with collecting(config, collect_mcts) as collect:
        for _ in range(bench.recorded + 2):
            began = time.perf_counter()
            trajectories, _, _ = collect(policy, None, [], config, None)
            update(policy, optimizer, trajectories, config.learning)
            seconds.append(time.perf_counter() - began)
    return mean(seconds[2:])


def copy_rates(ray, policy) -> dict[str, float]:
    """Seconds to publish this policy's weights; GB/s of `put`, and of a copy out of the object store."""
    array = np.ones(2**27, np.float32)  # 0.5 GB
    task = ray.remote(num_cpus=0)(copy_seconds)
    puts, copies = [], []
    for _ in range(4):
        began = time.perf_counter()
        ref = ray.put(array)
        puts.append(time.perf_counter() - began)
        copies.append(ray.get(task.remote(ref)))
    began = time.perf_counter()
    for _ in range(10):
        ray.put({name: weight.numpy() for name, weight in trained_weights(policy).items()})
    publish = (time.perf_counter() - began) / 10
    size = array.nbytes / 1e9
    return {"publish": publish, "put": size / median(puts[1:]), "copy": size / median(copies[1:])}


def copy_seconds(array) -> float:
    began = time.perf_counter()
    torch.tensor(array)
    return time.perf_counter() - began


# ------------------------------------------------------------------------------------------------ simulated


@dataclass
class Simulation:
    seconds: float  # a step
    waiting: float  # share of the time that the trainer waits
    age: float  # mean
    dropped: float  # shards a step


def simulate(generators: int, staleness: int, service: list[float], updates: list[float], steps: int) -> Simulation:
    """The rules of runtime/cluster.py with times instead of work: as many shards a step as generators; an update ends
    with publishing."""
    rng, now, waited = random.Random(0), 0.0, 0.0
    waiting: list[tuple[int, int]] = []  # shards, the oldest first
    running: list[tuple[float, tuple[int, int], int]] = []  # until when, shard, version
    done: list[tuple[tuple[int, int], int]] = []
    idle, ages, dropped = generators, [], 0

    def work(until: float, version: int) -> float:
        """Let generators work until then, or, without an end, until one is done; the time."""
        nonlocal idle
        clock = now
        while True:
            while idle and waiting:
                idle -= 1
                heapq.heappush(running, (clock + rng.choice(service), heapq.heappop(waiting), version))
            if not running or running[0][0] > until:
                return clock
            clock, shard, born = heapq.heappop(running)
            idle += 1
            done.append((shard, born))
            if until == float("inf"):
                return clock

    for step in range(steps):
        for ahead in [step + staleness] if step else range(staleness + 1):
            for number in range(generators):
                heapq.heappush(waiting, (ahead, number))
        work(now, step)
        taken, began = 0, now
        while taken < generators:
            if not done:
                now = work(float("inf"), step)
            shard, born = done.pop(0)
            if step - born > staleness:
                heapq.heappush(waiting, shard)
                dropped += 1
            else:
                ages.append(step - born)
                taken += 1
        waited += now - began
        ends = now + rng.choice(updates)
        work(ends, step)
        now = ends
    return Simulation(now / steps, waited / now, mean(ages), dropped / steps)


# ------------------------------------------------------------------------------------------------ on paper


def weight_bytes(config: Qwen2Config) -> dict[str, int]:
    """Bytes that a new version has on the wire, fp32, value head included."""
    with torch.device("meta"):
        lm, head = Qwen2ForCausalLM(config), ValueHead(config.hidden_size)
    linear = [m for m in lm.modules() if isinstance(m, nn.Linear) and m is not lm.lm_head]
    adapter = RANK * sum(m.in_features + m.out_features for m in linear)
    parameters, value = (sum(p.numel() for p in part.parameters()) for part in (lm, head))
    return {f"LoRA {RANK}": 4 * (adapter + value), "all weights": 4 * (parameters + value)}


def show_weights(bench: Bench, rates: dict[str, float]) -> None:
    names = " | ".join(f"{speed:g} Gbit/s" for speed in bench.networks)
    print(
        f"\n| model | trained | GB | put, s | copy, s | {names} |\n|---|---|---|---|---|{'---|' * len(bench.networks)}"
    )
    for model, config in SHAPES.items():
        for trained, size in weight_bytes(config).items():
            gb = size / 1e9
            wires = [gb * 8 / speed for speed in bench.networks]
            cells = " | ".join(f"{wire:.2f} to {wire * bench.nodes:.1f}" for wire in wires)
            print(f"| {model} | {trained} | {gb:.2f} | {gb / rates['put']:.2f} | {gb / rates['copy']:.2f} | {cells} |")
    print(f"put at {rates['put']:.1f} GB/s and copy at {rates['copy']:.1f} GB/s as measured here; networks at their")
    print(f"nominal rate, s to one node, and to {bench.nodes} nodes if all of it leaves through one link")


def main() -> None:
    bench = cli.read_config(Bench)
    torch.set_num_threads(1)
    config = Config().change(
        device="cpu", cluster="local", max_staleness=0, problems=max(GENERATORS), learning_rate=0.0,
        value_learning_rate=0.0,
    )  # fmt: skip
    policy = load_policy(config.model)
    sampler, data = TorchSampler(policy), splits(load_task(config.task), config)["train"]
    with collecting(config, collect_mcts) as collect:
        pairs = overhead(bench, config, policy, sampler, data, collect)
        rates = copy_rates(collect.ray, policy)
    overheads = [generator / process - 1 for process, generator in pairs]
    process, generator = (median(side) for side in zip(*pairs))
    print(
        f"a step of {config.learning.problems} trees: {process:.2f} s in this process, {generator:.2f} s through one "
        f"generator;\noverhead {median(overheads):+.1%} (rounds: {', '.join(f'{one:+.1%}' for one in overheads)})"
    )
    service = service_times(bench, config, policy, sampler, data)
    updates = [seconds + rates["publish"] for seconds in update_times(bench, config, policy, sampler, data)]
    print(f"an update: {mean(updates):.2f} s, of it publishing {1000 * rates['publish']:.1f} ms\n")
    print(
        "| generators | s a shard | paper, staleness 0 | simulated | waits | paper, 1 | simulated | waits | dropped |"
    )
    print("|---|---|---|---|---|---|---|---|---|")
    for generators, times in service.items():
        paper = [expected_most(times, generators) + mean(updates), max(mean(times), mean(updates))]
        cells = []
        for staleness in (0, 1):
            simulation = simulate(generators, staleness, times, updates, bench.simulated)
            cells += [f"{paper[staleness]:.2f}", f"{simulation.seconds:.2f}", f"{simulation.waiting:.0%}"]
        print(f"| {generators} | {mean(times):.2f} | {' | '.join(cells)} | {simulation.dropped:.2f} |")
    measured = overlapped(bench, config.change(max_staleness=1), policy)
    expected = simulate(1, 1, service[1], updates, bench.simulated).seconds
    print(f"one generator with staleness 1, really run: {measured:.2f} s a step, simulated {expected:.2f}")
    show_weights(bench, rates)
    recorded = {"overhead": pairs, "service": service, "updates": updates, "rates": rates, "together": measured}
    files.write(bench.out, json.dumps(recorded | provenance.provenance()))


def expected_most(times: list[float], number: int) -> float:
    """The mean of the largest of `number` draws."""
    ordered = sorted(times)
    ranks = [(k / len(ordered)) ** number for k in range(len(ordered) + 1)]
    return sum(time * (high - low) for time, low, high in zip(ordered, ranks, ranks[1:]))


if __name__ == "__main__":
    cli.command(main)
