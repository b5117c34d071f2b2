"""Reads settings from a JSON or YAML file, such as the config.json of a run folder."""

from pathlib import Path
from typing import Any

from . import files
from .aliases import ALIASES, LEAVE, note_of
from .config import TYPES
from .errors import ConfigError, FileError, shown
from .foreign import hint
from .options import fits, words_of

YAML = (".yaml", ".yml")


def load_settings(path: str | Path, told: list[str] | None = None) -> dict[str, Any]:
    """Reads settings from a JSON or YAML file, such as the config.json of a run folder, and checks their names and types.

    Names that other tools use are taken too (see aliases.py); what has to be said of them is added to `told`. Raises FileError
    for a file that cannot be read, ConfigError for an unknown name or a wrong type.
    """
    value = read_mapping(path, "you, or by plopfast run as config.json")
    settings = value.get("settings", value) if isinstance(value, dict) else None
    if not isinstance(settings, dict):
        kind = "YAML mapping" if _is_yaml(path) else "JSON object"
        raise ConfigError(f"{path}: expected a {kind} of settings, got {type(value).__name__}")
    if told is not None:
        told += [f"{path}: {note}" for name in settings if (note := note_of(name))]
    return checked_settings(path, settings)


def checked_settings(path: str | Path, settings: dict[str, Any]) -> dict[str, Any]:
    """Checks the names and types of settings that were read from `path`, and returns them by plopfast's own names.

    Raises ConfigError for unknown names, a wrong type, and two names of one setting.
    """
    found: dict[str, Any] = {}
    given: dict[str, str] = {}  # setting -> the name that the file has for it
    if unknown := [name for name in settings if _setting(name) is None]:
        first, *more = unknown
        known = (*TYPES, *(name for name, alias in ALIASES.items() if alias.setting in TYPES))
        beside = f" (and {len(more)} more: {shown(', '.join(more), str, 200)})" if more else ""
        raise ConfigError(f"{path}: unknown setting {shown(first)}{hint(first, known)}{beside}")
    for name, setting in settings.items():
        own = str(_setting(name))
        if own not in TYPES:
            raise ConfigError(
                f"{path}: {name}: a file of settings names no run folder: give --{own} {shown(setting, str)}"
            )
        where = name if name.replace("-", "_") == own else f"{name} ({own})"
        value = _meant(f"{path}: {name}", name, setting)
        if value is LEAVE:
            continue
        if own in given:
            raise ConfigError(f"{path}: {given[own]} and {name} both set {own}: leave one of them out")
        given[own] = name
        if not fits(TYPES[own], value):
            quotes = "; put quotes around it" if isinstance(value, int | float) and fits(TYPES[own], "") else ""
            raise ConfigError(f"{path}: {where}: expected {words_of(TYPES[own])}, got {shown(value)}{quotes}")
        found[own] = tuple(value) if isinstance(value, list) else value
    return found


def _setting(name: str) -> str | None:
    """The setting that has this name here or in another tool. Words of a name may be joined as in an option, with hyphens."""
    plain = name.replace("-", "_")
    alias = ALIASES.get(plain)
    return plain if plain in TYPES else alias.setting if alias else None


def _meant(where: str, name: str, value: Any) -> Any:
    """What a value means under this name, or LEAVE."""
    plain = name.replace("-", "_")
    alias = None if plain in TYPES else ALIASES[plain]
    if alias is None:
        return value
    if value is None:
        return LEAVE
    try:
        return alias.read(value) if alias.read else value
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from None


def read_mapping(path: str | Path, made_by: str = "you") -> Any:
    """Returns the value in a file of JSON or, where its name ends in .yaml or .yml, of YAML; whoever calls checks its form.

    Both are read alike: to the same values, and as strictly (see `strict_json` and `strict_yaml`). Raises FileError with the
    line; where the file is missing, it says that `made_by` writes it.
    """
    if not _is_yaml(path):
        return files.read_json(Path(path), made_by)
    from .strict_yaml import parse_yaml

    text = files.read_text(Path(path), f"no such file; it is written by {made_by}")
    try:
        return parse_yaml(text, files.DIGITS)
    except ValueError as error:
        raise FileError(f"{path}, {error}") from None


def _is_yaml(path: str | Path) -> bool:
    return Path(path).suffix.lower() in YAML
