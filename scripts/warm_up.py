"""A short supervised warm-up: a chat model learns the format of answers from written games, before any training run.

    make smollm2
    python -m scripts.warm_up models/smollm2 models/smollm2-warm      # minutes on a data-centre GPU, a day on two cores

A small chat model that has never seen the format never answers in it. Then no answer earns a reward, and neither a
search nor samples teach anything. The games are those of experiments/pretrain.py: random plays with the numbers of
training problems. A share `on_target` of the games states its own result as the target; the others state another
target. So the games teach format and arithmetic, and not how a target is found. A comparison of methods that starts
from here gives all methods the same start, and says so. Until the end the newest weights, of every hundredth step, are
in FOLDER.part.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # for `python scripts/warm_up.py`

import runtime.threads

import torch
import tyro
from tqdm import tqdm

from config import check, check_ranges
from experiments.pretrain import PretrainConfig, games
from runtime import cli
from runtime.files import check_new
from runtime.loading import load_policy, locate, pick_device


@dataclass
class WarmUpConfig:
    """Train all weights of a chat model on written games."""

    model: tyro.conf.Positional[Path]  # Hugging Face name or folder
    folder: tyro.conf.Positional[Path]  # folder of the new model, written whole or not at all
    steps: int = 400
    batch: int = 128  # games a step
    learning_rate: float = 3e-4  # of AdamW: rises over the first tenth of the steps, then falls to 0
    on_target: float = 0.45  # share of games that state their own result as the target
    seed: int = 0
    device: str = "auto"

    def __post_init__(self):
        check(self, "at least", 1, "steps batch")
        check(self, "at least", 0, "learning_rate on_target")
        check(self, "at most", 1, "on_target")
        check_ranges(seed=self.seed)
        pick_device(self.device)
        check_new(self.folder)
        check_new(self.part)
        locate(self.model)

    @property
    def part(self) -> Path:
        """The folder of the unfinished model."""
        return self.folder.with_name(f"{self.folder.name}.part")


def warm_up(config: WarmUpConfig) -> list[float]:
    """Train the model and write the folder; returns the loss of each step, in nats a token."""
    device = pick_device(config.device)
    policy = load_policy(config.model, device=device, train=False)
    if policy.lora:
        raise ValueError(f"{config.model} is an adapter: pass the folder of a whole model")
    tokenizer = policy.tokenizer
    optimizer = torch.optim.AdamW(policy.lm.parameters(), lr=config.learning_rate, weight_decay=0.0)
    on_target = dict(on_target=config.on_target, early_on_target=config.on_target)
    lesson = PretrainConfig(out=config.folder, batch=config.batch, seed=config.seed, **on_target)
    losses: list[float] = []
    for step in (bar := tqdm(range(config.steps), unit="step", mininterval=5)):
        scale = min(1.0, 10 * (step + 1) / config.steps) * (1 - step / config.steps)
        optimizer.param_groups[0]["lr"] = config.learning_rate * scale
        problems, texts = zip(*games(lesson, step), strict=True)
        completions = [
            ids + [tokenizer.eos_token_id] for ids in tokenizer(list(texts), add_special_tokens=False)["input_ids"]
        ]
        batch = policy.batch([policy.encode(problem) for problem in problems], completions)
        with torch.autocast(device, torch.bfloat16):
            logprobs, _ = policy.logprobs(*policy.states(batch), temperature=1.0)  # [B, T]
        loss = -(logprobs * batch.completion).sum() / batch.completion.sum()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(policy.lm.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        bar.set_postfix(loss=f"{losses[-1]:.4f}", refresh=False)
        if (step + 1) % 100 == 0 or step + 1 == config.steps:
            policy.lm.save_pretrained(config.part, max_shard_size="1TB")
            tokenizer.save_pretrained(config.part)
    config.part.rename(config.folder)
    return losses


if __name__ == "__main__":
    cli.command(lambda: warm_up(cli.read_config(WarmUpConfig)))
