"""The checked interpreter pads and clips tensor descriptors, and refuses those that hardware can't hold."""

import pytest
import torch
import triton
import triton.language as tl
from interpreter import MisalignedError, OutOfBoundsError, checked
from planted import BF16
from triton.tools.tensor_descriptor import TensorDescriptor


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
