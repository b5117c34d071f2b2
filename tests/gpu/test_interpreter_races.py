"""The checked interpreter catches programs that need an order, and lets pass those that need none."""

import pytest
import torch
import triton
import triton.language as tl
from interpreter import RaceError, UnwrittenReadError, checked
from planted import act, double, empty, gapped, run_double


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
