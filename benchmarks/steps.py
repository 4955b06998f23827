"""One side of benchmarks/training.py: an optimiser step on given trajectories, once for every line on stdin.

    python -m benchmarks.steps kit FOLDER 1024   # this kit's update, 1,024 tokens in a micro-batch
    python -m benchmarks.steps trl FOLDER 16     # TRL's GRPOTrainer, 16 sequences in a micro-batch

FOLDER/batch.json holds the trajectories and names the model. Each answer is a line of JSON. The first one says that the
model is loaded, the next ones give the process's own CPU seconds of a step, the last one the memory that the steps
took. The first step's gradient is left in FOLDER/SIDE.safetensors. Learning rates are 0 and nothing is clipped, so
every step does the same work.
"""

import json
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # for `python benchmarks/steps.py`

import runtime.threads

import torch
from safetensors.torch import save_file

from policy import left_pad
from ppo import make_optimizer, update
from runtime import cli
from runtime.loading import load_policy
from runtime.micro_batches import MicroBatches

UNCLIPPED = 1e9


def say(**numbers: float) -> None:
    print(json.dumps(numbers), flush=True)


def memory(name: str) -> int:
    """A line of /proc/self/status in bytes: VmRSS, what is resident, or VmHWM, the most that was."""
    line = next(
        line for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines() if line.startswith(name)
    )
    return int(line.split()[1]) * 1024


def ready() -> int:
    """Say that the model is loaded, and start a new count of VmHWM. Returns the bytes that are resident now."""
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")
    say(ready=1)
    return memory("VmRSS")


def keep_gradient(lm: torch.nn.Module, file: Path) -> None:
    save_file({name: p.grad.clone() for name, p in lm.named_parameters() if p.grad is not None}, file)


def kit(folder: Path, batch: dict, tokens: int) -> None:
    """The kit's side."""
    from benchmarks.training import read_trajectories, settings

    policy, config = load_policy(batch["model"], train=False), settings(batch["model"])
    trajectories, optimizer = read_trajectories(batch), make_optimizer(policy, config)
    micro = MicroBatches(tokens)
    loaded = ready()
    for count, _ in enumerate(sys.stdin):
        began = time.process_time()
        update(policy, optimizer, trajectories, config.learning, micro)
        say(seconds=time.process_time() - began)
        if not count:
            keep_gradient(policy.lm, folder / "kit.safetensors")
    lengths = [[t.length for t in group] for group in micro.cut(trajectories)]
    padded = sum(len(group) * max(group) for group in lengths)
    say(took=memory("VmHWM") - loaded, peak=memory("VmHWM"), padding=1 - sum(map(sum, lengths)) / padded)


def trl(folder: Path, batch: dict, rows: int) -> None:
    """TRL's side: its own trainer, all but the generation."""
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    prompts, completions, siblings = batch["prompts"], batch["completions"], batch["siblings"]
    # loss_type cispo averages over the tokens of the step, and takes the ratio's cap for epsilon_high
    args = GRPOConfig(
        output_dir=str(folder / "trl"), loss_type="cispo", epsilon_high=5.0, beta=0.0, temperature=1.0,
        per_device_train_batch_size=rows, gradient_accumulation_steps=len(prompts) // rows, num_generations=siblings,
        max_completion_length=max(map(len, completions)), learning_rate=0.0, max_grad_norm=UNCLIPPED, max_steps=10**6,
        bf16=False, gradient_checkpointing=False, use_cpu=True, report_to="none", logging_strategy="no",
        save_strategy="no", disable_tqdm=True,
    )  # fmt: skip

    class Given(GRPOTrainer):
        """The trajectories of the batch in place of generated ones."""

        def _generate_and_score_completions(self, inputs):
            ids, attention = left_pad(prompts, 0)
            reversed_ids, mask = left_pad([row[::-1] for row in completions], 0)
            return {
                "prompt_ids": ids,
                "prompt_mask": attention,
                "completion_ids": reversed_ids.flip(1),  # padded on the right
                "completion_mask": mask.flip(1),
                "advantages": torch.tensor(batch["advantages"]),
                "old_per_token_logps": right_pad(batch["logprobs"]),
                "num_items_in_batch": mask.sum(),
            }

    class InTurn(TrainerCallback):
        """A step when a line comes."""

        def on_step_begin(self, args, state, control, **_):
            if not sys.stdin.readline():
                width = max(map(len, prompts)) + max(map(len, completions))  # of every micro-batch
                padding = 1 - sum(map(len, prompts + completions)) / (len(prompts) * width)
                say(took=memory("VmHWM") - loaded, peak=memory("VmHWM"), padding=padding)
                raise SystemExit
            self.began = time.process_time()

        def on_pre_optimizer_step(self, args, state, control, model, **_):
            if not state.global_step:
                before = time.process_time()
                keep_gradient(model, folder / "trl.safetensors")
                self.began += time.process_time() - before

        def on_step_end(self, args, state, control, **_):
            say(seconds=time.process_time() - self.began)

    trainer = Given(
        model=AutoModelForCausalLM.from_pretrained(batch["model"], dtype=torch.float32),
        reward_funcs=lambda completions, **_: [0.0] * len(completions),
        args=args,
        train_dataset=Dataset.from_list([{"prompt": "1"}] * len(prompts)),
        processing_class=PreTrainedTokenizerFast.from_pretrained(batch["model"]),
        callbacks=[InTurn()],
    )
    loaded = ready()
    trainer.train()


def right_pad(rows: list[list[float]]) -> torch.Tensor:
    """[B, T], zeros on the right."""
    width = max(map(len, rows))
    return torch.tensor([row + [0.0] * (width - len(row)) for row in rows])


def main() -> None:
    if len(sys.argv) != 4 or sys.argv[1] not in ("kit", "trl"):
        raise ValueError("pass a side (kit or trl), a folder and a size of micro-batch")
    side, folder, size = sys.argv[1:]
    batch = json.loads((Path(folder) / "batch.json").read_text(encoding="utf-8"))
    torch.set_num_threads(batch["threads"])
    {"kit": kit, "trl": trl}[side](Path(folder), batch, int(size))


if __name__ == "__main__":
    cli.command(main)
