"""Sampling: the records that flow from model to trainer, and the two engines that draw them.

A sampler continues prefixes: `sample(prefixes, n, …)` returns, for each prefix, n continuations with the token ids, the
log-probability of every token *under the distribution it was drawn from*, and why it ended. TorchSampler runs
anywhere PyTorch does: siblings share one prefill of their prefix, finished rows leave the batch, and each prefix
has a random stream of its own, so what is drawn for it does not depend on what else is in the batch. VLLMSampler is
vLLM in the same process, for GPUs; tests/test_samplers.py holds both to the same contract.
"""

import os
import shutil
import tempfile
import time
from dataclasses import dataclass, field, fields
from importlib.util import find_spec
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from transformers import DynamicCache

from countdown import Problem, Reward
from policy import Policy, left_pad

STEP_END = "</step>"
DRAW_CHUNK = 2**24  # elements of [rows, vocabulary] alive at once while tokens are drawn: about 0.5 GB


@dataclass
class Usage:
    """What generation cost, the critic's share apart."""

    generated: int = 0  # tokens drawn
    prefilled: int = 0  # prefix tokens that the sampler ran through the model; those found in its cache don't count
    seconds: float = 0.0  # of the sampler
    valued: int = 0  # tokens that the critic read
    critic_seconds: float = 0.0

    def __add__(self, other: "Usage") -> "Usage":
        return Usage(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(Usage)))


@dataclass
class Sample:
    """One continuation. `logprobs[i]` belongs to `tokens[i]`, the stop tokens included."""

    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    ended: str = "length"  # "step": </step> was written, "end": the model ended its turn, "length": out of tokens


@dataclass
class Trajectory:
    """One whole completion with its reward, ready for the trainer."""

    problem: Problem
    prompt: list[int]
    completion: list[int]
    logprobs: list[float]  # of the sampling policy, a token
    reward: Reward
    version: int  # of the policy that sampled it
    source: str  # the method that made it
    trainer_logprobs: list[float] | None = None  # of the trainer before the update, where it recomputes them
    advantage: float | None = None  # fixed by group methods; otherwise the critic's R - V(s_t)


class Sampler(Protocol):
    def sample(
        self,
        prefixes: list[list[int]],
        n: int,
        seeds: list[int],
        max_tokens: int,
        temperature: float,
        stop_at_step: bool,
    ) -> tuple[list[list[Sample]], Usage]:
        """`n` continuations of each prefix, of at most `max_tokens` tokens; prefix i draws from the stream seeds[i].
        The policy's newest weights are served, whatever happened since the last call."""

    def rest(self) -> None:
        """Give the GPU's memory to the trainer until the next call of `sample`."""


def check_context(limit: int, prefixes: list[list[int]], max_tokens: int) -> None:
    """ValueError if a continuation would outgrow the sampler's positions."""
    if (longest := max(map(len, prefixes), default=0)) + max_tokens > limit:
        raise ValueError(f"{longest} prefix + {max_tokens} new tokens exceed the context of {limit}")


class TorchSampler:
    """Batched ragged sampling with a KV cache, on the trainer's own weights: never stale."""

    def __init__(self, policy: Policy, batch: int = 1024):
        self.policy = policy
        self.context = getattr(policy.lm.config, "max_position_embeddings", 10**9)
        self.batch = batch  # rows decoded together
        self.chunk = max(1, DRAW_CHUNK // policy.lm.config.vocab_size)  # rows whose logits are alive together
        pieces = policy.tokenizer.batch_decode([[i] for i in range(policy.lm.config.vocab_size)])
        self.closes = torch.tensor([STEP_END[-1] in piece for piece in pieces], device=policy.device)  # [V]

    def sample(self, prefixes, n, seeds, max_tokens, temperature=1.0, stop_at_step=False):
        began = time.perf_counter()
        check_context(self.context, prefixes, max_tokens)
        order = sorted(range(len(prefixes)), key=lambda i: len(prefixes[i]))  # neighbours pad little
        rows: list[list[Sample]] = [[] for _ in prefixes]
        size = max(1, self.batch // n)
        for start in range(0, len(order), size):
            some = order[start : start + size]
            streams = [seeds[i] for i in some]
            drawn = self._decode([prefixes[i] for i in some], n, streams, max_tokens, temperature, stop_at_step)
            for i, samples in zip(some, drawn, strict=True):
                rows[i] = samples
        usage = Usage(
            generated=sum(len(s.tokens) for row in rows for s in row),
            prefilled=sum(map(len, prefixes)),
            seconds=time.perf_counter() - began,
        )
        return rows, usage

    def rest(self):
        """Nothing to give: the weights are the trainer's, and a call keeps no cache."""

    @torch.inference_mode()
    def _decode(self, prefixes, n, seeds, max_tokens, temperature, stop_at_step) -> list[list[Sample]]:
        policy, device = self.policy, self.policy.device
        # u[row, t] decides token t of a row: a stream a prefix, whatever the batch around it
        uniform = np.concatenate([np.random.default_rng(seed).random((n, max_tokens)) for seed in seeds])
        uniform = torch.from_numpy(uniform).to(device)  # [R, T], fp64
        ids, attention = left_pad(prefixes, policy.tokenizer.pad_token_id, device)  # [B, L]
        cache = DynamicCache(config=policy.lm.config)
        hidden = policy.hidden(ids, attention, past_key_values=cache, use_cache=True).last_hidden_state[:, -1]  # [B, H]
        cache.batch_repeat_interleave(n)
        hidden, attention = hidden.repeat_interleave(n, 0), attention.repeat_interleave(n, 0)  # [R, H], [R, L]

        total = len(hidden)
        tokens = torch.zeros(total, max_tokens, dtype=torch.long, device=device)  # [R, T]
        logprobs = torch.zeros(total, max_tokens, device=device)  # [R, T]
        lengths = torch.full((total,), max_tokens, device=device)  # [R]
        ended = ["length"] * total
        alive = torch.arange(total, device=device)  # rows still being written, in the order of the cache
        stops = torch.tensor(sorted(policy.stop_ids), device=device)
        for t in range(max_tokens):
            token, logprobs[alive, t] = self._draw(hidden, uniform[alive, t], temperature)  # [r], [r]
            tokens[alive, t] = token
            done = at_end = torch.isin(token, stops)
            if stop_at_step:
                done = at_end | self._at_step(tokens[alive, max(0, t + 1 - len(STEP_END)) : t + 1])
            if done.any():
                for row, is_end in zip(alive[done].tolist(), at_end[done].tolist(), strict=True):
                    ended[row] = "end" if is_end else "step"
                lengths[alive[done]] = t + 1
                keep = (~done).nonzero().squeeze(-1)
                alive, token, attention = alive[keep], token[keep], attention[keep]
                if len(alive) == 0 or t + 1 == max_tokens:
                    break
                cache.batch_select_indices(keep)
            attention = torch.cat([attention, attention.new_ones(len(alive), 1)], 1)  # [r, L + t + 1]
            if t + 1 < max_tokens:
                output = policy.hidden(token[:, None], attention, past_key_values=cache, use_cache=True)
                hidden = output.last_hidden_state[:, -1]  # [r, H]

        table = zip(tokens.tolist(), logprobs.tolist(), lengths.tolist(), ended, strict=True)
        samples = [Sample(row[:length], logp[:length], why) for row, logp, length, why in table]
        return [samples[i : i + n] for i in range(0, total, n)]

    def _draw(self, hidden: torch.Tensor, uniform: torch.Tensor, temperature: float):
        """A token and its log-probability for each row of hidden states [r, H], a chunk of rows at a time."""
        drawn = []
        for states, u in zip(hidden.split(self.chunk), uniform.split(self.chunk), strict=True):
            logp = torch.log_softmax(self.policy.head(states) / temperature, -1)  # [chunk, V]
            token = inverse_cdf(logp, u)  # [chunk]
            drawn.append((token, logp.gather(-1, token[:, None]).squeeze(-1)))
        return (torch.cat(parts) for parts in zip(*drawn, strict=True))

    def _at_step(self, tails: torch.Tensor) -> torch.Tensor:
        """Which rows [r] end in </step>, given their last tokens [r, <= 7]. The text decides: Qwen2.5 writes it as 522
        9520 29 after a digit, but 690 9520 29 after a space and 522 9520 397 before a newline."""
        rows = self.closes[tails[:, -1]].nonzero().flatten().tolist()
        at_step = torch.zeros(len(tails), dtype=torch.bool, device=tails.device)
        at_step[[row for row in rows if STEP_END in self.policy.tokenizer.decode(tails[row])]] = True
        return at_step


class VLLMSampler:
    """vLLM in this process. Every call first serves the policy's newest weights: a LoRA policy as a new adapter (vLLM
    caches adapters by id: the same id with new files would silently stay the old one), a fully trained one by reloading
    all weights (the tied head by its own name, or the old one would stay). Log-probabilities are those of the
    distribution drawn from, not vLLM's default of the untempered one. One at a time in a process: vLLM's process groups
    and counters are global."""

    def __init__(self, policy: Policy, context: int, cache_gb: float = 1.0, seed: int = 0):
        """`context`: tokens of the longest sequence, continuations end there; `cache_gb`: GB (2**30 bytes) of cache."""
        os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")  # the engine lives in this process
        os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")  # nothing is sent anywhere
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
        self.on_gpu = policy.device.type == "cuda"
        if not self.on_gpu:
            os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
        import vllm

        self.vllm, self.policy, self.context = vllm, policy, context
        self.served: int | None = None  # the policy's version that vLLM holds
        self.adapter, self.adapters = None, tempfile.TemporaryDirectory(prefix="adapters-")
        self.asleep = False
        lora = policy.lm.peft_config["default"].r if policy.lora else 0
        if lora and self.on_gpu and policy.base.dtype == torch.float32:
            raise ValueError("vLLM's adapters need half precision on a GPU: pass --dtype bfloat16, or --sampler torch")
        if lora > LORA_RANKS[-1]:
            raise ValueError(f"vLLM's adapters end at rank {LORA_RANKS[-1]}: pass --sampler torch")
        self.llm = vllm.LLM(
            model=policy.base.name_or_path,
            tokenizer=policy.tokenizer.name_or_path,
            dtype=policy.base.dtype,
            max_model_len=context,
            kv_cache_memory_bytes=int(cache_gb * 2**30),
            gpu_memory_utilization=0.05,  # only a start-up check then: the trainer's weights are on the card too
            max_num_seqs=MAX_SEQUENCES,
            max_num_batched_tokens=4096 if self.on_gpu else max(4096, context),  # of prefixes in one pass
            enable_chunked_prefill=self.on_gpu,  # the split prefix of a seeded request is an error on a CPU
            enable_prefix_caching=True,
            logprobs_mode="processed_logprobs",
            generation_config="vllm",  # not the model's own top-p and repetition penalty
            enable_lora=bool(lora),
            max_lora_rank=next(rank for rank in LORA_RANKS if rank >= lora),
            enable_sleep_mode=self.on_gpu,
            enforce_eager=not self.on_gpu,
            disable_log_stats=False,  # they count what the prefix cache saved; they stay in this process
            seed=seed,
        )
        probe = policy.tokenizer("<step> 1 + 2 = 3 </step>")["input_ids"]
        if self.llm.get_tokenizer().decode(probe) != policy.tokenizer.decode(probe):
            raise ValueError("vLLM reads this model's tokenizer in another way: pass --sampler torch")

    def sample(self, prefixes, n, seeds, max_tokens, temperature=1.0, stop_at_step=False):
        began = time.perf_counter()
        check_context(self.context, prefixes, 1)
        self._serve()
        wanted = [
            self.vllm.SamplingParams(
                n=n,
                seed=seed % 2**62,  # vLLM adds the sample's index
                max_tokens=max_tokens,
                temperature=temperature,
                logprobs=0,  # of the drawn token
                stop=[STEP_END] if stop_at_step else None,
                stop_token_ids=sorted(self.policy.stop_ids),
                include_stop_str_in_output=True,
                skip_special_tokens=False,
                detokenize=stop_at_step,
            )
            for seed in seeds
        ]
        missed = self._cache_misses()
        prompts = [{"prompt_token_ids": prefix} for prefix in prefixes]
        outputs = self.llm.generate(prompts, wanted, lora_request=self.adapter, use_tqdm=False) if prompts else []
        rows = [[self._record(one) for one in sorted(row.outputs, key=lambda o: o.index)] for row in outputs]
        usage = Usage(
            generated=sum(len(s.tokens) for row in rows for s in row),
            prefilled=self._cache_misses() - missed,
            seconds=time.perf_counter() - began,
        )
        return rows, usage

    def rest(self):
        if self.on_gpu and not self.asleep:
            self.llm.sleep(level=1)  # weights go to the CPU's memory, the KV cache is dropped
            self.asleep = True

    def _serve(self) -> None:
        """Wake up, and bring vLLM's weights to the policy's version."""
        if self.asleep:
            self.llm.wake_up()
            self.asleep, self.served = False, None
        if self.served == self.policy.version:
            return
        if self.policy.lora:
            from vllm.lora.request import LoRARequest

            number = self.adapter.lora_int_id + 1 if self.adapter else 1
            folder = Path(self.adapters.name) / str(number)
            self.policy.lm.save_pretrained(folder, save_embedding_layers=False)
            if self.adapter:
                self.llm.llm_engine.remove_lora(self.adapter.lora_int_id)
                shutil.rmtree(self.adapter.lora_path)
            self.adapter = LoRARequest(f"policy-{number}", number, str(folder))
        else:  # state_dict names the tied head too
            weights = self.policy.lm.state_dict().items()
            self.llm.collective_rpc("reload_weights", kwargs=dict(weights_iterator=iter(weights)))
        self.llm.reset_prefix_cache()
        self.served = self.policy.version

    def _cache_misses(self) -> int:
        """Prefix tokens that vLLM has run through the model so far."""
        counted = {metric.name: metric.value for metric in self.llm.get_metrics() if hasattr(metric, "value")}
        return int(counted.get("vllm:prefix_cache_queries", 0) - counted.get("vllm:prefix_cache_hits", 0))

    def _record(self, output) -> Sample:
        ended = "length" if output.finish_reason == "length" else "step" if output.stop_reason == STEP_END else "end"
        tokens = list(output.token_ids)
        return Sample(tokens, [at[token].logprob for at, token in zip(output.logprobs, tokens, strict=True)], ended)


MAX_SEQUENCES = 256  # that vLLM decodes together
LORA_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)  # the ranks that vLLM can reserve


def pick_sampler(sampler: str, device: str, quantize: str = "none") -> str:
    """ "auto" is vLLM where it is installed and the policy is on a GPU in 16 or 32 bits, else torch; ValueError if vLLM
    isn't there or can't serve the weights (since 0.28 bitsandbytes is a plugin)."""
    if sampler == "auto":
        return "vllm" if find_spec("vllm") and device.startswith("cuda") and quantize == "none" else "torch"
    if sampler == "vllm" and quantize != "none":
        raise ValueError("vLLM does not serve NF4 weights: pass --sampler torch, or --quantize none")
    if sampler == "vllm" and not find_spec("vllm"):
        raise ValueError("vLLM is not installed: pass --sampler torch, or pip install -r requirements.txt")
    return sampler


def make_sampler(sampler: str, policy: Policy, context: int, rows: int, cache_gb: float, seed: int) -> Sampler:
    """The engine that `sampler` names: torch or vllm."""
    return TorchSampler(policy, rows) if sampler == "torch" else VLLMSampler(policy, context, cache_gb, seed)


def inverse_cdf(logprobs: torch.Tensor, uniform: torch.Tensor) -> torch.Tensor:
    """Draw from softmax rows [R, V] with one uniform number in [0, 1) each: the first index whose CDF exceeds it."""
    cdf = logprobs.double().exp().cumsum(-1)  # [R, V]
    index = torch.searchsorted(cdf, (uniform * cdf[:, -1])[:, None], right=True).squeeze(-1)  # [R]
    return index.clamp(max=logprobs.shape[-1] - 1)


def stream(*keys: int) -> int:
    """A seed made of several numbers (run, step, problem …), the same in every process."""
    return int(np.random.SeedSequence(keys).generate_state(1, np.uint64)[0] >> 1)


def complete(
    policy: Policy,
    sampler: Sampler,
    problems: list[Problem],
    n: int,
    seeds: list[int],
    max_tokens: int,
    temperature: float,
    source: str,
    strict: bool = True,
) -> tuple[list[list[Trajectory]], Usage]:
    """`n` whole completions of each problem, graded: plain sampling, groups, best-of-N and evaluation use it."""
    prompts = [policy.encode(problem) for problem in problems]
    rows, usage = sampler.sample(prompts, n, seeds, max_tokens, temperature, stop_at_step=False)
    return [
        [
            Trajectory(
                problem, start, s.tokens, s.logprobs, policy.grade(problem, s.tokens, strict), policy.version, source
            )
            for s in row
        ]
        for problem, start, row in zip(problems, prompts, rows, strict=True)
    ], usage
