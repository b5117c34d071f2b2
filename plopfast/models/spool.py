"""Weights that live in files mapped into memory, for models that are larger than the memory.

A read-only map of a safetensors file, and a shared map of an unlinked one, take memory only while they are read, and the
system takes it back when it needs it. (safetensors' own reader maps files privately and writable: that counts as data of the
process, all of it.) What is mapped read-only must never be written to: the process would be killed.
"""

import contextlib
import errno
import json
import mmap
import os
import shutil
import tempfile
import warnings
import weakref
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import nn

from ..support import files
from ..support.errors import FileError, ModelError
from .linears import linear_modules
from .streamer import ALIGNED

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
    "U16": torch.uint16, "U32": torch.uint32, "U64": torch.uint64, "C64": torch.complex64,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "F8_E8M0": torch.float8_e8m0fnu,
}  # fmt: skip
MIB = 2**20
CHUNK = 256 * MIB  # the file grows by so much at the most; it doubles until then
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_MAPPED: dict[int, tuple[range, weakref.ref[mmap.mmap]]] = {}  # addresses of files that are mapped now


def mapped_tensors(paths: Iterable[Path]) -> dict[str, torch.Tensor]:
    """The tensors of safetensors files, by name, as read-only views of the files: they take no memory of the process.

    Raises what safetensors raises for a damaged file.
    """
    return {name: tensor for path in paths for name, tensor in _mapped(path)}


def _mapped(path: Path) -> list[tuple[str, torch.Tensor]]:
    with safe_open(path, framework="numpy"):  # checks the header, and that all tensors are in the file
        pass
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header: dict[str, Any] = json.loads(file.read(length))
    header.pop("__metadata__", None)
    with path.open("rb") as file:
        memory = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The given buffer is not writable")
        whole = torch.frombuffer(memory, dtype=torch.uint8)
    _note(memory, whole)
    found = []
    for name, one in header.items():
        begin, end = (8 + length + offset for offset in one["data_offsets"])
        if one["dtype"] not in DTYPES:
            raise ModelError(f"{path}: {name} has the type {one['dtype']}, which torch cannot read: save it in another")
        part, dtype = whole[begin:end], DTYPES[one["dtype"]]
        part = part.clone() if begin % dtype.itemsize else part  # old files are not aligned
        found.append((name, part.view(dtype).view(one["shape"])))
    return found


def _note(memory: mmap.mmap, whole: torch.Tensor) -> None:
    address = whole.data_ptr()
    _MAPPED[address] = range(address, address + whole.nbytes), weakref.ref(memory)
    weakref.finalize(memory, _MAPPED.pop, address, None)


def let_pages_go() -> None:
    """Gives the memory of mapped pages back; they are read from their files again when they are needed."""
    for _, memory in list(_MAPPED.values()):
        if hasattr(mmap, "MADV_DONTNEED") and (found := memory()) is not None:
            found.madvise(mmap.MADV_DONTNEED)


def is_mapped(tensor: torch.Tensor) -> bool:
    """Whether a tensor lies in a file that this module has mapped."""
    return tensor.device.type == "cpu" and any(tensor.data_ptr() in where for where, _ in _MAPPED.values())


class Spool:
    """A file for weights that are in no checkpoint as they are to be: cast, merged or quantised while they were read.

    It lies in plopfast's cache folder without a name there, so the system removes it when the process ends, however it ends.
    Raises FileError where it cannot be written.
    """

    def __init__(self) -> None:
        self.folder, self.size = files.cache_dir(), 0
        self._file: Any = None
        self._room = torch.empty(0, dtype=torch.uint8)  # what is mapped and not yet taken

    def keep(self, tensor: torch.Tensor) -> torch.Tensor:
        """The tensor's values in a file: as it is where it lies in one already, else in this one.

        Raises FileError, with the sizes, where the disk is full.
        """
        if not tensor.numel() or is_mapped(tensor):
            return tensor
        aligned = -(-tensor.nbytes // ALIGNED) * ALIGNED
        if aligned > len(self._room):
            self._room = self._mapped(aligned)
        taken, self._room = self._room[: tensor.nbytes], self._room[aligned:]
        return taken.view(tensor.dtype).view(tensor.shape).copy_(tensor)

    def _mapped(self, least: int) -> torch.Tensor:
        """A new part of the file, of as many bytes at least. Few and large ones: each map holds a file descriptor."""
        wanted = max(least, min(CHUNK, self.size))
        pages = -(-wanted // mmap.ALLOCATIONGRANULARITY) * mmap.ALLOCATIONGRANULARITY
        try:
            if self._file is None:
                self.folder.mkdir(parents=True, exist_ok=True)
                self._file = tempfile.TemporaryFile(dir=self.folder)  # noqa: SIM115  # lives as long as the maps
        except OSError as error:
            raise FileError(
                f"{self.folder}: cannot write there ({error.strerror}), and streamed weights that are cast or quantised are "
                f"kept in a file; {files.OTHER_CACHE}"
            ) from error
        try:
            self._grow(pages)
            memory = mmap.mmap(self._file.fileno(), pages, offset=self.size)
        except OSError as error:
            with contextlib.suppress(OSError):
                self._file.truncate(self.size)
            if error.errno not in FULL:
                raise FileError(f"{self.folder}: cannot map the file of streamed weights ({error.strerror})") from error
            free = shutil.disk_usage(self.folder).free / MIB
            raise FileError(
                f"{self.folder}: no room for the streamed weights ({error.strerror}): {self.size / MIB:.0f} MiB are written, "
                f"{pages / MIB:.1f} MiB more are needed for the next ones, and {free:.1f} MiB are free; {files.OTHER_CACHE}"
            ) from error
        self.size += pages
        made = torch.frombuffer(memory, dtype=torch.uint8)
        _note(memory, made)
        return made

    def _grow(self, count: int) -> None:
        """Takes room on the disk now: a full disk found by a write to the map would kill the process."""
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(self._file.fileno(), self.size, count)
        else:  # macOS
            self._file.truncate(self.size + count)


class Kept:
    """Leaves the linear weights of the repeated layers in files; a Way of quantizer.py for dense weights."""

    def __init__(self, spool: Spool) -> None:
        self.spool, self.ignored = spool, list[str]()
        self._names: set[str] = set()

    def swap(self, model: Any) -> None:
        self._names = {f"{info.name}.weight" for info in linear_modules(model)}

    def takes(self, name: str) -> bool:
        return name in self._names

    def convert(self, model: Any, name: str, value: torch.Tensor) -> dict[str, torch.Tensor]:
        return {name: nn.Parameter(self.spool.keep(value), requires_grad=False)}

    def fill(self, model: Any) -> None:
        """They are."""

    def check(self, source: str, found: dict[str, Any]) -> None:
        """transformers has."""
