"""GPU memory, told before any weights are loaded: what a run will take, and what fits.

Computed from the model's config.json and tokenizer alone; 1 GB = 2**30 bytes. Resident all along are the frozen weights
and the trainable ones with gradients and optimiser state. On top of them comes the larger of two peaks:

    sampling   TorchSampler's cache of `rows` sequences and what it keeps of a search; or vLLM's copy of the weights,
               its cache and the critic's forward pass
    update     the activations of a micro-batch, then the optimiser's temporaries; vLLM sleeps but keeps VLLM_GB

The activations are those of a decoder of attention and gated MLP (Llama, Qwen, Mistral, Gemma), with attention kernels
that keep no [T, T] scores. `python -m benchmarks.memory` counts the kit's own passes on fake tensors: for the shape of
Qwen2.5-1.5B the estimate is at most 2 % above and never below; tests/test_memory.py counts others. What only a card can
tell is assumed: CONTEXT_GB, FRAGMENTATION, VLLM_GB.
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
from countdown import Problem
from policy import CRITIC_TOKENS, LOGIT_CHUNK, ValueHead, encode
from runtime.cache import BLOCK
from runtime.loading import adapter_rank, locate, read_model_config, read_tokenizer
from runtime.samplers import SamplerPlan, pick_sampler
from runtime.torch_sampler import DRAW_CHUNK, KEPT, check_context, context_of
from runtime.vllm_sampler import MAX_SEQUENCES

GB = 2**30
CONTEXT_GB = 0.6  # CUDA's own: context, kernels, cuBLAS workspaces
FRAGMENTATION = 0.05  # of what is allocated: what PyTorch reserves and can't use
VLLM_GB = 1.5  # vLLM's CUDA graphs, workspaces, adapter and the activations of its 4,096 tokens
NF4 = 0.5 + 1 / 64 + 4 / (64 * 256)  # bytes a weight: 4 bits, 8 bits of scale for 64 weights, fp32 for 256 scales
TABLES = 4 * (16 + 256 + 1)  # bytes a packed layer: both codes, an offset
MAX_ROWS = 1024  # that TorchSampler decodes together
MARGIN = 16  # tokens, for prompts longer than the one tried


@dataclass(frozen=True)
class Plan(SamplerPlan):
    """What a run may use, and the estimate behind it; as text, the estimate alone."""

    micro_tokens: int = 4_096  # tokens in one forward and backward pass
    budget: float = 0.0  # GB
    parts: dict[str, float] = field(default_factory=dict)  # GB; a peak has everything in it

    @property
    def need(self) -> float:
        return max(self.parts.values(), default=0.0)

    def __str__(self) -> str:
        batch = f"a cache of {self.cache_gb:.2f} GB" if self.cache_gb else f"{self.rows:,} sequences together"
        notes = ("", "with gradients and optimiser state", batch, f"{self.micro_tokens:,} tokens in a micro-batch")
        lines = [f"  {part:16s}{size:7.2f}  {note}".rstrip() for (part, size), note in zip(self.parts.items(), notes)]
        head = f"GPU memory with the {self.engine} sampler, estimated, {self.need:.2f} of {self.budget:.2f} GB:"
        return "\n".join([head, *lines] if lines else [])


@dataclass(frozen=True)
class Sizes:
    """What of a model decides about memory, in elements; from `queries` on, of one layer."""

    parameters: int  # tied ones once
    linear: int  # weights of the linear layers, the output head apart
    largest: int  # of these, in one linear layer
    adapter: int  # parameters of a LoRA adapter of rank 1
    value_head: int  # parameters
    vocabulary: int
    layers: int
    hidden: int
    dim: int  # of an attention head
    queries: int  # of all heads
    keys: int  # of all heads; values are as many
    wide: int  # in the MLP
    inputs: int  # of the linear layers, added up
    linears: int


def read_sizes(folder: str, base: str) -> Sizes:
    """A model's sizes, from a copy without weights. ValueError if its config.json can't be had."""
    config = read_model_config(folder, base)
    with torch.device("meta"):
        lm, value_head = AutoModelForCausalLM.from_config(config), ValueHead(config.hidden_size)
    linear = [m for m in lm.modules() if isinstance(m, nn.Linear) and m is not lm.get_output_embeddings()]
    layers = [m for m in lm.modules() if isinstance(m, GradientCheckpointingLayer)]
    inside = [m for m in layers[0].modules() if isinstance(m, nn.Linear)]
    dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return Sizes(
        parameters=sum(p.numel() for p in lm.parameters()),
        linear=sum(m.weight.numel() for m in linear),
        largest=max(m.weight.numel() for m in linear),
        adapter=sum(m.in_features + m.out_features for m in linear),
        value_head=sum(p.numel() for p in value_head.parameters()),
        vocabulary=config.vocab_size,
        layers=len(layers),
        hidden=config.hidden_size,
        dim=dim,
        queries=config.num_attention_heads * dim,
        keys=config.num_key_value_heads * dim,
        wide=max(m.out_features for m in inside),
        inputs=sum(m.in_features for m in inside),
        linears=len(inside),
    )


def longest_prompt(folder: str, base: str, size: int) -> int:
    """Tokens of a prompt of `size` numbers at most. ValueError if the tokenizer can't be had."""
    return len(encode(read_tokenizer(folder, base), Problem((13,) * size, 13**size))) + MARGIN


class Costs:
    """Bytes that the parts of a run take."""

    def __init__(self, config: Config, sizes: Sizes, prompt: int, engine: str, adapter: int = 0):
        """`prompt`: tokens of the longest; `engine`: torch or vllm; `adapter`: the rank of one that is trained on."""
        machine = config.machine
        s, rank, b = sizes, adapter or machine.lora_rank, 4 if machine.dtype == "float32" else 2
        self.config, self.sizes, self.prompt, self.adapter, self.rank, self.bytes = config, s, prompt, adapter, rank, b
        self.engine = "torch" if machine.sampler == "torch" or machine.quantize == "nf4" else engine
        self.context = prompt + config.task.max_tokens
        # base weights under LoRA, the reference without; NF4 unpacks one layer at a time; vLLM's copy is as large
        packed = s.linear * NF4 + s.layers * s.linears * TABLES + (s.parameters - s.linear + s.largest) * b
        self.frozen = packed if machine.quantize == "nf4" else s.parameters * b
        # fp32 weights and gradients, and two moments: fp32, or 8 bits with an fp32 scale for 256
        self.trained = s.value_head + (rank * s.adapter if rank else s.parameters)  # parameters
        self.trainable = self.trained * (16 if machine.optimizer == "adamw" else 10 + 2 * 4 / 256)
        # a token: in every pass, a row of the mask, rotary embedding, ids and positions; keys and values; and
        # what one layer keeps for its backward pass (LoRA casts the input of each linear layer to fp32)
        self.around = self.context + 2 * s.dim * b + 24
        self.cached = 2 * b * s.keys * s.layers
        inputs = 4 * s.inputs if rank and b < 4 else 4 * (2 * s.hidden + s.wide)
        attention = b * (4 * s.queries + self.context) + 4 * s.queries / s.dim
        self.kept = (8 if rank else 16) * s.hidden + inputs + attention + 3 * b * s.wide + 4 * rank * s.linears
        waiting = config.learning.problems * config.tree.workers * self.context if config.tree else 0
        self.critic = min(CRITIC_TOKENS, waiting) * self.forward(bool(rank))

    def forward(self, lora: bool) -> float:
        """A token of a pass without gradients. Its peak is in the MLP, where LoRA's product is fp32 and there twice."""
        s, b = self.sizes, self.bytes
        mlp = (2 * b + 8) * s.wide + (4 * s.hidden if b < 4 else 0) if lora else 3 * b * s.wide
        return self.around + b * self.context + 4 * b * s.hidden + mlp

    def update(self, tokens: int) -> float:
        """A micro-batch, then the optimiser's step, beyond what is resident (which has all gradients)."""
        s, b, recompute = self.sizes, self.bytes, self.config.machine.gradient_checkpointing
        layers = self.around + s.layers * (b * s.hidden if recompute else self.kept)
        work = max(4, 3 * b - 4) * s.wide + (12 if b < 4 else 4) * s.hidden  # gradients inside a layer
        norm, head = 12 * s.hidden, 28 * s.hidden  # the value head in fp32: norm, 4h, h
        logits = 4 * min(max(LOGIT_CHUNK, s.vocabulary), tokens * s.vocabulary)  # fp32; a chunk that is alone is kept
        embedding = 0 if self.rank else 4 * s.vocabulary * s.hidden  # one gradient of a tied embedding
        none, some = -4 * self.trained, 4 * (s.value_head - self.trained)  # the gradients that are not there yet
        kept = tokens * (layers + norm) + logits  # until the heads are done
        return max(
            kept + tokens * head + max(tokens * self.forward(False), 3 * logits) + none,  # the reference's pass
            kept + max(2 * tokens * head, 3 * (logits + embedding)) + some,  # back through the heads
            tokens * (layers + work + (self.kept if recompute else 0)) + embedding + some,  # through the last layer
            tokens * (self.around + b * s.hidden + work + self.kept),  # through the first layer
            tokens * self.around + 2 * embedding,  # through the embedding
            4 * self.trained,  # AdamW
        )

    def calls(self) -> list[tuple[int, int]]:
        """Siblings, and tokens of the longest prefix, of the sampler's calls: two evaluations and collecting."""
        c = self.config
        evaluations = [(c.measuring.eval_samples, self.prompt), (c.measuring.test_samples, self.prompt)]
        if c.tree:
            return [*evaluations, (c.tree.children, self.context)]
        return [*evaluations, (c.group.samples if c.group else 1, self.prompt)]

    def kept_tokens(self, rows: int) -> int:
        """Tokens whose keys and values TorchSampler keeps during a search: half as many as it decodes with."""
        return min(KEPT, rows * self.context // 2) if self.config.tree else 0

    def sampling(self, rows: int) -> float:
        """TorchSampler with `rows` sequences: what it keeps; prefill of their prefixes, decoding or drawing."""
        s, b = self.sizes, self.bytes
        prompted = max(max(1, rows // n) * prefix for n, prefix in self.calls())
        rows = max(rows, *(n for n, _ in self.calls()))
        length = self.prompt + drawn_tokens(self.config) + BLOCK
        cache = rows * length * (self.cached + 40)  # with masks, random numbers, tokens
        spread = rows * (length * 4 * b + self.forward(True))
        logits = 20 * min(max(DRAW_CHUNK, s.vocabulary), rows * s.vocabulary) + s.vocabulary  # fp32 once, fp64 twice
        prefill = prompted * (self.forward(bool(self.rank)) + self.cached)
        return self.kept_tokens(rows) * self.cached + max(prefill, cache + max(spread, logits))


def fit(costs: Costs, budget: float) -> Plan:
    """What to run within `budget` GB; where that is too little, the least there is."""
    vllm = costs.engine == "vllm"
    resident = costs.frozen + costs.trainable + (VLLM_GB * GB if vllm else 0)
    room = (budget - CONTEXT_GB) / (1 + FRAGMENTATION) * GB - resident
    limit = max(costs.config.machine.micro_batch_tokens, costs.context)
    tokens = max(costs.context, bisect(range(1, limit + 1), room, key=costs.update))
    if vllm:
        least = (costs.context + 32) * costs.cached  # one sequence, in blocks of 16 tokens
        left = (room - costs.frozen - costs.critic) // 2**20 * 2**20
        rows, cache = MAX_ROWS, min(max(left, least), MAX_SEQUENCES * least)
        sampling = costs.frozen + cache + costs.critic
    else:
        rows, cache = max(1, bisect(range(1, MAX_ROWS + 1), room, key=costs.sampling)), 0.0
        sampling = costs.sampling(rows)
    parts = {"frozen weights": costs.frozen / GB, "trainable ones": costs.trainable / GB}
    for phase, size in ("sampling", sampling), ("update", costs.update(tokens)):
        parts[f"{phase}, peak"] = CONTEXT_GB + (1 + FRAGMENTATION) * (resident + size) / GB
    tokens = min(costs.config.machine.micro_batch_tokens, tokens)
    return Plan(costs.engine, costs.context, rows, costs.kept_tokens(rows), cache / GB, tokens, budget, parts)


def advice(costs: Costs, budget: float) -> str:
    """The fewest options that make a run fit, mildest first; empty if there are none."""
    config = costs.config
    changes = {
        "--gradient-checkpointing": dict(gradient_checkpointing=True),
        "--optimizer paged-adamw8bit": dict(optimizer="paged-adamw8bit"),
        "--sampler torch": dict(sampler="torch"),
        "--dtype bfloat16": dict(dtype="bfloat16"),
        "--quantize nf4": dict(quantize="nf4"),
        "--lora-rank 16": dict(lora_rank=16),
        f"--max-tokens {config.task.max_tokens // 2 or 1}": dict(max_tokens=config.task.max_tokens // 2 or 1),
    }
    for number in range(1, len(changes) + 1):
        for options in combinations(changes, number):
            with suppress(ValueError):  # what doesn't go together
                changed = config.change(**{name: new for o in options for name, new in changes[o].items()})
                if fit(Costs(changed, costs.sizes, costs.prompt, costs.engine, costs.adapter), budget).need <= budget:
                    return " ".join(options)
    return ""


def plan(config: Config, device: str) -> Plan:
    """What to run on `device`, before weights are loaded; with --gpu-memory, PyTorch is held to it. Where the choice of
    sampler is open and vLLM does not fit, it is torch. ValueError, one line, if nothing fits. On a CPU without
    --gpu-memory nothing is estimated."""
    machine = config.machine
    engine = pick_sampler(machine, config.model, device, config.cutoff is not None)
    folder, base = locate(config.model)
    longest, on_gpu = longest_prompt(folder, base, config.task.size), device.startswith("cuda")
    check_context(context_of(read_model_config(folder, base)), longest, drawn_tokens(config))
    if not on_gpu and not machine.gpu_memory:
        return Plan(engine, longest + config.task.max_tokens, micro_tokens=machine.micro_batch_tokens)
    free, total = (size / GB for size in torch.cuda.mem_get_info()) if on_gpu else (machine.gpu_memory,) * 2
    budget = min(machine.gpu_memory or free, free)
    adapter = adapter_rank(folder, base)
    sizes = read_sizes(folder, base)
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
        asleep = costs.frozen / GB + plan.cache_gb if costs.engine == "vllm" else 0  # still counts for PyTorch
        torch.cuda.set_per_process_memory_fraction(min(1.0, (budget - CONTEXT_GB + asleep) / total))
    return plan


def drawn_tokens(config: Config) -> int:
    """Tokens of a completion, before a search cuts its last step to the limit."""
    return config.task.max_tokens + (config.tree.step_tokens - 1 if config.tree else 0)
