"""Which ranks have ended. Each rank knows the processes of those on its machine, so it can tell even where the launcher's
store has ended with rank 0."""

import os
import platform
import time
from pathlib import Path
from typing import Any

import psutil

NOTICED_S = 5.0  # a connection closes a moment before its process is seen to have ended
_VERDICT = "ended"


class Peers:
    """The other ranks. `store` is where ranks tell each other their processes; it may be gone later."""

    def __init__(self, store: Any, rank: int, size: int) -> None:
        self.store, self.rank, self.size = store, rank, size
        here = _machine()
        store.set(f"process/{rank}", f"{os.getpid()} {here}")
        told = {other: store.get(f"process/{other}").decode().split(" ", 1) for other in range(size) if other != rank}
        self.near = {other: _process(int(pid)) for other, (pid, machine) in told.items() if machine == here}
        self.far = [other for other, (_, machine) in told.items() if machine != here]

    def ended(self) -> list[int]:
        """Returns the ranks that ended first, as far as it can be seen: those that the first rank to look found."""
        deadline = time.monotonic() + NOTICED_S
        while not (found := self._gone()) and time.monotonic() < deadline:
            time.sleep(0.02)
        if found:
            try:  # ranks that look later find those gone, too, that ended for the same reason
                first = self.store.compare_set(_VERDICT, "", " ".join(map(str, found)))
            except RuntimeError:  # the store has ended with rank 0
                return found
            found = [int(other) for other in first.split() if int(other) != self.rank] or found
        return found

    def message(self) -> str:
        """Says which rank has ended, in words."""
        found = self.ended()
        if len(found) == 1:
            return f"rank {found[0]} of {self.size} has ended"
        if found:
            return f"ranks {_words(found)} of {self.size} have ended"
        if self.far:
            return (
                f"one of the ranks on other machines ({_words(self.far)} of {self.size}) has ended or not answered within "
                "--timeout"
            )
        return "another rank did not answer within --timeout, though all of them run"

    def _gone(self) -> list[int]:
        return [other for other, process in self.near.items() if not _runs(process)]


def _machine() -> str:
    """Names this machine; containers with one host name have numbers of processes of their own."""
    space = Path("/proc/self/ns/pid")
    return f"{platform.node()} {space.readlink() if space.is_symlink() else ''}"


def _process(number: int) -> psutil.Process | None:
    try:
        return psutil.Process(number)
    except psutil.NoSuchProcess:
        return None


def _runs(process: psutil.Process | None) -> bool:
    try:
        return process is not None and process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def _words(ranks: list[int]) -> str:
    *others, last = map(str, ranks)
    return f"{', '.join(others)} and {last}" if others else last
