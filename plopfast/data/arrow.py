"""Reads Parquet files, and folders and hub ids through the `datasets` package. Both are optional.

No code of a data set is run, and nothing is unpickled: only the formats in `_PLAIN` are read.
"""

import importlib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..support.errors import DataError

_BATCH = 1000  # rows that are turned into Python values at a time
_PLAIN = ("json", "csv", "parquet", "arrow", "text")
_CARDS = ("README.md", ".huggingface.yaml")  # where `datasets` looks for the files to read
_ROLES = {"train": "train", "valid": "validation", "test": "test"}


def read_parquet(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """The rows of a Parquet file. Raises DataError where pyarrow is missing or refuses the file."""
    parquet = _package("pyarrow.parquet", str(path))
    arrow = _package("pyarrow", str(path))
    try:
        with parquet.ParquetFile(path) as file:
            yield from _rows(str(path), file.iter_batches(_BATCH))
    except (arrow.ArrowException, OSError) as error:
        raise DataError(f"{path}: not a whole Parquet file ({_first_line(error)})") from error


def read_dataset(source: str, name: str, parts: list[str], split: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """The rows of a folder or hub id `name`. `parts` is [], [split] or [config, split]; `source` is how a user wrote it.

    Raises DataError where `datasets` is missing, finds nothing, or has no such config or split.
    """
    if len(parts) > 2:
        raise DataError(f"{source}: expected {name}, {name}:SPLIT or {name}:CONFIG:SPLIT")
    datasets = _package("datasets", source)
    wanted = parts[-1] if parts else _ROLES[split]
    found = _load(datasets, source, name, parts[0] if len(parts) == 2 else None)
    if isinstance(found, dict):
        if wanted not in found:
            raise DataError(
                f"{source}: no split {wanted!r}; it has {', '.join(map(str, found))}: choose one with {name}:SPLIT"
            )
        found = found[wanted]
    elif parts:
        raise DataError(f"{source}: the folder holds one data set without splits; leave out :{':'.join(parts)}")
    yield from _rows(source, found.with_format("arrow").iter(_BATCH))


def _load(datasets: Any, source: str, name: str, config: str | None) -> Any:
    """Return a Dataset, or a dict of them."""
    yaml = _package("yaml", source)
    saved = [Path(name, file) for file in ("dataset_dict.json", "state.json")]
    try:
        if any(file.is_file() for file in saved):
            if config:
                raise DataError(f"{source}: a folder of save_to_disk has no configs; leave out {config}:")
            return datasets.load_from_disk(name)
        _refuse_urls(source, Path(name))
        builder = datasets.load_dataset_builder(name, config)
        if builder.name not in _PLAIN:
            raise DataError(f"{source}: holds data of the kind {builder.name!r}; read are {', '.join(_PLAIN)}")
        builder.download_and_prepare()
        return builder.as_dataset()
    except (OSError, ValueError, RuntimeError, ImportError, yaml.YAMLError, datasets.exceptions.DatasetsError) as error:
        where = "the folder" if Path(name).is_dir() else "no such file or folder, and the hub's data set"
        raise DataError(f"{source}: {where} cannot be read through datasets ({_first_line(error)})") from error


def _refuse_urls(source: str, folder: Path) -> None:
    """Raises DataError for a local folder whose own settings would have its rows fetched from elsewhere."""
    for name in _CARDS:
        if folder.is_dir() and (folder / name).is_file():
            text = (folder / name).read_text(encoding="utf-8", errors="replace")
            if name == "README.md":
                text = text.split("\n---")[0] if text.startswith("---") else ""
            text = text.partition("configs:")[2]
            if found := re.search(r"\S*(://|::)\S*", text):
                raise DataError(
                    f"{source}: {name} names data outside of the folder ({found[0]:.80}), which is not fetched: give them as "
                    "--train, or leave configs out"
                )


def _rows(source: str, batches: Any) -> Iterator[tuple[str, dict[str, Any]]]:
    number = 0
    for batch in batches:
        for row in batch.to_pylist():
            number += 1
            yield f"{source}, row {number}", without_nulls(row)


def without_nulls(value: Any) -> Any:
    """Drops the keys that are null: Arrow gives every row, and every message, all keys that any of them has."""
    if isinstance(value, dict):
        return {key: without_nulls(item) for key, item in value.items() if item is not None}
    return [without_nulls(item) for item in value] if isinstance(value, list) else value


def _package(name: str, source: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError:
        package = name.partition(".")[0]
        raise DataError(f"{source}: needs the package {package}: pip install 'plopfast[data]'") from None


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0] or type(error).__name__
