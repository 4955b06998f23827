"""The command line: options become settings, and what is wrong with them is told in one line, before any long work."""

import inspect
import io
import os
import re
import sys
import textwrap
from collections.abc import Callable
from contextlib import redirect_stderr
from dataclasses import asdict, fields, is_dataclass, replace
from difflib import get_close_matches
from itertools import groupby
from pathlib import Path
from typing import TypeVar

from config import METHODS, PRESETS, Config, flatten, preset_for
from runtime.data import are_those_of
from runtime.files import check_writable
from runtime.guard import Stopped
from runtime.provenance import versions
from runtime.run_folder import by_name, read_settings
from runtime.tasks import file_of, is_that_of
from runtime.unread import check_stated

Settings = TypeVar("Settings")
# settings that say where and how a run works, not what comes out
INCIDENTAL = ("out", "checkpoints", "track", "gpu_memory", "micro_batch_tokens", "cluster", "generator_timeout")
SHORT_HELP = {  # the settings that a student changes
    "method": "where answers come from",
    "preset": "tiny (a CPU, minutes), qwen1.5b (one GPU), post (the post's numbers)",
    "model": "Hugging Face name or folder",
    "seed": "of all random draws",
    "out": "run folder (default: runs/METHOD-PRESET-seedN)",
    "task": "countdown; FILE.py:NAME: a task of your own",
    "data": "problems of your own: a file, or a folder of train, validation and test",
    "tokens": "budget of generated tokens",
    "problems": "problems a training step",
    "simulations": "visits of a tree",
    "children": "steps drawn at a node",
    "lesson": "what a tree teaches, see distill.py",
    "samples": "answers drawn of a problem",
    "cutoff": "draw without repeats, drop what is this much less likely; None: no",
    "reward": "exact (right or wrong), dense (a near miss earns something)",
    "learning_rate": "at the start of the linear decay",
    "temperature": "of sampling",
}

# what tyro says, as a pattern, and what the kit says instead
MESSAGES = (
    (r"Unrecognized options: ", "unexpected: "),
    (r"Missing value for argument '(\S+)'.*", r"\1 needs a value"),
    (r"Missing from \S+: (.*?) \(required\).*", r"missing: \1"),
    (r"Error parsing (--\S+): invalid literal for int\(\) with base 10: (.*)", r"\1 must be a whole number, not \2"),
    (r"Error parsing (--\S+): could not convert string to float: (.*)", r"\1 must be a number, not \2"),
    (r"Error parsing (--\S+): no type matching \{None\}\|FLOAT .* \[(.*)\]\.", r"\1 must be a number or None, not \2"),
    (r"Error parsing (--\S+): Could not find valid parse for arguments: \[(.*)\]", r"\1 can't be \2"),
    (r"Error parsing [\w.]+: ", ""),  # of a topic
)

# ------------------------------------------------------------------------------------------------ any program


def command(main: Callable[[], None]) -> None:
    """Run a program: expected errors become one line, Ctrl-C exits with 130, a stopped run with 3."""
    print_anywhere()
    try:
        check_names()
        main()
    except OSError as error:
        fail(f"{error.filename}: {error.strerror}" if error.filename else str(error))
    except ValueError as error:
        fail(str(error))
    except Stopped as reason:
        fail(str(reason), 3)
    except KeyboardInterrupt:
        raise SystemExit(130) from None


def print_anywhere() -> None:
    """Let a terminal or a pipe whose encoding lacks a character show a question mark, where Python would raise."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # not a notebook's
            stream.reconfigure(errors="replace")


def check_names() -> None:
    """ValueError for names that the machine's encoding lacks: no library could open them."""
    try:
        "".join([*sys.argv, os.getcwd()]).encode()
    except UnicodeEncodeError:
        encoding = sys.getfilesystemencoding()
        raise ValueError(f"a name holds a character that {encoding} lacks: set the variable PYTHONUTF8=1") from None


def fail(message: str, code: int = 2) -> None:
    """One line on stderr and an exit code; 2 means bad input, told before any long work."""
    print(f"error: {message}", file=sys.stderr)
    raise SystemExit(code)


def read_config(
    kind: type[Settings],
    args: list[str] | None = None,
    default: Settings | None = None,
    others: dict[str, str] | None = None,
) -> Settings:
    """A dataclass of settings from the command line, read by tyro. A bad option is one line on stderr, exit code 2.

    An option is the name of a field, also of one in a topic. A topic that is None in `default` has no options. `others`
    says of an option that others have who has no use for it.
    """
    import tyro

    args, boxes = sys.argv[1:] if args is None else args, io.StringIO()
    check_options(args, default or kind, others or {})
    packages = ", ".join(f"{package} {found}" for package, found in versions().items())
    try:
        with redirect_stderr(boxes):
            return tyro.cli(
                kind,
                args=args,
                description=f"{inspect.getdoc(kind)}\n\nInstalled: {packages}.",
                config=(tyro.conf.OmitArgPrefixes, tyro.conf.AvoidSubcommands),
                **({} if default is None else {"default": default}),
            )
    except SystemExit as stop:
        if stop.code in (0, None):
            raise
        message = first_message(boxes.getvalue())
    except ValueError as error:  # of a topic that may be None: tyro lets it pass
        message = str(error)
    fail(f"{message} (--help lists the options)")


def first_message(boxes: str) -> str:
    """The first message of what tyro wrote, in the kit's words. tyro draws boxes, with colours on a terminal."""
    plain = re.sub(r"\x1b\[[0-9;]*m", "", boxes)
    lines = [line.strip("│ ") for line in plain.splitlines()[1:]]  # the first is the box's title
    parts = groupby(lines, key=lambda line: set(line) <= set("─-╭╮╰╯ "))
    message = next((" ".join(part) for is_rule, part in parts if not is_rule), plain.strip())
    for pattern, words in MESSAGES:
        if re.match(pattern, message):
            return re.sub(pattern, words, message, count=1)
    return message


def check_options(args: list[str], config: object, others: dict[str, str]) -> None:
    """Fail for the first empty value, and for the first option that `config` does not have; of those in `others` it is
    said who has no use for it."""
    known = set(option_names(config)) | {"help"}
    names = known | others.keys() | ({"search"} if "method" in known else set())
    for before, arg in zip(["", *args], args):
        option, equals, value = arg.partition("=")
        if not arg or (option.startswith("--") and equals and not value):
            fail(f"{option or before or 'an argument'} is empty")
        if not re.match(r"--[a-zA-Z]", arg):
            continue
        name = option[2:].replace("_", "-").removeprefix("no-")
        if name in known:
            continue
        if name in others:
            fail(f"{others[name]} has no use for {option}: leave it out")
        near = get_close_matches(name.lower(), names, 1)
        fail(f"there is no option {option}{f': did you mean --{near[0]}?' if near else ''} (--help lists the options)")


def option_names(config: object) -> list[str]:
    """The options of a dataclass of settings and its topics."""
    names = []
    for field in fields(config):
        value = getattr(config, field.name, None) if not isinstance(config, type) else field.default
        if is_dataclass(value):
            names += option_names(value)
        elif not (value is None and "Config" in str(field.type)):  # not a topic that is left out
            names.append(field.name.replace("_", "-"))
    return names


# ------------------------------------------------------------------------------------------------ training runs


def parse(args: list[str], method: str) -> tuple[Config, bool]:
    """The configuration of a training run, and whether it goes on with an interrupted one. `method`: if not given."""
    args = normalized(args)
    if "--resume" in args:
        return resumed(args), True
    preset = given(args, "--preset", "tiny")
    if preset not in PRESETS:
        fail(f"preset must be one of {', '.join(PRESETS)}, not {preset!r}")
    default = preset_for(preset, given(args, "--method", method))
    config = read_training_config(args, default)
    check_writable(config.folder, folder=True)
    return config, False


def normalized(args: list[str]) -> list[str]:
    """Arguments with --search, the other name of --method, replaced, and --resume=RUN in two parts."""
    if {"--search", "--method"} <= {arg.partition("=")[0] for arg in args}:
        fail("--search and --method are one option: leave one of them out")
    args = [re.sub(r"^--search(?==|$)", "--method", arg) for arg in args]
    return [part for arg in args for part in (arg.split("=", 1) if arg.startswith("--resume=") else [arg])]


def given(args: list[str], option: str, default: str) -> str:
    """The value of an option in a command line."""
    for i, arg in enumerate(args):
        if arg == option or arg.startswith(f"{option}="):
            default = arg.partition("=")[2] or (args[i + 1] if i + 1 < len(args) else "")
    return default


def read_training_config(args: list[str], default: Config) -> Config:
    """A Config from the command line. An option that other methods have, and this one does not read, is refused."""
    names = {name for method in METHODS for name in option_names(preset_for("tiny", method))}
    others = dict.fromkeys(names, default.method) | {"force": "a new run", "resume": "a resumed run"}
    config = read_config(Config, args, default, others)
    check_stated(args, config, default)
    return config


def resumed(args: list[str]) -> Config:
    """The settings of an interrupted run. Other settings, and a folder of another version, are refused without
    --force."""
    at = args.index("--resume")
    name = "".join(args[at + 1 : at + 2])
    if not name or name.startswith("--"):
        fail("--resume needs the folder of a run")
    folder = Path(name)
    options = [arg for arg in args[:at] + args[at + 2 :] if arg != "--force"]
    if given(options, "--out", ""):
        fail("--resume goes on in the run's own folder: leave out --out, or copy the folder first")
    default, problems = restore(Config, read_settings(folder), folder)
    default = replace(default, out=folder)
    if given(options, "--method", default.method) != default.method:
        fail(f"{folder} is a run of {default.method}: --resume goes on with it, not with another method")
    if given(options, "--preset", default.preset) != default.preset:  # only its name would change
        fail(f"{folder} is a run of preset {default.preset}: --resume goes on with it, not with another preset")
    config = read_training_config(options, default) if options else default
    if (data := config.task.data) and are_those_of(data, folder):
        default = default.change(data=data)  # the same files, wherever they lie now
    elif data:
        problems.append(f"{data} does not hold the problems that the run began with")
    if is_that_of(task := config.task.task, folder):
        default = default.change(task=task)
    else:
        problems.append(f"{file_of(task)} has changed since the run began")
    problems += differences(asdict(default), asdict(config))
    if problems and "--force" not in args:
        fail(f"{folder} has other settings ({'; '.join(problems)}): --force goes on all the same")
    return replace(config, out=folder)


def restore(kind: type, saved: dict, folder: Path) -> tuple[object, list[str]]:
    """A configuration from a run's config.json, and what in there is no setting of this version. ValueError for a
    damaged one."""
    if not isinstance(saved, dict):
        raise ValueError(f"{folder}/config.json is damaged: a topic is no JSON object")
    topics = {field.name: type_of_topic(field) for field in fields(kind)}
    optional = {field.name for field in fields(kind) if "None" in str(field.type)}
    unknown = sorted(saved.keys() - topics.keys() - {"provenance"})
    values, problems = {}, [f"{name} is no setting here" for name in unknown]
    for name, topic in topics.items():
        if name in saved:
            values[name] = saved[name]
            if topic and not (saved[name] is None and name in optional):
                values[name], more = restore(topic, saved[name], folder)
                problems += more
    try:
        config = kind(**values)
        if any(field.type is str and not isinstance(getattr(config, field.name), str) for field in fields(kind)):
            raise TypeError
        return config, problems
    except (AttributeError, TypeError):  # null for a topic, a list for a word …
        raise ValueError(f"{folder}/config.json is damaged: a setting of {kind.__name__} is of another type") from None


def type_of_topic(field) -> type | None:
    """The dataclass of a topic; None for a setting."""
    return next((kind for kind in (field.type, *getattr(field.type, "__args__", ())) if is_dataclass(kind)), None)


def result_settings(saved: dict) -> dict:
    """The settings in a config.json that decide a run's result, by their names alone. Model, data and task are known
    by their names, wherever they lie."""
    flat = by_name(saved)
    if flat.get("cluster") == "none":
        flat["max_staleness"] = 0
    for name in ("model", "data", "task"):
        if flat.get(name):
            flat[name] = Path(flat[name]).name
    return {name: value for name, value in flat.items() if name not in INCIDENTAL}


def differences(there: dict, here: dict) -> list[str]:
    """Which settings of two config.json differ, a piece of text each."""
    return differing(result_settings(there), result_settings(here))


def differing(there: dict, here: dict) -> list[str]:
    """Which settings `here` have another value `there`, a piece of text each."""
    return [f"{name} {there.get(name)} there, {value} here" for name, value in here.items() if there.get(name) != value]


# ------------------------------------------------------------------------------------------------ help


def answer_help(about: str, method: str) -> None:
    """Print the help of a training program and exit, if it is asked for. Called before torch is loaded, which takes
    seconds."""
    args = normalized(sys.argv[1:])
    if not {"-h", "--help", "--help-all"} & set(args):
        return
    print_anywhere()
    method, preset = given(args, "--method", method), given(args, "--preset", "tiny")
    config = preset_for(preset if preset in PRESETS else "tiny", method if method in METHODS else "mcts")
    try:
        print(help_all(config) if "--help-all" in args else short_help(about, config), flush=True)
    except BrokenPipeError:  # `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    raise SystemExit


def short_help(about: str, config: Config) -> str:
    """What the program does, and the options that a student changes, a line each."""
    settings = flatten(config)
    lines = [about.strip(), "", f"options of --method {config.method}, preset {config.preset}:"]
    for name, text in SHORT_HELP.items():
        if name in settings:
            value = f" ({settings[name]})" if settings[name] is not None or name == "cutoff" else ""
            lines.append(f"  --{name.replace('_', '-'):16s} {text}{value}")
    lines += [
        f"  --{'resume RUN':16s} go on with an interrupted run; --force: under other settings too",
        f"  --{'help-all':16s} every option, by topic ({len(option_names(config))})",
    ]
    return "\n".join(lines)


def help_all(config: Config) -> str:
    """Every option of a method, by topic, with its value."""
    lines, topics = [], [config]
    for topic in topics:
        comments = field_comments(type(topic))
        lines += ["", inspect.getdoc(topic)]
        for field in fields(topic):
            value = getattr(topic, field.name)
            if is_dataclass(value):
                topics.append(value)
            elif field.name.replace("_", "-") in option_names(topic):
                option = f"  --{field.name.replace('_', '-')} {value}"
                lines += textwrap.wrap(f"{option:34s} {comments[field.name]}", 118, subsequent_indent=35 * " ")
    return "\n".join(lines)


def field_comments(kind: type) -> dict[str, str]:
    """The comments beside the fields of a dataclass, or above them."""
    comments, above = {}, []
    for line in inspect.getsource(kind).splitlines():
        if match := re.match(r"    # (.*)", line):
            above.append(match[1])
        elif match := re.match(r"    (\w+): .*?(?:# (.*))?$", line):
            comments[match[1]] = " ".join([*above, match[2] or ""]).strip()
            above = []
    return comments
