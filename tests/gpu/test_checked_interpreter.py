"""Every bug that the checked interpreter claims to catch is planted in a small kernel, which passes without it.

Names carry shapes: M rows, N columns, K inner; kernels take a bug's name as `BUG`, "" for none.
"""

import random

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from checked_interpreter import (
    CheckError,
    IntegerOverflowError,
    Memory,
    MisalignedError,
    NoSuchInstructionError,
    OutOfBoundsError,
    RaceError,
    UnwrittenReadError,
    View,
    checked,
    far_apart,
)
from triton.runtime.errors import InterpreterError
from triton.tools.tensor_descriptor import TensorDescriptor

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2


def gapped(*shape, dtype=FP32, gap=8):
    """Random numbers in a view whose surroundings, the gap after each row included, are NaN."""
    rows, columns = shape
    buffer = torch.full((rows + 2, columns + gap), float("nan")).to(dtype)
    view = buffer[1:-1, gap // 2 : gap // 2 + columns]
    return view.copy_(torch.randn(shape, generator=torch.Generator().manual_seed(rows * columns)))


def empty(*shape, dtype=FP32):
    return gapped(*shape, dtype=dtype).fill_(float("nan"))


# ------------------------------------------------------------------------------------------------------- planted bugs
@triton.jit
def double(x, y, M, N, stride_x, stride_y, BM: tl.constexpr, BN: tl.constexpr, BUG: tl.constexpr):
    """y_MN = 2 * x_MN, in tiles."""
    rows = tl.program_id(0) * BM + tl.arange(0, BM)[:, None]
    columns = tl.program_id(1) * BN + tl.arange(0, BN)[None, :]
    keep = (rows < M) & (columns < N)
    load_keep = keep
    if BUG == "no column mask in the load":
        load_keep = rows < M
    if BUG == "no row mask in the load":
        load_keep = columns < N
    if BUG == "off by one in the load":
        load_keep = (rows < M) & (columns <= N)
    if BUG == "no mask in the store":
        keep = rows >= 0
    if BUG == "off by one in the store":
        keep = (rows <= M) & (columns < N)
    if BUG == "columns left out":
        keep = keep & (columns < N - 1)
    if BUG == "stride of the other tensor":
        stride_x = stride_y
    if BUG == "before the first row":
        rows = rows - 1
    if BUG == "no other":
        tile = tl.load(x + rows * stride_x + columns, mask=load_keep)
        tile += tl.sum(tile) * 0
    else:
        tile = tl.load(x + rows * stride_x + columns, mask=load_keep, other=0)
    if BUG == "every program stores all rows":
        rows = tl.arange(0, BM)[:, None]
        keep = (rows < M) & (columns < N)
    if BUG == "added to what is there":
        tile += tl.load(y + rows * stride_y + columns, mask=keep)
    if BUG == "added up by atomics":
        tl.atomic_add(y + rows * stride_y + columns, 2 * tile, mask=keep)
    else:
        tl.store(y + rows * stride_y + columns, 2 * tile, mask=keep)


def run_double(bug="", x=None, y=None, seed=0, **checks):
    x = gapped(21, 13) if x is None else x
    y = empty(21, 13) if y is None else y
    with checked(out=("y",), seed=seed, **checks) as check:
        double[3, 1](x, y, 21, 13, x.stride(0), y.stride(0), BM=8, BN=16, BUG=bug)
    return x, y, check


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


def test_atomics_have_names():
    y = torch.zeros(21, 13)
    x, y, check = run_double("added up by atomics", y=y)
    assert torch.equal(y, 2 * x)
    assert check.atomics() == {"y": 21 * 13} and check.coverage() == {"y": 1.0}
    assert check.counts()["y"].atomic.launch_bytes == check.counts()["x"].load.launch_bytes == 21 * 13 * 4


def test_in_place():
    """By memory, not by argument: x and y are one tensor. Tiles that stay apart are fine, an offset is not."""
    x = gapped(21, 13)
    expected = 2 * x
    with checked() as check:
        double[3, 1](x, x, 21, 13, x.stride(0), x.stride(0), BM=8, BN=16, BUG="")
    assert torch.equal(x, expected) and check.compulsory() == 2 * 21 * 13 * 4
    for seed in range(3):
        buffer = torch.randn(22, 13)
        with (
            checked(seed=seed),
            pytest.raises(RaceError, match="of '[xy]' at element .* which program .* (load|stor)ed"),
        ):
            double[3, 1](buffer[:-1], buffer[1:], 21, 13, 13, 13, BM=8, BN=16, BUG="")


@pytest.mark.parametrize("seed", range(4))
def test_programs_that_need_an_order(seed):
    @triton.jit
    def running_sum(x, y, BUG: tl.constexpr):
        pid = tl.program_id(0)
        total = tl.load(x + pid)
        if BUG and pid > 0:
            total += tl.load(y + pid - 1)
        tl.store(y + pid, total)

    x, y = torch.randn(9), torch.zeros(9)
    with checked(seed=seed):
        running_sum[9,](x, y, BUG=False)
    with checked(seed=seed), pytest.raises(RaceError, match=r"(load|store) of 'y' .* which program .* (stored|loaded)"):
        running_sum[9,](x, y, BUG=True)
    with checked(seed=seed, race=False):
        running_sum[9,](x, y, BUG=True)
    assert not torch.allclose(y, x.cumsum(0))  # the order is random


@triton.jit
def act(x, action: tl.constexpr):
    if action == "load":
        tl.device_assert(tl.load(x) >= 0)
    elif action == "store":
        tl.store(x, 1)
    elif action == "atomic":
        tl.atomic_add(x, 1)
    elif action == "load, store":
        tl.store(x, tl.load(x))


@pytest.mark.parametrize("second", ["load", "store", "atomic", "load, store"])
@pytest.mark.parametrize("first", ["load", "store", "atomic", "load, store"])
def test_what_two_programs_may_do_to_one_address(first, second):
    @triton.jit
    def two(x, halves, FIRST: tl.constexpr, SECOND: tl.constexpr):
        if tl.program_id(0) == 0:
            act(x, FIRST)
        elif tl.program_id(0) == 1:
            act(halves, SECOND)

    x = torch.zeros(64, dtype=torch.int32)[7:8]
    for other in (x, x.view(torch.int16)[1:]):  # also where only some of the bytes are shared
        if first == second and first in ("load", "atomic"):
            with checked(seed=None):
                two[2,](x, x if first == "atomic" else other, FIRST=first, SECOND=second)
        elif "atomic" not in (first, second) or other is x:  # there are no atomics of 16-bit integers
            with checked(seed=None, race=False):
                two[2,](x, other, FIRST=first, SECOND=second)
            with checked(seed=None), pytest.raises(RaceError, match=r"of 'halves' at .*, which program \(0, 0, 0\)"):
                two[2,](x, other, FIRST=first, SECOND=second)


def test_a_third_program_among_readers():
    @triton.jit
    def three(x):
        act(x, "load")
        if tl.program_id(0) == 2:
            act(x, "store")

    with checked(seed=None), pytest.raises(RaceError, match=r"store of 'x' .* program \(0, 0, 0\) loaded"):
        three[3,](torch.zeros(1))


def test_order_of_programs():
    @triton.jit
    def stamp(y, nx, ny):
        x, z = tl.program_id(0), tl.program_id(2)
        tl.store(y + (z * ny + tl.program_id(1)) * nx + x, x + 10 * tl.program_id(1) + 100 * z)

    orders = []
    for seed in (0, 0, 1, None):
        y = torch.zeros(4, 3, 2, dtype=torch.int32)
        with checked(out="y", seed=seed) as check:
            stamp[2, 3, 4](y, 2, 3)
        assert y[2, 1, 0] == 210 and check.coverage() == {"y": 1.0}
        orders.append(check.launches[0].order.tolist())
    assert orders[0] == orders[1] != orders[2] and orders[3] == list(range(24)) == sorted(orders[2])


def test_one_store_of_different_values():
    @triton.jit
    def store(y, BUG: tl.constexpr):
        lanes = tl.arange(0, 8)
        tl.store(y + lanes // 2, lanes if BUG else lanes // 2)

    with checked():
        store[1,](torch.zeros(4), BUG=False)
    with checked(), pytest.raises(RaceError, match="one store of different values to 'y' at element 0"):
        store[1,](torch.zeros(4), BUG=True)
    y = torch.zeros(16)
    with checked() as check:
        store[1,](y.view(torch.int8), BUG=False)  # from here on the memory is tracked by bytes
        store[1,](y, BUG=False)
        with pytest.raises(RaceError, match="to 'y' at element 0"):
            store[1,](y, BUG=True)
    assert len(check.launches) == 3


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


def test_triton_random_numbers_may_wrap():
    @triton.jit
    def noise(y, seed, N: tl.constexpr):
        tl.store(y + tl.arange(0, N), tl.rand(seed, tl.arange(0, N)))

    y = torch.zeros(64)
    with checked(out="y"):
        noise[1,](y, 1234, N=64)
    assert 0.3 < y.mean() < 0.7


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


def test_launches_are_ordered():
    """The output of one launch is read, by another name, in the next; what the first left out is still unwritten."""
    x, y, z = gapped(21, 13), empty(21, 13), empty(21, 13)
    with checked(out=("y",)) as check:
        double[3, 1](x, y, 21, 13, x.stride(0), y.stride(0), BM=8, BN=16, BUG="")
        double[3, 1](y, z, 21, 13, y.stride(0), z.stride(0), BM=8, BN=16, BUG="")
        double[3, 1](z, y, 21, 13, z.stride(0), y.stride(0), BM=8, BN=16, BUG="")
    assert torch.equal(y, 8 * x) and len(check.launches) == 3
    assert check.compulsory() == 3 * check.launches[1].compulsory() == 6 * check.launches[1].compulsory("x")
    with (
        checked(out=("y",)) as check,
        pytest.raises(UnwrittenReadError, match=r"load of 'x' at element \d+, which nothing"),
    ):
        double[3, 1](x, y, 21, 13, x.stride(0), y.stride(0), BM=8, BN=16, BUG="columns left out")
        double[3, 1](y, z, 21, 13, y.stride(0), z.stride(0), BM=8, BN=16, BUG="")


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


def test_views_of_one_memory_in_different_types():
    """Bytes are what is tracked: 16-bit halves of the same words are two elements, and two programs' business."""

    @triton.jit
    def write(y, words):
        pid = tl.program_id(0)
        tl.store(y + pid, pid.to(tl.int16))
        if pid == 5:
            tl.store(words + 8, pid)

    buffer = torch.zeros(16, dtype=torch.int32)
    with checked(out=("y",)) as check:
        write[8,](buffer.view(torch.int16)[:8], buffer, num_warps=4)
    assert check.coverage() == {"y": 1.0} and check.counts()["y"].store.launch_bytes == 16
    with checked(), pytest.raises(RaceError, match="store of '(y|words)'"):
        write[17,](buffer.view(torch.int16), buffer)


def test_checks_end_with_the_block():
    y = torch.zeros(4)

    @triton.jit
    def store(y):
        tl.store(y + tl.arange(0, 8) // 2, tl.arange(0, 8))

    with checked(), pytest.raises(RuntimeError, match="within checked"), checked():
        pass
    store[1,](y)
    assert y.tolist() == [1, 3, 5, 7]


# -------------------------------------------------------------------------------------------------- tensor descriptors
@triton.jit
def transport(x_desc, y_desc, BM: tl.constexpr, BN: tl.constexpr, SHIFT: tl.constexpr):
    row, column = tl.program_id(0) * BM, tl.program_id(1) * BN
    y_desc.store([row, column], x_desc.load([row + SHIFT, column]))


def aligned(rows, columns, stride):
    return torch.full((rows, stride), float("nan"), dtype=BF16)[:, :columns].copy_(torch.randn(rows, columns))


def test_descriptors_pad_and_clip():
    x, y = aligned(19, 21, 24), aligned(19, 21, 32)
    describe = TensorDescriptor.from_tensor
    with checked(out=("y_desc",)) as check:
        transport[3, 3](describe(x, [8, 8]), describe(y, [8, 8]), BM=8, BN=8, SHIFT=2)
    assert torch.equal(y[:-2], x[2:]) and y[-2:].eq(0).all()
    assert check.coverage() == {"y_desc": 1.0}
    counts = check.counts()
    assert counts["x_desc"].load.launch_bytes == 17 * 21 * 2 and counts["y_desc"].store.bytes == 19 * 21 * 2


def test_descriptors_are_held_to_their_tensor():
    x, y = aligned(19, 21, 24), aligned(19, 21, 24)
    too_wide = TensorDescriptor(x, [19, 24], [24, 1], [8, 8])
    with checked(), pytest.raises(OutOfBoundsError, match="load of 'x_desc' at element .*21"):
        transport[3, 3](too_wide, TensorDescriptor.from_tensor(y, [8, 8]), BM=8, BN=8, SHIFT=0)


@pytest.mark.parametrize("bug, message", [("base", "a base at 2 modulo 16"), ("stride", r"\[46\]")])
def test_misaligned_descriptors(bug, message):
    @triton.jit
    def kernel(x, y, M, N, stride, BN: tl.constexpr):
        source = tl.make_tensor_descriptor(x, [M, N], [stride, 1], [8, BN])
        target = tl.make_tensor_descriptor(y, [M, N], [stride, 1], [8, BN])
        target.store([0, 0], source.load([0, 0]))

    x, y = aligned(8, 16, 24), aligned(8, 16, 24)
    with checked(out="y") as check:
        kernel[1,](x, y, 8, 16, 24, BN=16)
    assert torch.equal(x, y) and check.coverage() == {"y": 1.0}
    with checked(), pytest.raises(MisalignedError, match=f"descriptor of 'x': .*{message}"):
        kernel[1,](x[:, 1:] if bug == "base" else x, y, 8, 15, 23 if bug == "stride" else 24, BN=8)


def test_narrow_block_of_a_host_descriptor():
    describe, x = TensorDescriptor.from_tensor, aligned(8, 16, 16)
    with checked(), pytest.raises(MisalignedError, match="'x_desc'.*blocks 8 bytes wide, in transport"):
        transport[1, 1](describe(x, [8, 4]), describe(x.clone(), [8, 4]), BM=8, BN=4, SHIFT=0)


# ---------------------------------------------------------------------------------------------------------- arithmetic
@triton.jit
def convert(x, y, N, BLOCK: tl.constexpr):
    lanes = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    numbers = tl.load(x + lanes, mask=lanes < N, other=0.0)
    tl.store(y + lanes, numbers.to(y.dtype.element_ty), mask=lanes < N)


def same(a, b):
    """Equal to the last bit, where all NaNs are one."""
    return torch.equal(a.isnan(), b.isnan()) and torch.equal(*(t.float().nan_to_num(nan=7.0) for t in (a, b)))


@pytest.mark.parametrize("dtype", [BF16, FP16, E4M3, E5M2], ids=str)
def test_casts(dtype):
    """Every number of the narrow type to fp32; random fp32 of all magnitudes, and all halfway points, back."""
    width = torch.uint8 if dtype.itemsize == 1 else torch.uint16
    everything = torch.arange(2 ** (8 * dtype.itemsize)).to(width).view(dtype)
    wide, numbers = torch.empty(len(everything)), everything.float()
    ties = (numbers[1:] + numbers[:-1]) / 2
    bits = torch.randint(-(2**31), 2**31, (20_000,), dtype=torch.int32).view(FP32)
    source = torch.cat([numbers, ties, bits, bits * 2.0**-60, torch.randn(5000), torch.randn(5000) * 1e-3])
    result = torch.empty(len(source), dtype=dtype)
    with checked(out="y"):
        convert[triton.cdiv(len(wide), 4096),](everything, wide, len(wide), BLOCK=4096)
        convert[triton.cdiv(len(source), 4096),](source, result, len(source), BLOCK=4096)
    assert same(wide, numbers)
    limit = torch.finfo(dtype).max
    assert same(result, (source.clamp(-limit, limit) if dtype.itemsize == 1 else source).to(dtype))


@triton.jit
def elementwise(x, y, z, factor, out, N: tl.constexpr):
    lanes = tl.arange(0, N)
    a, b, c = tl.load(x + lanes), tl.load(y + lanes), tl.load(z + lanes)
    tl.store(out + lanes, a + b)
    tl.store(out + N + lanes, a - b)
    tl.store(out + 2 * N + lanes, a * b)
    tl.store(out + 3 * N + lanes, -a)
    tl.store(out + 4 * N + lanes, tl.maximum(a, b))
    tl.store(out + 5 * N + lanes, tl.where(a < b, b, c))
    tl.store(out + 6 * N + lanes, tl.fma(a, b, c))
    tl.store(out + 7 * N + lanes, tl.abs(a))
    tl.store(out + 8 * N + lanes, a * factor)
    tl.store(out + 9 * N + lanes, tl.clamp(a, b, tl.maximum(b, c)))
    tl.store(out + 10 * N + lanes, a / b)
    tl.store(out + 11 * N + lanes, (a >= b).to(tl.float32))


@pytest.mark.parametrize("dtype", [BF16, FP16, FP32], ids=str)
def test_elementwise(dtype):
    a, b, c = (torch.randn(1024).to(dtype) for _ in range(3))
    factor = 0.3
    got = torch.empty(12, 1024, dtype=dtype)
    with checked(out="out") as check:
        elementwise[1,](a, b, c, factor, got, N=1024)
    exact = (a.double() * b.double() + c.double()).to(FP32).to(dtype)
    expected = [
        a + b, a - b, a * b, -a, torch.maximum(a, b), torch.where(a < b, b, c), exact, a.abs(),
        (a.float() * factor).to(dtype),  # a float argument is an fp32 scalar, and the product is rounded once, later
        torch.clamp(a, b, torch.maximum(b, c)), (a.float() / b.float()).to(dtype), (a >= b).to(dtype),
    ]  # fmt: skip
    for i, reference in enumerate(expected):
        assert same(got[i], reference), i
    assert check.coverage() == {"out": 1.0}


def test_the_product_with_a_float_argument_is_not_rounded():
    @triton.jit
    def scale(x, factor, y, N: tl.constexpr):
        tl.store(y + tl.arange(0, N), tl.load(x + tl.arange(0, N)) * factor)

    x, y = torch.randn(64).to(BF16), torch.empty(64)
    with checked():
        scale[1,](x, 0.3, y, N=64)
    assert torch.equal(y, x.float() * 0.3)


@triton.jit
def add(a, b):
    return a + b


def test_reductions_of_narrow_types():
    @triton.jit
    def total(x, y, N: tl.constexpr, BUG: tl.constexpr):
        numbers = tl.load(x + tl.arange(0, N))
        if BUG:
            tl.store(y, tl.reduce(numbers, 0, add))
        else:
            tl.store(y, tl.sum(numbers.to(tl.float32)) + tl.max(numbers))

    x, y = torch.randn(256).to(BF16), torch.empty(1)
    with checked():
        total[1,](x, y, N=256, BUG=False)
    assert torch.allclose(y, x.float().sum() + x.float().max(), rtol=1e-5)
    with checked(), pytest.raises(NoSuchInstructionError, match="reduction or scan of bf16.*cast to fp32"):
        total[1,](x, y, N=256, BUG=True)


@triton.jit
def matmul(
    a, b, c, M, N, K, stride_a, stride_b, stride_c,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, PRECISION: tl.constexpr, BUG: tl.constexpr,
):  # fmt: skip
    """c_MN = a_MK @ b_KN."""
    rows = tl.program_id(0) * BM + tl.arange(0, BM)[:, None]
    columns = tl.program_id(1) * BN + tl.arange(0, BN)[None, :]
    acc = tl.zeros((BM, BN), tl.float32)
    if BUG:
        acc = acc.to(tl.bfloat16)
    for start in range(0, K, BK):
        inner = start + tl.arange(0, BK)
        tile_a = tl.load(a + rows * stride_a + inner[None, :], mask=(rows < M) & (inner[None, :] < K), other=0.0)
        tile_b = tl.load(b + inner[:, None] * stride_b + columns, mask=(inner[:, None] < K) & (columns < N), other=0.0)
        if BUG:
            acc += tl.dot(tile_a, tile_b).to(tl.bfloat16)
        else:
            acc = tl.dot(tile_a, tile_b, acc, input_precision=PRECISION)
    tl.store(c + rows * stride_c + columns, acc, mask=(rows < M) & (columns < N))


def run_matmul(a, b, c, block=(16, 16, 16), precision="ieee", bug=False, **checks):
    (M, K), N = a.shape, b.shape[1]
    grid = triton.cdiv(M, block[0]), triton.cdiv(N, block[1])
    strides = [t.stride(0) for t in (a, b, c)]
    with checked(out=("c",), **checks) as check:
        matmul[grid](a, b, c, M, N, K, *strides, *block, PRECISION=precision, BUG=bug)
    return check


@pytest.mark.parametrize("dtype", [BF16, FP16, FP32, E4M3, E5M2], ids=str)
@pytest.mark.parametrize("seed", [0, 1])
def test_matmul(dtype, seed):
    a, b, c = gapped(37, 70, dtype=dtype), gapped(70, 45, dtype=dtype), empty(37, 45)
    check = run_matmul(a, b, c, block=(16, 32, 32), seed=seed)
    expected = a.double() @ b.double()
    assert ((c.double() - expected).abs() <= 70 * 2.0**-24 * (a.double().abs() @ b.double().abs())).all()
    assert check.coverage() == {"c": 1.0}
    assert check.flops == {check.launches[0].flops.most_common(1)[0][0]: 2 * 48 * 64 * 96}


def test_bf16_accumulation_shows():
    a, b, c = gapped(32, 512, dtype=BF16), gapped(512, 32, dtype=BF16), empty(32, 32)
    expected, norm = a.double() @ b.double(), 512**0.5
    run_matmul(a, b, c, block=(32, 32, 64))
    assert (c - expected).abs().max() < 1e-4 * norm
    run_matmul(a, b, c, block=(32, 32, 64), bug=True)
    assert 3e-3 * norm < (c - expected).abs().max() < 1e-1 * norm


def test_tf32():
    """Times the identity, a dot is the rounding of its operand."""
    a, identity, c = gapped(16, 16), torch.eye(16), empty(16, 16)
    run_matmul(a, identity, c, precision="ieee")
    assert torch.equal(c, a)
    run_matmul(a, identity, c, precision="tf32", tf32=False)
    assert torch.equal(c, a)
    spacing = 2.0 ** (a.abs().log2().floor() - 10)
    for operands in ((a, identity), (identity, a)):
        run_matmul(*operands, c, precision="tf32")
        assert torch.equal(c, (a / spacing).round() * spacing) and not torch.equal(c, a)


@pytest.mark.parametrize("dtype, least", [(BF16, 16), (FP32, 16), (E4M3, 32)], ids=str)
def test_small_dots(dtype, least):
    a, b, c = gapped(16, 64, dtype=dtype), gapped(64, 16, dtype=dtype), empty(16, 16)
    run_matmul(a, b, c, block=(16, 16, least))
    with pytest.raises(NoSuchInstructionError, match=f"expected K >= {least}, got {least // 2}"):
        run_matmul(a, b, c, block=(16, 16, least // 2))


# ------------------------------------------------------------------------------------------------------------- traffic
def test_traffic_of_a_copy():
    check = run_double()[2]
    moved = check.counts()
    assert list(moved) == ["x", "y"] and moved["x"].load.lanes == 21 * 13
    size = 21 * 13 * 4
    assert moved["x"].load.bytes == moved["x"].load.program_bytes == moved["x"].load.launch_bytes == size
    assert moved["y"].store.bytes == moved["y"].store.launch_bytes == size
    assert moved["x"].store.lanes == moved["y"].load.lanes == moved["y"].atomic.lanes == 0
    # 84 bytes from row to row, the first at byte 100: how many 32-byte sectors the 52 bytes of each row touch
    sectors = [set(range((100 + 84 * row) // 32, (100 + 84 * row + 51) // 32 + 1)) for row in range(21)]
    per_program = [set().union(*sectors[start : start + 8]) for start in range(0, 21, 8)]
    assert moved["x"].load.sectors == sum(map(len, per_program))
    assert check.compulsory() == 2 * size and check.compulsory("y") == size and not check.flops


def test_traffic_of_a_matmul():
    M, N, K = 64, 48, 80
    a, b, c = gapped(M, K, dtype=BF16), gapped(K, N, dtype=BF16), empty(M, N)
    check = run_matmul(a, b, c, block=(32, 16, 16), trace=True)
    moved = check.counts()
    assert moved["a"].load.bytes == moved["a"].load.program_bytes == M * K * 2 * (N // 16)
    assert moved["b"].load.bytes == K * N * 2 * (M // 32)
    assert [moved[name].load.launch_bytes for name in "abc"] == [M * K * 2, K * N * 2, 0]
    assert check.launches[0].kernel == "matmul" and check.launches[0].args == moved
    assert check.launches[0].compulsory("a", "b") == (M + N) * K * 2
    assert check.compulsory() == (M + N) * K * 2 + M * N * 4
    assert check.flops == {"bf16": 2 * M * N * K}


def test_lanes_that_share_an_address_count_once():
    @triton.jit
    def spread(x, y):
        lanes = tl.arange(0, 64)
        value = tl.load(x + lanes // 16) + tl.load(x + lanes // 32)
        tl.store(y + tl.program_id(0) * 64 + lanes, value)

    with checked() as check:
        spread[3,](torch.randn(4), torch.zeros(192))
    load = check.counts()["x"].load
    assert (load.bytes, load.program_bytes, load.launch_bytes, load.sectors) == (3 * 2 * 256, 3 * 16, 16, 6)


def test_traffic_without_arithmetic():
    a, b = torch.zeros(64, 64, dtype=BF16), torch.zeros(64, 64, dtype=BF16)
    full, dry = (
        run_matmul(a, b, torch.zeros(64, 64), block=(32, 32, 32), compute=compute) for compute in (True, False)
    )
    assert full.counts() == dry.counts() and full.flops == dry.flops


def test_l2_replay():
    a, b, c = (torch.zeros(64, 64, dtype=FP32) for _ in range(3))  # 16 KiB each: whole cache lines
    check = run_matmul(a, b, c, block=(16, 16, 32), compute=False, trace=True)
    size = 64 * 64 * 4
    endless = check.l2_replay(2**20, concurrent=4)
    assert endless["dram_read"] == 2 * size and endless["dram_write"] == size
    none = check.l2_replay(0, concurrent=4)
    assert none["hits"] == 0 and none["dram_read"] > 2 * 4 * size
    small = check.l2_replay(4096, concurrent=4)
    assert endless["dram_read"] < small["dram_read"] < none["dram_read"]
    with pytest.raises(ValueError, match="trace=True"):
        run_matmul(a, b, c, block=(64, 64, 64)).l2_replay(2**20, concurrent=4)


def test_all_errors_are_check_errors():
    for error in (OutOfBoundsError, MisalignedError, RaceError, UnwrittenReadError, IntegerOverflowError):
        assert issubclass(error, CheckError) and not issubclass(error, InterpreterError)
