"""Reading and writing files: JSON and safetensors only. They are written under a temporary name and then renamed."""

import contextlib
import functools
import hashlib
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from .errors import FileError, PlopfastError
from .strict_json import StrictJSON, dumps

SCRATCH = ".plopfast"  # ends the names of temporary folders
DIGITS = 20  # of an integer and its sign; nothing that is counted has more
OTHER_OUT = "choose another --out"
OTHER_CACHE = "plopfast keeps its cache there: set PLOPFAST_CACHE to a writable folder with room"


@contextlib.contextmanager
def replacing(path: Path, remedy: str = OTHER_OUT, mine: Callable[[str], bool] = lambda name: False) -> Iterator[Path]:
    """Yields a temporary path in the same folder. On success it replaces `path`; on failure it is removed.

    Works for files and folders. An earlier folder is replaced only if nothing in it is lost: each of its files has a
    successor of the same name, or `mine` is true of its name (relative, with slashes). Raises FileError, with `remedy`, where
    that is not so, and where the system refuses (permission, full disk, not a folder).
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=SCRATCH, dir=path.parent))
    except OSError as error:
        raise FileError(f"{path}: cannot write there ({error.strerror}); {remedy}") from error
    new, old = scratch / path.name, scratch / "old"
    try:
        yield new
        _share(new)
        if path.is_dir() and new.is_dir():  # a folder cannot be replaced in one step: move it aside first
            _refuse_loss(path, new, mine)
            path.replace(old)
        try:
            new.replace(path)
        except OSError:
            if old.exists():
                old.replace(path)
            raise
    except (OSError, SafetensorError) as error:
        raise FileError(f"{path}: writing failed ({error}); the earlier file, if any, is intact; {remedy}") from error
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _refuse_loss(path: Path, new: Path, mine: Callable[[str], bool]) -> None:
    if path.is_symlink():
        raise FileError(f"{path}: a symbolic link, which plopfast does not replace: remove it, or {OTHER_OUT}")
    for file in sorted(path.rglob("*")):
        name = file.relative_to(path).as_posix()
        if file.is_symlink() or not (file.is_dir() or (new / name).exists() or mine(name)):
            raise FileError(
                f"{file}: in a folder that is to be replaced, but plopfast did not write it: move it away, or {OTHER_OUT}"
            )


def recover(scratch: Path) -> None:
    """Ends what a kill interrupted in `replacing`, whose temporary folder this is: an earlier folder comes back, or the new
    one takes its place if it is complete, which it is once the earlier one was moved aside.

    Leaves a folder alone that holds something else.
    """
    name = scratch.name[1:].removesuffix(SCRATCH).rpartition(".")[0]
    new, old, path = scratch / name, scratch / "old", scratch.parent / name
    if not name or scratch.is_symlink() or not scratch.is_dir():
        return
    if {file.name for file in scratch.iterdir()} - {name, "old", "usual"}:
        return
    if old.exists() and not path.exists():
        (new if new.exists() else old).replace(path)
    shutil.rmtree(scratch, ignore_errors=True)


def _share(written: Path) -> None:
    """Gives files the permissions that new files have here; safetensors' writer makes them private."""
    (usual := written.with_name("usual")).touch()
    for file in (written, *written.rglob("*")):
        if file.is_file():
            file.chmod(usual.stat().st_mode)


def write_text(path: Path, text: str, remedy: str = OTHER_OUT) -> None:
    """Writes a UTF-8 file, as a whole or not at all. Raises FileError."""
    with replacing(path, remedy) as scratch:
        scratch.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any, remedy: str = OTHER_OUT) -> None:
    """Writes a JSON file, indented, as a whole or not at all. Raises FileError."""
    write_text(path, dumps(value, indent=2) + "\n", remedy)


def write_json_lines(path: Path, values: Iterable[Any], remedy: str = OTHER_OUT) -> None:
    """Writes a JSON value a line."""
    write_text(path, "".join(dumps(value) + "\n" for value in values), remedy)


def read_json(path: Path, made_by: str) -> Any:
    """Returns the JSON value in `path`. Raises FileError; where the file is missing, it says that `made_by` writes it."""
    return parse_json(path, read_text(path, f"no such file; it is written by {made_by}"))


def read_kind(path: Path, kind: str, made_by: str) -> dict[str, Any]:
    """Returns the object in a JSON file of one of plopfast's kinds, which its first key names, without that key.

    Raises FileError as `read_json` does, and for a file of another kind.
    """
    value = read_json(path, made_by)
    found = value.pop("plopfast", "another program's") if isinstance(value, dict) else f"a {type(value).__name__}"
    if found != kind:
        raise FileError(f"{path}: expected a file of the kind {kind!r}, got {found!r:.40}; make it anew with {made_by}")
    return value


def read_json_lines(path: Path, made_by: str) -> list[Any]:
    """Returns the JSON values in `path`, one a line. Raises FileError as `read_json` does."""
    lines = read_text(path, f"no such file; it is written by {made_by}").split("\n")
    return [parse_json(f"{path}, line {number}", line) for number, line in enumerate(lines, 1) if line]


def read_text(path: Path, missing: str, error: type[PlopfastError] = FileError) -> str:
    """Returns the text of a UTF-8 file, without a byte order mark. Raises `error`; `missing` says that there is no file."""
    check_regular(path, error)
    try:
        return path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise error(f"{path}: {missing}") from None
    except (OSError, UnicodeDecodeError) as failure:
        raise error(f"{path}: cannot be read as UTF-8 text ({failure})") from failure


def parse_json(where: object, text: str) -> Any:
    """Returns the value of a JSON text. Raises FileError, which begins with `where`."""
    try:
        return StrictJSON(DIGITS).parse(text.strip())
    except ValueError as error:
        raise FileError(f"{where}: {error}; was it edited by hand?") from None


def real(path: str | os.PathLike[str]) -> Path:
    """Returns the absolute path, without symbolic links; a link to itself stays as it is, where `Path.resolve` raises."""
    return Path(os.path.realpath(path))


def check_regular(path: Path, error: type[PlopfastError] = FileError) -> None:
    """Raises `error` for what is there and no file: reading a pipe or a device could last for ever."""
    if path.exists() and not path.is_file():
        raise error(f"{path}: expected a file, got a {'folder' if path.is_dir() else 'pipe, socket or device'}")


def read_tensors(path: Path, made_by: str) -> tuple[dict[str, Any], dict[str, str]]:
    """Returns the tensors of a safetensors file, on the CPU, and its metadata. Raises FileError as `read_json` does."""
    check_regular(path)
    try:
        with safe_open(path, framework="pt") as file:
            return {key: file.get_tensor(key) for key in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except FileNotFoundError:
        raise FileError(f"{path}: no such file; it is written by {made_by}") from None
    except (SafetensorError, OSError) as error:
        raise FileError(f"{path}: truncated or not a safetensors file ({error}); it is written by {made_by}") from None


def sha256(path: Path) -> str:
    """Returns the SHA-256 of a file's bytes, in hexadecimal; a file that has not changed since is not read again."""
    state = path.stat()
    return _sha256(path, (state.st_ino, state.st_size, state.st_mtime_ns))


@functools.lru_cache(maxsize=4096)
def _sha256(path: Path, _state: tuple[int, ...]) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def refuse_existing(path: Path, overwrite: bool) -> None:
    """Raises FileError where `path` exists and is not an empty folder, unless `overwrite`."""
    if overwrite or not path.exists() or (path.is_dir() and not any(path.iterdir())):
        return
    raise exists_already(path)


def exists_already(path: Path, holds: str = "", more: str = "") -> FileError:
    """The error for a result that is not to be replaced. `holds` follows its name, `more` the remedies."""
    return FileError(f"{path}: exists already{holds}; {OTHER_OUT}, or pass --overwrite to replace it{more}")


def cache_dir() -> Path:
    """Returns the folder of converted GGUF files and the tuning table: $PLOPFAST_CACHE, else the user's cache folder."""
    root = os.environ.get("PLOPFAST_CACHE")
    return Path(root) if root else Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "plopfast"
