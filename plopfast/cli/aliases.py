"""Options as other tools name them: --lora-r for --rank, and any of their words joined with _ as in --learning_rate."""

import argparse
import re
from collections.abc import Sequence
from typing import Any

from ..support.aliases import ALIASES, LEAVE, Alias, note_of, switch
from ..support.errors import ConfigError
from .parser import Parser

_OPTION = re.compile(r"\A--[A-Za-z][\w-]*(?==|\Z)")


def spelled(words: Sequence[str]) -> list[str]:
    """The words of a command line with options as plopfast writes them: --batch_rows=2 is --batch-rows=2."""
    end = _end_of_options(words)
    return [_OPTION.sub(_with_hyphens, word) for word in words[:end]] + list(words[end:])


def options_in(words: Sequence[str]) -> list[str]:
    """The names of the options on a command line, in order."""
    return [found[0] for word in words[: _end_of_options(words)] if (found := _OPTION.match(word))]


def _end_of_options(words: Sequence[str]) -> int:
    return words.index("--") if "--" in words else len(words)


def _with_hyphens(found: re.Match[str]) -> str:
    return found[0].replace("_", "-")


def add_aliases(parser: Parser) -> None:
    """Adds, for each option that the parser has, what other tools call it. --help-all lists them; --help does not."""
    by_name = {action.dest: action for action in parser.actions()}
    for name, alias in ALIASES.items():
        if target := by_name.get(alias.setting):
            option = f"--{name.replace('_', '-')}"
            parser.add_argument(option, action=_Aliased, alias=alias, target=target)
            own = f"--{alias.setting.replace('_', '-')}"
            parser.other_names.setdefault(own, []).append(option + MEANINGS.get(name, ""))


MEANINGS = {  # what --help-all adds to a name whose values have other words here
    "target_modules": " (names, or all-linear)", "load_in_4bit": " (nf4)", "load_in_8bit": " (int8, of weights alone)",
    "lora_target_linear": " (the rule all)", "lr_scheduler": " (constant_with_warmup is constant)",
    "optim": " (adamw_torch, adamw_8bit)", "cutoff_len": " (longer rows are an error, and not cut unasked)",
}  # fmt: skip


class _Aliased(argparse.Action):
    """Sets what the option of another name sets, and notes that this name was used."""

    def __init__(self, option_strings: list[str], dest: str, alias: Alias, target: argparse.Action) -> None:
        self.read = alias.read
        is_switch = alias.takes == "switch" or target.nargs == 0
        if is_switch and self.read is None:
            self.read = switch
        several = "+" if alias.takes == "names" else target.nargs
        super().__init__(option_strings, target.dest, default=argparse.SUPPRESS, help=argparse.SUPPRESS)
        self.nargs, self.const = ("?", "true") if is_switch else (several, None)
        self.type, self.metavar = None if self.read else target.type, target.metavar

    def __call__(
        self, parser: Any, namespace: argparse.Namespace, values: Any, option_string: str | None = None
    ) -> None:
        try:
            value = self.read(values) if self.read else values
        except ConfigError as error:
            raise argparse.ArgumentError(self, str(error)) from None
        if value is not LEAVE:
            setattr(namespace, self.dest, value)
            namespace.aliased = [*getattr(namespace, "aliased", []), (str(option_string), self.dest)]


def check_names(parsed: argparse.Namespace, words: Sequence[str]) -> str:
    """Says which two options of a command line set the same; "" where none do."""
    given = options_in(words)
    for name, dest in getattr(parsed, "aliased", []):
        own = f"--{dest.replace('_', '-')}"
        others = {own, f"--no-{own[2:]}"} | {other for other, its in parsed.aliased if its == dest}
        if twice := [other for other in given if other in others and other != name]:
            return f"{name} and {twice[0]} both set {own}: leave one of them out"
    return ""


def notes(parsed: argparse.Namespace) -> list[str]:
    """What has to be said of the names that were used."""
    return [note for name, _ in getattr(parsed, "aliased", []) if (note := note_of(name))]
