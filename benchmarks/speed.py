"""Sampling and search beside what a user would write without this kit, measured side by side in one run.

    python -m benchmarks.speed                                  # prints a table of ratios, writes runs/speed.json
    python -m benchmarks.speed --only sampling --rows 64 512 2048 --repeats 5

Each figure is the median of `--repeats` measurements of both sides, taken in turn after a warm-up. On one thread a
second is one of the process's own on the CPU, so that other programs hardly matter. vLLM runs in an environment of its
own, before the others. The floor of sampling is arithmetic: the products with the weights for every token that is run,
at the rate that this machine reaches on products of that shape. Attention, norms, draws and Python come on top of it.
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # for `python benchmarks/speed.py`

import runtime.threads

import torch

from benchmarks.timing import in_turn, timed
from config import TINY, Config, SearchConfig, check, check_choices
from countdown import make_problems
from mcts import Tree, plant, search
from policy import Policy, left_pad
from runtime import cli, files, provenance
from runtime.files import KIT, check_writable
from runtime.loading import load_policy
from runtime.torch_sampler import TorchSampler
from sampling import Sample, SamplingParams, Usage

SIBLINGS, LENGTH = 8, 64  # completions a prompt, tokens of one at most
SECTIONS = ("sampling", "search")


@dataclass
class Bench:
    """Time the kit beside its peers on the embedded policy."""

    only: tuple[str, ...] = SECTIONS
    rows: tuple[int, ...] = (64, 512, 2048)  # sequences sampled together
    trees: int = 64
    peer_trees: int = 4  # the peer searches them one expansion at a time
    children: int = 4
    simulations: int = 128
    repeats: int = 3
    threads: int = 1
    vllm: Path = Path(".venv-vllm/bin/python")  # the Python of an environment that has vLLM (make test-vllm)
    out: Path = Path("runs/speed.json")

    def __post_init__(self):
        check_choices(self, only=SECTIONS)
        check(self, "at least", SIBLINGS, "rows")
        check(self, "at least", 1, "trees peer_trees children simulations repeats threads")
        check_writable(self.out)


class GenerateSampler:
    """The peer: transformers' `generate` with its own KV cache and attention, one call for all siblings of a prefix;
    `together` pads all prefixes into one call, as one would for whole completions."""

    def __init__(self, policy: Policy, together: bool):
        self.policy, self.together = policy, together

    def sample(self, prefixes, seeds, params):
        began, rows = time.perf_counter(), []
        torch.manual_seed(seeds[0] % 2**63)
        ours, self.policy.lm.config._attn_implementation = self.policy.lm.config._attn_implementation, "sdpa"
        try:
            for call in [prefixes] if self.together else [[prefix] for prefix in prefixes]:
                rows += self._generate(call, params)
        finally:  # a peer that runs out of memory must not leave its attention to the kit
            self.policy.lm.config._attn_implementation = ours
        generated = sum(len(s.tokens) for row in rows for s in row)
        return rows, Usage(generated, sum(map(len, prefixes)), time.perf_counter() - began)

    def _generate(self, prefixes: list[list[int]], params: SamplingParams) -> list[list[Sample]]:
        pad, step = self.policy.tokenizer.pad_token_id, self.policy.tokenizer.convert_tokens_to_ids("</step>")
        ids, attention = left_pad(prefixes, pad, self.policy.device)
        ends = [*self.policy.stop_ids, *([step] if params.stop_at_step else [])]
        with torch.inference_mode():
            out = self.policy.lm.generate(
                input_ids=ids, attention_mask=attention, do_sample=True, num_return_sequences=params.n, top_k=0,
                top_p=1.0, temperature=params.temperature, max_new_tokens=params.max_tokens, eos_token_id=ends,
                pad_token_id=pad, return_dict_in_generate=True, output_scores=params.stop_at_step,
            )  # fmt: skip
        tokens = out.sequences[:, ids.shape[1] :]
        logprobs = torch.zeros(tokens.shape)
        if params.stop_at_step:  # a search needs its priors
            logprobs = self.policy.lm.compute_transition_scores(out.sequences, out.scores, normalize_logits=True)
        samples = []
        for row, logp in zip(tokens.tolist(), logprobs.tolist()):
            length = next((i + 1 for i, token in enumerate(row) if token in ends), len(row))
            last = row[length - 1]
            ended = "step" if last == step else "end" if last in ends else "length"
            samples.append(Sample(row[:length], logp[:length], ended))
        return [samples[i : i + params.n] for i in range(0, len(samples), params.n)]

    def values(self, states):
        return [self.policy.values([state])[0] for state in states], Usage(valued=sum(map(len, states)))


def floor(policy: Policy, rows: int) -> float:
    """Tokens a second if only the products with the weights took time, at the rate of the MLP's two."""
    config = policy.lm.config
    x, up = torch.randn(rows, config.hidden_size), torch.randn(config.hidden_size, config.intermediate_size)
    seconds, _ = timed(lambda: x @ up @ up.T, 50, clock=time.perf_counter)
    rate = 4 * rows * up.numel() / seconds  # FLOP/s
    weights = sum(
        p.numel() for name, p in policy.lm.named_parameters() if p.dim() == 2
    )  # a tied head once, as it is run
    return rate / (2 * weights)


def measure_sampling(policy: Policy, rows: int, repeats: int, bound: Callable[[Policy, int], float]) -> dict:
    """Tokens a second of whole completions, TorchSampler's, `generate`'s and those of the floor."""
    prompts = [policy.encode(problem) for problem in make_problems(rows // SIBLINGS, "train")]

    def rate(sampler) -> float:
        _, usage = sampler.sample(prompts, list(range(len(prompts))), SamplingParams(SIBLINGS, LENGTH))
        return usage.generated / usage.seconds

    samplers = TorchSampler(policy, rows), GenerateSampler(policy, together=True)
    ours, peer = in_turn([lambda s=s: rate(s) for s in samplers], repeats)
    return {"rows": rows, "ours": ours, "peer": peer, "ratio": ours / peer, "floor": bound(policy, rows)}


def measure_vllm(bench: Bench) -> dict[str, float]:
    """Tokens a second of vLLM for each number of rows; none, and a line that says why, where it can't be had."""
    if not bench.vllm.exists():
        print(f"vLLM: {bench.vllm} is not there (make test-vllm makes it): skipped")
        return {}
    command = [str(bench.vllm.absolute()), "-m", "benchmarks.vllm_cpu", *map(str, bench.rows)]
    environment = os.environ | {
        "OMP_NUM_THREADS": str(bench.threads),
        "CUDA_VISIBLE_DEVICES": "",
        "HF_HUB_OFFLINE": "1",
    }
    done = subprocess.run(
        command, cwd=KIT, env=environment, capture_output=True, text=True, encoding="utf-8", errors="replace"
    )
    if done.returncode:
        print(f"vLLM: ended with code {done.returncode} ({done.stderr.strip()[-200:]}): skipped")
        return {}
    return {rows: median(rates) for rows, rates in json.loads(done.stdout.splitlines()[-1]).items()}


def bench_sampling(policy: Policy, bench: Bench) -> list[dict]:
    """The table of sampling."""
    vllm, table = measure_vllm(bench), []
    print("| sampling, rows | ours, tokens/s | generate | ratio | vLLM | ratio | share of the floor |\n|" + "---|" * 7)
    for rows in bench.rows:
        row = measure_sampling(policy, rows, bench.repeats, floor) | {"vllm": vllm.get(str(rows))}
        table.append(row)
        other = f"{row['vllm']:,.0f} | {row['ours'] / row['vllm']:.2f}" if row["vllm"] else " | "
        share = row["ours"] / row["floor"]
        shown = f"{row['ours']:,.0f} | {row['peer']:,.0f} | {row['ratio']:.2f} | {other} | {share:.0%}"
        print(f"| {rows} | {shown} |", flush=True)
    return table


def measure_search(policy: Policy, bench: Bench) -> dict:
    """Simulations a second of the kit, all trees together, and of the plain loop, one expansion at a time."""
    base = replace(Config().search, children=bench.children, simulations=bench.simulations, cutoff=None)
    spent: list[tuple[list[Tree], Usage, float, int]] = []
    run, plain = [0], policy.hidden

    def counted(ids, *rest, **cache):
        run[0] += ids.numel()
        return plain(ids, *rest, **cache)

    policy.hidden = counted

    def rate(sampler, count: int, config: SearchConfig) -> float:
        problems, run[0] = make_problems(count, "train"), 0
        began = time.perf_counter()
        trees = plant(policy, problems, list(range(count)))
        usage = search(trees, sampler, policy.grade, config)
        seconds = time.perf_counter() - began
        if isinstance(sampler, TorchSampler):
            spent.append((trees, usage, seconds, run[0]))
            sampler.rest()
        return count * bench.simulations / seconds

    ours, peer = in_turn(
        [
            lambda: rate(TorchSampler(policy), bench.trees, base),
            lambda: rate(GenerateSampler(policy, together=False), bench.peer_trees, replace(base, workers=1)),
        ],
        bench.repeats,
    )
    del policy.hidden
    trees, usage, seconds, tokens = spent[-1]
    distinct = sum(len(tree.prompt) + sum(len(node.tokens) for node in tree.nodes()) for tree in trees)
    return {
        "ours": ours,
        "peer": peer,
        "ratio": ours / peer,
        "outside_sampler": 1 - (usage.seconds + usage.critic_seconds) / seconds,
        "run": tokens / distinct,  # padding of the prompts included
        "drawn": usage.generated / distinct,
        "prefilled": usage.prefilled / distinct,
    }


def bench_search(policy: Policy, bench: Bench) -> dict:
    """The line about search."""
    measured = measure_search(policy, bench)
    print(
        f"search, K={bench.children}, {bench.simulations} simulations: {measured['ours']:,.0f} simulations/s "
        f"({measured['ours'] / bench.simulations:.1f} problems/s) with {bench.trees} trees, the plain loop "
        f"{measured['peer']:,.0f}, ratio {measured['ratio']:.1f}; outside the sampler "
        f"{measured['outside_sampler']:.0%}; prefilled over distinct tokens {measured['prefilled']:.3f}, run in all "
        f"{measured['run']:.2f}, drawn {measured['drawn']:.2f}"
    )
    return measured


def main() -> None:
    bench = cli.read_config(Bench)
    torch.set_num_threads(bench.threads)
    if bench.threads == 1:
        time.perf_counter = time.process_time
    policy = load_policy(TINY, train=False)
    sections = {"sampling": bench_sampling, "search": bench_search}
    measured = {name: sections[name](policy, bench) for name in bench.only}
    files.write(bench.out, json.dumps(asdict(bench) | measured | provenance.provenance(), indent=1, default=str))


if __name__ == "__main__":
    cli.command(main)
