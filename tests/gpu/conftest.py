"""Tests of the Triton kernels: on the CPU in the checked interpreter (TRITON_INTERPRET=1), on a GPU as they ship.

    TRITON_INTERPRET=1 OPENBLAS_NUM_THREADS=1 python -m pytest --confcutdir=tests/gpu tests/gpu
    python -m pytest --confcutdir=tests/gpu tests/gpu                                               # on a GPU

Without the interpreter and without a GPU nothing here is collected. The rest of the suite hides GPUs, and runs these
files in the interpreter: tests/kernels/test_triton_interpreted.py.
"""

import contextlib
import os
from dataclasses import replace

import pytest
import torch
import triton.runtime.interpreter as stock

from plopfast.kernels import dispatch
from plopfast.kernels.launch import forget_plans

INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") == "1"
if INTERPRETED:
    collect_ignore_glob = ["test_grouped_heads.py"]  # of a GPU itself
elif torch.cuda.is_available():
    of_the_interpreter = ["test_traffic*.py", "test_parallel_work.py", "test_far*.py"]
    collect_ignore_glob = ["test_interpreter_*.py", *of_the_interpreter]
else:
    collect_ignore_glob = ["test_*.py"]


@pytest.fixture
def device():
    return torch.device("cpu" if INTERPRETED else "cuda")


@pytest.fixture
def units(monkeypatch, device):
    """A GPU of so many multiprocessors decides how sums are split."""
    target = dispatch.target_of(device)

    def of(count):
        monkeypatch.setattr(dispatch, "target_of", lambda device: replace(target, units=count))
        forget_plans()

    return of


@pytest.fixture(autouse=True)
def new_plans(monkeypatch):
    """Plans are made anew, as tests change what they are made from; and small products may give norms."""
    monkeypatch.setattr(dispatch, "EPILOGUE_FLOPS", 0)
    forget_plans()
    yield
    forget_plans()


@pytest.fixture(autouse=True)
def poisoned(monkeypatch):
    """Fills every `new_empty` with NaN. Launchers get their outputs from it, so what no kernel writes shows."""
    new_empty = torch.Tensor.new_empty

    def poisoned_empty(self, *shape, **options):
        empty = new_empty(self, *shape, **options)
        return empty.fill_(float("nan")) if empty.is_floating_point() else empty

    monkeypatch.setattr(torch.Tensor, "new_empty", poisoned_empty)


@pytest.fixture
def programs_from(monkeypatch):
    """`programs_from(x)` numbers the programs of a launch from x on, along the first axis."""

    def start(first):
        program_id = stock.InterpreterBuilder.create_get_program_id

        def shifted(self, axis):
            found = program_id(self, axis)
            return stock.TensorHandle(found.data + (first if axis == 0 else 0), found.dtype)

        monkeypatch.setattr(stock.InterpreterBuilder, "create_get_program_id", shifted)

    return start


@pytest.fixture
def watched():
    """`with watched("y", seed=1) as check:` runs all launches in the checked interpreter, if there is no GPU.

    The names are the kernels' outputs. Loading what was not stored raises an error, and in the end every element must be
    stored, without atomics. On a GPU nothing is watched, and `check` is None.
    """

    @contextlib.contextmanager
    def watch(*out, seed=0, **options):
        if not INTERPRETED:
            yield None
            return
        from interpreter import checked

        with checked(out=out, seed=seed, **options) as check:
            yield check
        names = {(launch.kernel, name) for launch in check.launches for name in launch.parameters}
        check.out &= {known for kernel, name in names for known in (name, f"{kernel}.{name}")}  # one part has no sum
        share = check.coverage()
        assert set(share.values()) <= {1.0}, f"shares of the outputs that were written: {share}"
        assert not check.atomics()

    return watch


@pytest.fixture
def launched(monkeypatch):
    """The names of what computes, in order: Triton kernels, and torch's own matrix products as "torch.addmm" and so on."""
    from triton.runtime.jit import KernelInterface

    names, launcher_of = [], KernelInterface.__getitem__
    monkeypatch.setattr(
        KernelInterface, "__getitem__", lambda kernel, grid: names.append(kernel.__name__) or launcher_of(kernel, grid)
    )
    products = ["addmm", "addmm_", "mm", "matmul", "__matmul__", "addbmm", "baddbmm", "bmm", "mv", "dot"]
    for owner, found in {torch.Tensor: products, torch: products, torch.nn.functional: ["linear"]}.items():
        for name in found:
            if hasattr(owner, name):
                monkeypatch.setattr(owner, name, _recorded(getattr(owner, name), f"torch.{name.strip('_')}", names))
    return names


def _recorded(function, name, names):
    def recorded(*arguments, **options):
        names.append(name)
        return function(*arguments, **options)

    return recorded
