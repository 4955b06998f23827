"""Tests of runtime/ranks.py: two processes that compute one update."""

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch.testing import assert_close

import ppo
from config import TINY, MachineConfig
from countdown import Problem, Reward
from runtime import ranks
from runtime.launch import follow
from runtime.ranks import MicroBatchesOnRanks
from runtime.run_folder import read_metrics
from runtime.samplers import pick_sampler
from runtime.weights import read_tensors
from sampling import Trajectory

KIT = Path(ppo.__file__).parent


def together(monkeypatch, world, rank):
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_world_size", lambda: world)
    monkeypatch.setattr(dist, "get_rank", lambda: rank)


def of_lengths(*lengths: int) -> list[Trajectory]:
    """Trajectories of so many tokens."""
    return [Trajectory(Problem((1, 2), 3), [0] * length, [], [], Reward(0, False, False, "")) for length in lengths]


def test_every_trajectory_is_in_one_share_and_shares_are_about_as_large(monkeypatch):
    """Prevents a trajectory that no rank or two learn from, and one rank for which all others wait."""
    trajectories = of_lengths(9, 1, 5, 5, 2, 8, 7, 3, 3, 6)
    shares = []
    for rank in range(3):
        together(monkeypatch, 3, rank)
        shares.append(MicroBatchesOnRanks().own_share(trajectories))
    assert sorted(id(t) for share in shares for t in share) == sorted(map(id, trajectories))
    tokens = [sum(t.length for t in share) for share in shares]
    assert max(tokens) - min(tokens) <= max(t.length for t in trajectories)
    together(monkeypatch, 3, 2)
    assert MicroBatchesOnRanks().own_share(of_lengths(4, 4)) == []


def test_one_process_is_left_alone(monkeypatch):
    """Prevents another order of trajectories, so other sums, where nobody asked for ranks."""
    trajectories = of_lengths(1, 9, 5)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert ranks.join("cpu") == 0 and ranks.world() == 1
    assert MicroBatchesOnRanks().own_share(trajectories) is trajectories
    assert ranks.broadcast(trajectories) is trajectories


def test_more_processes_than_cards_is_one_line(monkeypatch):
    """Prevents two processes on one card, and ranks that talk in different ways and wait for each other for a day."""
    for name, value in {"WORLD_SIZE": "3", "LOCAL_RANK": "2"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(ValueError, match=r"more processes here than there are GPUs \(2\)"):
        ranks.join("cuda")


def test_metrics_of_two_ranks_are_those_of_one(monkeypatch):
    """Prevents a loss that is half of what it is, and a rank that runs out of memory again at every step."""

    def gather(reports, ours):
        reports[:] = [ours, ([False, True, False], {"disagreement_max": 0.3}, 50)]

    together(monkeypatch, 2, 0)
    monkeypatch.setattr(dist, "all_gather_object", gather)
    monkeypatch.setattr(dist, "all_reduce", lambda gradient: gradient.mul_(2).add_(1))
    micro, parameters = MicroBatchesOnRanks(100), [torch.ones(1) for _ in "abc"]
    parameters[0].grad = torch.ones(1)
    ours = {"policy_loss": 1.5, "disagreement_max": 0.1}
    assert micro.add_up(parameters, ours) == {"policy_loss": 1.5, "disagreement_max": 0.3}
    assert micro.tokens == 50
    assert [p.grad for p in parameters] == [3, 1, None]  # what no rank has a gradient of stays without, and unmoved


def test_vllm_is_left_to_generators(monkeypatch):
    """Prevents vLLM's process groups in the trainer's: both are the process's only ones."""
    monkeypatch.setattr("runtime.samplers.find_spec", lambda name: True)
    monkeypatch.setattr("runtime.samplers.serves", lambda *_: True)
    auto, torch, vllm = (MachineConfig(sampler=sampler) for sampler in ("auto", "torch", "vllm"))
    assert pick_sampler(auto, TINY, "cuda", False) == "vllm"
    together(monkeypatch, 2, 0)
    assert pick_sampler(auto, TINY, "cuda", False) == pick_sampler(torch, TINY, "cuda", False) == "torch"
    with pytest.raises(ValueError, match="vLLM can't run beside torchrun's ranks"):
        pick_sampler(vllm, TINY, "cuda", False)


@pytest.mark.parametrize("number", [0, 1])
def test_every_rank_closes_its_connections(monkeypatch, number):
    """Prevents "terminate called without an active exception": one of a dozen runs ended so, after all work was done,
    because rank 1 exited with open connections."""
    calls = []
    together(monkeypatch, 2, number)
    monkeypatch.setattr(dist, "broadcast_object_list", lambda *_, **__: calls.append("the end"))
    monkeypatch.setattr(dist, "destroy_process_group", lambda: calls.append("closed"))
    ranks.leave()
    assert calls == ["the end", "closed"][number:]  # rank 0 tells the others; rank 1 has been told


def test_a_follower_closes_its_connections(monkeypatch):
    """Prevents the same: `follow` has to leave when the run ends."""
    left = []
    monkeypatch.setattr("runtime.launch.Session", lambda *_, **__: SimpleNamespace(policy=None, optimizer=None))
    for name, stand_in in dict(
        synchronize=lambda *_: None, broadcast=lambda: None, leave=lambda: left.append(1)
    ).items():
        monkeypatch.setattr(ranks, name, stand_in)
    follow(None, SimpleNamespace(make_optimizer=None))
    assert left == [1]


@pytest.mark.slow
def test_two_processes_go_on_like_one(tiny_config, tmp_path):
    """Prevents gradients that are averaged or left out, a norm of a share, other weights or optimiser state on the
    second process, and log-probabilities that only one of them recomputes."""
    settings = dict(
        tokens=0, steps=5, problems=5, learning_rate=1e-3, inner_steps=2, clip_gradient=0.05,
        old_logprobs="recomputed", micro_batch_tokens=100, lesson="best-path-tree", checkpoints=5, evaluations=0,
    )  # fmt: skip
    ppo.train(tiny_config(out=tmp_path / "one", **settings), ppo.collect_mcts)

    def interrupted(policy, *rest):
        if policy.version == 2:
            raise KeyboardInterrupt
        return ppo.collect_mcts(policy, *rest)

    with pytest.raises(KeyboardInterrupt):
        ppo.train(tiny_config(out=tmp_path / "two", **settings), interrupted)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*command, KIT / "ppo.py", "--resume", tmp_path / "two"], capture_output=True, text=True, encoding="utf-8"
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("tokens generated") == 1  # one process speaks

    names = ("step", "trajectories", "policy_loss", "value_loss", "kl", "disagreement_max", "gradient_norm")
    one, two = (
        [{name: row[name] for name in names if name in row} for row in read_metrics(tmp_path / which)]
        for which in ("one", "two")
    )
    assert two == [pytest.approx(row, rel=1e-4, abs=2e-6) for row in one]
    assert min(row["gradient_norm"] for row in one[1:-1]) > 0.05
    for file in sorted((tmp_path / "one" / "policy").rglob("*.safetensors")):
        same = tmp_path / "two" / file.relative_to(tmp_path / "one")
        assert_close(load_file(same), load_file(file), atol=1e-5, rtol=1e-4)
    one, two = (read_tensors(tmp_path / which / "checkpoint" / "optimizer.pt")["state"] for which in ("one", "two"))
    assert_close(two, one, atol=1e-6, rtol=1e-3)
