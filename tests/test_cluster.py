"""Tests of runtime/cluster.py: shards, lost generators, and whole runs on Ray."""

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from safetensors.torch import load_file
from torch.testing import assert_close

import baselines
import ppo
from config import Config
from runtime import cluster, provenance, run_folder
from runtime.cli import parse
from runtime.cluster import Cluster, Shard, ShardResult, collecting, connect, in_shards, merge_shards, split_step
from runtime.run_folder import read_metrics
from runtime.tasks import load_task, splits
from runtime.torch_sampler import TorchSampler
from sampling import Reward, SamplingParams, Trajectory, Usage, draw

COLLECTORS = ppo.COLLECTORS | baselines.COLLECTORS

# ------------------------------------------------------------------------------------------------ shards


def test_a_step_in_shards_is_the_whole_step(problems):
    """Prevents a problem that is left out or done twice, and shards that draw the same numbers."""
    config = Config().change(shards=3, problems=4)
    shards = split_step(problems, np.random.default_rng(5), config, 7)
    assert [p for shard in shards for p in shard.problems] == problems
    assert [(shard.step, shard.number, len(shard.problems)) for shard in shards] == [(7, 0, 2), (7, 1, 1), (7, 2, 1)]
    drawn = {tuple(shard.rng.integers(2**63, size=2)) for shard in shards}
    again = {
        tuple(shard.rng.integers(2**63, size=2)) for shard in split_step(problems, np.random.default_rng(5), config, 7)
    }
    assert len(drawn) == 3 and drawn == again
    [whole] = split_step(problems, np.random.default_rng(5), config.change(shards=1), 7)
    assert whole.problems == problems and whole.rng.integers(2**63) == np.random.default_rng(5).integers(2**63)


@pytest.mark.parametrize("method", ["mcts", "cispo"])
def test_one_shard_is_what_is_collected_without_shards(moved, problems, tiny_config, method):
    """Prevents a cluster of one generator that finds something else than one process."""
    config, collect = tiny_config(method), COLLECTORS[method]
    plain, sharded = (
        collector(moved, TorchSampler(moved), problems, config, np.random.default_rng(3))
        for collector in (collect, in_shards(collect))
    )
    assert plain[0] == sharded[0] and plain[2] == pytest.approx(sharded[2])
    assert (plain[1].generated, plain[1].prefilled) == (sharded[1].generated, sharded[1].prefilled)


def test_metrics_of_shards_are_averaged_over_problems(problems):
    """Prevents a mean of means where shards differ in size, and tokens that are not counted."""
    rows = [(problems[:3], 1.0, Usage(5, 1, 1.0)), (problems[3:], 5.0, Usage(7, 2, 0.5))]
    results = [ShardResult(Shard(0, i, part, None), 0, [], usage, {"a": a}) for i, (part, a, usage) in enumerate(rows)]
    assert merge_shards(results) == ([], Usage(12, 3, 1.5), {"a": 2.0})


# ------------------------------------------------------------------------------------------------ bad input


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(cluster="cloud"), "cluster must be one of none, local, auto"),
        (dict(cluster="local", generators=0), "generators must be at least 1"),
        (dict(generators=2), "several generators need a cluster"),
        (dict(cluster="local", max_staleness=-1), "max_staleness must be at least 0"),
        (dict(cluster="local", generator_timeout=0), "generator_timeout must be above 0"),
        (dict(cluster="local", generators=3, problems=2), "2 problems a step can't be cut into 3 shards"),
        (dict(cluster="local", generators=5, shards=2), "5 generators, but at most 4 shards in work"),
        (dict(cluster="local", old_logprobs="recomputed"), "recomputed log-probabilities can't correct for age"),
    ],
)
def test_what_several_processes_can_not_do_is_refused(options, message):
    """Prevents a cluster that is begun and then does nothing, or something else than was asked."""
    with pytest.raises(ValueError, match=message):
        Config().change(**options)


def test_a_cluster_that_is_not_there_or_too_small_is_one_line(monkeypatch, tmp_path, capsys):
    """Prevents a traceback of Ray, or generators that wait forever for a core."""

    def refusal(**changes):
        with pytest.raises(ValueError) as error:
            connect(Config().change(device="cpu", problems=10_000, **changes))
        return str(error.value)

    monkeypatch.setattr(cluster, "find_spec", lambda name: None)
    assert refusal(cluster="local") == 'Ray is not installed: pip install "ray>=2.60,<2.61"'
    monkeypatch.undo()
    ray = pytest.importorskip("ray")
    cores = os.cpu_count()
    expected = f"999 generators, but {cores} CPUs for them: pass fewer --generators"
    assert refusal(cluster="local", generators=999) == expected
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    for error in (ConnectionError, RuntimeError):  # none, and one that is gone
        monkeypatch.setattr(ray, "init", lambda error=error, **options: fail_to_connect(error))
        assert refusal(cluster="auto").startswith("no Ray cluster is running here: ray start --head")
    monkeypatch.setattr(ray, "init", lambda **options: None)
    monkeypatch.setattr(ray, "cluster_resources", lambda: {"CPU": 3.0})
    assert refusal(cluster="auto", generators=4).startswith("4 generators, but 3 CPUs in the cluster")
    assert os.environ["RAY_USAGE_STATS_ENABLED"] == "0"  # nothing is sent to Ray's makers


def fail_to_connect(error):
    raise error("Could not find any running Ray instance.\nPlease specify the one to connect to")


# ------------------------------------------------------------------------------------------------ lost generators


class RayError(Exception):
    pass


class RayTaskError(RayError):
    def __init__(self, cause):
        self.cause = cause


class Inline:
    """Stands in for Ray: calls run in the thread that waits for them, and fail as `script(method, shard)` says. Each
    trajectory's only log-probability is the version that it was collected with."""

    exceptions = SimpleNamespace(RayError=RayError, RayTaskError=RayTaskError)

    def __init__(self, script):
        self.script, self.started, self.timeouts = script, 0, Counter()
        self.put = lambda item: item
        self.kill = lambda actor: None

    def remote(self, kind):
        return SimpleNamespace(options=lambda **_: SimpleNamespace(remote=self.start))

    def start(self):
        self.started += 1
        calls = {name: self.call(name) for name in ("load", "collect")}
        return SimpleNamespace(**calls)

    def call(self, name):
        return SimpleNamespace(remote=lambda *args: (name, args))

    def get(self, call, timeout):
        name, args = call
        self.timeouts[name, timeout] += 1
        if (error := self.script(name, args[0] if name == "collect" else None)) is not None:
            raise error
        if name == "load":
            return provenance.identity()
        shard, version, _ = args
        reward = Reward(0, False, True, "")
        trajectories = [Trajectory(problem, [0], [1], [float(version)], reward) for problem in shard.problems]
        return trajectories, Usage(len(trajectories), 0, 1.0), {"tree": float(shard.step)}


@pytest.fixture
def inline(monkeypatch, tiny_config):
    """A cluster on an `Inline` Ray, and that Ray."""

    @contextmanager
    def make(script=lambda *_: None, **changes):
        ray = Inline(script)
        monkeypatch.setitem(sys.modules, "ray", ray)
        config = tiny_config(cluster="auto", **changes)
        config.folder.mkdir(exist_ok=True)
        (config.folder / "metrics.jsonl").touch()
        collector = Cluster(config, None, owns_ray=False)
        try:
            yield collector, ray, config
        finally:
            collector.close()
            assert not any(thread.is_alive() for thread in collector.threads)

    return make


def step(collector, config, number):
    """A step, and its row of metrics."""
    row = collector(SimpleNamespace(version=number, named_parameters=dict().items), None, None, config, None)
    with (config.folder / "metrics.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps({"step": number + 1} | row[2]) + "\n")
    return row


def drawn(config, steps):
    data = splits(load_task(config.task), config)["train"]
    return Counter(
        problem for number in range(steps) for problem in draw(data, config.learning.problems, config.seed, number)[0]
    )


@pytest.mark.parametrize("max_staleness", [0, 2])
def test_lost_generators_lose_and_double_nothing(inline, max_staleness):
    """Prevents problems that are trained on twice, or never, because a generator died under them."""
    rng = np.random.default_rng(0)

    def fail_often(name, shard):
        return RayError() if name == "collect" and shard.losses < 3 and rng.random() < 0.4 else None

    settings = dict(generators=3, shards=4, steps=20, tokens=0, max_staleness=max_staleness)
    trained, lost = Counter(), 0
    with inline(fail_often, **settings) as (collector, ray, config):
        for number in range(20):
            trajectories, usage, info = step(collector, config, number)
            assert len(trajectories) == config.learning.problems
            assert 0 <= info["age_mean"] <= info["age_max"] <= max_staleness
            assert usage.generated == len(trajectories) + info["dropped"]
            trained.update(t.problem for t in trajectories)
            lost += info["restarts"]
        assert trained == drawn(config, 20)
        assert lost > 10 and ray.started >= lost and collector.waiting.empty() and collector.results.empty()


def test_a_resumed_run_goes_on_with_the_shards_it_has_not_trained_on(inline):
    """Prevents problems that are trained on twice or never because the trainer died while others worked ahead."""
    slow = {(0, 1): 3, (2, 0): 4, (5, 1): 8}  # shards, and the step before which they are not done
    now, trained = 0, Counter()

    def wait(name, shard):
        while name == "collect" and now < slow.get((shard.step, shard.number), 0):
            time.sleep(0.001)

    settings = dict(generators=3, shards=2, steps=12, tokens=0, max_staleness=2)
    for start, end in ((0, 4), (4, 7), (7, 12)):
        with inline(wait, **settings) as (collector, ray, config):
            for now in range(start, end):
                trained.update(t.problem for t in step(collector, config, now)[0])
            now = 99
    assert trained == drawn(config, 12)
    assert cluster.trained_shards(config.change(shards=3)) == {(number, k) for number in range(12) for k in range(3)}


def test_work_ahead_is_bounded_and_ends_with_the_run(inline):
    """Prevents generators that run away from the trainer, and tokens spent on steps that never come."""
    with inline(max_staleness=2, steps=4, tokens=0) as (collector, ray, config):
        seen = []
        for number in range(4):
            step(collector, config, number)
            time.sleep(0.05)
            seen.append(collector.results.qsize())
        assert seen == [2, 2, 1, 0]


def test_what_is_too_old_is_dropped_counted_and_done_again(inline):
    """Prevents training on what a policy of long ago has made, and problems that vanish with it."""
    with inline(max_staleness=1, steps=4, tokens=0, shards=1) as (collector, ray, config):
        trained = Counter(t.problem for t in step(collector, config, 0)[0])
        time.sleep(0.05)  # step 1 is collected by version 0
        trajectories, usage, info = step(collector, config, 2)
        assert (info["dropped"], info["age_max"]) == (config.learning.problems, 0)
        assert {t.logprobs[0] for t in trajectories} == {2} and usage.generated == 2 * config.learning.problems
        trained.update(
            t.problem for t in [*trajectories, *step(collector, config, 3)[0], *step(collector, config, 3)[0]]
        )
        assert trained == drawn(config, 4)


def test_what_can_not_be_cured_ends_the_run(inline, monkeypatch):
    """Prevents a run that hangs, or starts generators without end: on a bug, on problems that kill every generator,
    on a machine where none can start, and on one with other code."""
    failures = {
        "a bug": lambda name, shard: RayTaskError(KeyError("a bug")) if shard else None,
        "5 generators were lost with the same problems": lambda name, shard: RayError() if shard else None,
        "no generator is left": lambda name, shard: RayError() if name == "load" else None,
    }
    for message, script in failures.items():
        with inline(script, generators=2) as (collector, ray, config):
            with pytest.raises((ValueError, KeyError), match=message):
                step(collector, config, 0)
        assert ray.started <= 10
    with inline() as (collector, ray, config):
        step(collector, config, 0)
    assert set(ray.timeouts) == {("load", 2_400.0), ("collect", 1_800.0)}
    ours = iter([{"this kit": "a"}, {"this kit": "b"}])
    for module in (provenance, cluster):
        monkeypatch.setattr(module, "identity", lambda: next(ours))
    with inline() as (collector, ray, config), pytest.raises(ValueError, match="install the same everywhere"):
        step(collector, config, 0)


# ------------------------------------------------------------------------------------------------ whole runs on Ray


@pytest.fixture(scope="module")
def ray():
    module = pytest.importorskip("ray", reason="Ray is not installed: requirements-dev.txt")
    module.cloudpickle.register_pickle_by_value(sys.modules[__name__])  # tests/ is on no generator's path
    module.init("local", num_cpus=4, include_dashboard=False, object_store_memory=2**28, log_to_driver=False)
    yield module
    module.shutdown()


def stumble(policy, sampler, problems, config, rng):
    """Collects, but a search's process is killed in the middle the first time in version 1, and hangs in version 2."""
    import ray

    for version, accident in ((1, lambda: os.kill(os.getpid(), signal.SIGKILL)), (2, lambda: time.sleep(600))):
        if (
            config.method == "mcts"
            and policy.version == version
            and not (flag := config.folder / f"accident{version}").exists()
        ):
            flag.write_text(ray.get_runtime_context().get_task_id(), encoding="utf-8")
            sampler.sample([policy.encode(problems[0])], [0], SamplingParams(1, max_tokens=4))
            accident()
    return COLLECTORS[config.method](policy, sampler, problems, config, rng)


def stubborn(policy, sampler, problems, config, rng):
    """The first shard of all takes as long as several steps. Each trajectory is marked with its policy's version."""
    if not (flag := config.folder / "slow").exists():
        flag.touch()
        while not (config.folder / "go").exists():
            time.sleep(0.02)
    collected = ppo.collect_samples(policy, sampler, problems, config, rng)
    for trajectory in collected[0]:
        trajectory.version = policy.version
    return collected


def history(folder):
    kept = {"step", "generated", "prefilled", "reward", "length", "policy_loss", "value_loss", "kl", "gradient_norm"}
    return [{key: row[key] for key in kept if key in row} for row in read_metrics(folder)]


def weights(folder):
    files = sorted((folder / "policy").rglob("*.safetensors"))
    return {file.name: load_file(file) for file in files}


@pytest.mark.slow
@pytest.mark.parametrize(("method", "rank"), [("mcts", 0), ("cispo", 4)], ids=["mcts-full", "cispo-lora"])
def test_without_staleness_a_cluster_is_one_process_whatever_happens(
    ray, tiny_config, tmp_path, monkeypatch, method, rank
):
    """Prevents weights that are stale or not whole, seeds that depend on who works, and a generator that is killed in
    mid-search or hangs, or a trainer that is interrupted, from changing what is learnt."""
    settings = dict(method=method, lora_rank=rank, tokens=0, steps=4, learning_rate=1e-3, shards=2, checkpoints=4)
    alone = tiny_config(out=tmp_path / "alone", **settings)
    with collecting(alone, COLLECTORS[method]) as collect:
        ppo.train(alone, collect)

    def get(call, timeout, get=ray.get, hangs=tmp_path / "many" / "accident2"):
        """A generator that hangs runs out of time, one that is slow on a busy machine does not."""
        while not ray.wait([call], timeout=timeout)[0]:
            if hangs.exists() and hangs.read_text(encoding="utf-8") == call.task_id().hex():
                return get(call, timeout=0)
        return get(call)

    monkeypatch.setattr(ray, "get", get)
    settings |= dict(cluster="auto", generators=2, max_staleness=0, generator_timeout=1.0)
    config, resume = tiny_config(out=tmp_path / "many", **settings), False
    with collecting(config, stumble) as collect:
        if method == "cispo":
            with pytest.raises(KeyboardInterrupt):
                ppo.train(config, lambda policy, *rest: interrupt(policy) or collect(policy, *rest))
            config, resume = parse(["--resume", str(config.folder)], method)
        ppo.train(config, collect, resume)
    assert history(tmp_path / "many") == history(tmp_path / "alone")
    assert_close(weights(tmp_path / "many"), weights(tmp_path / "alone"), atol=0, rtol=0)
    rows = read_metrics(tmp_path / "many")
    assert sum(row.get("restarts", 0) for row in rows) == (2 if method == "mcts" else 0)
    assert {row["age_max"] for row in rows if "age_max" in row} == {0}


def interrupt(policy):
    if policy.version == 3:
        raise KeyboardInterrupt


@pytest.mark.slow
def test_generators_work_ahead_with_the_newest_weights(ray, tiny_config, monkeypatch):
    """Prevents a trainer that waits for a straggler, trajectories without their true age, and old ones trained on."""
    config = tiny_config(
        method="none", cluster="auto", generators=2, shards=1, max_staleness=1, tokens=0, steps=8, evaluations=0
    )
    trained = []

    def recorded(policy, *rest):
        if policy.version == 3:
            (config.folder / "go").touch()
        collected = collect(policy, *rest)
        trained.extend((t.problem, policy.version, t.version) for t in collected[0])
        return collected

    with collecting(config, stubborn) as collect:
        ppo.train(config, recorded)
    assert Counter(problem for problem, *_ in trained) == drawn(config, 8)
    ages = [now - version for _, now, version in trained]
    assert min(ages) >= 0 and max(ages) == 1
    rows = read_metrics(config.folder)[1:-1]
    assert sum(row["dropped"] for row in rows) == config.learning.problems
    assert sum(row["age_mean"] for row in rows) == pytest.approx(sum(ages) / config.learning.problems)


@pytest.mark.slow
def test_the_command_starts_ray_and_ends_it(tmp_path, checkpoint):
    """Prevents a program that needs a cluster by hand, leaves processes behind, or can't hand over its collector."""
    pytest.importorskip("ray", reason="Ray is not installed: requirements-dev.txt")
    options = (
        f"--preset tiny --device cpu --model {checkpoint} --out {tmp_path / 'run'} --tokens 0 --steps 2 --problems 2 "
    )
    options += "--max-tokens 8 --simulations 4 --step-tokens 4 --train-problems 20 --eval-problems 2 "
    options += "--test-problems 2 --test-samples 1 --cluster local --generators 1"
    kit = Path(ppo.__file__).parent
    done = subprocess.run(
        [sys.executable, kit / "ppo.py", *options.split()], capture_output=True, text=True, encoding="utf-8"
    )
    assert done.returncode == 0, done.stderr
    assert [row["step"] for row in read_metrics(tmp_path / "run")] == [0, 1, 2, 2]
    assert run_folder.finished(tmp_path / "run")
