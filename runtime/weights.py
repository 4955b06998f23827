"""A policy's weights as files, and tensors from files that may be torn or hostile."""

import logging
from collections.abc import Collection
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from policy import Policy
from runtime.files import one_line
from runtime.guard import Stopped

# of a table of tensors `read_model` makes one line
logging.getLogger("transformers.modeling_utils").addFilter(lambda record: "LOAD REPORT" not in record.getMessage())

VALUE_HEAD = Path("value_head") / "weights.safetensors"  # in the folder of a saved policy


def save_policy(policy: Policy, folder: Path) -> None:
    """Write weights or adapter and tokenizer as `save_pretrained` does, and the value head. Stopped, before anything is
    written, for weights that are not finite.

    The value head has a folder of its own: vLLM takes every safetensors file beside config.json for the model's.
    """
    if name := not_finite(policy):
        raise Stopped(f"the weights {name} are not finite (NaN or infinity) and not saved: try a lower --learning-rate")
    # one file, and no look at the hub for a changed vocabulary
    options = dict(save_embedding_layers=False) if policy.lora else dict(max_shard_size="1TB")
    policy.lm.save_pretrained(folder, **options)
    policy.tokenizer.save_pretrained(folder)
    (folder / VALUE_HEAD).parent.mkdir(exist_ok=True)
    save_file(policy.value_head.state_dict(), folder / VALUE_HEAD)


def load_weights(policy: Policy, folder: Path) -> None:
    """Load what `save_policy` wrote into a policy with the same settings; its reference stays as it is. ValueError for
    weights of other settings, and for such that are not finite."""
    file = folder / ("adapter_model.safetensors" if policy.lora else "model.safetensors")
    names = tensor_names(file)
    try:
        if policy.lora:
            from peft import get_peft_model_state_dict, set_peft_model_state_dict

            check_names(names, get_peft_model_state_dict(policy.lm, save_embedding_layers=False).keys())
            set_peft_model_state_dict(policy.lm, read_tensors(file))
        else:
            # from_pretrained, as a file's names may be others than the model's (mixtures of experts)
            saved = read_model(folder, type(policy.lm), dtype=policy.lm.dtype)
            policy.lm.load_state_dict(saved.state_dict())
    except (RuntimeError, ValueError, OSError) as error:
        raise ValueError(
            f"{folder}: weights do not fit the model: go on with its own settings ({one_line(error)})"
        ) from None
    load_value_head(policy, folder / VALUE_HEAD)
    if name := not_finite(policy):
        raise ValueError(f"{folder}: the weights {name} are not finite (NaN or infinity): start the run anew")


def not_finite(policy: Policy) -> str:
    """The name of a weight with NaN or infinity in it; empty if there is none."""
    for module in (policy.lm, policy.value_head):
        for name, weight in module.named_parameters():
            if weight.is_floating_point() and not torch.isfinite(weight).all():
                return name
    return ""


def read_model(source: str | Path, kind: type, **options) -> nn.Module:
    """A transformers model with its weights. `kind`: a class with `from_pretrained`. ValueError unless the files hold
    just the tensors of the model: transformers would draw the others at random, or leave them out."""
    options |= dict(use_safetensors=True, trust_remote_code=False, ignore_mismatched_sizes=True)
    try:
        lm, info = kind.from_pretrained(source, output_loading_info=True, **options)
    except RuntimeError as error:
        if "conversion" in str(error):  # of the files' tensors to the model's; the error names none of them
            raise ValueError("the tensors of its experts do not fit together: some are missing or foreign") from None
        raise
    for name, stored, shape in sorted(info["mismatched_keys"]):
        raise ValueError(
            f"its weights {name} have the shape {tuple(stored)}, but its config.json asks for {tuple(shape)}"
        )
    check_names(info["unexpected_keys"], info["missing_keys"])
    return lm


def check_names(saved: Collection[str], wanted: Collection[str]) -> None:
    """ValueError if the names of the tensors in a file are not those of the model."""
    if wrong := sorted(set(saved) ^ set(wanted)):
        fault = "hold tensors without a place in the model" if wrong[0] in saved else "lack tensors of the model"
        raise ValueError(f"its weights {fault}: {', '.join(wrong[:3])}{' …' if wrong[3:] else ''}")


def load_value_head(policy: Policy, file: Path) -> None:
    """Load a saved value head. ValueError if it is one of another model."""
    try:
        policy.value_head.load_state_dict(read_tensors(file))
    except RuntimeError as error:
        raise ValueError(f"{file}: the value head is that of another model ({one_line(error)})") from None


def tensor_names(file: Path) -> set[str]:
    """The names of the tensors in a safetensors file. ValueError for a torn or foreign file."""
    try:
        with safe_open(file, "pt") as tensors:
            return set(tensors.keys())
    except Exception as error:
        raise unreadable(file, error) from None


def read_tensors(file: Path) -> dict:
    """What `save_file` or `torch.save` wrote. ValueError for a torn file, and for a pickle with anything but tensors
    and plain values, before any of its code runs."""
    try:
        if file.suffix == ".safetensors":
            return load_file(file)
        return torch.load(file, map_location="cpu", weights_only=True)  # noqa: TID251
    except Exception as error:  # torn, foreign or hostile: each raises its own
        raise unreadable(file, error) from None


def unreadable(file: Path, error: Exception) -> ValueError:
    return ValueError(f"{file} can't be read as plain tensors ({type(error).__name__})")


# ------------------------------------------------------------------------------------------------ between processes


def trained_weights(policy: Policy) -> dict[str, torch.Tensor]:
    """What training changes, by name, on the CPU: adapter or all weights, and the value head."""
    return {name: p.detach().cpu() for name, p in policy.named_parameters() if p.requires_grad}


@torch.no_grad()
def set_weights(policy: Policy, weights: dict[str, torch.Tensor]) -> None:
    """Give a policy the `trained_weights` of one with the same settings."""
    for name, weight in weights.items():
        policy.get_parameter(name).copy_(weight)
