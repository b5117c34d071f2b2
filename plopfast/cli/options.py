"""The parser, built from the table of commands and the settings' fields; and settings out of what was given."""

import argparse
import dataclasses
import inspect
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

from ..models.known import KNOWN
from ..placing.rules import help_words
from ..support import config as groups, machine
from ..support.config import ROWS, TYPES, RunConfig
from ..support.options import Settings
from ..support.settings_file import load_settings
from . import arguments, bench_command
from .aliases import add_aliases, check_names, notes, spelled
from .commands import COMMANDS, Command
from .help import BRIEF, EPILOG, Overview, basics_of
from .parser import Parser
from .suggest import unexpected, unknown_command, unknown_first

FLAGS: dict[str, dict[str, Any]] = {
    "overwrite": {"action": "store_true", "help": "replace results that exist and that plopfast wrote"},
    "resume": {"action": "store_true", "help": "go on with what was interrupted"},
    "adapter": {"type": arguments.path, "metavar": "DIR", "help": "take this adapter (default: OUT/adapter)"},
    "any_base": {"action": "store_true", "help": "accept an adapter that was trained on other base weights"},
    "requantize": {
        "action": "store_true",
        "help": "of a quantised model: write codes again, which rounds the merged weights, instead of dense weights",
    },
    "print_peft": {
        "action": "store_true",
        "help": "show the placement as PEFT, TRL, Axolotl and Unsloth take it, to paste",
    },
    "jobs": {
        "type": arguments.path,
        "metavar": "FILE",
        "help": "the jobs, in JSON or YAML: names, and settings as the options here are named (docs/multi.md)",
    },
    "plan": {
        "type": arguments.path,
        "metavar": "FILE",
        "help": "the study, in JSON or YAML: models, tasks and budgets, each with settings as the options here are named (docs/study.md)",
    },
    "at_once": {
        "type": arguments.number(int, 1e6),
        "metavar": "INT",
        "help": "train at most so many jobs at a time; the others wait (default: all)",
    },
    "prompt": {
        "action": "append",
        "type": arguments.text,
        "metavar": "TEXT",
        "help": "answer this; a user's message where the model has a chat template (may be given several times)",
    },
    "prompts": {
        "dest": "prompts_file",
        "type": arguments.path,
        "metavar": "FILE",
        "help": 'answer the rows of this file: {"prompt": text or messages} or {"messages": ...}, as train takes them',
    },
    "adapters": {
        "option": "--adapter",
        "action": "append",
        "type": arguments.text,
        "metavar": "[NAME=]DIR",
        "help": "answer with this adapter (default: OUT's); given several times, each answers every prompt, in one batch, or those rows "
        'of --prompts that name it as "adapter"',
    },
    "without": {
        "type": arguments.text,
        "metavar": "MODULES",
        "help": 'switch adapters off in these modules: types or parts of names, such as mlp,q_proj (a row\'s own: "without", a list)',
    },
    "answers": {
        "type": arguments.path,
        "metavar": "FILE",
        "help": 'write the answers to this file, too: JSONL rows {"prompt", "answer", "tokens", "ended"}, of several adapters with "adapter"',
    },
    "seconds": {
        "type": arguments.number(float, 1e6),
        "default": 60.0,
        "help": "time for the kernel checks (default: 60)",
    },
}
FIELDS = {field.name: field for field in dataclasses.fields(RunConfig)}
GROUPS = [kind for kind in RunConfig.__mro__ if issubclass(kind, Settings)]
TITLES = list(dict.fromkeys(kind.title for kind in GROUPS))
KNOWN_BEST = (
    "--rank",
    "--lr",
    "--model",
    "--out",
)  # the first that a command has stands for the names from other tools
FIRST = ("model", "train", "score_prompts", "rule", "k", "rank", "init", "lr")  # lead their groups in a help text


def build_parser() -> Overview:
    """One subcommand for each entry of COMMANDS, and bench, which reads no settings."""
    parser = Overview("plopfast")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND", parser_class=Parser)
    for name, command in COMMANDS.items():
        basics = basics_of(name)
        example = f"example: plopfast {name} {basics.example}" if basics.example else ""
        text = [command.help[0].upper() + command.help[1:] + ".", example]
        added = commands.add_parser(name, text=text, more=EPILOG, basics=basics.options.split(), brief=_briefs())
        parser.helps[name], parser.commands[name] = command.help, added
        if command.bare:
            added.add_argument("out", type=arguments.path, metavar="OUT", help="run folder")
            continue
        for position in command.names:
            added.add_argument(position, type=arguments.text, help="a run folder, an adapter's folder, or base")
        if not command.names:
            added.add_argument("--out", type=arguments.path, metavar="DIR", help=_help_of_out(command))
        config = "take settings from this JSON or YAML file (.yaml, .yml), named as the options are"
        added.add_argument("--config", type=arguments.path, metavar="FILE", help=config)
        for flag in command.flags:
            option = {"option": f"--{flag.replace('_', '-')}", "dest": flag} | FLAGS[flag]
            added.add_argument(option.pop("option"), **option)
        _add_settings(added, command)
        add_aliases(added)
        other = next((option for option in KNOWN_BEST if option in added.other_names), "")
        names = f", and names from other tools that work, too, such as {added.other_names[other][0]}" if other else ""
        added.foot = f"plopfast {name} --help-all shows every option in groups{names}."
    parser.helps["bench"], parser.commands["bench"] = bench_command.HELP, bench_command.add_to(commands)
    return parser


def _briefs() -> dict[str, str]:
    return {name: text + _default(name) for name, text in BRIEF.items()}


def _help_of_out(command: Command) -> str:
    if groups.GenerateSettings in command.takes:
        return "run folder whose model and adapter answer (default: the model alone)"
    if "adapter" in command.flags:
        return "run folder of the stages before (default with --adapter: a new one, runs/DATE-TIME)"
    if command.needs_out:
        return "run folder of the stages before"
    if "plan" in command.flags:
        return "folder of the study, with a run folder for each trial"
    if "overwrite" in command.flags:
        return "run folder (default: a new one, runs/DATE-TIME)"
    return "run folder whose settings to take"


def names_of(command: Command) -> list[str]:
    """The settings that a command reads."""
    names: set[str] = set()
    for taken in command.takes:
        names |= {taken} if isinstance(taken, str) else {field.name for field in dataclasses.fields(taken)}
    return [name for name in sorted(FIELDS, key=lambda name: name not in FIRST) if name in names - {*command.without}]


def _add_settings(parser: argparse.ArgumentParser, command: Command) -> None:
    """Adds the command's settings as options, under the titles of their groups."""
    titles = {name: _title(name) for name in names_of(command)}
    groups = {title: parser.add_argument_group(title) for title in TITLES if title in titles.values()}
    for name, title in titles.items():
        groups[title].add_argument(f"--{name.replace('_', '-')}", **_option(name))


def _title(name: str) -> str:
    return next(kind.title for kind in GROUPS if name in inspect.get_annotations(kind))


def _option(name: str) -> dict[str, Any]:
    field, hint = FIELDS[name], TYPES[name]
    words = help_words() | {"models": ", ".join(KNOWN)}
    text = field.metadata["help"].format(**words) + _default(name)
    options: dict[str, Any] = {"default": argparse.SUPPRESS, "help": text}
    plain = next((kind for kind in get_args(hint) if kind is not type(None)), hint)  # int | None -> int
    if plain is bool:
        return options | {"action": argparse.BooleanOptionalAction}
    if field.metadata["choices"]:
        return options | arguments.one_of(field.metadata["choices"])
    several = {"nargs": "+"} if name in ROWS else {}
    return options | several | {"type": plain, "metavar": "FILE" if field.metadata["file"] else plain.__name__.upper()}


def _default(name: str) -> str:
    """The end of a help text: what holds where the option is not given."""
    value = FIELDS[name].default if name in FIELDS else None
    return "" if value is None else f" (default: {('off', 'on')[value] if isinstance(value, bool) else value})"


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parses a command line. Ends with one line and exit code 2 where it is wrong, and with the help where it is empty.

    `--out=--` is refused: argparse takes the -- for the end of the options, and gives no value.
    """
    words = spelled(sys.argv[1:] if argv is None else argv)
    parser = build_parser()
    if not words:
        parser.exit(2, parser.format_help())
    if words[0] not in parser.commands and not words[0].startswith("-"):
        parser.fail(unknown_command(words[0], parser.commands))
    if words[0].startswith("-") and words[0] not in {
        name for action in parser.actions() for name in action.option_strings
    }:
        parser.fail(unknown_first(words, parser, parser.commands))
    parsed, unknown = parser.parse_known_args(words)
    if unknown:
        parser.fail(unexpected(parsed.command, unknown, parser.commands))
    for name, value in vars(parsed).items():
        if value == []:
            parser.commands[parsed.command].error(f"argument --{name.replace('_', '-')}: expected a value, got --")
    if problem := check_names(parsed, words):
        parser.fail(problem)
    return parsed


def _kept_settings(parsed: argparse.Namespace, command: Command) -> Path | None:
    """The config.json of the run folder that a command works in; of one that names run folders, the first that has one."""
    if command.names:
        found = (Path(getattr(parsed, name)) / "config.json" for name in command.names)
        return next((path for path in found if path.is_file()), None)
    if "plan" in command.flags:  # its trials have settings of their own
        return None
    return parsed.out / "config.json" if parsed.out else None


def settings_of(parsed: argparse.Namespace) -> RunConfig:
    """Defaults, then the run folder's config.json (which a new run ignores), then --config, then the options given.

    Prints, on stderr, what has to be said of settings that were given by the names of other tools.
    """
    told = notes(parsed)
    settings: dict[str, Any] = {}
    command = COMMANDS[parsed.command]
    if command.bare:
        return RunConfig()
    kept = _kept_settings(parsed, command)
    if kept and (kept.is_file() or "overwrite" not in command.flags) and (parsed.command != "run" or parsed.resume):
        settings |= load_settings(kept)
    if parsed.config:
        settings |= load_settings(parsed.config, told)
    given = {key: value for key, value in vars(parsed).items() if key in FIELDS}
    for one, other in (("epochs", "max_steps"), ("max_steps", "epochs")):
        if one in given:
            settings.pop(other, None)  # both say how long to train: the one that is given now counts
    config = RunConfig(**settings | given)
    if config.batch_tokens is None and not machine.launch().rank:  # with it, all notes that there are say nothing new
        print("".join(f"plopfast: {note}\n" for note in told), end="", file=sys.stderr)
    return config
