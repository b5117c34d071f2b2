"""The parser of a command line: errors of one line, help in two sizes, versions."""

import argparse
import copy
import shutil
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NoReturn

import plopfast

from ..support import machine
from ..support.errors import for_terminal

WIDEST = 100  # columns of a help text, as longer lines are hard to read


class Parser(argparse.ArgumentParser):
    """Like argparse's, but an error is one line, options are never abbreviated, and help comes in two sizes.

    `basics` names the arguments that --help shows, in order, with the `brief` help of those that have one; --help-all shows
    every argument in its group. Without basics both show all. `text` are the paragraphs above the arguments, `more` is what
    --help-all says below them.

    Abbreviations are off: those in scripts would change their meaning, or fail, when an option is added.
    """

    def __init__(
        self, prog: str, *, text: Sequence[str] = (), more: str = "", basics: Sequence[str] = (),
        brief: Mapping[str, str] | None = None, color: object = None,
    ) -> None:  # fmt: skip
        super().__init__(prog, allow_abbrev=False, add_help=False)  # `color` is what argparse of Python 3.14 asks for
        self.text, self.more, self.basics, self.brief = text, more, basics, brief or {}
        self._positionals.title = "arguments"
        self.foot = ""  # what --help says below the basics
        self.other_names: dict[str, list[str]] = {}  # option -> what other tools call it
        self.add_argument("-h", "--help", action=_Help, help="show the options that most people need")
        self.add_argument("--help-all", action=_Help, help="show every option in groups")

    def error(self, message: str) -> NoReturn:
        """What argparse calls for a wrong argument. What says itself what to give needs no hint."""
        says = any(words in message for words in ("did you mean", "expected one of", "; give ", ": give "))
        self.fail(message if says else f"{message}; {self.prog} --help shows the options")

    def fail(self, message: str) -> NoReturn:
        """Ends with exit code 2 and one line."""
        self.exit(2, f"plopfast: error: {for_terminal(message.translate({10: ' ', 13: ' '}))}\n")

    def actions(self) -> list[argparse.Action]:
        """The arguments that help texts show."""
        return [action for action in self._actions if action.help != argparse.SUPPRESS]

    def hidden(self) -> list[argparse.Action]:
        """The arguments that no help text shows."""
        return [action for action in self._actions if action.help == argparse.SUPPRESS]

    def format_help(self) -> str:
        return self.help_text()

    def help_text(self, whole: bool = False) -> str:
        """The basics, or every argument in its group where `whole`, or where there are no basics."""
        width = width_of_help()
        parts = [wrapped(part, width) for part in (self._usage(), *self.text)]
        for title, actions in self._sections(whole):
            parts.append(f"{title}:\n" + listed([(_invocation(one), one.help or "") for one in actions], width))
        if whole and self.other_names:
            rows = [(option, ", ".join(names)) for option, names in self.other_names.items()]
            parts.append("names from other tools that work, too:\n" + listed(rows, width))
        return "\n\n".join([*parts, wrapped(self.more if whole else self.foot, width)]).rstrip() + "\n"

    def _usage(self) -> str:
        names = [_invocation(action) for action in self.actions() if not action.option_strings]
        options = "[options]" if len(self.actions()) > len(names) + len(("--help", "--help-all")) else ""
        return " ".join(filter(None, ["usage:", self.prog, *names, options]))

    def _sections(self, whole: bool) -> list[tuple[str, list[argparse.Action]]]:
        if whole or not self.basics:
            groups = {group.title or "": group._group_actions for group in self._action_groups}
            shown = {title: [one for one in group if one.help != argparse.SUPPRESS] for title, group in groups.items()}
            return [(title, actions) for title, actions in shown.items() if actions]
        by_name = {action.dest: action for action in self.actions()}
        return [("basics", [self._short(by_name[name]) for name in self.basics])]

    def _short(self, action: argparse.Action) -> argparse.Action:
        """The argument with its brief help, and without what few need: --no-x, and that there may be several files."""
        short = copy.copy(action)
        short.help = self.brief.get(action.dest, action.help)
        short.option_strings = [name for name in action.option_strings if not name.startswith("--no-")]
        short.nargs = None if action.nargs == "+" else action.nargs
        return short


def _invocation(action: argparse.Action) -> str:
    """How an argument is given, such as "--train FILE [FILE ...]"."""
    value = str(action.metavar or action.dest.upper())
    several = f"{value} [{value} ...]" if action.nargs == "+" else value
    return " ".join(filter(None, [", ".join(action.option_strings), "" if action.nargs == 0 else several]))


def width_of_help() -> int:
    return min(shutil.get_terminal_size().columns - 2, WIDEST)


def wrapped(text: str, width: int) -> str:
    """Each line of the text as a paragraph of this width; lines that begin with spaces go on where those end."""
    indents = [" " * (len(line) - len(line.lstrip())) for line in text.splitlines()]
    lines = zip(text.splitlines(), indents, strict=True)
    return "\n".join(textwrap.fill(line, width, subsequent_indent=by, break_on_hyphens=False) for line, by in lines)


def listed(rows: Iterable[tuple[str, str]], width: int, column: int = 24) -> str:
    """Names and what they mean, in two columns; the second begins at `column`, below a name that is too long for the first."""
    lines = []
    for name, text in rows:
        first = f"  {name}".ljust(column)
        if not first.endswith(" "):
            lines.append(textwrap.fill(f"  {name}", width, subsequent_indent="  ", break_on_hyphens=False))
            first = " " * column
        below = " " * column
        lines.append(textwrap.fill(text, width, initial_indent=first, subsequent_indent=below, break_on_hyphens=False))
    return "\n".join(lines)


class _Help(argparse.Action):
    """--help, --help-all."""

    def __init__(self, option_strings: list[str], dest: str, help: str) -> None:
        super().__init__(option_strings, argparse.SUPPRESS, nargs=0, default=argparse.SUPPRESS, help=help)

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        print(parser.help_text(whole=option_string == "--help-all"), end="")
        parser.exit()


class Version(argparse.Action):
    """--version: that of plopfast, and of what its results depend on."""

    def __init__(self, option_strings: list[str], dest: str) -> None:
        text = "show the versions and exit"
        super().__init__(option_strings, argparse.SUPPRESS, nargs=0, default=argparse.SUPPRESS, help=text)

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        print(version_line())
        parser.exit()


def version_line() -> str:
    """The versions of plopfast and of the packages that it runs on, without importing these."""
    others = {name: version for name, version in machine.versions().items() if name != "plopfast"}
    return f"plopfast {plopfast.__version__} ({', '.join(f'{name} {version}' for name, version in others.items())})"
