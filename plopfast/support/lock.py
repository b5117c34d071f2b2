"""One writer to a folder: a lock that the system takes back when its process ends, however it ends (flock)."""

import contextlib
import errno
import fcntl
import json
import os
import socket
import time
import warnings
from collections.abc import Iterator
from pathlib import Path

from .errors import FileError
from .files import OTHER_OUT, real
from .machine import command

LOCK = ".lock"
_held: set[Path] = set()  # folders that this process has locked


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Holds the lock of a folder, which is made if need be, while the context lasts.

    A process that has locked the folder, or one above it, may do so again. Raises FileError, with the holder's command,
    process and start, where another process holds it. The file .lock stays: removing it would let two processes in.
    """
    whole = real(folder)
    if not _held.isdisjoint((whole, *whole.parents)):
        yield
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
        handle = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o644)
    except OSError as error:
        raise FileError(f"{folder}: cannot write there ({error.strerror}); {OTHER_OUT}") from error
    try:
        _take(handle, folder)
        _held.add(whole)
        yield
    finally:
        _held.discard(whole)
        os.close(handle)


def _take(handle: int, folder: Path) -> None:
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
            raise FileError(f"{folder}: in use by {_holder(handle)}; wait until it ends, or {OTHER_OUT}") from None
        warnings.warn(
            f"{folder}: cannot be locked ({error.strerror}): see that only one process writes there", stacklevel=4
        )
        return
    _refuse_others(handle, folder / LOCK)
    since = time.strftime("%Y-%m-%d %H:%M:%S")
    mine = {"command": command(), "pid": os.getpid(), "host": socket.gethostname(), "since": since}
    os.ftruncate(handle, 0)
    os.pwrite(handle, json.dumps(mine).encode(), 0)


def _refuse_others(handle: int, path: Path) -> None:
    """Raises FileError for a file that plopfast did not write."""
    with contextlib.suppress(ValueError, OSError):  # a pipe cannot be read at a place
        text = os.pread(handle, 1 << 16, 0)
        if not text or "pid" in json.loads(text):
            return
    raise FileError(f"{path}: in the way, and not a lock of plopfast: move it away, or {OTHER_OUT}")


def _holder(handle: int) -> str:
    with contextlib.suppress(ValueError, KeyError, TypeError):
        found = json.loads(os.pread(handle, 1 << 16, 0))
        return f"`{found['command']}` (process {found['pid']} on {found['host']}, since {found['since']})"
    return "another process"
