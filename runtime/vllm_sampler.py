"""The sampler for GPUs: vLLM, in the trainer's process."""

import math
import os
import shutil
import tempfile
import time
from pathlib import Path

import torch
from transformers.core_model_loading import revert_weight_conversion

from policy import Policy
from runtime.guard import Stopped
from runtime.torch_sampler import NOT_FINITE, check_context, read_values
from sampling import STEP_END, Sample, Usage

MAX_SEQUENCES = 256  # that vLLM decodes together
LORA_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)  # that vLLM can reserve memory for
COLDEST = 0.01  # lowest temperature; vLLM takes a lower one for this one, with a warning
# measured with vLLM 0.32 on a CPU: log-probabilities are wrong by a nat after an update
NO_NEW_EXPERTS = "vLLM does not take new weights of a mixture of experts: pass --sampler torch, or --lora-rank 32"
NOT_DISTINCT = "vLLM does not draw steps without replacement: pass --sampler torch, or --cutoff None"


class VLLMSampler:
    """vLLM, serving the policy's newest weights. `sample` brings them to vLLM first, if they have changed:

    LoRA          a new adapter with a new id: vLLM caches adapters by id, and would not read the new files of an old id
    all weights   reloaded, the tied head by its own name too: without it vLLM would keep the old head

    Log-probabilities are those of the distribution drawn from; vLLM's default is that of temperature 1. There can be
    one such sampler in a process, as vLLM's process groups and counters are global.
    """

    def __init__(self, policy: Policy, context: int, cache_gb: float = 1.0, seed: int = 0):
        """`context`: tokens of the longest sequence, at which a continuation ends; `cache_gb`: GB (2**30 bytes) of keys
        and values."""
        os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")  # the engine lives in this process
        os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")  # nothing is sent anywhere
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
        self.on_gpu = policy.device.type == "cuda"
        if not self.on_gpu:
            os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
        os.environ.pop("TORCHELASTIC_USE_AGENT_STORE", None)  # torchrun's; with it vLLM's own group finds no store
        import vllm

        self.vllm, self.policy, self.context = vllm, policy, context
        self.served: int | None = None  # version of the weights that vLLM holds
        self.adapter, self.adapters = None, tempfile.TemporaryDirectory(prefix="adapters-")
        self.asleep = False
        lora = policy.lm.peft_config["default"].r if policy.lora else 0
        if getattr(policy.base, "is_quantized", False):
            raise ValueError("vLLM does not serve weights in few bits: pass --sampler torch")
        if not lora and any(".experts." in name for name, _ in policy.lm.named_parameters()):
            raise ValueError(NO_NEW_EXPERTS)
        if borrowed(policy.base.config.architectures):
            raise ValueError("vLLM runs this model through transformers' classes: pass --sampler torch")
        if why := refusal(lora, self.on_gpu and policy.base.dtype == torch.float32):
            raise ValueError(why)
        self.llm = vllm.LLM(
            model=policy.base.name_or_path,
            tokenizer=policy.tokenizer.name_or_path,
            dtype=policy.base.dtype,
            max_model_len=context,
            kv_cache_memory_bytes=int(cache_gb * 2**30),
            gpu_memory_utilization=0.05,  # only checked at the start, and low, as the trainer is on the card too
            max_num_seqs=MAX_SEQUENCES,
            max_num_batched_tokens=4096 if self.on_gpu else max(4096, context),  # of prefixes in one pass
            enable_chunked_prefill=self.on_gpu,  # on a CPU a seeded request fails if its prefix is split
            enable_prefix_caching=True,
            logprobs_mode="processed_logprobs",
            generation_config="vllm",  # without the model's own top-p and repetition penalty
            enable_lora=bool(lora),
            max_lora_rank=next(rank for rank in LORA_RANKS if rank >= lora),
            enable_sleep_mode=self.on_gpu,
            enforce_eager=not self.on_gpu,
            disable_log_stats=False,  # counts of the prefix cache; they stay in this process
            seed=seed,
        )
        if not read_alike(policy.tokenizer, self.llm.get_tokenizer()):
            raise ValueError("vLLM reads this model's tokenizer in another way: pass --sampler torch")

    def sample(self, prefixes, seeds, params):
        if params.cutoff is not None:
            raise ValueError(NOT_DISTINCT)
        if params.temperature < COLDEST:
            raise ValueError(f"vLLM samples at a temperature of {COLDEST} at least, not {params.temperature}")
        began = time.perf_counter()
        check_context(self.context, max(map(len, prefixes), default=0), 1)
        self._serve()
        wanted = [
            self.vllm.SamplingParams(
                n=params.n,
                seed=seed % 2**62,  # vLLM adds the sample's index
                max_tokens=params.max_tokens,
                temperature=params.temperature,
                logprobs=0,  # of the drawn token
                stop=[STEP_END] if params.stop_at_step else None,
                stop_token_ids=sorted(self.policy.stop_ids),
                include_stop_str_in_output=True,
                skip_special_tokens=False,
                detokenize=params.stop_at_step,
            )
            for seed in seeds
        ]
        missed = self._cache_misses()
        prompts = [{"prompt_token_ids": prefix} for prefix in prefixes]
        outputs = self.llm.generate(prompts, wanted, lora_request=self.adapter, use_tqdm=False) if prompts else []
        rows = [[self._record(one) for one in sorted(row.outputs, key=lambda o: o.index)] for row in outputs]
        if not all(math.isfinite(logprob) for row in rows for s in row for logprob in s.logprobs):
            raise Stopped(NOT_FINITE)
        usage = Usage(
            generated=sum(len(s.tokens) for row in rows for s in row),
            prefilled=self._cache_misses() - missed,
            seconds=time.perf_counter() - began,
            decoded=sum(len(s.tokens) - 1 for row in rows for s in row),  # the last token is not run
        )
        return rows, usage

    def values(self, states):
        return read_values(self.policy, states)

    def rest(self):
        if self.on_gpu and not self.asleep:
            self.llm.sleep(level=1)  # weights go to the CPU's memory, the KV cache is dropped
            self.asleep = True

    def _serve(self) -> None:
        """Wake vLLM up, and give it the policy's weights if it has others."""
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
        else:  # by the names in files; the tied head has its own in state_dict
            weights = revert_weight_conversion(self.policy.lm, self.policy.lm.state_dict()).items()
            self.llm.collective_rpc("reload_weights", kwargs=dict(weights_iterator=iter(weights)))
        self.llm.reset_prefix_cache()
        self.served = self.policy.version

    def _cache_misses(self) -> int:
        """Prefix tokens that vLLM has run through the model so far."""
        counted = {metric.name: metric.value for metric in self.llm.get_metrics() if hasattr(metric, "value")}
        return int(counted.get("vllm:prefix_cache_queries", 0) - counted.get("vllm:prefix_cache_hits", 0))

    def _record(self, output) -> Sample:
        """vLLM's output as a Sample."""
        ended = "end"
        if output.finish_reason == "length":
            ended = "length"
        elif output.stop_reason == STEP_END:
            ended = "step"
        tokens = list(output.token_ids)
        logprobs = [choices[token].logprob for choices, token in zip(output.logprobs, tokens, strict=True)]
        return Sample(tokens, logprobs, ended)


def refusal(lora_rank: int, on_gpu_in_fp32: bool) -> str:
    """Why vLLM does not serve an adapter of rank `lora_rank` (0: no adapter); empty if it does."""
    if lora_rank and on_gpu_in_fp32:
        return "vLLM's adapters need half precision on a GPU: pass --dtype bfloat16, or --sampler torch"
    if lora_rank > LORA_RANKS[-1]:
        return f"vLLM's adapters end at rank {LORA_RANKS[-1]}: pass --sampler torch"
    return ""


def borrowed(architectures: list[str] | None) -> bool:
    """Whether vLLM has no code of its own for a model. It then takes the class of transformers, and changes that class
    for the whole process: the trainer's model would break."""
    from vllm import ModelRegistry

    own = ModelRegistry.models.get((architectures or [""])[0])
    return own is None or getattr(own, "module_name", "").endswith(".transformers")


def read_alike(ours, theirs) -> bool:
    """Whether two tokenizers decode a step alike. vLLM looks for </step> in the text of its own tokenizer."""
    tokens = ours("<step> 1 + 2 = 3 </step>")["input_ids"]
    return ours.decode(tokens) == theirs.decode(tokens)
