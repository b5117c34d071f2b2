"""An error at the N-th step of a call: the N-th entry of a function of plopfast, or of a call of a torch module.

Steps that only clean up are left out: what a `finally` or an ExitStack calls. No program stays whole where its cleaning up
fails too.
"""

import ast
import contextlib
import functools
import inspect
import sys
from pathlib import Path

from torch import nn

import plopfast

PACKAGE = str(Path(plopfast.__file__).parent)
MODULE_CALL = nn.Module._call_impl.__code__


class PlantedError(Exception):
    """No code expects it."""


class PlantedInterrupt(KeyboardInterrupt):
    """Ctrl-C at this place."""


@functools.cache
def _cleaning(file):
    """The lines of a file that are in a `finally`."""
    tries = [
        node for node in ast.walk(ast.parse(Path(file).read_text())) if isinstance(node, ast.Try) and node.finalbody
    ]
    return {line for node in tries for line in range(node.finalbody[0].lineno, node.finalbody[-1].end_lineno + 1)}


def _is_step(frame, begun):
    code = frame.f_code
    if code is not MODULE_CALL and (not code.co_filename.startswith(PACKAGE) or code.co_name.startswith("<")):
        return False
    if code.co_flags & inspect.CO_GENERATOR:
        if frame in begun or frame.f_lineno != code.co_firstlineno:
            return False  # it goes on after a `yield`, or is closed
        begun.append(frame)
    caller = frame
    while caller is not None:
        file, name = caller.f_code.co_filename, caller.f_code.co_name
        if (
            caller is not frame
            and file.startswith(PACKAGE)
            and file.endswith(".py")
            and caller.f_lineno in _cleaning(file)
        ):
            return False
        if (
            name == "__torch_dispatch__"
        ):  # torch ends the process where one raises while it keeps tensors for the backward pass
            return False
        if name == "__exit__" and isinstance(caller.f_locals.get("self"), contextlib.ExitStack):
            return False
        if file.endswith(("/weakref.py", "/importlib/__init__.py")) or file.startswith("<frozen importlib"):
            return False
        caller = caller.f_back
    return True


@contextlib.contextmanager
def planted(number, error=PlantedError):
    """Raises `error` at step `number` (from 1) of what happens inside; yields the list of the steps' names."""
    steps, begun = [], []

    def trace(frame, event, _):
        if event == "call" and _is_step(frame, begun):
            steps.append(f"{Path(frame.f_code.co_filename).stem}.{frame.f_code.co_qualname if sys.version_info >= (3, 11) else frame.f_code.co_name}")  # fmt: skip
            if len(steps) == number:
                raise error(f"planted at {steps[-1]}")

    held = sys.gettrace()
    sys.settrace(trace)
    try:
        yield steps
    finally:
        sys.settrace(held)


def is_planted(error):
    """Whether an error is a planted one, or was raised because of it."""
    while error is not None:
        if isinstance(error, PlantedError | PlantedInterrupt):
            return True
        error = error.__cause__ or error.__context__
    return False
