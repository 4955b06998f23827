"""Checks of a loaded policy. What would make training silently wrong is refused: each check raises a ValueError of one
line."""

from pathlib import Path

import torch
from peft import get_peft_model_state_dict

from countdown import Problem
from policy import Policy, left_pad
from runtime.files import one_line, read_json
from runtime.weights import check_names, read_tensors

LOGIT_TOLERANCE = 0.05  # nats; the kit and the model run the same layers, so that even bf16 differs by less
PROBES = [Problem((n,), n) for n in range(1, 100)]  # every digit, alone and beside another


def check_policy(policy: Policy, model: str) -> None:
    """Run all checks of a loaded policy. `model` is its name in the messages."""
    check_finite(policy, model)
    check_vocabulary(policy, model)
    check_logits(policy, model)


def check_finite(policy: Policy, model: str) -> None:
    """Refuse NaN and infinite weights: every answer would be noise."""
    for name, weight in policy.named_parameters():
        if weight.is_floating_point() and not torch.isfinite(weight).all():
            raise ValueError(f"{model}: the weights {name} are not finite (NaN or infinity): the model is damaged")


def check_vocabulary(policy: Policy, model: str) -> None:
    """Refuse a tokenizer whose prompts, padding or ends are no rows of the embedding. Other tokens may have no row: the
    model can't draw them."""
    rows = policy.lm.get_input_embeddings().weight.shape[0]
    used = {token for problem in PROBES for token in policy.encode(problem)}
    largest = max(used | policy.stop_ids | {policy.tokenizer.pad_token_id})
    if largest >= rows:
        token = policy.tokenizer.convert_ids_to_tokens(largest)
        raise ValueError(
            f"{model}: its tokenizer does not fit its weights: token {largest} ({token!r}) is used, but the embedding "
            f"has {rows} rows: use the model's own tokenizer, or resize the embedding"
        )


@torch.no_grad()
def check_logits(policy: Policy, model: str) -> None:
    """Refuse a model whose logits are not its output embedding of the backbone's hidden states, or that reads padding.

    A scale, a cap or a layer between the two would make every log-probability wrong. The model's own forward pass of a
    prompt is compared with the kit's, in which the prompt is padded on the left.
    """
    prompt, device = policy.encode(PROBES[-1]), policy.device
    other = prompt[: len(prompt) // 2]  # the shorter row
    try:
        own = policy.lm(input_ids=torch.tensor([other], device=device), use_cache=False).logits[0, -1]
        ids, attention = left_pad([prompt, other], policy.tokenizer.pad_token_id, device)
        hidden = policy.hidden(ids, attention, use_cache=False).last_hidden_state[1, -1]
        kit = policy.head(hidden)
    except Exception as error:  # each architecture refuses in its own way
        reason = one_line(error)
        raise ValueError(
            f"{model}: {policy.lm.config.model_type} can't be run as the kit runs models: {reason}"
        ) from None
    if not torch.isfinite(own).all():
        raise ValueError(f"{model}: the logits are not finite: the model is damaged, or needs another --dtype")
    difference = (torch.log_softmax(own.float(), -1) - torch.log_softmax(kit, -1)).abs().max().item()
    if not difference <= LOGIT_TOLERANCE:
        raise ValueError(
            f"{model}: {policy.lm.config.model_type} does more than multiply hidden states by its output embedding, or "
            f"reads padding: log-probabilities would be wrong by {difference:.2g} nats, so it can't be used here"
        )


def check_adapter(lm: torch.nn.Module, folder: str) -> None:
    """Refuse an adapter whose tensors are not those of the loaded model: PEFT would leave out what fits nowhere."""
    saved = read_tensors(Path(folder) / "adapter_model.safetensors")
    check_names(saved.keys(), get_peft_model_state_dict(lm).keys())


def check_adapter_settings(folder: str, lora_rank: int) -> None:
    """Refuse an adapter of another kind than LoRA, and another rank than the settings state (0: they state none)."""
    settings = read_json(Path(folder) / "adapter_config.json")
    if settings.get("peft_type", "LORA") != "LORA":
        raise ValueError(f"{folder} is an adapter of kind {settings['peft_type']}: only LoRA is trained here")
    if lora_rank and lora_rank != (rank := settings.get("r", 8)):
        raise ValueError(f"{folder} is an adapter of rank {rank}, not {lora_rank}: pass --lora-rank {rank}")
