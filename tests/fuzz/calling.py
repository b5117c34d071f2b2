"""Calls the command line in this process, and judges how it ended."""

import contextlib
import io
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from plopfast.cli import main

HANG_S = 10
WAITS = 3  # looks without computing, each a tenth of that time after the other, in which a command is stuck
ROOT = Path(__file__).parents[2]


class Hang(BaseException):
    """The command did not end."""


@dataclass
class Outcome:
    """`fault`: empty where the command ended as it may. `code`: the exit code."""

    argv: list[str]
    code: int | None
    err: str
    fault: str = ""
    detail: str = ""
    seconds: float = 0.0


def call(argv: list[str], folder: Path, must_refuse: str = "") -> Outcome:
    """Runs `plopfast ARGV...` in `folder`; `must_refuse` says why it has to end with an error, if it has to."""
    out, err = (
        io.TextIOWrapper(io.BytesIO(), encoding="utf-8", errors=how, write_through=True)
        for how in ("strict", "backslashreplace")
    )
    code, failure, began = None, None, time.perf_counter()
    with _elsewhere(folder), open(os.devnull) as nothing:  # noqa: PTH123
        saved, sys.stdin = sys.stdin, nothing
        try:
            with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), _limit(HANG_S):
                code = main.main(argv)
        except SystemExit as exit_:
            code = exit_.code if isinstance(exit_.code, int) else 1
        except BaseException as error:
            failure = error
        finally:
            sys.stdin = saved
    printed = err.buffer.getvalue().decode("utf-8", errors="replace")
    found = Outcome(argv, code, printed, seconds=time.perf_counter() - began)
    if failure is not None:
        kind = "hang" if isinstance(failure, Hang) else "traceback"
        found.fault = f"{kind}: {type(failure).__name__} at {_place(failure)}"
        found.detail = "".join(traceback.format_exception(failure))[-3000:]
    else:
        found.fault = _wrong(found, must_refuse)
    return found


def _wrong(found: Outcome, must_refuse: str) -> str:
    lines = [line for line in found.err.splitlines() if "error:" in line and line.startswith("plopfast")]
    if found.code == 0:
        return f"accepted: {must_refuse}" if must_refuse else ""
    if found.code == 1 and found.argv[0] == "doctor":
        return ""
    if found.code != 2:
        return f"exit code {found.code}"
    if len(lines) != 1:
        return f"{len(lines)} error lines"
    return ""


def _place(error: BaseException) -> str:
    """The innermost place of plopfast's own code."""
    places = [
        f"{Path(frame.filename).resolve().relative_to(ROOT)}:{frame.lineno} {frame.name}"
        for frame in traceback.extract_tb(error.__traceback__)
        if Path(frame.filename).resolve().is_relative_to(ROOT / "plopfast")
    ]
    return places[-1] if places else "?"


@contextlib.contextmanager
def _elsewhere(folder: Path) -> Iterator[None]:
    here = Path.cwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(here)


@contextlib.contextmanager
def _limit(seconds: float) -> Iterator[None]:
    """Raises Hang after `seconds` that the command computed, or waited for nothing; on a busy machine others compute."""
    began, used = time.perf_counter(), [time.process_time()]

    def late(number: int, frame: object) -> None:
        used.append(time.process_time())
        waits = len(used) > WAITS and used[-1] - used[-1 - WAITS] < 0.01 * WAITS
        if waits or used[-1] - used[0] > seconds or time.perf_counter() - began > 6 * seconds:
            raise Hang(f"not ended after {time.perf_counter() - began:.0f} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, seconds, seconds / 10)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def fork(do: Callable[[], None]) -> int:
    """Runs `do` in a copy of this process, which has imported all that is needed; returns its process id."""
    sys.stdout.flush()
    if pid := os.fork():
        return pid
    try:
        do()
        os._exit(0)
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(70)
