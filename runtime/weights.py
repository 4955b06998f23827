"""A policy's weights as files, and tensors from files that may be torn or hostile."""

from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from policy import Policy

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
            from peft import set_peft_model_state_dict

            set_peft_model_state_dict(policy.lm, read_tensors(folder / "adapter_model.safetensors"))
        else:
            missing, unexpected = policy.lm.load_state_dict(read_tensors(folder / "model.safetensors"), strict=False)
            if unexpected or set(missing) - {"lm_head.weight"}:
                raise RuntimeError(f"{[*missing, *unexpected][:3]} …")
            policy.lm.tie_weights()
        policy.value_head.load_state_dict(read_tensors(folder / VALUE_HEAD))
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:120]
        raise ValueError(f"{folder}: weights do not fit the model: go on with its own settings ({reason})") from None


def read_tensors(file: Path) -> dict:
    """What `save_file` or `torch.save` wrote. ValueError for a torn file, and for a pickle with anything but tensors
    and plain values, before any of its code runs."""
    try:
        if file.suffix == ".safetensors":
            return load_file(file)
        return torch.load(file, map_location="cpu", weights_only=True)  # noqa: TID251
    except Exception as error:  # torn, foreign or hostile: each raises its own
        raise ValueError(f"{file} can't be read as plain tensors ({type(error).__name__})") from None
