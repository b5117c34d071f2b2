"""Reads settings from a JSON file, such as the config.json of a run folder."""

from pathlib import Path
from typing import Any

from . import files
from .config import TYPES
from .errors import ConfigError, shown
from .foreign import hint
from .options import fits, words_of


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
            raise ConfigError(f"{path}: unknown setting {shown(name)}{hint(name, tuple(TYPES))}")
        if not fits(TYPES[name], setting):
            raise ConfigError(f"{path}: {name}: expected {words_of(TYPES[name])}, got {shown(setting)}")
    return {name: tuple(setting) if isinstance(setting, list) else setting for name, setting in settings.items()}
