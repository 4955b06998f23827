"""The estimate of runtime/memory.py beside a count: the kit's own policy, update and sampler, run on fake tensors. Then
what preset qwen1.5b would use of 8, 12, 16 and 24 GB (the table of docs/gpu.md).

    python -m benchmarks.memory

Fake tensors have shapes and storages but no data, so an update of the real Qwen2.5-1.5B is counted on any machine. They
stand for CPU tensors, because a CPU build of PyTorch has no autograd for fake CUDA ones. Attention is the CPU's flash
kernel, which keeps what the GPU's memory-efficient one keeps; AdamW is set to its path for GPUs. bitsandbytes does not
run on fake tensors: the NF4 row adds up the weights of a small real model.
"""

import sys
import tempfile
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # for `python benchmarks/memory.py`

import runtime.threads

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, Qwen2Config

from benchmarks.random_qwen import Shape, build_tokenizer, make_checkpoint
from config import PRESETS, Config, check
from countdown import Problem, make_problems
from policy import Batch, Policy
from ppo import batch_loss, make_batch, make_optimizer
from runtime import cli
from runtime.loading import load_policy, read_chat
from runtime.memory import GB, MARGIN, Costs, advice, fit, read_sizes
from runtime.torch_sampler import TorchSampler
from sampling import Reward, SamplingParams, Trajectory

QWEN = PRESETS["qwen1.5b"]


class Count(TorchDispatchMode):
    """Bytes of the storages made inside that are alive, each rounded up to 512 as on a GPU: now, and at the peak."""

    def __init__(self):
        super().__init__()
        self.sizes: dict[int, int] = {}
        self.now = self.peak = 0
        self.nonzero: list[int] = []  # how many elements the next calls of nonzero are to find

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten._local_scalar_dense.default:  # a number out of no data: no row ends
            return 1.0 if args[0].dtype.is_floating_point else 0
        if func is torch.ops.aten.nonzero.default:
            return args[0].new_empty(self.nonzero.pop(0), args[0].dim(), dtype=torch.long)
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                self.note(tensor.untyped_storage())
        return out

    def note(self, storage: torch.UntypedStorage) -> None:
        if (key := storage._cdata) not in self.sizes:
            self.sizes[key] = -(-storage.nbytes() // 512) * 512
            self.now += self.sizes[key]
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self.forget, key)

    def forget(self, key: int) -> None:
        self.now -= self.sizes.pop(key)


def bare(shape: Shape) -> str:
    """`shape.folder` as a model without weights: config.json, tokenizer and an empty file in the weights' place."""
    Qwen2Config(
        vocab_size=shape.vocabulary, hidden_size=shape.hidden, intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers, num_attention_heads=shape.heads, num_key_value_heads=shape.kv_heads,
        max_position_embeddings=shape.context, tie_word_embeddings=True,
    ).save_pretrained(shape.folder)  # fmt: skip
    build_tokenizer(min(600, shape.vocabulary - 3)).save_pretrained(shape.folder)
    (shape.folder / "model.safetensors").touch()
    return str(shape.folder)


@contextmanager
def counted(config: Config) -> Iterator[tuple[Policy, Count]]:
    """A policy of fake tensors, made by `load_policy`, and the count of its bytes."""

    def blank(base, kind, dtype, **_):
        return kind.from_config(AutoConfig.from_pretrained(base), dtype=dtype)

    def copied(lm):  # deepcopy mixes fake modes
        return blank(config.model, AutoModelForCausalLM, lm.dtype)

    def stay(module, *_, **__):  # a fake module can't be moved, and is where it should be
        return module

    with FakeTensorMode(), Count() as count:
        with (
            patch("runtime.loading.read_model", blank),
            patch("policy.copy", SimpleNamespace(deepcopy=copied)),
            patch("runtime.loading.check_policy"),  # fake tensors have no values
            patch.object(PreTrainedModel, "to", stay),
            patch.object(torch.nn.Module, "to", stay),
        ):
            policy = load(config)
        yield policy, count


def load(config: Config) -> Policy:
    machine = config.machine
    return load_policy(
        config.model, machine.lora_rank, "cpu", machine.dtype, machine.quantize, machine.gradient_checkpointing
    )


def count_update(config: Config, rows: int, length: int) -> int:
    """Bytes at the peak of one update on `rows` sequences of `length` tokens, completions of `task.max_tokens`."""
    width, learning, reward = config.task.max_tokens, config.learning, Reward(1.0, True, True, "")
    trajectory = Trajectory(Problem((1, 2), 3), [0] * (length - width), [0] * width, [0.0] * width, reward)

    def batch(policy, prompts, completions):  # its width is in the data
        ids = torch.zeros(rows, length, dtype=torch.long)
        return Batch(ids, torch.ones_like(ids), torch.ones(rows, width))

    with counted(config) as (policy, count), patch.object(Policy, "batch", batch):
        optimizer = make_optimizer(policy, config)
        trained = [p for group in optimizer.param_groups for p in group["params"]]
        for group in optimizer.param_groups:
            group["foreach"] = True
        for parameter in trained:
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()  # makes the moments
        optimizer.zero_grad(set_to_none=True)
        count.peak = count.now
        lengths = [width] * rows
        lessons = make_batch(policy, [trajectory] * rows, learning, True, lengths, lengths)
        batch_loss(policy, lessons, learning)[0].backward()
        for group in optimizer.param_groups:
            torch.nn.utils.clip_grad_norm_(group["params"], learning.clip_gradient, foreach=True)
        optimizer.step()
        return count.peak


def count_sampling(config: Config, rows: int, n: int, length: int) -> int:
    """Bytes at the peak of decoding `rows` sequences, `n` to a prefix, that all differ from their first token on: the
    last 4 of their `length` tokens."""

    def differ(row, token):
        return row, token, torch.arange(rows)

    prefixes = [[0] * (length - 4)] * (rows // n)
    decode = torch.no_grad()(TorchSampler._decode.__wrapped__)  # inference_mode hides operations inside others
    with counted(config) as (policy, count), patch("runtime.torch_sampler.merge_rows", differ):
        sampler = TorchSampler(policy, rows)
        count.peak = count.now
        count.nonzero = [rows, 0, 0]  # rows of the cache that move, after each token but the last
        decode(sampler, prefixes, [0] * len(prefixes), SamplingParams(n, max_tokens=4))
        return count.peak


def count_critic(config: Config, rows: int, length: int) -> int:
    """Bytes at the peak of the critic's pass over `rows` states of `length` tokens."""
    with counted(config) as (policy, count):
        count.peak = count.now
        policy.values([[0] * length] * rows)
        return count.peak


def frozen_weights(policy: Policy) -> int:
    """Bytes of the frozen weights, and of the scales and tables that bitsandbytes keeps beside packed ones."""
    frozen = [p for p in policy.lm.parameters() if not p.requires_grad]
    states = [p.quant_state for p in frozen if hasattr(p, "quant_state")]
    scales = [t for s in states for t in (s.absmax, s.code, s.offset, s.state2.absmax, s.state2.code)]
    return sum(tensor.nbytes for tensor in [*frozen, *scales])


def show_plans(model: str) -> None:
    """What preset qwen1.5b would do with a budget, a row each."""
    print("\n| budget | weights | sampler | micro-batch | sampler's share | estimated peak |\n|" + "---|" * 6)
    for budget in 8, 12, 16, 24:
        for quantize, engine in ("nf4", "torch"), ("none", "torch"), ("none", "vllm"):
            config = QWEN.change(model=model, quantize=quantize, sampler=engine)
            prompt = read_chat(model, model).longest(make_problems(100, "train")) + MARGIN
            costs = Costs(config, read_sizes(model, model), prompt, engine)
            plan = fit(costs, budget)
            memory = f"{plan.cache_gb:.1f} GB cache" if plan.cache_gb else f"{plan.rows} sequences"
            shown = f"{plan.micro_tokens:,} tokens | {memory} | {plan.need:.1f} GB"
            if plan.need > budget:
                shown = f"no: {advice(costs, budget)} fits | | "
            print(f"| {budget} GB | {'NF4' if quantize == 'nf4' else 'bf16'} | {engine} | {shown} |")


@dataclass
class Bench:
    """Count updates, sampling and the critic of a model with the shape of Qwen2.5-1.5B."""

    length: int = 704  # tokens of a sequence, 512 of them the completion

    def __post_init__(self):
        check(self, "at least", QWEN.task.max_tokens + 1, "length")
        check(self, "at most", Shape.context, "length")


def main() -> None:
    length = cli.read_config(Bench).length
    with tempfile.TemporaryDirectory() as folder:
        compare(length, Path(folder))


def compare(length: int, folder: Path) -> None:
    """Count, and print beside the estimates; models are made in `folder`."""
    lora = QWEN.change(model=bare(Shape(folder / "qwen")))
    sizes = read_sizes(lora.model, lora.model)
    print("| phase | sequences | counted GB | estimated GB | ratio |\n|" + "---|" * 5)

    def show(phase: str, rows: int | str, count: int, estimate: float) -> None:
        print(f"| {phase} | {rows} | {count / GB:.3f} | {estimate / GB:.3f} | {estimate / count:.3f} |", flush=True)

    for what, changes in {
        "bf16, LoRA 32, checkpointing": {},
        "bf16, LoRA 32": dict(gradient_checkpointing=False),
        "fp32, all weights, checkpointing": dict(lora_rank=0, dtype="float32"),
    }.items():
        config = lora.change(**changes)
        costs = Costs(config, sizes, length - config.task.max_tokens, "torch")
        for rows in (1, 4, 16):
            guess = costs.frozen + costs.trainable + costs.update(rows * length)
            show(f"update, {what}", rows, count_update(config, rows, length), guess)
    for rows, n in (16, 4), (64, 4), (64, 16):
        config = lora.change(children=n, step_tokens=1, eval_samples=n, test_samples=n, problems=1)
        costs = Costs(config, sizes, length - config.task.max_tokens, "torch")
        weights = costs.frozen + 4 * costs.trained  # neither gradients nor moments
        guess = weights + costs.sampling(rows) - costs.kept_tokens(rows) * costs.cached  # nothing is kept here
        show(f"sampling, {n} to a prefix", rows, count_sampling(config, rows, n, length), guess)
    leaves = config.learning.problems * config.tree.workers
    show("critic", leaves, count_critic(config, leaves, length), weights + costs.critic)

    small = Shape(folder / "small", layers=2, hidden=512, intermediate=2048, heads=8, vocabulary=4096)
    config = lora.change(model=str(make_checkpoint(small)), quantize="nf4")
    policy = load(config)
    sizes = read_sizes(config.model, config.model)
    guess = Costs(config, sizes, 1, "torch").frozen - sizes.largest * 2
    show("frozen weights, NF4, 2 layers", "", frozen_weights(policy), guess)
    show_plans(lora.model)


if __name__ == "__main__":
    cli.command(main)
