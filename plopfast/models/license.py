"""The license of a base model, as far as its own files say it: the front matter of its README.md, or a GGUF file's header."""

import contextlib
import os
import re
import struct
from pathlib import Path

import yaml

from ..support import files
from ..support.errors import PlopfastError
from . import sources
from .loading import name_of, path_of

FIELDS = ("license", "license_name", "license_link")  # as the hub's model cards name them
HEADER = 1 << 16  # a GGUF file says what it is before its vocabulary
_GGUF_KEY = struct.pack("<Q", 15) + b"general.license" + struct.pack("<I", 8)  # 8: a string follows
_PLAIN = re.compile(r"[A-Za-z0-9][\w.:/+-]{0,199}")
_FRONT = re.compile(r"---\r?\n(.*?)\r?\n---\s*$", re.DOTALL | re.MULTILINE)


def license_of(name: str | os.PathLike[str] | None) -> dict[str, str]:
    """The license of the model that `load_model(name)` loads: FIELDS -> what its files say; empty where they say nothing.

    >>> license_of(None)
    {'license': 'apache-2.0'}
    """
    path = path_of(name)
    if path is not None and path.is_file():
        return _of_gguf(path)
    with contextlib.suppress(OSError, ValueError, PlopfastError):  # no README.md that can be read
        folder = path or sources.folder_of(name_of(name))
        return in_card(files.read_text(folder / "README.md", "none"))
    return {}


def in_card(text: str) -> dict[str, str]:
    """FIELDS -> what the YAML at the head of a model card says, without values that are no plain words."""
    front = _FRONT.match(text)
    try:
        said = yaml.safe_load(front[1]) if front else None
    except (yaml.YAMLError, ValueError, RecursionError):
        return {}
    found = {key: said.get(key) for key in FIELDS} if isinstance(said, dict) else {}
    plain = {key: value for key, value in found.items() if isinstance(value, str) and _PLAIN.fullmatch(value)}
    return plain if "license" in plain else {}


def _of_gguf(path: Path) -> dict[str, str]:
    with path.open("rb") as file:
        head = file.read(HEADER)
    _, key, rest = head.partition(_GGUF_KEY)
    if not key or len(rest) < 8:
        return {}
    (length,) = struct.unpack_from("<Q", rest)
    said = rest[8 : 8 + min(length, 200)].decode(errors="replace")
    return {"license": said} if _PLAIN.fullmatch(said) else {}
