"""Which sampler a run or an evaluation uses."""

from dataclasses import dataclass
from importlib.util import find_spec

from transformers import AutoTokenizer

from policy import Policy
from runtime import ranks
from runtime.loading import adapter_rank, locate, read_model_config, read_tokenizer
from runtime.torch_sampler import KEPT, TorchSampler
from runtime.vllm_sampler import NOT_DISTINCT, VLLMSampler, borrowed, read_alike, refusal
from sampling import Sampler


def serves(model: str, dtype: str, lora_rank: int) -> bool:
    """Whether vLLM serves a model's class, weights, tokenizer and adapter on a GPU."""
    folder, base = locate(model)
    config = read_model_config(folder, base)
    if getattr(config, "quantization_config", None) or borrowed(config.architectures):
        return False
    rank, tokenizer = adapter_rank(folder, base) or lora_rank, read_tokenizer(folder, base)
    if refusal(rank, dtype == "float32"):
        return False
    return read_alike(tokenizer, AutoTokenizer.from_pretrained(tokenizer.name_or_path))


def pick_sampler(machine, model: str, device: str, distinct: bool) -> str:
    """The sampler that `machine` (sampler, dtype, quantize, lora_rank) means on a device: torch or vllm.

    auto is vLLM where it is installed, the weights are on a GPU in 16 or 32 bits, vLLM `serves` the model, no other
    rank of torchrun is beside it, and draws are not distinct. ValueError if vLLM is asked for and can't do it.
    """
    if machine.sampler == "auto":
        able = machine.quantize == "none" and not distinct and ranks.world() == 1
        able = able and device.startswith("cuda") and find_spec("vllm")
        rank = getattr(machine, "lora_rank", 0)
        return "vllm" if able and serves(model, machine.dtype, rank) else "torch"
    if machine.sampler == "vllm":
        if ranks.world() > 1:
            raise ValueError(
                "vLLM can't run beside torchrun's ranks: --sampler auto gives it to a cluster's generators"
            )
        if distinct:
            raise ValueError(NOT_DISTINCT)
        if machine.quantize != "none":  # since 0.28 bitsandbytes is a plugin
            raise ValueError("vLLM does not serve NF4 weights: pass --sampler torch, or --quantize none")
        if not find_spec("vllm"):
            raise ValueError("vLLM is not installed: pass --sampler torch, or pip install -r requirements.txt")
    return machine.sampler


@dataclass(frozen=True)
class SamplerPlan:
    """Which sampler, and the memory that it may use."""

    engine: str  # torch or vllm
    context: int  # tokens of the longest sequence
    rows: int = 1024  # sequences that TorchSampler decodes together
    kept: int = KEPT  # tokens whose keys and values TorchSampler keeps during a search
    cache_gb: float = 1.0  # GB (2**30 bytes) of vLLM's keys and values


def make_sampler(plan: SamplerPlan, policy: Policy, seed: int) -> Sampler:
    """The sampler of a plan."""
    if plan.engine == "torch":
        return TorchSampler(policy, plan.rows, plan.kept)
    return VLLMSampler(policy, plan.context, plan.cache_gb, seed)
