"""Loading: a policy from a Hugging Face name, a folder, an adapter or a run.

A model that can't be used raises a ValueError of one line that says what to do. Weights are read from safetensors
alone, and code that comes with a model is never run.
"""

import json
import re
from pathlib import Path

import torch
from huggingface_hub import HfApi, try_to_load_from_cache
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    PreTrainedConfig,
    PreTrainedTokenizerFast,
)
from transformers.utils.logging import disable_progress_bar

from config import TINY, Config
from countdown import Countdown
from policy import Policy
from runtime.cache import GROUPED
from runtime.chat import Chat
from runtime.files import KIT, one_line, read_json, typed
from runtime.model_checks import (
    EXACT,
    check_adapter,
    check_adapter_settings,
    check_files,
    check_policy,
    check_tokenizer_files,
    difference,
)
from runtime.weights import VALUE_HEAD, load_value_head, read_model
from sampling import Task

disable_progress_bar()  # of weights that are loaded or saved: it would break the run's own bar; downloads keep theirs

COUNTDOWN = Countdown()
LOGIT_SETTINGS = ("final_logit_softcapping", "logit_scale", "logits_scaling")  # of Gemma 2, Cohere, Granite


def pick_device(device: str) -> str:
    """The device that a setting means: auto is the GPU where there is one. ValueError if it is missing."""
    if device not in ("auto", "cpu", "cuda"):
        raise ValueError(f"device must be auto, cpu or cuda, not {device!r}; CUDA_VISIBLE_DEVICES picks among GPUs")
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("no NVIDIA GPU is visible to PyTorch: pass --device cpu")
    return device


def load_policy(
    model: str | Path,
    lora_rank: int = 0,
    device: str = "cpu",
    dtype: str = "float32",
    quantize: str = "none",
    gradient_checkpointing: bool = False,
    train: bool = True,
    seed: int | None = None,
    template_options: str = "",
    task: Task = COUNTDOWN,
) -> Policy:
    """A policy from a Hugging Face name or folder, a run folder, or a folder written by `Policy.save` (adapters too).

    lora_rank: 0 trains all weights, in fp32. Above 0 it is the rank of a LoRA adapter on all linear layers. The adapter
    is trained in fp32; the base weights are frozen in `dtype`, with quantize="nf4" the linear layers in 4 bits.
    train: False, for evaluation, allows any dtype and makes no reference.
    seed: of the first weights of value head and adapter.
    template_options: of the chat template, as JSON.
    task: what the policy is asked.
    ValueError says what to do if the model can't be used.
    """
    if seed is not None:
        torch.manual_seed(seed)
    folder, base = locate(model)
    adapter = folder if base != folder else None
    lora = bool(adapter or lora_rank)
    if train and not lora and dtype != "float32":
        raise ValueError("training all weights needs --dtype float32: in bf16 most small updates round to nothing")
    if train and not lora and quantize != "none":
        raise ValueError("4-bit weights can't be trained: pass --lora-rank 32, or --quantize none")
    if adapter:
        check_adapter_settings(adapter, lora_rank)
    config = read_model_config(folder, base)
    stored = stored_bits(base, config, train and not lora)
    chat = read_chat(folder, base, task, template_options)
    dtype = getattr(torch, dtype)
    options = dict(config=config, dtype=dtype)
    if stored:
        options["device_map"] = {"": device}
    elif quantize == "nf4":
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype
        )
        options["device_map"] = {"": device}
    try:
        lm = read_model(base, AutoModelForCausalLM, **options)
    except Exception as error:  # no access, no memory, torn or foreign files: each has its own type
        raise ValueError(explain(folder, base, error)) from None
    if quantize == "none" and not stored:
        lm.to(device)
    try:
        keep_packing(lm)
        if lm.config._attn_implementation == "sdpa":
            lm.set_attn_implementation(GROUPED)
        if gradient_checkpointing:
            lm.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        if adapter:
            lm = load_adapter(lm, adapter, train)
        elif lora_rank:
            settings = LoraConfig(r=lora_rank, lora_alpha=2 * lora_rank, target_modules="all-linear")
            lm = get_peft_model(lm, settings)
    except Exception as error:  # of PEFT
        raise ValueError(f"can't load {folder!r}: {one_line(error)}") from None
    for parameter in lm.parameters():
        if parameter.requires_grad and lora:
            parameter.data = parameter.data.float()
    policy = Policy(lm.eval(), chat, lora, train)
    if (head := Path(folder) / VALUE_HEAD).exists():
        load_value_head(policy, head)
    check_policy(policy, str(model))
    return policy


@torch.no_grad()
def load_adapter(lm: torch.nn.Module, folder: str, train: bool) -> PeftModel:
    """A model with the adapter of a folder. ValueError for tensors without a place; and, to train, for an adapter that
    changes its base: the reference is the model with the adapter off."""
    probe = torch.arange(8, device=lm.device)[None]
    base = lm(input_ids=probe).logits
    lm = PeftModel.from_pretrained(lm, folder, is_trainable=True)
    check_adapter(lm, folder)
    with lm.disable_adapter():
        if train and difference(lm(input_ids=probe).logits, base) > EXACT:
            raise ValueError(
                "the adapter changes its base too (biases, PiSSA …), so the KL penalty would have no reference: "
                "merge it into the base, merge_and_unload() of PEFT, and pass the merged model"
            )
    return lm


def stored_bits(base: str, config: PreTrainedConfig, train_all: bool) -> bool:
    """Whether a checkpoint's weights are stored in 4 or 8 bits. ValueError where they can't be used so."""
    settings = getattr(config, "quantization_config", None)
    if not settings:
        return False
    kind = settings.get("quant_method", "bitsandbytes")
    if kind != "bitsandbytes":
        raise ValueError(f"{base}: its weights are stored as {kind}, which is not read here: use the unquantized model")
    if train_all:
        raise ValueError(f"{base}: its weights are stored in few bits, which can't be trained: pass --lora-rank 32")
    return True


def read_model_config(folder: str, base: str) -> PreTrainedConfig:
    """A model's config.json. ValueError if it can't be read, or for a kind of model that the kit would run wrongly."""
    try:
        check_files(base, "config.json", "generation_config.json")
        config = AutoConfig.from_pretrained(base, trust_remote_code=False)
    except Exception as error:  # each fault has its own type
        raise ValueError(explain(folder, base, error)) from None
    config._attn_implementation = None  # the kit chooses it; a checkpoint may name a package that is not installed
    config.return_dict = True
    kind = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
    if not kind or kind.base_model_prefix != "model" or config.is_encoder_decoder or not hasattr(config, "hidden_size"):
        raise ValueError(f"{base}: {config.model_type} is no decoder of text like Llama")
    if kind._is_stateful or set(getattr(config, "layer_types", None) or []) - {"full_attention", "sliding_attention"}:
        raise ValueError(f"{base}: {config.model_type} has layers without attention, whose state is not kept here")
    if changed := [name for name in LOGIT_SETTINGS if getattr(config, name, None) not in (None, 1)]:
        raise ValueError(f"{base}: {config.model_type} changes its logits ({changed[0]}), which is not done here")
    return config


def read_chat(folder: str, base: str, task: Task = COUNTDOWN, template_options: str = "") -> Chat:
    """A task for a model's tokenizer. ValueError if the tokenizer can't be read, or can't write the task's prompts."""
    chat = Chat(read_tokenizer(folder, base, template_options), task)
    problem = task.problems("train", 1)[0]
    try:
        chat.encode(problem)
    except Exception as error:  # those of the chat template too
        raise ValueError(explain(folder, base, error)) from None
    return chat


def read_tokenizer(folder: str, base: str, template_options: str = "") -> PreTrainedTokenizerFast:
    """A model's tokenizer; of an adapter, the one in its folder if there is one. ValueError if it can't be read."""
    source = folder if (Path(folder) / "tokenizer.json").exists() else base
    try:
        check_tokenizer_files(source)
        # not AutoTokenizer: for model type qwen2 it ignores tokenizer.json and builds a byte-level BPE
        tokenizer = PreTrainedTokenizerFast.from_pretrained(source, padding_side="left")
        if tokenizer.chat_template is None:
            raise ValueError("it has no chat template: use an instruct model")
        if tokenizer.eos_token is None:
            raise ValueError("its tokenizer has no eos_token: answers would never end")
        set_template_options(tokenizer, template_options)
    except Exception as error:  # each fault has its own type
        raise ValueError(explain(folder, base, error)) from None
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def set_template_options(tokenizer, options: str) -> None:
    """Give options of a chat template their values, by writing them into the template: so every saved policy has them.
    `options`: a JSON object, such as {"enable_thinking": false}. ValueError for one that the template does not read."""
    try:
        values = dict(json.loads(options or "{}"))
    except (TypeError, ValueError):
        example = '{"enable_thinking": false}'
        raise ValueError(f"template_options must be a JSON object such as {example}, not {options}") from None
    for name, value in values.items():
        if not name.isidentifier() or not re.search(rf"\b{name}\b", tokenizer.chat_template):
            raise ValueError(f"its chat template has no option {name!r}: leave it out of template_options")
        if isinstance(value, list | dict):
            raise ValueError(f"option {name!r} of the chat template must be a text, a number, true or false")
        template = tokenizer.chat_template
        at = re.match(r"({% set \w+ = [^%]* %})*", template).end()  # after those of an earlier training
        tokenizer.chat_template = f"{template[:at]}{{% set {name} = {json.dumps(value)} %}}{template[at:]}"


def recorded(config: Config) -> Config:
    """A run's settings as its config.json has to have them: a model's folder with its whole path, the rank of a model
    that is an adapter. ValueError for what is not a model."""
    folder, base = locate(config.model)
    changes = {"lora_rank": adapter_rank(folder, base)} if folder != base and not config.machine.lora_rank else {}
    path = Path(config.model).expanduser()
    if config.model != TINY and path.exists():
        changes["model"] = str(path.resolve())
    return config.change(**changes)


def adapter_rank(folder: str, base: str) -> int:
    """The rank of an adapter. `folder`, `base`: as `locate` returns them. 0 if the model is no adapter."""
    return read_json(Path(folder) / "adapter_config.json").get("r", 8) if folder != base else 0


def keep_packing(lm: torch.nn.Module) -> None:
    """Keep 4-bit weights as they were loaded. On CPUs with bf16 instructions bitsandbytes 0.50 would pack them anew in
    the first pass without gradients. That layout has no backward pass: training would fail, or lose gradients without
    an error."""
    for layer in lm.modules():
        if hasattr(layer, "support_avx512bf16_for_cpu"):
            layer.support_avx512bf16_for_cpu = False


def locate(model: str | Path) -> tuple[str, str]:
    """Two folders or Hugging Face names: of the tokenizer (and the adapter, if there is one), and of the base weights.

    A run folder means its final policy. ValueError, before weights are read, for what is not a model.
    """
    path, name = Path(model).expanduser(), str(model)
    if name == TINY:  # the embedded policy, from any working directory
        path = path if path.exists() else KIT / TINY
    elif path.exists():  # a name that holds from any working directory later
        path = path.resolve()
    if path.suffix == ".gguf" or (path.is_dir() and not (path / "config.json").exists() and any(path.glob("*.gguf"))):
        raise ValueError(f"{name} is GGUF: convert it first, python -m scripts.from_gguf FILE.gguf FOLDER")
    if not path.exists():
        if path.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1:
            raise ValueError(f"there is no folder {name}")
        ask_hub(name)
        return name, name
    if path.is_file():
        raise ValueError(f"{name} is a file: pass the folder of a Hugging Face model")
    if (path / "policy").is_dir():
        path = path / "policy"
    if (path / "adapter_config.json").exists():
        base = read_json(path / "adapter_config.json").get("base_model_name_or_path")
        if not (base and isinstance(base, str)):
            raise ValueError(f"{name}: the adapter doesn't name its base model (adapter_config.json)")
        if not (path / "adapter_model.safetensors").exists():
            raise ValueError(f"{name}: the adapter has no weights (adapter_model.safetensors)")
        try:
            return str(path), locate(base)[0]
        except ValueError as error:
            raise ValueError(f"{name}: its base model can't be found: {error}") from None
    if (path / "checkpoint").is_dir():
        raise ValueError(
            f"{name} is a run without a final policy: go on with it, --resume {typed(name)}, or pass "
            f"{typed(name + '/checkpoint')}"
        )
    if not (path / "config.json").exists():
        names = ", ".join(sorted(item.name for item in path.iterdir())[:4]) or "nothing"
        raise ValueError(f"{name} is no model folder: it has no config.json (it holds {names})")
    if not any(path.glob("*.safetensors")):
        raise ValueError(f"{name} holds no safetensors weights; pickled ones (.bin) are not read")
    index = path / "model.safetensors.index.json"
    shards = read_json(index).get("weight_map", {}) if index.exists() else {}
    if not isinstance(shards, dict):
        raise ValueError(f"{name}: {index.name} is damaged")
    if not all(str(shard).endswith(".safetensors") for shard in shards.values()):  # transformers would read pickles
        raise ValueError(f"{name}: {index.name} names other weights than safetensors; pickled ones (.bin) are not read")
    return str(path), str(path)


def ask_hub(name: str) -> None:
    """ValueError if a model is neither in the local cache nor on the Hugging Face hub. One request, where transformers
    would try again for minutes."""
    try:
        if not isinstance(try_to_load_from_cache(name, "config.json"), str):
            HfApi().model_info(name, timeout=10)
    except Exception as error:  # no such name, no access, no network, offline: each has its own type
        raise ValueError(explain(name, name, error)) from None


def explain(folder: str, base: str, error: Exception) -> str:
    """One line of advice about a model that transformers could not load."""
    model = f"{folder!r}" if folder == base else f"the base model {base!r} of the adapter {folder!r}"
    if Path(base).exists() or isinstance(try_to_load_from_cache(base, "config.json"), str):
        return f"can't load {model}: {one_line(error)}"
    return (
        f"can't load {model}: no such folder, and not found on the Hugging Face hub (no access, or no such name). "
        f"Where there is access: hf download {base} --local-dir FOLDER; then pass the folder"
    )
