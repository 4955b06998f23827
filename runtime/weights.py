"""A policy's weights as files, and tensors from files that may be torn or hostile."""

from collections.abc import Collection
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from policy import Policy
from runtime.files import one_line

VALUE_HEAD = Path("value_head") / "weights.safetensors"  # in the folder of a saved policy


def save_policy(policy: Policy, folder: Path) -> None:
    """Write weights or adapter and tokenizer as `save_pretrained` does, and the value head.

    The value head has a folder of its own: vLLM takes every safetensors file beside config.json for the model's.
    """
    # one file, and no look at the hub for a changed vocabulary
    options = dict(save_embedding_layers=False) if policy.lora else dict(max_shard_size="1TB")
    policy.lm.save_pretrained(folder, **options)
    policy.tokenizer.save_pretrained(folder)
    (folder / VALUE_HEAD).parent.mkdir(exist_ok=True)
    save_file(policy.value_head.state_dict(), folder / VALUE_HEAD)


def load_weights(policy: Policy, folder: Path) -> None:
    """Load what `save_policy` wrote into a policy with the same settings; its reference stays as it is. ValueError for
    weights of other settings."""
    try:
        if policy.lora:
            from peft import get_peft_model_state_dict, set_peft_model_state_dict

            saved = read_tensors(folder / "adapter_model.safetensors")
            check_names(saved.keys(), get_peft_model_state_dict(policy.lm).keys())
            set_peft_model_state_dict(policy.lm, saved)
        else:
            # from_pretrained, as a file's names may be others than the model's (mixtures of experts)
            options = dict(dtype=policy.lm.dtype, use_safetensors=True, trust_remote_code=False)
            saved, info = type(policy.lm).from_pretrained(folder, output_loading_info=True, **options)
            check_names(info["unexpected_keys"], info["missing_keys"])
            policy.lm.load_state_dict(saved.state_dict())
    except (RuntimeError, ValueError, OSError) as error:
        raise ValueError(
            f"{folder}: weights do not fit the model: go on with its own settings ({one_line(error)})"
        ) from None
    load_value_head(policy, folder / VALUE_HEAD)


def check_names(saved: Collection[str], wanted: Collection[str]) -> None:
    """ValueError if the names of the tensors in a file are not those of the model: a loader would leave them out, or
    draw them at random."""
    if wrong := sorted(set(saved) ^ set(wanted)):
        which = "has no place for" if wrong[0] in saved else "lacks"
        raise ValueError(f"the model {which} {wrong[0]}, one of {len(wrong)} tensors")


def load_value_head(policy: Policy, file: Path) -> None:
    """Load a saved value head. ValueError if it is one of another model."""
    try:
        policy.value_head.load_state_dict(read_tensors(file))
    except RuntimeError as error:
        raise ValueError(f"{file}: the value head is that of another model ({one_line(error)})") from None


def read_tensors(file: Path) -> dict:
    """What `save_file` or `torch.save` wrote. ValueError for a torn file, and for a pickle with anything but tensors
    and plain values, before any of its code runs."""
    try:
        if file.suffix == ".safetensors":
            return load_file(file)
        return torch.load(file, map_location="cpu", weights_only=True)  # noqa: TID251
    except Exception as error:  # torn, foreign or hostile: each raises its own
        raise ValueError(f"{file} can't be read as plain tensors ({type(error).__name__})") from None
