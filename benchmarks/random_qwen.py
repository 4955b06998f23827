"""A Qwen2 checkpoint that needs no download: random weights, and a byte-level BPE tokenizer like Qwen2.5's.

    python -m benchmarks.random_qwen models/random-1.5b    # the shape of Qwen2.5-1.5B, random bf16 weights, 3.1 GB

The tests use thin ones with `lessons` above 0: a few seconds of training on written games, so that </step> and <answer>
occur. The vocabulary is padded beyond the tokenizer, as Qwen2.5's is (151,936 against 151,665).
"""

import random
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # for `python benchmarks/random_qwen.py`

import runtime.threads

import torch
import tyro
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

from config import check, check_choices, check_ranges
from countdown import Problem, make_problems, prompt
from experiments.pretrain import write_game
from runtime import cli
from runtime.files import check_writable

# how Qwen2 splits text into words before it merges bytes: contractions, words, single digits, punctuation, white space
WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@dataclass
class Shape:
    """Write a Qwen2 checkpoint with random weights; the defaults are the shape of Qwen2.5-1.5B-Instruct."""

    folder: tyro.conf.Positional[Path]
    layers: int = 28
    hidden: int = 1536
    intermediate: int = 8960
    heads: int = 12
    kv_heads: int = 2
    vocabulary: int = 151_936
    context: int = 32_768
    dtype: str = "bfloat16"  # of the file
    lessons: int = 0  # training steps on written games
    seed: int = 0

    def __post_init__(self):
        check(self, "at least", 1, "layers hidden intermediate heads kv_heads context")
        check(self, "at least", 256 + len(SPECIAL), "vocabulary")  # all bytes
        check(self, "at least", 0, "lessons")
        check_choices(self, dtype=("float32", "bfloat16"))
        check_ranges(seed=self.seed)
        if self.hidden % (2 * self.heads) or self.heads % self.kv_heads:
            raise ValueError("a head's width must be whole and even, and heads a multiple of kv_heads")
        check_writable(self.folder, folder=True)


THIN = dict(layers=2, hidden=128, intermediate=256, heads=4, kv_heads=2, vocabulary=640, context=1024, dtype="float32")


def games(number: int) -> list[tuple[Problem, str]]:
    """Training problems and for each a game that reaches the target."""
    rng = random.Random(0)
    return [(p, write_game(p.numbers, p.target, rng)) for p in make_problems(number, "train")]


def build_tokenizer(size: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE with Qwen2's pre-tokenizer and special tokens, its merges learnt from prompts and games."""
    bpe = Tokenizer(models.BPE())
    bpe.normalizer = normalizers.NFC()
    split, to_bytes = pre_tokenizers.Split(Regex(WORDS), "isolated"), pre_tokenizers.ByteLevel(False, use_regex=False)
    bpe.pre_tokenizer = pre_tokenizers.Sequence([split, to_bytes])
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=size, initial_alphabet=alphabet, special_tokens=[], show_progress=False)
    texts = [f"{prompt(problem)[0]['content']}\n{prompt(problem)[1]['content']} {game}" for problem, game in games(100)]
    bpe.train_from_iterator(texts, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe, padding_side="left", eos_token="<|im_end|>", pad_token="<|endoftext|>"
    )
    tokenizer.add_special_tokens({"additional_special_tokens": SPECIAL})
    tokenizer.chat_template = CHATML
    return tokenizer


def make_checkpoint(shape: Shape) -> Path:
    """Write the folder as save_pretrained does; returns it."""
    torch.manual_seed(shape.seed)
    tokenizer = build_tokenizer(min(600, shape.vocabulary - len(SPECIAL)))
    end, start, stop = tokenizer.convert_tokens_to_ids(["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
    config = Qwen2Config(
        vocab_size=shape.vocabulary, hidden_size=shape.hidden, intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers, num_attention_heads=shape.heads, num_key_value_heads=shape.kv_heads,
        max_position_embeddings=shape.context, tie_word_embeddings=True, rope_theta=1_000_000.0, rms_norm_eps=1e-6,
        bos_token_id=end, eos_token_id=stop, pad_token_id=end,
    )  # fmt: skip
    dtype = getattr(torch, shape.dtype)
    with torch.device("cpu"):
        lm = Qwen2ForCausalLM(config).to(dtype)
    lm.generation_config.eos_token_id = [stop, end]  # as Qwen2.5-Instruct: two tokens end a turn
    if shape.lessons:
        teach(lm, tokenizer, shape.lessons)
    lm.save_pretrained(shape.folder)
    tokenizer.save_pretrained(shape.folder)
    return shape.folder


def teach(lm: Qwen2ForCausalLM, tokenizer: PreTrainedTokenizerFast, steps: int) -> None:
    """Training steps on the same few games, behind the assistant's turn marker alone: the format, not arithmetic."""
    optimizer = torch.optim.AdamW(lm.parameters(), lr=5e-3)
    opening = "<|im_start|>assistant\n"
    texts = [opening + game + tokenizer.eos_token for _, game in games(16)]
    batch = tokenizer(texts, padding=True, padding_side="right", return_tensors="pt")
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    for _ in range(steps):
        lm(**batch, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


if __name__ == "__main__":
    cli.command(lambda: print(make_checkpoint(cli.read_config(Shape))))
