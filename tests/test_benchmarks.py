"""Tests of the benchmarks (speed.py: tests/test_speed.py): each command runs on a small size, and what it compares is
the same. Then the arithmetic of benchmarks/cluster.py and scripts/cluster_test.py."""

import json

import pytest
import torch
from safetensors.torch import load_file

from benchmarks import cluster, game, learning, one_gpu, scaling, shares, training, trials
from config import TINY
from ppo import gradients, make_batches, make_optimizer
from runtime.loading import load_policy
from runtime.micro_batches import MicroBatches
from sampling import SamplingParams
from scripts import cluster_test


@pytest.mark.parametrize(
    ("module", "args", "key"),
    [
        (game, "--problems 20 --answers 5 --repeats 1", "verified"),
        (scaling, "--trees 1 2 --simulations 4 --of 4 2 --repeats 1", "scaling"),
        (shares, "--rows 8", "shares"),
        (trials, "--trials fp32 two-products plain-calls --rows 8 --repeats 1", "trials"),
    ],
)
def test_the_command_prints_a_table_and_keeps_it(tmp_path, monkeypatch, capsys, module, args, key):
    """Prevents a benchmark that fails after its minutes."""
    monkeypatch.setattr("sys.argv", [module.__name__, *args.split(), "--out", str(tmp_path / "deep" / "table.json")])
    module.main()
    written = json.loads((tmp_path / "deep" / "table.json").read_text(encoding="utf-8"))
    assert written[key] and written["torch"] and "|---|" in capsys.readouterr().out


@pytest.mark.slow
def test_steps_of_a_run_are_measured(tmp_path, monkeypatch, capsys):
    """Prevents the minutes on a rented GPU from ending in a traceback, also where there was nothing to learn from."""
    args = f"--device cpu --model {TINY} --rows 8 --repeats 1 --caps 8 0.1 --quantize none --samplers torch --steps 2"
    args += f" --problems 2 --simulations 4 --out {tmp_path}"
    monkeypatch.setattr("sys.argv", [one_gpu.__name__, *args.split()])
    one_gpu.main()
    written = json.loads((tmp_path / "one_gpu.json").read_text(encoding="utf-8"))
    samples, tree, *refused = written["steps"]
    assert samples["trajectories"] == 2 and samples["update_seconds"] > 0 and tree["sampler_seconds"] > 0
    assert all("GB of GPU memory" in row["error"] for row in refused) and len(refused) == 2
    assert written["sampling"][0]["ours"] > 0 and "| 8 GB | bf16 | torch | mcts |" in capsys.readouterr().out


@pytest.mark.parametrize("trial", ["two-products", "plain-calls"])
def test_a_trial_draws_what_the_sampler_draws(trial):
    """Prevents a trial that is fast because it is wrong."""
    prompts = [[5, 6, 7], [8, 9]]
    plain, other = (trials.TorchSampler(trials.TRIALS[name]()) for name in ("fp32", trial))
    params = SamplingParams(4, max_tokens=12)
    drawn, expected = (sampler.sample(prompts, [1, 2], params)[0] for sampler in (other, plain))
    for a, b in zip(sum(drawn, []), sum(expected, []), strict=True):
        assert a.tokens == b.tokens and a.logprobs == pytest.approx(b.logprobs, abs=1e-4)


def test_the_answers_to_verify_are_what_they_are_called():
    """Prevents a rate of something else."""
    rewards = {kind: [game.verify(*pair) for pair in pairs] for kind, pairs in game.answers(50).items()}
    assert fraction(rewards["right"], "correct") > 0.9 and {r.reason for r in rewards["none"]} == {"no answer"}
    assert not any(r.parsed for r in rewards["broken"]) and fraction(rewards["wrong"], "parsed") > 0.9


def fraction(rewards, name: str) -> float:
    return sum(getattr(reward, name) for reward in rewards) / len(rewards)


@pytest.mark.slow
def test_a_side_makes_the_step_it_is_asked_for(tmp_path):
    """Prevents a time of another step than the kit's, a gradient of another batch, and a side that does not end."""
    batch = training.tiny_batch()
    for name in ("prompts", "completions", "logprobs", "advantages"):
        batch[name] = batch[name][:32]
    (tmp_path / "batch.json").write_text(json.dumps(batch | {"threads": 1}), encoding="utf-8")
    side = training.Side("kit", str(tmp_path), "512")
    side.step()
    side.step()
    measured = side.end()
    assert measured["seconds"] > 0 and 0 <= measured["padding"] <= 0.1 and side.process.returncode == 0
    policy, config = load_policy(batch["model"], train=False), training.settings(batch["model"])
    micro = MicroBatches(10_000)
    batches = make_batches(policy, training.read_trajectories(batch), config.learning, micro)
    gradients(policy, make_optimizer(policy, config), batches, config.learning, micro)
    expected = {name: p.grad for name, p in policy.lm.named_parameters() if p.grad is not None}
    assert training.compare(load_file(tmp_path / "kit.safetensors"), expected) < 1e-4
    with pytest.raises(ValueError, match="other weights"):
        training.compare({"a": torch.ones(1)}, expected)


@pytest.mark.slow
def test_a_side_that_fails_is_an_error(tmp_path):
    """Prevents a benchmark that waits for a process that is gone."""
    with pytest.raises(ValueError, match="ended with code 2"):
        training.Side("kit", str(tmp_path), "512")


def test_tokens_to_a_score_are_those_of_the_logs(tmp_path, monkeypatch):
    """Prevents a seed that never reached the score from being left out of the median, as if it had been quick."""
    for seed, scores in enumerate([(0.05, 0.2), (0.2, 0.3), (0.05, 0.05)]):
        (tmp_path / f"run-{seed}").mkdir()
        rows = [{"step": i, "generated": 500_000 * i} | {"eval_mean": s} for i, s in enumerate(scores, 1)]
        (tmp_path / f"run-{seed}" / "metrics.jsonl").write_text(
            "".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8"
        )
    monkeypatch.setattr(learning, "KIT", tmp_path)
    assert learning.millions_to(0.1, "run-*") == 1.0 and learning.millions_to(0.1, "run-1") == 0.5
    assert learning.millions_to(0.1, "run-2") is None and learning.millions_to(0.1, "none-*") is None


def test_a_clone_without_the_older_commit_is_skipped(tmp_path, monkeypatch, capsys):
    """Prevents a traceback that ends `make bench` in a shallow clone."""
    out = tmp_path / "learning.json"
    monkeypatch.setattr("sys.argv", ["learning", "--before", "0" * 40, "--out", str(out)])
    learning.main()
    assert capsys.readouterr().out.endswith(": skipped\n") and not out.exists()


@pytest.mark.parametrize(
    ("generators", "staleness", "updates", "expected"),
    [
        (1, 0, 1.0, (3.0, 2 / 3, 0.0, 0.0)),  # 2 s of collecting, then 1 s of update
        (1, 1, 1.0, (2.0, 1 / 2, 1.0, 0.0)),  # the update is hidden behind the next shard
        (4, 0, 1.0, (3.0, 2 / 3, 0.0, 0.0)),  # shards as long as before: four times the work
        (1, 1, 5.0, (5.0, 0.0, 1.0, 0.0)),  # now the trainer is what is waited for
    ],
)
def test_a_simulated_cluster_of_fixed_times_is_as_on_paper(generators, staleness, updates, expected):
    """Prevents a table of 64 generators that begin before their weights, or of a trainer that never waits."""
    simulation = cluster.simulate(generators, staleness, [2.0], [updates], 400)
    measured = simulation.seconds, simulation.waiting, simulation.age, simulation.dropped
    assert measured == pytest.approx(expected, abs=0.02)


def test_a_shard_that_is_too_old_is_dropped_and_done_again():
    """Prevents a simulation whose slow generators deliver what runtime/cluster.py would refuse."""
    simulation = cluster.simulate(8, 1, [0.1, 0.1, 0.1, 9.0], [0.1], 400)
    assert simulation.dropped > 0 and simulation.age <= 1


def test_the_longest_of_several_shards():
    """Prevents a step on paper as long as a mean shard: of two draws from 1 and 3 the larger is 1 in a quarter."""
    assert cluster.expected_most([3.0, 1.0], 1) == 2 and cluster.expected_most([3.0, 1.0], 2) == 2.5


def test_bytes_of_new_weights():
    """Prevents a wire that is too slow or too fast for the model: parameters of Qwen2.5-1.5B as published, fp32."""
    counted = cluster.weight_bytes(cluster.SHAPES["1.5B"])
    head = sum(p.numel() for p in cluster.ValueHead(1536).parameters())
    assert counted["all weights"] == 4 * (1_543_714_304 + head)
    sizes = ((1536, 1536), (1536, 256), (1536, 256), (1536, 1536), (1536, 8960), (1536, 8960), (8960, 1536))
    assert counted["LoRA 32"] == 4 * (28 * 32 * sum(a + b for a, b in sizes) + head)


def test_lost_and_doubled_shards_are_reported(tmp_path):
    """Prevents a cluster test that passes whatever its kills have cost."""
    test = cluster_test.ClusterTest(steps=2, max_staleness=1, out=tmp_path / "new")

    def account(*shards, age=1):
        rows = [{"step": i + 1, "shards": trained, "age_max": age} for i, trained in enumerate(shards)]
        (tmp_path / "metrics.jsonl").write_text(
            "".join(json.dumps(row) + "\n" for row in [{"step": 0}, *rows]), encoding="utf-8"
        )
        return cluster_test.account(test, tmp_path)

    first, second = [[0, 0], [0, 1], [0, 2]], [[1, 0], [1, 1], [1, 2]]
    assert account(first, second) == ""
    assert account(first, second[:2]) == "1 shards lost, 0 doubled, 0 steps with too old ones"
    assert account(first, [*second, [0, 1]]) == "0 shards lost, 1 doubled, 0 steps with too old ones"
    assert account(first, second, age=2) == "0 shards lost, 0 doubled, 2 steps with too old ones"
