"""The embedded policy: 1.7 million parameters, trained from nothing on generated Countdown games.

    python -m experiments.pretrain --out assets/tiny      # from nothing; after an interruption the same command goes on

The policy takes the place of an instruct model on a laptop. It plays legal steps with right arithmetic in the asked
format, and rarely reaches the target.

A game is a random play *conditioned on its result*: each move is drawn from the exact posterior P(move | the play ends
at the result). Games use multisets of the training split alone, so the policy has never seen a validation or test
problem. `--on-target` is the share of games that state their own result as the target; it decides how much the policy
knows before any search. The other games state another target. Without them the policy learns that the last result *is*
the target, and miscalculates to get there (measured: docs/LOG.md).
"""

import json
import random
import sys
import time
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # for `python experiments/pretrain.py`

import runtime.threads

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from torch.nn.functional import cross_entropy
from tqdm import tqdm
from transformers import PreTrainedTokenizerFast, SeedOssConfig, SeedOssForCausalLM

from config import check, check_ranges
from countdown import Problem, enclose, legal_moves, play_distribution, prompt, split_of
from runtime import cli
from runtime.files import check_writable
from runtime.weights import read_tensors

MAX_LENGTH = 512  # tokens that the policy has positions for
LARGEST = 255  # up to here an integer is one token; a larger one goes on with a token a digit: 468 is 46 ##8
TAGS = ["<step>", "</step>", "<answer>", "</answer>"]
SPECIAL = {"pad_token": "<|pad|>", "eos_token": "<|end|>", "unk_token": "<|unknown|>"}
ROLES = ["<|user|>", "<|assistant|>"]
CHAT_TEMPLATE = (  # without a system message: the games have taught the rules
    "{% for m in messages %}{% if m.role == 'user' %}<|user|> {{ m.content }} "
    "{% elif m.role == 'assistant' %}<|assistant|> {{ m.content }} <|end|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Word pieces: one token for a tag, a word of the prompt, an operator or a number."""
    words = ["Numbers:", "Target:", "left", "=", "+", "-", "*", "/", "(", ")"]
    pieces = [*SPECIAL.values(), *ROLES, *TAGS, *words, *map(str, range(LARGEST + 1)), *(f"##{d}" for d in range(10))]
    tokenizer = Tokenizer(models.WordPiece({p: i for i, p in enumerate(pieces)}, unk_token=SPECIAL["unk_token"]))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Split(Regex("[-+*/()=]"), "isolated")]
    )
    tokenizer.decoder = decoders.WordPiece(prefix="##", cleanup=False)
    tokenizer.add_tokens(TAGS)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, padding_side="left", **SPECIAL)
    fast.add_special_tokens({"additional_special_tokens": ROLES})
    fast.chat_template = CHAT_TEMPLATE
    return fast


# ------------------------------------------------------------------------------------------------ games


@cache
def posterior(state: tuple[int, ...], result: int) -> tuple[list[tuple], list[float]]:
    """The moves from `state`, and for each the (unnormalised) probability that random play then ends at `result`."""
    moves = list(legal_moves(state))
    weights = [play_distribution(left).get(result, 0.0) for *_, left in moves]
    return moves, weights


def write_game(numbers: tuple[int, ...], result: int, rng: random.Random) -> str:
    """A completion that plays `numbers` down to `result`. Steps name the larger operand of + and * first."""
    expressions = [(n, str(n)) for n in numbers]
    state, text = tuple(sorted(numbers)), []
    while len(state) > 1:
        moves, weights = posterior(state, result)
        a, operator, b, c, state = rng.choices(moves, weights)[0]
        if operator in "+*" and a < b:
            a, b = b, a
        operands = []
        for value in (a, b):
            at = next(k for k, (n, _) in enumerate(expressions) if n == value)
            operands.append(enclose(expressions.pop(at)[1]))
        expressions.append((c, f"{operands[0]} {operator} {operands[1]}"))
        text.append(f"<step> {a} {operator} {b} = {c} left {' '.join(map(str, state))} </step>")
    return " ".join([*text, f"<answer> {expressions[0][1]} </answer>"])


def games(config: "PretrainConfig", step: int) -> list[tuple[Problem, str]]:
    """The games of one step. They depend on seed and step alone, so a resumed run sees the same ones."""
    rng = random.Random(f"{config.seed} {step}")
    batch = []
    while len(batch) < config.batch:
        numbers = tuple(rng.randint(1, config.highest) for _ in range(config.size))
        if split_of(numbers) != "train":
            continue
        results = {r: p for r, p in play_distribution(tuple(sorted(numbers))).items() if r <= config.largest_result}
        result, target = rng.choices(list(results), [p**config.rarity for p in results.values()], k=2)
        if rng.random() < (config.on_target if step >= 0.3 * config.steps else config.early_on_target):
            target = result
        batch.append((Problem(numbers, target), write_game(numbers, result, rng)))
    return batch


def encode_games(batch: list[tuple[Problem, str]], tokenizer, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids [B, T = width], padded on the right, and labels [B, T], -100 on the prompt and the padding.

    One width for all steps keeps the compiled shapes static. Longer games (1 %) are left out. ValueError if all games
    are longer.
    """
    eos = tokenizer.eos_token
    prompts = [tokenizer.apply_chat_template(prompt(p), tokenize=False, add_generation_prompt=True) for p, _ in batch]
    starts = [len(ids) for ids in tokenizer(prompts)["input_ids"]]
    rows = tokenizer([f"{start} {text} {eos}" for start, (_, text) in zip(prompts, batch)])["input_ids"]
    blank = [tokenizer.pad_token_id] * width
    if min(map(len, rows)) > width:
        raise ValueError(f"no game fits into {width} tokens: pass a larger --width")
    ids = torch.tensor([(row + blank)[:width] if len(row) <= width else blank for row in rows])  # [B, T]
    labels = ids.masked_fill(ids == tokenizer.pad_token_id, -100)
    for row, start in zip(labels, starts):
        row[:start] = -100
    return ids, labels


# ------------------------------------------------------------------------------------------------ training


@dataclass
class PretrainConfig:
    """Train the embedded Countdown policy from nothing."""

    out: Path = Path("assets/tiny")
    steps: int = 5_000
    batch: int = 256  # games a step
    width: int = 56  # tokens a game
    learning_rate: float = 0.01  # Muon, on the matrices of the layers
    adam_learning_rate: float = 3e-3  # AdamW, on the embedding and the norms
    warmup: int = 200  # steps
    on_target: float = 0.45  # share of games that state their own result as the target
    early_on_target: float = 0.3  # the same in the first 30 % of the steps: arithmetic first
    rarity: float = 0.5  # results are drawn by P(result)^rarity: 1 is random play, 0 uniform over the results in reach
    largest_result: int = 999
    size: int = 4
    highest: int = 13
    hidden: int = 160
    layers: int = 4
    save_every: int = 250  # steps between checkpoints
    compile: bool = True  # torch.compile the forward pass (needs a C++ compiler on a CPU)
    seed: int = 0

    def __post_init__(self):
        check_ranges(size=self.size, highest=self.highest, seed=self.seed)
        check(self, "at least", 1, "steps batch width warmup hidden layers save_every")
        check(self, "at most", MAX_LENGTH, "width")
        check(self, "at least", 0, "learning_rate adam_learning_rate on_target early_on_target rarity")
        check(self, "at most", 1, "on_target early_on_target")
        check(self, "at most", 10, "rarity")
        check(self, "at least", self.size * self.highest, "largest_result")  # so that every game has a result
        if self.hidden % 32:
            raise ValueError(f"hidden must be a multiple of 32, the width of a head, not {self.hidden}")
        check_writable(self.out, folder=True)


def build_model(config: PretrainConfig, vocabulary: int) -> SeedOssForCausalLM:
    """A Qwen2 of the given width and depth, heads of 32, tied embeddings, fp32, under the name of SeedOss.

    The two are the same network. But for model type qwen2 `AutoTokenizer` reads every tokenizer as Qwen's own, and
    the numbers of a prompt run together; for seed_oss it takes the tokenizer that is saved (transformers 5.19).
    """
    heads = config.hidden // 32
    return SeedOssForCausalLM(
        SeedOssConfig(
            vocab_size=vocabulary,
            hidden_size=config.hidden,
            intermediate_size=4 * config.hidden,
            num_hidden_layers=config.layers,
            num_attention_heads=heads,
            num_key_value_heads=heads,
            max_position_embeddings=MAX_LENGTH,
            tie_word_embeddings=True,
            bos_token_id=None,
            eos_token_id=1,
            pad_token_id=0,
            head_dim=32,
            attention_bias=True,  # of queries, keys and values
            attention_out_bias=False,
            attention_dropout=0.0,
            residual_dropout=0.0,
            rope_parameters={"rope_type": "default", "rope_theta": 10_000.0},
            attn_implementation="eager",  # three times faster than sdpa's backward on a CPU in bf16
        )
    )


def make_optimizers(model: SeedOssForCausalLM, config: PretrainConfig) -> list[torch.optim.Optimizer]:
    """Muon on the matrices of the layers, AdamW on the embedding and the norms."""
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name]
    others = [p for name, p in model.named_parameters() if p.ndim != 2 or "embed" in name]
    return [
        torch.optim.Muon(matrices, lr=config.learning_rate, weight_decay=0.01),
        torch.optim.AdamW(others, lr=config.adam_learning_rate, weight_decay=0.0),
    ]


def restore(checkpoint: Path, settings: dict, model: SeedOssForCausalLM, optimizers: list) -> tuple[int, float]:
    """Load a checkpoint; returns the steps and the seconds so far. ValueError for one with other settings."""
    saved = read_tensors(checkpoint)
    try:
        differences = cli.differing(saved["settings"], settings)
        if not differences:
            model.load_state_dict(saved["model"])
            for optimizer, state in zip(optimizers, saved["optimizers"]):
                optimizer.load_state_dict(state)
            print(f"going on from step {saved['step']} of {checkpoint}")
            return saved["step"], saved["seconds"]
    except (RuntimeError, ValueError, KeyError, TypeError, AttributeError):
        raise ValueError(f"{checkpoint} is of another model: pass its settings, or move it away") from None
    raise ValueError(f"{checkpoint} has other settings ({'; '.join(differences)}): pass them, or move it away")


def pretrain(config: PretrainConfig) -> None:
    """Train the policy, from the last checkpoint in `config.out` if there is one, and save it there."""
    torch.manual_seed(config.seed)
    tokenizer = build_tokenizer()
    model = build_model(config, len(tokenizer))
    optimizers, peaks = make_optimizers(model, config), (config.learning_rate, config.adam_learning_rate)
    forward = torch.compile(model, dynamic=False) if config.compile else model
    checkpoint, start, seconds = config.out / "pretrain.pt", 0, 0.0
    settings = {key: value for key, value in asdict(config).items() if key not in ("out", "compile", "save_every")}
    if checkpoint.exists():
        start, seconds = restore(checkpoint, settings, model, optimizers)

    began = time.time() - seconds
    bar = tqdm(range(start, config.steps), initial=start, total=config.steps, unit="step", mininterval=10)
    for step in bar:
        scale = min(1.0, (step + 1) / config.warmup) * (1 - step / config.steps)
        for optimizer, peak in zip(optimizers, peaks):
            optimizer.param_groups[0]["lr"] = peak * scale
        ids, labels = encode_games(games(config, step), tokenizer, config.width)  # [B, T]
        with torch.autocast(ids.device.type, torch.bfloat16):
            logits = forward(ids, use_cache=False).logits  # [B, T, V]; padding is on the right: no mask is needed
        loss = cross_entropy(logits[:, :-1].float().flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100)
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        if step % 20 == 0:
            bar.set_postfix(loss=f"{loss.item():.4f}")
        if (step + 1) % config.save_every == 0 or step + 1 == config.steps:
            saved = {"model": model.state_dict(), "optimizers": [o.state_dict() for o in optimizers]}
            saved |= {"step": step + 1, "seconds": time.time() - began, "settings": settings}
            config.out.mkdir(parents=True, exist_ok=True)
            torch.save(saved, checkpoint.with_suffix(".tmp"))
            checkpoint.with_suffix(".tmp").replace(checkpoint)
            print(f"step {step + 1}, loss {loss.item():.4f}, {saved['seconds']:.0f} s", flush=True)
    model.save_pretrained(config.out)
    tokenizer.save_pretrained(config.out)
    (config.out / "pretrain.json").write_text(
        json.dumps(asdict(config) | {"seconds": time.time() - began}, default=str), encoding="utf-8"
    )


if __name__ == "__main__":
    cli.command(lambda: pretrain(cli.read_config(PretrainConfig)))
