"""Reads settings from a JSON file, such as the config.json of a run folder."""

import inspect
from pathlib import Path
from typing import Any, get_args

from . import files
from .config import ROWS, TYPES
from .errors import ConfigError, nearest


def load_settings(path: str | Path) -> dict[str, Any]:
    """Reads settings from a JSON file, such as the config.json of a run folder, and checks their names and types.

    Raises FileError for a file that cannot be read, ConfigError for an unknown name or a wrong type.
    """
    value = files.read_json(Path(path), "you, or by plopfast run as config.json")
    settings = value.get("settings", value) if isinstance(value, dict) else None
    if not isinstance(settings, dict):
        raise ConfigError(f"{path}: expected a JSON object of settings, got {type(value).__name__}")
    for name, setting in settings.items():
        if name not in TYPES:
            raise ConfigError(f"{path}: unknown setting {name!r}{nearest(name, tuple(TYPES))}")
        if not _fits(name, setting):
            wanted = "a string or a list of strings" if name in ROWS else inspect.formatannotation(TYPES[name])
            raise ConfigError(f"{path}: {name}: expected {wanted}, got {setting!r}")
    return {name: tuple(setting) if isinstance(setting, list) else setting for name, setting in settings.items()}


def _fits(name: str, value: Any) -> bool:
    """Whether a JSON value has the type of a setting."""
    if isinstance(value, list):
        return name in ROWS and all(isinstance(item, str) for item in value)
    kinds = [kind for kind in get_args(TYPES[name]) or (TYPES[name],) if kind != tuple[str, ...]]
    kinds += [int] if float in kinds else []
    return isinstance(value, tuple(kinds)) and (bool in kinds or not isinstance(value, bool))
