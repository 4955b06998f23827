"""Checks of a loaded policy. What would make training silently wrong is refused: each check raises a ValueError of one
line."""

from pathlib import Path

import torch
from peft import get_peft_model_state_dict
from torch import Tensor

from policy import Policy, left_pad
from runtime.cache import KVCache
from runtime.files import one_line, read_json
from runtime.weights import check_names, not_finite, tensor_names

EXACT = 0.01  # largest `difference` of the same computation, done twice
ROUNDED = 0.2  # that of two orders of the same computation in bf16 or in few bits; in fp32 EXACT holds too
AMPLIFIED = 1000  # factor of hidden states, so that a cap of the logits shows
OTHER_TOKENIZERS = ("vocab.json", "merges.txt", "vocab.txt", "tokenizer.model", "added_tokens.json")
PROBES = 99  # problems whose prompts are looked at


def check_policy(policy: Policy, model: str) -> None:
    """Run all checks of a loaded policy. `model` is its name in the messages."""
    check_finite(policy, model)
    check_vocabulary(policy, model)
    check_logits(policy, model)


def check_finite(policy: Policy, model: str) -> None:
    """Refuse NaN and infinite weights: every answer would be noise."""
    if name := not_finite(policy):
        raise ValueError(f"{model}: the weights {name} are not finite (NaN or infinity): the model is damaged")


def check_vocabulary(policy: Policy, model: str) -> None:
    """Refuse a tokenizer whose prompts, padding or end are no rows of the embedding. Other tokens may have no row: the
    model can't draw them."""
    rows, tokenizer = policy.lm.get_input_embeddings().weight.shape[0], policy.tokenizer
    problems = policy.chat.task.problems("train", PROBES)
    used = {token for problem in problems for token in policy.encode(problem)}
    largest = max(used | {tokenizer.eos_token_id, tokenizer.pad_token_id})
    if largest >= rows:
        token = tokenizer.convert_ids_to_tokens(largest)
        raise ValueError(
            f"{model}: its tokenizer does not fit its weights: token {largest} ({token!r}) is used, but the embedding "
            f"has {rows} rows: use the model's own tokenizer, or resize the embedding"
        )
    if odd := [stop for stop in policy.stop_ids if not isinstance(stop, int)]:
        raise ValueError(f"{model}: generation_config.json is damaged: eos_token_id is {odd[0]!r}, no token")


@torch.no_grad()
def check_logits(policy: Policy, model: str) -> None:
    """Refuse a model that the kit would run wrongly. The model's own forward pass of a prompt is compared with the
    kit's.

    The head: the kit multiplies the backbone's hidden states by the output embedding. A scale, a cap or a layer between
    the two would make every log-probability wrong. The backbone: the kit pads prompts on the left, and runs the last
    token with the keys and values of those before it.
    """
    kind, prompt = policy.lm.config.model_type, policy.encode(policy.chat.task.problems("train", 1)[0])
    ids, attention = left_pad([prompt, prompt[len(prompt) // 2 :]], policy.tokenizer.pad_token_id, policy.device)
    try:
        hidden, amplified, logits = own_pass(policy, ids[1:, len(prompt) // 2 :])
        cache = KVCache()
        policy.hidden(ids[:, :-1], attention[:, :-1], past_key_values=cache, use_cache=True)
        last = policy.hidden(ids[:, -1:], attention, past_key_values=cache, use_cache=True).last_hidden_state[1, -1]
        own, kit, head = policy.head(hidden[0, -1]), policy.head(last), policy.head(amplified)
    except Exception as error:  # each architecture refuses in its own way
        raise ValueError(f"{model}: {kind} can't be run as the kit runs models: {one_line(error)}") from None
    if not torch.isfinite(own).all():
        raise ValueError(f"{model}: the logits are not finite: the model is damaged, or needs another --dtype")
    if not difference(head, logits) <= EXACT:
        raise ValueError(
            f"{model}: the logits of {kind} are more than its output embedding times its hidden states (a scale, a "
            "cap, a layer): the kit's log-probabilities would be wrong, so it can't be used here"
        )
    exact = policy.base.dtype == torch.float32 and not getattr(policy.base, "is_quantized", False)
    if not difference(kit, own) <= (EXACT if exact else ROUNDED):
        raise ValueError(
            f"{model}: {kind} gives other logits with padding or with cached keys and values, so it can't be used here"
        )


def own_pass(policy: Policy, ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The model's own forward pass of one sequence. Returns the backbone's hidden states [1, L, H], the same amplified,
    and the logits [1, L, V] that the model makes of the amplified ones."""
    states: list[Tensor] = []

    def amplify(module, args, output):
        states.append(output.last_hidden_state)
        states.append(AMPLIFIED * output.last_hidden_state)
        output.last_hidden_state = states[-1]
        return output

    with policy.base.model.register_forward_hook(amplify):
        logits = policy.lm(input_ids=ids, use_cache=False).logits
    if not states:
        raise ValueError("its logits are not made of what its backbone returns")
    return *states, logits


def difference(a: Tensor, b: Tensor) -> float:
    """How far logits [..., V] are from others, in units of the others' spread. A constant that is added to all logits
    of a token counts nothing."""
    a, b = (logits.float() - logits.float().mean(-1, keepdim=True) for logits in (a, b))
    return ((a - b).norm() / b.norm().clamp(min=1e-9)).item()


# ------------------------------------------------------------------------------------------------ files


def check_files(folder: str, *names: str) -> None:
    """ValueError, which names the file, for one of a folder's JSON files that is damaged. A missing one is no fault."""
    for file in (Path(folder) / name for name in names):
        if file.exists():
            read_json(file)


def check_tokenizer_files(folder: str) -> None:
    """ValueError, which names the file, if a folder's tokenizer has not all the files that are needed."""
    path = Path(folder)
    if not path.is_dir():  # a name on the hub
        return
    if not (path / "tokenizer.json").exists():
        others = [name for name in OTHER_TOKENIZERS if (path / name).exists()]
        advice = "AutoTokenizer.from_pretrained(FOLDER).save_pretrained(FOLDER) of transformers writes it"
        raise ValueError(
            f"it has no tokenizer.json, only {', '.join(others)}: {advice}" if others else "it has no tokenizer.json"
        )
    names = "tokenizer_config.json", "special_tokens_map.json"
    if not any((path / name).exists() for name in names):
        raise ValueError(f"it has no {names[0]}, which names the token that ends an answer")
    check_files(folder, "tokenizer.json", *names)


# ------------------------------------------------------------------------------------------------ adapters


def check_adapter(lm: torch.nn.Module, folder: str) -> None:
    """Refuse an adapter whose tensors are not those of the loaded model: PEFT would leave out what fits nowhere. Whole
    embeddings beside the adapter are loaded too."""
    saved = tensor_names(Path(folder) / "adapter_model.safetensors")
    wanted = get_peft_model_state_dict(lm, save_embedding_layers=False).keys()
    check_names(saved - (lm.state_dict().keys() - wanted), wanted)


def check_adapter_settings(folder: str, lora_rank: int) -> None:
    """Refuse an adapter of another kind than LoRA, and another rank than the settings state (0: they state none)."""
    settings = read_json(Path(folder) / "adapter_config.json")
    if settings.get("peft_type", "LORA") != "LORA":
        raise ValueError(f"{folder} is an adapter of kind {settings['peft_type']}: only LoRA is trained here")
    if settings.get("alora_invocation_tokens"):
        raise ValueError(
            f"{folder} is an activated LoRA, which is off before its own tokens: only LoRA is trained here"
        )
    rank = settings.get("r", 8)
    if not isinstance(rank, int):
        raise ValueError(f"{folder}/adapter_config.json is damaged: the rank r is {rank!r}, no number")
    if lora_rank not in (0, rank):
        raise ValueError(f"{folder} is an adapter of rank {rank}, not {lora_rank}: pass --lora-rank {rank}")
