"""The tuning table: the strategy and tiles that were fastest on this machine's GPU, in tune.json in the user's cache.

The file holds one version (kernels, torch, triton) and a row for each (GPU, dtype, tokens, N, K, rank), named by
`dispatch.key`. Rows of another version are not used, because another compiler gives other times.
"""

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
    """Returns where tune.json is: in plopfast's cache folder ($PLOPFAST_CACHE, else the user's cache folder)."""
    return files.cache_dir() / "tune.json"


def version() -> dict[str, Any]:
    """Returns the versions that the measured times depend on; triton's is "" where it is not installed."""
    found = importlib.util.find_spec("triton")  # the module knows its version; on ROCm the package has another name
    triton = importlib.import_module("triton").__version__ if found else ""
    return {"kernels": dispatch.VERSION, "torch": str(torch.__version__), "triton": triton}


def row(strategy: str, tiles: Tiles, measured_ms: Mapping[str, float], date: str) -> dict[str, Any]:
    """Makes a row of the table.

    `strategy`: the faster one. `tiles`: lora_gemm's best. `measured_ms`: the time of a step with each variant, in ms.
    `date`: in ISO format.
    """
    return {"strategy": strategy, "tiles": asdict(tiles), "measured": dict(measured_ms), "date": date}


def load(path: Path | None = None) -> str:
    """Makes `dispatch` use the stored rows; without a file, it uses none.

    Returns one line for the user where rows are ignored, else "". Raises FileError for a damaged file.
    """
    rows, note = _read(path or table_path())
    dispatch.use_table({key: (value["strategy"], Tiles(**value["tiles"])) for key, value in rows.items()})
    return note


def save(rows: Mapping[str, dict[str, Any]], path: Path | None = None) -> Path:
    """Adds rows, made by `row`, to the stored ones; returns the file.

    Stored rows of another version are dropped, and a damaged file is replaced. Raises FileError where the file cannot be
    written.
    """
    path = path or table_path()
    assert all(_sound(value) for value in rows.values())
    try:
        kept = _read(path)[0]
    except FileError:
        kept = {}
    table = {"plopfast": "tuning", "version": version(), "rows": {**kept, **rows}}
    files.write_json(path, table, files.OTHER_CACHE)
    return path


def describe(path: Path | None = None) -> str:
    """Returns one line about the stored table, for `plopfast info`, also where the file is damaged."""
    path = path or table_path()
    try:
        rows, note = _read(path)
    except FileError as error:
        return f"tuning: {error}"
    if rows:
        gpus = sorted({key.rsplit(" ", 5)[0] for key in rows})
        return f"tuning: {len(rows)} rows measured on {', '.join(gpus)}, {path}"
    return f"tuning: {note or 'not measured, GPUs take the default, plain torch; see plopfast bench --tune'}"


def _read(path: Path) -> tuple[dict[str, dict[str, Any]], str]:
    """Returns the rows of this version, and a note where the file holds another's. Raises FileError if it is damaged."""
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
    """Whether a row can be used: its strategy is known, and Triton could compile its tiles."""
    tiles = value.get("tiles") if isinstance(value, dict) else None
    if not isinstance(tiles, dict) or set(tiles) != {field.name for field in fields(Tiles)}:
        return False
    whole = all(type(size) is int and 1 <= size <= 1024 for name, size in tiles.items() if name != "descriptor")
    powers = whole and all((n := tiles[name]) & (n - 1) == 0 for name in ("bm", "bn", "bk", "warps"))
    return powers and type(tiles["descriptor"]) is bool and value.get("strategy") in dispatch.CHOICES
