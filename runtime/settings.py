"""The settings of a run in words: those that are not its preset's, its command, and tables by topic."""

import inspect
from dataclasses import fields, is_dataclass

from config import SAMPLING_METHODS, Config, flatten, preset_for
from runtime.cli import field_comments
from runtime.files import typed


def changed_settings(config: Config) -> list[list[str]]:
    """The settings that are not the preset's: name, value, the preset's value."""
    usual, own = flatten(preset_for(config.preset, config.method)), flatten(config)
    names = [name for name in own if own[name] != usual[name] and name not in ("out", "seed")]
    return [[name, str(own[name]), str(usual[name])] for name in names]


def command(config: Config) -> str:
    """The command that makes the run again."""
    program = "baselines.py --method" if config.method in SAMPLING_METHODS else "ppo.py --search"
    words = [f"python {program} {config.method} --seed {config.seed}"]
    if config.preset != "tiny":
        words.append(f"--preset {config.preset}")
    for name, value, _ in changed_settings(config):
        option = name.replace("_", "-")
        flags = {"True": f"--{option}", "False": f"--no-{option}"}
        words.append(flags.get(value) or f"--{option} {typed(value)}")
    return " ".join(words)


def topics(config: Config) -> list[dict]:
    """All settings by topic: name, value, meaning."""
    nested, tables = [config], []
    for topic in nested:  # which grows
        values = {field.name: getattr(topic, field.name) for field in fields(topic)}
        nested += [value for value in values.values() if is_dataclass(value)]
        comments, name = field_comments(type(topic)), type(topic).__name__.removesuffix("Config") or "Run"
        settings = [[key, str(value), comments[key]] for key, value in values.items() if not is_dataclass(value)]
        tables.append({"name": name, "about": inspect.getdoc(topic), "settings": settings})
    return tables
