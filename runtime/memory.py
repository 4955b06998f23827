"""GPU memory: what a run will take and what fits, estimated before weights are loaded.

The estimate reads the model's config.json and tokenizer alone. 1 GB = 2**30 bytes. Two things are in memory all the
time: the frozen weights, and the trained weights with their gradients and optimiser state. The larger of two peaks
comes on top:

    sampling   torch: the cache of `rows` sequences, and the keys and values kept for a search
               vLLM: its copy of the weights, its cache, and the critic's forward pass
    update     a micro-batch's targets, then its activations, then the optimiser's temporaries; vLLM sleeps and still
               takes VLLM_GB

The activations are those of a decoder of attention and gated MLP (Llama, Qwen, Mistral, Gemma), whose attention kernels
keep no [T, T] scores. `python -m benchmarks.memory` counts the kit's own passes on fake tensors. For the shape of
Qwen2.5-1.5B the estimate is never below the count and at most 2 % above; tests/test_memory.py counts other shapes.
CONTEXT_GB, FRAGMENTATION and VLLM_GB are assumptions: only a GPU can tell them.
"""

from bisect import bisect
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import combinations

import torch
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.modeling_layers import GradientCheckpointingLayer

from config import Config
from policy import LOGIT_CHUNK, ValueHead
from runtime.cache import BLOCK
from runtime.loading import adapter_rank, locate, read_model_config
from runtime.samplers import SamplerPlan, pick_sampler
from runtime.torch_sampler import CRITIC_TOKENS, DRAW_CHUNK, KEPT, check_context, context_of
from runtime.vllm_sampler import MAX_SEQUENCES

GB = 2**30
CONTEXT_GB = 0.6  # CUDA's own memory: context, kernels, cuBLAS workspaces
FRAGMENTATION = 0.05  # share of the allocated memory that PyTorch reserves on top and can't use
VLLM_GB = 1.5  # vLLM's CUDA graphs, workspaces, adapter and the activations of its 4,096 tokens
NF4 = 0.5 + 1 / 64 + 4 / (64 * 256)  # bytes a weight: 4 bits, an 8-bit scale for 64 weights, an fp32 one for 256 scales
NF4_TABLES = 4 * (16 + 256 + 1)  # bytes a linear layer in NF4: two code books, an offset
MAX_ROWS = 1024  # sequences that TorchSampler decodes together at most
MARGIN = 16  # tokens, for prompts longer than the one that is measured


@dataclass(frozen=True)
class Plan(SamplerPlan):
    """The sizes that a run works with, and the estimate behind them. As text: the estimate."""

    micro_tokens: int = 4_096  # tokens in one forward and backward pass
    budget: float = 0.0  # GB
    estimate: dict[str, float] = field(default_factory=dict)  # GB by name; a peak includes the weights

    @property
    def need(self) -> float:
        """The GB that the run takes at its peak."""
        return max(self.estimate.values(), default=0.0)

    def __str__(self) -> str:
        batch = f"a cache of {self.cache_gb:.2f} GB" if self.cache_gb else f"{self.rows:,} sequences together"
        notes = ("", "with gradients and optimiser state", batch, f"{self.micro_tokens:,} tokens in a micro-batch")
        rows = zip(self.estimate.items(), notes)
        lines = [f"  {name:16s}{size:7.2f}  {note}".rstrip() for (name, size), note in rows]
        head = f"GPU memory with the {self.engine} sampler, estimated, {self.need:.2f} of {self.budget:.2f} GB:"
        return "\n".join([head, *lines] if lines else [])


# ------------------------------------------------------------------------------------------------ the model's sizes


@dataclass(frozen=True)
class Sizes:
    """The numbers of a model that decide about memory. Weights and parameters are counted, not in bytes."""

    parameters: int  # tied ones once
    linear: int  # weights of all linear layers, the output head apart
    largest: int  # weights of the largest linear layer
    adapter: int  # parameters of a LoRA adapter of rank 1
    value_head: int  # parameters
    vocabulary: int
    layers: int
    hidden: int
    head_dim: int
    # of one layer
    queries: int  # width of the queries of all heads
    keys: int  # width of the keys of all heads; the values are as wide
    mlp: int  # width inside the MLP
    linear_inputs: int  # widths of the inputs of the linear layers, added up
    linear_layers: int


def read_sizes(folder: str, base: str) -> Sizes:
    """A model's sizes, from a copy without weights. ValueError if its config.json can't be read."""
    config = read_model_config(folder, base)
    with torch.device("meta"):
        lm, value_head = AutoModelForCausalLM.from_config(config), ValueHead(config.hidden_size)
    linear = [m for m in lm.modules() if isinstance(m, nn.Linear) and m is not lm.get_output_embeddings()]
    layers = [m for m in lm.modules() if isinstance(m, GradientCheckpointingLayer)]
    of_a_layer = [m for m in layers[0].modules() if isinstance(m, nn.Linear)]
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return Sizes(
        parameters=sum(p.numel() for p in lm.parameters()),
        linear=sum(m.weight.numel() for m in linear),
        largest=max(m.weight.numel() for m in linear),
        adapter=sum(m.in_features + m.out_features for m in linear),
        value_head=sum(p.numel() for p in value_head.parameters()),
        vocabulary=config.vocab_size,
        layers=len(layers),
        hidden=config.hidden_size,
        head_dim=head_dim,
        queries=config.num_attention_heads * head_dim,
        keys=config.num_key_value_heads * head_dim,
        mlp=max(m.out_features for m in of_a_layer),
        linear_inputs=sum(m.in_features for m in of_a_layer),
        linear_layers=len(of_a_layer),
    )


def drawn_tokens(config: Config) -> int:
    """Tokens of an answer, before a search cuts its last step to the limit."""
    return config.task.max_tokens + (config.tree.step_tokens - 1 if config.tree else 0)


# ------------------------------------------------------------------------------------------------ bytes


class Costs:
    """The bytes that each part of a run takes."""

    def __init__(self, config: Config, sizes: Sizes, prompt: int, engine: str, adapter: int = 0):
        """`prompt`: tokens of the longest prompt. `engine`: torch or vllm. `adapter`: rank of the adapter that training
        starts from, 0 if there is none."""
        machine, s = config.machine, sizes
        rank, b = adapter or machine.lora_rank, 4 if machine.dtype == "float32" else 2
        self.config, self.sizes, self.prompt, self.adapter = config, sizes, prompt, adapter
        self.rank = rank  # of the trained adapter, 0 if all weights are trained
        self.bytes = b  # of a frozen weight or an activation
        self.engine = "torch" if machine.sampler == "torch" or machine.quantize == "nf4" else engine
        self.context = prompt + config.task.max_tokens  # tokens of the longest sequence

        # in memory all the time. Frozen: the base under LoRA, else the reference; vLLM's copy is as large. NF4 unpacks
        # one layer at a time
        nf4 = s.linear * NF4 + s.layers * s.linear_layers * NF4_TABLES + (s.parameters - s.linear + s.largest) * b
        self.frozen = nf4 if machine.quantize == "nf4" else s.parameters * b  # bytes
        self.trained = s.value_head + (rank * s.adapter if rank else s.parameters)  # parameters
        # fp32 weights and gradients, and two moments: fp32, or 8 bits with an fp32 scale for 256
        self.trainable = self.trained * (16 if machine.optimizer == "adamw" else 10 + 2 * 4 / 256)  # bytes

        # of one token: in every pass (a row of the mask, rotary embedding, ids, positions), in the cache of all
        # layers, and what one layer keeps for its backward pass (LoRA casts the input of each linear layer to fp32)
        self.input = self.context + 2 * s.head_dim * b + 24
        self.cached = 2 * b * s.keys * s.layers
        inputs = 4 * s.linear_inputs if rank and b < 4 else 4 * (2 * s.hidden + s.mlp)
        attention = b * (4 * s.queries + self.context) + 4 * s.queries / s.head_dim
        norms, adapters = (8 if rank else 16) * s.hidden, 4 * rank * s.linear_layers
        self.layer = norms + inputs + attention + 3 * b * s.mlp + adapters

        leaves = config.learning.problems * config.tree.workers if config.tree else 0  # of a wave
        self.critic = min(CRITIC_TOKENS, leaves * self.context) * self.forward(bool(rank))  # bytes of one pass

    def forward(self, lora: bool) -> float:
        """Of one token in a pass without gradients. The peak is in the MLP; LoRA's products there are fp32, two at a
        time."""
        s, b = self.sizes, self.bytes
        mlp = (2 * b + 8) * s.mlp + (4 * s.hidden if b < 4 else 0) if lora else 3 * b * s.mlp
        return self.input + b * self.context + 4 * b * s.hidden + mlp

    def logits(self, tokens: int, chunk: int) -> int:
        """fp32 logits of `tokens` tokens, one chunk at most. A chunk has `chunk` elements, or those of one token."""
        return 4 * min(max(chunk, self.sizes.vocabulary), tokens * self.sizes.vocabulary)

    def update(self, tokens: int) -> float:
        """The peak of an update with micro-batches of `tokens` tokens, beyond what is in memory all the time. That
        includes all gradients: where some do not exist yet, they are taken off."""
        s, b, recompute = self.sizes, self.bytes, self.config.machine.gradient_checkpointing
        embedding = 0 if self.rank else 4 * s.vocabulary * s.hidden  # gradient of a tied embedding; it has two parts
        in_layer = max(4, 3 * b - 4) * s.mlp + (12 if b < 4 else 4) * s.hidden  # gradients inside a layer, a token
        no_body = 4 * (s.value_head - self.trained)  # the value head alone has its gradients
        logits = self.logits(tokens, LOGIT_CHUNK)

        hidden = b * s.hidden  # what the critic's pass leaves, a token
        targets = tokens * (hidden + max(self.forward(bool(self.rank)), 40 * s.hidden))  # the value head: 40 a token
        reference = tokens * hidden + max(tokens * self.forward(False), tokens * hidden + 3 * logits)

        layers = self.input + s.layers * (b * s.hidden if recompute else self.layer)  # kept for the backward pass
        last_norm, value_head = 12 * s.hidden, 28 * s.hidden  # in fp32; the value head keeps its norm, 4h and h
        body = tokens * (layers + last_norm) + logits  # a chunk that is alone is kept too
        heads = max(2 * tokens * value_head, 3 * (logits + embedding))
        again = self.layer if recompute else 0  # the recomputed layer
        return max(
            targets,
            reference,
            body + heads + no_body,  # back through the heads
            tokens * (layers + in_layer + again) + embedding + no_body,  # back through the last layer
            tokens * (self.input + b * s.hidden + in_layer + self.layer),  # back through the first layer
            tokens * self.input + 2 * embedding,  # back through the embedding
            4 * self.trained,  # AdamW's temporaries
        )

    def calls(self) -> list[tuple[int, int]]:
        """The sampler's calls, in evaluations and in collecting: samples of a prefix, tokens of the longest prefix."""
        c = self.config
        evaluations = [(c.measuring.eval_samples, self.prompt), (c.measuring.test_samples, self.prompt)]
        if c.tree:
            return [*evaluations, (c.tree.children, self.context)]
        return [*evaluations, (c.group.samples if c.group else 1, self.prompt)]

    def kept_tokens(self, rows: int) -> int:
        """Tokens whose keys and values TorchSampler keeps for a search: half as many as it decodes with."""
        return min(KEPT, rows * self.context // 2) if self.config.tree else 0

    def sampling(self, rows: int) -> float:
        """The peak of TorchSampler with `rows` sequences: kept keys and values, and prefill, decoding or drawing."""
        s, b = self.sizes, self.bytes
        prefix_tokens = max(max(1, rows // n) * prefix for n, prefix in self.calls())
        rows = max(rows, *(n for n, _ in self.calls()))
        length = self.prompt + drawn_tokens(self.config) + BLOCK
        cache = rows * length * (self.cached + 40)  # with masks, random numbers, tokens
        decode = rows * (length * 4 * b + self.forward(True))
        draw = 5 * self.logits(rows, DRAW_CHUNK) + s.vocabulary  # the chunk once in fp32, twice in fp64
        prefill = prefix_tokens * (self.forward(bool(self.rank)) + self.cached)
        return self.kept_tokens(rows) * self.cached + max(prefill, cache + max(decode, draw))


# ------------------------------------------------------------------------------------------------ what fits


def fit(costs: Costs, budget: float) -> Plan:
    """The plan of a run within `budget` GB; the smallest plan where even that does not fit."""
    vllm, machine = costs.engine == "vllm", costs.config.machine
    resident = costs.frozen + costs.trainable + (VLLM_GB * GB if vllm else 0)
    left = (budget - CONTEXT_GB) / (1 + FRAGMENTATION) * GB - resident  # bytes for either peak
    most = max(machine.micro_batch_tokens, costs.context)
    tokens = max(costs.context, bisect(range(1, most + 1), left, key=costs.update))
    if vllm:
        one_sequence = (costs.context + 32) * costs.cached  # in blocks of 16 tokens
        whole_mb = (left - costs.frozen - costs.critic) // 2**20 * 2**20
        rows, cache = MAX_ROWS, min(max(whole_mb, one_sequence), MAX_SEQUENCES * one_sequence)
        sampling = costs.frozen + cache + costs.critic
    else:
        rows, cache = max(1, bisect(range(1, MAX_ROWS + 1), left, key=costs.sampling)), 0.0
        sampling = costs.sampling(rows)
    estimate = {"frozen weights": costs.frozen / GB, "trainable ones": costs.trainable / GB}
    for phase, size in ("sampling", sampling), ("update", costs.update(tokens)):
        estimate[f"{phase}, peak"] = CONTEXT_GB + (1 + FRAGMENTATION) * (resident + size) / GB
    return Plan(
        costs.engine,
        costs.context,
        rows,
        costs.kept_tokens(rows),
        cache / GB,
        min(machine.micro_batch_tokens, tokens),
        budget,
        estimate,
    )


def advice(costs: Costs, budget: float) -> str:
    """The fewest options that make a run fit, the mildest first; empty if there are none."""
    config = costs.config
    half = config.task.max_tokens // 2 or 1
    changes = {
        "--gradient-checkpointing": dict(gradient_checkpointing=True),
        "--optimizer paged-adamw8bit": dict(optimizer="paged-adamw8bit"),
        "--sampler torch": dict(sampler="torch"),
        "--dtype bfloat16": dict(dtype="bfloat16"),
        "--quantize nf4": dict(quantize="nf4"),
        "--lora-rank 16": dict(lora_rank=16),
        f"--max-tokens {half}": dict(max_tokens=half),
    }
    for number in range(1, len(changes) + 1):
        for options in combinations(changes, number):
            with suppress(ValueError):  # options that exclude each other
                changed = config.change(**{name: new for o in options for name, new in changes[o].items()})
                if fit(Costs(changed, costs.sizes, costs.prompt, costs.engine, costs.adapter), budget).need <= budget:
                    return " ".join(options)
    return ""


def plan(config: Config, device: str, prompt: int) -> Plan:
    """The plan of a run on `device`, made before weights are loaded. ValueError, one line, if nothing fits. `prompt`:
    tokens of the longest prompt.

    With --gpu-memory PyTorch gets no more than that. With --sampler auto a run that does not fit with vLLM takes the
    torch sampler. On a CPU without --gpu-memory nothing is estimated.
    """
    machine = config.machine
    engine = pick_sampler(machine, config.model, device, config.cutoff is not None)
    folder, base = locate(config.model)
    longest = prompt + MARGIN
    on_gpu = device.startswith("cuda")
    check_context(context_of(read_model_config(folder, base)), longest, drawn_tokens(config))
    if not on_gpu and not machine.gpu_memory:
        return Plan(engine, longest + config.task.max_tokens, micro_tokens=machine.micro_batch_tokens)
    free, total = (size / GB for size in torch.cuda.mem_get_info()) if on_gpu else (machine.gpu_memory,) * 2
    budget = min(machine.gpu_memory or free, free)
    adapter, sizes = adapter_rank(folder, base), read_sizes(folder, base)
    for sampler in dict.fromkeys([engine, "torch"] if machine.sampler == "auto" else [engine]):
        costs = Costs(config, sizes, longest, sampler, adapter)
        plan = fit(costs, budget)
        if plan.need <= budget:
            break
    else:
        options = advice(costs, budget)
        cure = f"{options} would make it fit" if options else "no option makes it fit, take a smaller model"
        raise ValueError(f"{config.model} needs {plan.need:.2f} GB of GPU memory and has {budget:.2f}: {cure}")
    if on_gpu and machine.gpu_memory:
        asleep = costs.frozen / GB + plan.cache_gb if costs.engine == "vllm" else 0  # PyTorch still counts it
        torch.cuda.set_per_process_memory_fraction(min(1.0, (budget - CONTEXT_GB + asleep) / total))
    return plan
