"""What was probably meant by a command or an option that there is not."""

import difflib
from collections.abc import Iterable, Mapping

from ..support.aliases import ALIASES
from ..support.errors import shown
from ..support.foreign import why_not
from .parser import Parser

SIMILAR = 0.6  # of difflib's ratio, from which on a name may have been meant


def unknown_command(name: str, known: Iterable[str]) -> str:
    """The error about a command that there is not."""
    if name == "help":
        return "no command 'help': plopfast --help lists the commands, plopfast COMMAND --help shows one's options"
    return f"no command {shown(name)}{meant(name, known) or '; plopfast --help lists the commands'}"


def unknown_first(words: list[str], parser: Parser, commands: Iterable[str]) -> str:
    """The error about an option in front of the command."""
    if command := next((word for word in words if word in commands), ""):
        return f"{shown(words[0], str)} stands before the command: options come after it, plopfast {command} {shown(words[0], str)}"
    return (
        f"no option {shown(words[0], str)}{meant(words[0], _options(parser)) or '; plopfast --help lists the commands'}"
    )


def unexpected(command: str, words: list[str], parsers: Mapping[str, Parser]) -> str:
    """The error about the first of the words that a command's parser did not know."""
    word, parser = words[0], parsers[command]
    if not word.startswith("-") or word == "--":
        return _no_option(command, word, parser)
    name = word.partition("=")[0]
    if why := why_not(name):
        return f"no option {shown(name, str)}: {why}"
    if (alias := ALIASES.get(name.strip("-").replace("-", "_"))) and name.startswith("--"):
        option = f"--{alias.setting.replace('_', '-')}"
        if option in _options(parser):
            return f"no option {name} of plopfast {command}; did you mean {option}?"
        return f"{name} is {option}, which plopfast {command} does not have{_elsewhere(option, parsers)}"
    own = [option for action in parser.actions() for option in action.option_strings]
    if not any(option.startswith(name) for option in own) and (others := _elsewhere(name, parsers)):
        return f"plopfast {command} has no option {name}{others}"
    near = meant(name, own, _options(parser))
    return (
        f"no option {shown(name, str)} of plopfast {command}{near or f'; plopfast {command} --help shows the options'}"
    )


def meant(name: str, *known: Iterable[str]) -> str:
    """The end of an error about an unknown name: the known one that it is but for hyphens, those that it may abbreviate, or
    the most similar ones; "" for none.

    Of several collections of known names, an earlier one is preferred where the name may be short for one of its names.
    """
    word = name.lstrip("-").lower()
    everywhere = list(dict.fromkeys(one for names in known for one in names))
    found = [one for one in everywhere if one.lstrip("-") == word]
    for group in known:
        found = found or [one for one in group if word and one.lstrip("-").startswith(word)]
    *most, last = (found or _similar(word, everywhere))[:4] or [""]
    return f"; did you mean {', '.join(most)}{' or ' if most else ''}{last}?" if last else ""


def _similar(word: str, known: Iterable[str]) -> list[str]:
    """The most similar names, several where they are equally similar: trian may be train or trial."""
    ratios = {one: difflib.SequenceMatcher(None, one.lstrip("-"), word).ratio() for one in known}
    best = max(ratios.values(), default=0.0)
    return [one for one, ratio in ratios.items() if ratio == best >= SIMILAR]


def _options(parser: Parser) -> list[str]:
    """Its own options, and those by other tools' names."""
    return [name for action in (*parser.actions(), *parser.hidden()) for name in action.option_strings]


def _elsewhere(option: str, parsers: Mapping[str, Parser]) -> str:
    """Which commands have this option, as the end of an error; "" for none."""
    have = [name for name, parser in parsers.items() if option in _options(parser)]
    if not have:
        return ""
    *most, last = have[:4]
    return f"; plopfast {', '.join(most)}{' and ' if most else ''}{last} {'have' if most else 'has'} it"


def _no_option(command: str, word: str, parser: Parser) -> str:
    if word.lower() in ("true", "false", "yes", "no", "on", "off"):
        return (
            f"expected an option, got {shown(word)}: a switch takes no value, --packing is on and --no-packing is off"
        )
    option = next((name for name in ("--train", "--prompt", "--out") if name in _options(parser)), "")
    remedy = f"; did you mean {option} {shown(word, str)}?" if option and word != "--" else ""
    return f"plopfast {command}: expected an option, got {shown(word)}{remedy}"
