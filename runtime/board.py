"""Where a run's numbers go besides its own files: TensorBoard, and a tracker if one is asked for.

tensorboard --logdir runs              # scalars by group, samples as text, settings as hyper-parameters
python ppo.py --track trackio          # or wandb: packages that the user installs and sets up
"""

from importlib import import_module
from pathlib import Path

from sampling import STEP_END

PROJECT = "tree-search-distillation"  # the name that a tracker shows
GROUPS = {  # of scalars; eval_…, test_… and tree_… are groups too, and the rest are facts of the lessons
    "learning": "policy_loss value_loss kl entropy ratio gradient_norm value_gradient_norm disagreement_mean "
    "disagreement_max",
    "cost": "generated decoded prefilled valued seconds tokens_per_second sampler_seconds critic_seconds "
    "update_seconds cpu_seconds gpu_peak_gb micro_tokens",
}


def grouped(name: str) -> str:
    """The name of a metric with its group: eval_mean is eval/mean, kl is learning/kl."""
    prefix, _, rest = name.partition("_")
    if prefix in ("eval", "test", "tree"):
        return f"{prefix}/{rest}"
    group = next((group for group, names in GROUPS.items() if name in names.split()), "lessons")
    return f"{group}/{name}"


def load_tracker(name: str):
    """The package of a tracker; None for "none". ValueError if it is not installed."""
    if name == "none":
        return None
    try:
        return import_module(name)
    except ImportError:
        raise ValueError(f"{name} is not installed: pip install {name}, or leave out --track") from None


class Board:
    """The open logs of one run."""

    def __init__(self, folder: Path, settings: dict, track: str = "none", first_step: int | None = None):
        """`settings`: by their names alone. `first_step`: of a resumed run, the first step that is logged again."""
        from torch.utils.tensorboard import SummaryWriter
        from torch.utils.tensorboard.summary import hparams

        self.writer = SummaryWriter(str(folder), purge_step=first_step)
        plain = {name: value if isinstance(value, int | float) else str(value) for name, value in settings.items()}
        if first_step is None:
            for summary in hparams(plain, {"eval/mean": 0.0, "test/mean_at_k": 0.0}):
                self.writer.file_writer.add_summary(summary)
        self.tracker = load_tracker(track)
        if self.tracker:
            self.tracker.init(project=PROJECT, name=folder.name, config=plain, resume="allow")

    def log(self, row: dict) -> None:
        """The numbers of a row of metrics."""
        scalars = {grouped(name): value for name, value in row.items() if isinstance(value, int | float)}
        del scalars[grouped("step")]
        for name, value in scalars.items():
            self.writer.add_scalar(name, value, row["step"])
        if self.tracker:
            self.tracker.log(scalars, step=row["step"])

    def show(self, samples: list[dict]) -> None:
        """Answers to the watched problems, as text, a line a step. Indented lines are shown by Markdown as they are."""
        for i, sample in enumerate(samples):
            lines = sample["text"].replace(STEP_END, f"{STEP_END}\n").splitlines()
            text = "".join(f"    {line.strip()}\n" for line in lines)
            self.writer.add_text(
                f"samples/{i}", f"**{sample['problem']}**: {sample['reason']}\n\n{text}", sample["step"]
            )

    def close(self) -> None:
        self.writer.close()
        if self.tracker:
            self.tracker.finish()
