"""The checked interpreter catches accesses outside a view, misaligned ones, and reads of what nothing wrote."""

import random

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from interpreter import (
    CheckError,
    IntegerOverflowError,
    Memory,
    MisalignedError,
    OutOfBoundsError,
    RaceError,
    UnwrittenReadError,
    View,
    checked,
    far_apart,
)
from planted import BF16, act, double, empty, gapped, run_double
from triton.runtime.errors import InterpreterError


@pytest.mark.parametrize("seed", [None, 0, 1])
def test_without_a_bug(seed):
    x, y, check = run_double(seed=seed)
    assert torch.equal(y, 2 * x)
    assert check.coverage() == {"y": 1.0} and check.atomics() == {}


@pytest.mark.parametrize(
    "bug, error, message",
    [
        ("no column mask in the load", OutOfBoundsError, r"load of 'x' at element \d+ and .* in double, program \("),
        ("no row mask in the load", OutOfBoundsError, r"load of 'x' at element 441 and .* program \(2, 0, 0\)"),
        ("off by one in the load", OutOfBoundsError, r"load of 'x' at element \d+ and (4|7) more lanes .*\(21, 13\)"),
        ("before the first row", OutOfBoundsError, r"load of 'x' at element -21 "),
        ("no mask in the store", OutOfBoundsError, "store of 'y'"),
        ("off by one in the store", OutOfBoundsError, "store of 'y' at element 441 and 12 more"),
        (
            "every program stores all rows",
            RaceError,
            r"store of 'y' at element 0, which program \(., 0, 0\) stored, in",
        ),
        ("added to what is there", UnwrittenReadError, "load of 'y' at element .* which nothing wrote"),
    ],
)
def test_bugs_of_double(bug, error, message):
    with pytest.raises(error, match=message):
        run_double(bug)


def test_wrong_stride():
    """The rows of x and y are differently far apart: with y's stride the kernel walks into x's gaps."""
    x = torch.full((40, 40), float("nan"))[3:24, 5:18].copy_(torch.randn(21, 13))
    assert torch.equal(run_double(x=x)[1], 2 * x)
    with pytest.raises(OutOfBoundsError, match=r"load of 'x' at element \d+ and .* stride \(40, 1\)"):
        run_double("stride of the other tensor", x=x)


def test_poison_is_consumed():
    assert run_double("no other")[1].isnan().all()


def test_integer_poison_is_noise():
    x, y = (torch.zeros(21, 13, dtype=torch.int32) for _ in range(2))
    assert run_double(x=x, y=y)[1].eq(0).all()
    assert run_double("off by one in the load", x=torch.zeros(22, 14, dtype=torch.int32)[:21], y=y)[1].eq(0).all()

    @triton.jit
    def first(x, y, N: tl.constexpr):
        tl.store(y + tl.arange(0, N), tl.load(x + tl.arange(0, N), mask=tl.arange(0, N) < 1))

    x, y = torch.zeros(1, dtype=torch.int8), torch.zeros(64, dtype=torch.int8)
    with checked():
        first[1,](x, y, N=64)
    assert y[0] == 0 and len(y[1:].unique()) > 20


def test_an_uncovered_output():
    assert run_double("columns left out")[2].coverage() == {"y": pytest.approx(12 / 13)}


def test_a_name_that_no_kernel_has():
    check = run_double()[2]
    check.out.add("z")
    with pytest.raises(ValueError, match="no kernel that was launched has a parameter named z"):
        check.coverage()


def test_an_output_of_one_kernel_alone():
    """`double.y` is the parameter y of `double`, whatever else has a y; no tensor and no elements are no gap."""

    @triton.jit
    def other(y, z, n):
        if n > 0:
            tl.store(z, tl.load(y))

    x, y, z = gapped(21, 13), empty(21, 13), torch.zeros(1)
    with checked(out=("double.y", "z")) as check:
        other[1,](torch.ones(1), z, 1)
        other[1,](None, torch.zeros(0), 0)
        other[0,](None, None, 0)
        double[3, 1](x, y, 21, 13, x.stride(0), y.stride(0), BM=8, BN=16, BUG="columns left out")
    assert check.coverage() == {"double.y": pytest.approx(12 / 13), "z": 1.0} and z == 1
    assert [launch.kernel for launch in check.launches] == ["other", "other", "other", "double"]


def test_views_with_overlapping_elements():
    @triton.jit
    def copy(x, y, stride, M: tl.constexpr, N: tl.constexpr):
        rows, columns = tl.arange(0, M)[:, None], tl.arange(0, N)[None, :]
        tl.store(y + rows * N + columns, tl.load(x + rows * stride + columns))

    row = torch.randn(1, 8)
    for x in (row.expand(4, 8), torch.randn(11).as_strided((4, 8), (1, 1)), torch.randn(17).as_strided((4, 8), (3, 1))):
        y = torch.zeros(4, 8)
        with checked(out="y") as check:
            copy[1,](x, y, x.stride(0), M=4, N=8)
        assert torch.equal(y, x) and check.counts()["x"].load.launch_bytes == 4 * len(set(range_of(x)))
        with checked(), pytest.raises(OutOfBoundsError, match="'x'"):
            copy[1,](x, y, x.stride(0) + 1, M=4, N=8)
    x = torch.randn(30).as_strided((4, 2, 2), (7, 3, 2))  # elements 0 2 3 5, 7 9 10 12, ...
    with checked(), pytest.raises(OutOfBoundsError, match="'x' at element 1 "):
        copy[1,](x, torch.zeros(4, 8), 7, M=4, N=4)


def range_of(x):
    return (torch.arange(x.shape[0])[:, None] * x.stride(0) + torch.arange(x.shape[1]) * x.stride(1)).flatten().tolist()


def test_views_know_their_elements():
    """Against a mask made by torch, for random shapes and strides: permuted, gapped, overlapping and broadcast."""
    numbers = random.Random(0)
    for _ in range(300):
        dims = numbers.randint(1, 4)
        shape = [numbers.choice([1, 2, 3, 5]) for _ in range(dims)]
        stride = [numbers.choice([0, 1, 2, 3, 4, 6, 10, 15, 30]) for _ in range(dims)]
        buffer = torch.zeros(400, dtype=torch.bool)
        view = View("x", buffer.as_strided(shape, stride, 40), Memory(buffer.untyped_storage()))
        view_mask = buffer.clone()
        view_mask.as_strided(shape, stride, 40).fill_(True)
        assert view.contains(np.arange(-40, 360)).tolist() == view_mask.tolist(), (shape, stride)
        assert sorted(set(view.elements().tolist())) == (view_mask.nonzero().flatten() - 40).tolist()


def test_many_pages():
    """Tracked apart: 300,000 elements in a random order of programs, halves of words in one launch, words in the next."""

    @triton.jit
    def copy(x, y, N, BLOCK: tl.constexpr):
        lanes = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        tl.store(y + lanes, tl.load(x + lanes, mask=lanes < N), mask=lanes < N)

    x, y = torch.randint(-99, 99, (150_000,), dtype=torch.int32), torch.zeros(150_000, dtype=torch.int32)
    with checked(out="y") as check:
        copy[10,](x, y, 150_000, BLOCK=16384)
        copy[19,](x.view(torch.int16), y.view(torch.int16), 300_000, BLOCK=16384)
        copy[10,](y, x, 150_000, BLOCK=16384)
    assert check.coverage() == {"y": 1.0} and torch.equal(x, y)
    assert check.compulsory() == 6 * 600_000 == check.counts()["x"].load.bytes + check.counts()["y"].store.bytes


def test_pointers_of_several_arguments_in_one_access():
    @triton.jit
    def interleave(sources, y, N: tl.constexpr, BUG: tl.constexpr):
        lanes = tl.arange(0, N)
        pointers = tl.where(lanes % 2 == 0, sources[0] + lanes // 2, sources[1] + lanes // 2 + BUG)
        tl.store(y + lanes, tl.load(pointers))

    a, b, y = torch.randn(8), torch.randn(8), torch.zeros(16)
    with checked() as check:
        interleave[1,]((a, b), y, N=16, BUG=0)
    assert torch.equal(y, torch.stack([a, b], 1).flatten())
    assert list(check.counts()) == ["sources[0]", "sources[1]", "y"] and check.compulsory("sources[1]") == 32
    with checked(), pytest.raises(OutOfBoundsError, match=r"load of 'sources\[1\]' at element 8 and 0 more lanes"):
        interleave[1,]((a, b), y, N=16, BUG=1)


def test_offsets_beyond_32_bits():
    @triton.jit
    def last_row(x, y, M, stride, N: tl.constexpr, BUG: tl.constexpr):
        row = M - 1
        if not BUG:
            row = tl.cast(row, tl.int64)
        tl.store(y + tl.arange(0, N), tl.load(x + row * stride + tl.arange(0, N)))

    x = far_apart((3, 16), (2**31 - 16, 1), BF16)
    x.copy_(torch.randn(3, 16))
    y = torch.zeros(16, dtype=BF16)
    with checked(out=("y",)) as check:
        last_row[1,](x, y, 3, x.stride(0), N=16, BUG=False)
    assert torch.equal(y, x[2]) and check.counts()["x"].load.bytes == 32
    assert sum(memory.shadow.nbytes for memory in check.memories.values()) < 2**20
    with (
        checked(),
        pytest.raises(IntegerOverflowError, match=r"int32 overflow in mul, in last_row, program \(0, 0, 0\)"),
    ):
        last_row[1,](x, y, 3, x.stride(0), N=16, BUG=True)


def test_pointers_to_nowhere():
    @triton.jit
    def load(x, y, BUG: tl.constexpr):
        pointer = x + 1
        if BUG == "an integer":
            pointer = tl.cast(tl.full((1,), 4096, tl.int64), tl.pointer_type(tl.float32))
        if BUG == "misaligned":
            pointer = tl.cast(tl.cast(x, tl.pointer_type(tl.int8)) + 2, tl.pointer_type(tl.float32))
        if BUG == "wider":
            pointer = tl.cast(x + 1, tl.pointer_type(tl.int64))
        tl.store(y, tl.load(pointer).to(tl.float32))

    x, y = torch.randn(2), torch.zeros(1)
    with checked():
        load[1,](x, y, BUG="")
    assert y == x[1]
    bugs = {
        "an integer": (OutOfBoundsError, "none of the arguments"),
        "misaligned": (MisalignedError, "load of 4 bytes of 'x' not aligned to 4"),
        "wider": (OutOfBoundsError, "load of 'x'"),
    }
    for bug, (error, message) in bugs.items():
        with checked(), pytest.raises(error, match=message):
            load[1,](x, y, BUG=bug)


@triton.jit
def far(x):
    return tl.load(x + 99)


def test_errors_of_device_functions_keep_their_class():
    @triton.jit
    def outer(x, y):
        tl.store(y, far(x))

    with checked(), pytest.raises(OutOfBoundsError, match="load of 'x' at element 99 .* in outer"):
        outer[1,](torch.zeros(3), torch.zeros(1))


def test_a_kernels_own_errors_stay_what_they_are():
    @triton.jit
    def wrong(x):
        tl.store(x + tl.arange(0, 4), tl.arange(0, 8))

    with checked(), pytest.raises(InterpreterError):
        wrong[1,](torch.zeros(8))


def test_unwritten_is_what_is_in_the_output():
    """The rest of its storage may hold inputs, and atomics write too."""

    @triton.jit
    def update(x, y, BUG: tl.constexpr):
        act(x + BUG, "load")
        act(y, "atomic")

    buffer = torch.zeros(8)
    with checked(out="y") as check:
        update[1,](buffer[:4], buffer[4:], BUG=0)
        update[1,](buffer[4:], buffer, BUG=0)
        with pytest.raises(UnwrittenReadError, match="'x' at element 1,"):
            update[1,](buffer[4:], buffer, BUG=1)
    assert check.coverage() == {"y": (1 + 2) / (4 + 8)}


def test_checks_end_with_the_block():
    y = torch.zeros(4)

    @triton.jit
    def store(y):
        tl.store(y + tl.arange(0, 8) // 2, tl.arange(0, 8))

    with checked(), pytest.raises(RuntimeError, match="within checked"), checked():
        pass
    store[1,](y)
    assert y.tolist() == [1, 3, 5, 7]


def test_all_errors_are_check_errors():
    for error in (OutOfBoundsError, MisalignedError, RaceError, UnwrittenReadError, IntegerOverflowError):
        assert issubclass(error, CheckError) and not issubclass(error, InterpreterError)
