"""Faster ways to sample that were tried: bf16 weights, torch.compile, two products in place of SDPA, a forward pass of
plain calls in place of transformers' layers.

    python -m benchmarks.trials --rows 512 --out runs/trials.json

Each samples in turn with the same seeds. The table has its tokens a CPU second (one thread), the share of its samples
that equal those of plain fp32 to the last token, and the distance of its log-probabilities from the fp32 trainer's.
"""

import json
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from types import SimpleNamespace

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # for `python benchmarks/trials.py`

import runtime.threads

import torch
from torch.nn.functional import rms_norm, scaled_dot_product_attention, silu
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from benchmarks.speed import LENGTH, SIBLINGS
from config import TINY, check, check_choices
from countdown import make_problems
from policy import Policy
from runtime import cli, files, provenance
from runtime.cache import KVCache
from runtime.files import check_writable
from runtime.loading import load_policy
from runtime.torch_sampler import TorchSampler
from sampling import Sample, SamplingParams


def two_products(module, query, key, value, attention_mask, scaling, **options):
    """Attention of one query a row [rows, heads, 1, dim]; of more SDPA's."""
    if query.shape[2] > 1:
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **options)
    scores = torch.matmul(query * scaling, key.transpose(-1, -2))  # [rows, heads, 1, columns]
    if attention_mask is not None:
        scores = scores.masked_fill(~attention_mask, float("-inf"))
    return torch.matmul(scores.softmax(-1), value).transpose(1, 2).contiguous(), None  # [rows, 1, heads, dim]


def with_two_products() -> Policy:
    AttentionInterface.register("two_products", two_products)
    AttentionMaskInterface.register("two_products", sdpa_mask)
    policy = load_policy(TINY, train=False)
    policy.lm.config._attn_implementation = "two_products"
    return policy


def with_plain_calls() -> Policy:
    """One token a row through the model's own weights, without what transformers' layers do around the operators: each
    a module's call, mask, rotary embedding and hooks of its own."""
    policy = load_policy(TINY, train=False)
    layered, model = policy.hidden, policy.base.model

    def norm(layer: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
        return rms_norm(x, (x.shape[-1],), layer.weight, layer.variance_epsilon)

    def hidden(ids: torch.Tensor, attention: torch.Tensor, past_key_values: KVCache, use_cache: bool):
        if ids.shape[1] > 1:
            return layered(ids, attention, past_key_values=past_key_values, use_cache=use_cache)
        positions, mask = attention.sum(-1, keepdim=True) - 1, attention[:, None, None].bool()  # [r, 1], [r, 1, 1, L]
        x = model.embed_tokens(ids)  # [r, 1, H]
        cos, sin = (part[:, None] for part in model.rotary_emb(x, positions))  # [r, 1, 1, dim]
        half = sin.shape[-1] // 2
        sin = torch.cat([-sin[..., :half], sin[..., half:]], -1)
        for layer, cache in zip(model.layers, past_key_values.layers, strict=True):
            own, h, mlp = layer.self_attn, norm(layer.input_layernorm, x), layer.mlp
            query, key, value = (
                project(h).view(len(h), 1, -1, own.head_dim).transpose(1, 2)
                for project in (own.q_proj, own.k_proj, own.v_proj)
            )  # [r, heads, 1, dim] each
            query, key = (part * cos + part.roll(half, -1) * sin for part in (query, key))
            keys, values = cache.update(key, value)
            attended = scaled_dot_product_attention(query, keys, values, mask, scale=own.scaling)
            x = x + own.o_proj(attended.transpose(1, 2).flatten(2))
            h = norm(layer.post_attention_layernorm, x)
            x = x + mlp.down_proj(silu(mlp.gate_proj(h)) * mlp.up_proj(h))
        return SimpleNamespace(last_hidden_state=norm(model.norm, x))

    policy.hidden = hidden
    return policy


def with_compile() -> Policy:
    """Norms and MLPs compiled for any number of rows; attention writes its cache from Python."""
    policy = load_policy(TINY, train=False)
    for layer in policy.lm.model.layers:
        for name in ("mlp", "input_layernorm", "post_attention_layernorm"):
            setattr(layer, name, torch.compile(getattr(layer, name), dynamic=True))
    return policy


TRIALS = {
    "fp32": lambda: load_policy(TINY, train=False),
    "bf16": lambda: load_policy(TINY, train=False, dtype="bfloat16"),
    "compile": with_compile,
    "two-products": with_two_products,
    "plain-calls": with_plain_calls,
}


@dataclass
class Bench:
    """Time ways to sample beside plain fp32."""

    trials: tuple[str, ...] = tuple(TRIALS)  # the others are compared with the first
    rows: int = 512
    repeats: int = 3
    out: Path = Path("runs/trials.json")

    def __post_init__(self):
        check_choices(self, trials=TRIALS)
        check(self, "at least", SIBLINGS, "rows")
        check(self, "at least", 1, "repeats")
        check_writable(self.out)


def disagreement(trainer: Policy, prompts: list[list[int]], rows: list[list[Sample]]) -> float:
    """Mean |log pi_sampler - log pi_trainer| over the tokens of the samples."""
    distance = tokens = 0.0
    for prompt, samples in zip(prompts, rows, strict=True):
        batch = trainer.batch([prompt] * len(samples), [s.tokens for s in samples])
        with torch.no_grad():
            logprobs = trainer.logprobs(*trainer.states(batch), 1.0)[0]  # [B, T]
        for row, sample in zip(logprobs, samples, strict=True):
            distance += (row[-len(sample.tokens) :] - torch.tensor(sample.logprobs)).abs().sum().item()
            tokens += len(sample.tokens)
    return distance / tokens


def main() -> None:
    bench = cli.read_config(Bench)
    torch.set_num_threads(1)
    trainer = load_policy(TINY, train=False)
    prompts = [trainer.encode(problem) for problem in make_problems(bench.rows // SIBLINGS, "train")]
    samplers = {name: TorchSampler(TRIALS[name](), bench.rows) for name in bench.trials}
    params, seeds = SamplingParams(SIBLINGS, LENGTH), list(range(len(prompts)))
    rates, drawn = {name: [] for name in samplers}, {}
    for _ in range(bench.repeats + 1):
        for name, sampler in samplers.items():
            began = time.process_time()
            drawn[name], usage = sampler.sample(prompts, seeds, params)
            rates[name].append(usage.generated / (time.process_time() - began))
    table, first = [], bench.trials[0]
    print("| sampler | tokens/s | ratio | same samples | disagreement, nats a token |\n|" + "---|" * 5)
    for name in samplers:
        rate = median(rates[name][1:])  # the first one compiles
        pairs = [(a.tokens, b.tokens) for x, y in zip(drawn[first], drawn[name]) for a, b in zip(x, y)]
        row = {"trial": name, "rate": rate, "same": sum(a == b for a, b in pairs) / len(pairs)}
        row |= {"ratio": rate / median(rates[first][1:]), "disagreement": disagreement(trainer, prompts, drawn[name])}
        table.append(row)
        print(
            f"| {name} | {rate:,.0f} | {row['ratio']:.2f} | {row['same']:.0%} | {row['disagreement']:.1e} |", flush=True
        )
    files.write(
        bench.out, json.dumps(asdict(bench) | {"trials": table} | provenance.provenance(), indent=1, default=str)
    )


if __name__ == "__main__":
    cli.command(main)
