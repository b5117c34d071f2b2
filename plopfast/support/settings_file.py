"""Reads settings from a JSON or YAML file, such as the config.json of a run folder."""

from pathlib import Path
from typing import Any

from . import files
from .config import TYPES
from .errors import ConfigError, FileError, shown
from .foreign import hint
from .options import fits, words_of

YAML = (".yaml", ".yml")


def load_settings(path: str | Path) -> dict[str, Any]:
    """Reads settings from a JSON or YAML file, such as the config.json of a run folder, and checks their names and types.

    Raises FileError for a file that cannot be read, ConfigError for an unknown name or a wrong type.
    """
    value = read_mapping(path, "you, or by plopfast run as config.json")
    settings = value.get("settings", value) if isinstance(value, dict) else None
    if not isinstance(settings, dict):
        kind = "YAML mapping" if _is_yaml(path) else "JSON object"
        raise ConfigError(f"{path}: expected a {kind} of settings, got {type(value).__name__}")
    return checked_settings(path, settings)


def checked_settings(path: str | Path, settings: dict[str, Any]) -> dict[str, Any]:
    """Checks the names and types of settings that were read from `path`. Raises ConfigError for an unknown name or a wrong type."""
    for name, setting in settings.items():
        if name not in TYPES:
            raise ConfigError(f"{path}: unknown setting {shown(name)}{hint(name, tuple(TYPES))}")
        if not fits(TYPES[name], setting):
            quotes = "; put quotes around it" if isinstance(setting, int | float) and fits(TYPES[name], "") else ""
            raise ConfigError(f"{path}: {name}: expected {words_of(TYPES[name])}, got {shown(setting)}{quotes}")
    return {name: tuple(setting) if isinstance(setting, list) else setting for name, setting in settings.items()}


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
