"""The tuning table: which strategy and tiles were faster on this machine's GPU, kept in the user's cache as tune.json.

One JSON file with one version key (kernels, torch, triton) and a row for each (GPU, dtype, tokens, N, K, rank), as
`dispatch.key` names it. Rows of another version are not used: a new compiler moves the times that they rest on.
"""

import importlib
import importlib.util
from collections.abc import Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import torch

from ..kernels import dispatch
from ..kernels.dispatch import Tiles
from ..support import files
from ..support.errors import FileError

AGAIN = "run plopfast bench --tune again"


def table_path() -> Path:
    """tune.json in plopfast's cache folder ($PLOPFAST_CACHE, else the user's cache folder)."""
    return files.cache_dir() / "tune.json"


def version() -> dict[str, Any]:
    """What a row's times rest on; triton is "" where it is not installed."""
    found = importlib.util.find_spec("triton")  # asked for its version itself: on ROCm the package has another name
    triton = importlib.import_module("triton").__version__ if found else ""
    return {"kernels": dispatch.VERSION, "torch": str(torch.__version__), "triton": triton}


def row(strategy: str, tiles: Tiles, measured_ms: Mapping[str, float], date: str) -> dict[str, Any]:
    """A row of the table: the faster strategy, lora_gemm's best tiles, the step time of each variant, an ISO date."""
    return {"strategy": strategy, "tiles": asdict(tiles), "measured": dict(measured_ms), "date": date}


def load(path: Path | None = None) -> str:
    """Puts the stored rows in force (`dispatch.use_table`), none where there is no file.

    Returns one line to show the user where rows were left out, else "". Raises FileError for a damaged file.
    """
    rows, note = _read(path or table_path())
    dispatch.use_table({key: (value["strategy"], Tiles(**value["tiles"])) for key, value in rows.items()})
    return note


def save(rows: Mapping[str, dict[str, Any]], path: Path | None = None) -> Path:
    """Adds rows made by `row` to the stored ones of the same version; returns the file.

    Rows of another version go, and a damaged file is replaced. Raises FileError where nothing can be written.
    """
    path = path or table_path()
    assert all(_sound(value) for value in rows.values())
    try:
        kept = _read(path)[0]
    except FileError:
        kept = {}
    try:
        files.write_json(path, {"plopfast": "tuning", "version": version(), "rows": {**kept, **rows}})
    except FileError as error:
        raise FileError(f"{error}\n  The tuning table lies there: set PLOPFAST_CACHE to a writable folder") from error
    return path


def describe(path: Path | None = None) -> str:
    """One line about the stored table, for `plopfast info`; a damaged file is described, not raised."""
    path = path or table_path()
    try:
        rows, note = _read(path)
    except FileError as error:
        return f"tuning: {error}"
    if rows:
        gpus = sorted({key.rsplit(" ", 5)[0] for key in rows})
        return f"tuning: {len(rows)} rows measured on {', '.join(gpus)}, {path}"
    return f"tuning: {note or 'not measured, GPUs take the safe default (lora-first); see plopfast bench --tune'}"


def _read(path: Path) -> tuple[dict[str, dict[str, Any]], str]:
    """The rows of this version, and a note where the file holds those of another. Raises FileError if damaged."""
    if not path.exists():
        return {}, ""
    try:
        table = files.read_json(path, "plopfast bench --tune")
    except FileError as error:
        raise FileError(f"{error}\n  The tuning table is damaged: delete it, or {AGAIN}") from error
    if not (isinstance(table, dict) and table.get("plopfast") == "tuning" and isinstance(table.get("rows"), dict)):
        raise FileError(f"{path}: not a tuning table: delete it, or {AGAIN}")
    then, now = table.get("version"), version()
    if then != now:
        spell = lambda v: " ".join(f"{k} {x}" for k, x in v.items()) if isinstance(v, dict) else repr(v)  # noqa: E731
        return {}, f"{path}: measured with {spell(then)}, not used with {spell(now)}: {AGAIN}"
    for key, value in table["rows"].items():
        if not _sound(value):
            raise FileError(f"{path}: row {key!r} is damaged: {AGAIN}")
    return table["rows"], ""


def _sound(value: Any) -> bool:
    """Whether a row can be put in force: a known strategy, and tiles that Triton could compile."""
    tiles = value.get("tiles") if isinstance(value, dict) else None
    if not isinstance(tiles, dict) or set(tiles) != {field.name for field in fields(Tiles)}:
        return False
    whole = all(type(size) is int and 1 <= size <= 1024 for name, size in tiles.items() if name != "descriptor")
    powers = whole and all((n := tiles[name]) & (n - 1) == 0 for name in ("bm", "bn", "bk", "warps"))
    return powers and type(tiles["descriptor"]) is bool and value.get("strategy") in dispatch.STRATEGIES
