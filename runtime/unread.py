"""Settings that other settings of the same run leave without effect. The command line refuses them."""

import re
from collections import defaultdict
from importlib.util import find_spec

from config import changed, flatten


def unread(config: object) -> dict[str, str]:
    """Why a setting of a training run or an evaluation decides nothing, by the setting's name.

    A setting that decides speed or memory alone is read. `config`: a Config, or an Evaluation of evaluate.py.
    """
    s = defaultdict(lambda: None, flatten(config))  # None for a setting that the method does not have
    evaluates = "skip" in s
    torch_draws = samples_with_torch(s)
    learns_nothing = s["learning_rate"] == 0 and not s["value_learning_rate"]
    rules = (  # a condition, the settings that it leaves without effect, and why
        (s["task"] != "countdown", "data size split", "--task brings its own problems"),
        (s["data"] and not evaluates, "size split train_problems", "--data brings its own problems"),
        (s["data"] and evaluates, "size skip problems", "--data brings its own problems"),
        (s["selection"] == "gumbel", "c_puct", "--selection gumbel has no exploration constant"),
        (s["selection"] == "gumbel", "unvisited", "--selection gumbel completes Q in its own way"),
        (s["selection"] == "uct", "unvisited", "--selection uct visits each child before it compares their Q"),
        (s["selection"] == "uct", "prior", "--selection uct does without a prior"),
        (s["workers"] == 1, "virtual_loss", "with --workers 1 no visit is pending"),
        (s["simulations"] == 1, "workers virtual_loss c_puct unvisited", "--simulations 1 visits the root alone"),
        (s["children"] == 1, "selection c_puct prior unvisited virtual_loss", "--children 1 leaves no choice"),
        (s["evaluations"] == 0, "eval_problems eval_samples", "with --evaluations 0 no validation problem is read"),
        (ratio_is_1(s, torch_draws), "clip", "with --inner-steps 1 the ratio is 1, which no clip changes"),
        (learns_nothing, "warmup inner_steps clip_gradient", "with learning rates of 0 nothing is learnt"),
        (s["cluster"] == "none", "max_staleness generator_timeout", "there is no --cluster"),
        (evaluates and torch_draws, "cache_gb", "the torch sampler has no such cache"),
        (s["sampler"] == "vllm", "rows kept", "it belongs to the torch sampler"),
        (s["method"] != "mcts", "kept", "a search alone keeps keys and values"),
    )
    return {name: why for applies, names, why in reversed(rules) if applies for name in names.split() if name in s}


def check_stated(args: list[str], config: object, default: object) -> None:
    """ValueError for the first option of a command line that has no effect. `default`: the settings without options."""
    usual = flatten(default)
    for option in (arg.partition("=")[0] for arg in args if re.match(r"--[a-zA-Z]", arg)):
        name = option[2:].replace("-", "_")
        name = name if name in usual else name.removeprefix("no_")
        if name in usual and (why := why_idle(config, name, usual[name])):
            raise ValueError(f"{option} has no effect here ({why}): leave it out")


def why_idle(config: object, name: str, usual: object) -> str:
    """Why a setting has no effect, with its value and with the usual one alike. Empty if it has, or if the usual value
    does not go with the other settings."""
    if name not in unread(config):
        return ""
    try:
        return unread(changed(config, {name: usual})).get(name, "")
    except ValueError:
        return ""


def samples_with_torch(s: dict) -> bool:
    """Whether the torch sampler draws for certain, also where --sampler is auto."""
    asked = s["sampler"] == "torch" or s["cutoff"] is not None or s["quantize"] == "nf4"
    return asked or (s["sampler"] == "auto" and (s["device"] == "cpu" or not find_spec("vllm")))


def ratio_is_1(s: dict, torch_draws: bool) -> bool:
    """Whether pi / pi_old is 1 but for rounding, and --clip beyond rounding. So it is in fp32 in the only pass over
    answers that the newest weights have drawn, or whose log-probabilities the trainer computes itself."""
    once_in_fp32 = s["inner_steps"] == 1 and s["dtype"] == "float32" and s["quantize"] == "none"
    newest = s["old_logprobs"] != "recorded" or (torch_draws and s["cluster"] == "none")
    return once_in_fp32 and newest and s["clip"] >= (1.01 if s["loss"] == "cispo" else 0.01)
