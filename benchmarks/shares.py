"""Where the time of sampling goes, by torch's profiler; and the speed of attention on a CPU by its buffers' layout.

    python -m benchmarks.shares --rows 512 --out runs/shares.json

The time that no operator takes is counted as Python's.
"""

import json
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # for `python benchmarks/shares.py`

import runtime.threads

import torch
from torch.nn.functional import scaled_dot_product_attention
from torch.profiler import ProfilerActivity, profile

from benchmarks.speed import LENGTH, SIBLINGS
from benchmarks.timing import timed
from config import TINY, check
from countdown import make_problems
from policy import Policy
from runtime import cli, files, provenance
from runtime.files import check_writable
from runtime.loading import load_policy
from runtime.torch_sampler import TorchSampler
from sampling import SamplingParams

KINDS = {  # of operators
    "products with the weights": ("mm", "addmm"),
    "attention": ("_scaled_dot_product_flash_attention_for_cpu", "bmm", "_softmax"),
    "copies (caches, heads)": ("copy_", "cat", "index", "index_put_", "_index_put_impl_", "index_select", "clone"),
    "draws": ("_log_softmax", "exp", "cumsum", "searchsorted", "gather", "isin"),
}


@dataclass
class Bench:
    """Profile sampling and time attention over caches of three layouts."""

    rows: int = 512
    threads: int = 1
    out: Path = Path("runs/shares.json")

    def __post_init__(self):
        check(self, "at least", SIBLINGS, "rows")
        check(self, "at least", 1, "threads")
        check_writable(self.out)


def shares(policy: Policy, rows: int) -> dict[str, float]:
    """Shares of one call's CPU time, by kind of operator."""
    sampler, prompts = TorchSampler(policy, rows), [policy.encode(p) for p in make_problems(rows // SIBLINGS, "train")]

    def sample() -> None:
        sampler.sample(prompts, list(range(len(prompts))), SamplingParams(SIBLINGS, LENGTH))

    sample()
    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        began = time.perf_counter()  # the profiler's clock
        sample()
        whole = time.perf_counter() - began
    by_kind = dict.fromkeys([*KINDS, "norms, rotary embedding, the rest"], 0.0)
    for event in profiled.key_averages():
        name = event.key.removeprefix("aten::")
        kind = next((kind for kind, names in KINDS.items() if name in names), "norms, rotary embedding, the rest")
        by_kind[kind] += event.self_cpu_time_total / 1e6 / whole
    return by_kind | {"Python": 1 - sum(by_kind.values())}


def layouts(rows: int, heads: int = 5, columns: int = 40, dim: int = 32) -> dict[str, float]:
    """Milliseconds of attention of one query a row over a cache [rows, heads, columns, dim]."""
    query = torch.randn(rows, heads, 1, dim)
    mask = torch.ones(rows, 1, 1, columns, dtype=torch.bool)
    dense = torch.randn(2, rows, heads, columns, dim)
    roomy = torch.randn(2, rows, heads, 73, dim)[..., :columns, :]  # room for the final length
    outermost = torch.randn(2, rows, columns, heads, dim).transpose(2, 3)  # as projections write them

    def products(keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        scores = torch.matmul(query * dim**-0.5, keys.transpose(-1, -2)).masked_fill(~mask, float("-inf"))
        return torch.matmul(scores.softmax(-1), values)  # [rows, heads, 1, dim]

    def fused(keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        return scaled_dot_product_attention(query, keys, values, mask)

    variants = {
        "SDPA, no gap between rows": (fused, dense),
        "SDPA, room for the final length": (fused, roomy),
        "SDPA, tokens outermost": (fused, outermost),
        "two products and a softmax, no gap": (products, dense),
        "two products and a softmax, room": (products, roomy),
    }
    times = {}
    for name, (attention, cache) in variants.items():
        times[name] = 1000 * timed(lambda a=attention, c=cache: a(*c), 30, warm_up=3)[0]
    return times


def main() -> None:
    bench = cli.read_config(Bench)
    torch.set_num_threads(bench.threads)
    by_kind = shares(load_policy(TINY, train=False), bench.rows)
    print(f"| sampling, {bench.rows} rows | share |\n|---|---|")
    print("\n".join(f"| {name} | {share:.0%} |" for name, share in by_kind.items()), flush=True)
    with torch.inference_mode():
        costs = layouts(bench.rows)
    print("\n| attention, a layer and token | ms |\n|---|---|")
    print("\n".join(f"| {name} | {cost:.2f} |" for name, cost in costs.items()))
    measured = asdict(bench) | {"shares": by_kind, "layouts": costs} | provenance.provenance()
    files.write(bench.out, json.dumps(measured, indent=1, default=str))


if __name__ == "__main__":
    cli.command(main)
