"""Buffers that launchers make have more than 2^31 elements for large models, and no test can fill them.

So the kernels are called with such sizes, and only those programs run that touch the far end. The range of addresses is
reserved, and most of it never touched. Of the interpreter alone: a GPU would have to have the memory.

M tokens, K in, C columns, N out, R rank.
"""

import pytest
import torch
from cases import BF16, FP32, HALF, LONG, normal
from interpreter import checked, far_apart
from triton.tools.tensor_descriptor import TensorDescriptor

from plopfast.kernels import (
    dispatch,
    expand,
    gemm,
    gemm_tma,
    grads,
    nf4,
    nf4_ops,
    reduce,
    reference,
    scaled,
    shrink,
    torch_codes,
    triton_ops,
)

close = torch.testing.assert_close


def test_shrink_of_three_adapters_in_parts():
    """The second part of S begins at 3 M R, the third adapter's at 2 M R."""
    m, rank = HALF // 16, 16
    assert m * rank < 1 << 31 < 2 * m * rank
    x = normal(16, 64, seed=1)
    adapters = [normal(rank, 64, scale=0.1, seed=10 + i) for i in range(3)]
    s = far_apart((2, 3, 16, rank), (3 * m * rank, m * rank, rank, 1), FP32)
    with checked(out="s") as check:
        shrink.lora_shrink[1, 2](
            x, *adapters, s, m, 0, 0, 0, 64, 32, 0, 64, 1, 64, 1,
            RANK=rank, RP=16, ADAPTERS=3, DROP=False, PRECISION="ieee", BM=16, BK=32,
        )  # fmt: skip
    assert check.coverage() == {"s": 1.0}
    for part, columns in enumerate((slice(0, 32), slice(32, 64))):
        for i, a in enumerate(adapters):
            close(s[part, i], x[:, columns] @ a[:, columns].T)


def test_parts_of_gradients_and_of_ds():
    """Three row parts of dB [C, R], three stripes of dS [M, R]."""
    columns = 3 * 32
    t, v, u = normal(48, columns, seed=1), normal(48, 16, seed=2), normal(columns, 16, scale=0.2, seed=3)
    g, ds = (far_apart((3, n, 16), (HALF, 16, 1), FP32) for n in (columns, 48))
    with checked(out=("g", "ds")) as check:
        grads.lora_grads[3, 3](
            t, v, u, g, ds, 48, 16, 0, HALF, columns, 1.0, 0, columns, 1, 16, 16, 1, HALF, 16, 1,
            RANK=16, RP=16, WITH_DS=True, DROP=False, PRECISION="ieee", BM=16, BC=32,
        )  # fmt: skip
    assert check.coverage() == {"g": 1.0, "ds": 1.0}
    for i in range(3):
        rows, stripe = slice(16 * i, 16 * i + 16), slice(32 * i, 32 * i + 32)
        close(g[i], t[rows].T @ v[rows])
        close(ds[i], t[:, stripe] @ u[stripe])


def test_rows_and_parts_of_the_gradient_of_a():
    """dA lies as [R, K], and its rows may be far apart too."""
    x, ds = normal(32, 32, seed=1), normal(32, 3, seed=2)
    g = far_apart((2, 3, 32), (3 * HALF, HALF, 1), FP32)
    with checked(out="g") as check:
        grads.lora_grads[1, 2](
            x, ds, x, g, x, 32, 16, 0, 0, 32, 1.0, 0, 32, 1, 3, 0, 0, 3 * HALF, 1, HALF,
            RANK=3, RP=16, WITH_DS=False, DROP=False, PRECISION="ieee", BM=16, BC=32,
        )  # fmt: skip
    assert check.coverage() == {"g": 1.0}
    for part, rows in enumerate((slice(0, 16), slice(16, 32))):
        close(g[part], ds[rows].T @ x[rows])


GEMM = {"RANK": 1, "BR": 16, "LORA": False, "MASK": False, "BIAS": False, "NORMS": True, "STORE": False,
        "PRECISION": "ieee", "BM": 16, "BN": 32, "BK": 32, "GROUP": 1}  # fmt: skip


def test_norms_of_the_product():
    x, w = normal(16, 32, seed=1), normal(96, 32, seed=2)
    norms = far_apart((3, 16), (HALF, 1), FP32)
    with checked(out="norms") as check:
        gemm.lora_gemm[3,](x, w, x, x, x, x, norms, HALF, 0, 96, 32, 0, 32, 1, 32, 1, 0, 0, 0, 1, EVEN_K=True, **GEMM)
    assert check.coverage() == {"norms": 1.0}
    close(norms, (x @ w.T).view(16, 3, 32).square().sum(2).T)


def test_a_weight_with_far_columns():
    """A step along K is beyond 2^31 elements."""
    x, w = normal(16, 64, dtype=BF16, seed=1), normal(32, 64, dtype=BF16, seed=2)
    with checked():
        y, _ = triton_ops.gemm(
            x, far_apart((32, 64), (1, 1 << 27), BF16).copy_(w), tiles=dispatch.Tiles(32, 32, 32, 4, 2)
        )
    close(y, (x.float() @ w.float().T).to(BF16))


def test_norms_of_the_product_by_descriptors(programs_from):
    """Of the last rows: their tiles are the last programs'."""
    x = far_apart((HALF, 32), (32, 1), BF16)
    last = x[-16:].copy_(normal(16, 32, dtype=BF16, seed=1))
    w, norms = normal(96, 32, dtype=BF16, seed=2), far_apart((3, HALF), (HALF, 1), FP32)
    descriptors = TensorDescriptor.from_tensor(x, [16, 32]), TensorDescriptor.from_tensor(w, [32, 32])
    programs_from((HALF // 16 - 1) * 3)
    with checked():
        gemm_tma.lora_gemm_tma[3,](
            *descriptors, x, x, x, x, norms, HALF, 96, 32, 0, 0, 0, 0, 0, 1, W_IS_NK=True, **GEMM
        )
    close(norms[:, -16:], (last.float() @ w.float().T).view(16, 3, 32).square().sum(2).T)


def test_output_and_s_of_expand():
    s, b = far_apart((4, 16), (HALF, 1), FP32).copy_(normal(4, 16, seed=1)), normal(32, 16, seed=2)
    y = far_apart((4, 32), (HALF, 1), FP32)
    with checked(out="y") as check:
        expand.lora_expand[1, 1](
            s, b, s, y, 4, 0, 32, 0, HALF, 16, 1, HALF,
            RANK=16, BR=16, MASK=False, BIAS=False, PRECISION="ieee", BM=16, BN=32,
        )  # fmt: skip
    assert check.coverage() == {"y": 1.0}
    close(y, s @ b.T)


@pytest.mark.parametrize("size", [HALF, LONG])
@pytest.mark.parametrize("buffer", ["alone", "one", "other"])
def test_sums_of_parts(buffer, size, programs_from):
    """The last block of five parts: of sum_partials, and of each buffer of sum_both."""
    partials, out = far_apart((5, size), (size, 1), FP32), far_apart((size,), (1,), FP32)
    block = (size - 1) // 1024
    tail = slice(block * 1024, size)
    exact = partials[:, tail].copy_(normal(5, size - block * 1024, seed=1)).sum(0) * 1.7
    small, small_out = normal(2, 5, seed=2), torch.zeros(5)
    programs_from(block + (buffer == "other"))  # one block of the small sum comes first
    with checked():
        if buffer == "alone":
            reduce.sum_partials[1,](partials, out, 5, size, 1.7, ROOT=False, BLOCK=1024)
        elif buffer == "one":
            reduce.sum_both[2,](partials, small, out, small_out, 5, size, 2, 5, 1.7, 0.3, BLOCK=1024)
        else:
            reduce.sum_both[1,](small, partials, small_out, out, 2, 5, 5, size, 0.3, 1.7, BLOCK=1024)
    close(out[tail], exact)
    if buffer == "one":  # whose block follows
        close(small_out, small.sum(0) * 0.3)


def test_columns_and_rows_of_row_norms(programs_from):
    y = far_apart((4, 48), (1, HALF), BF16).copy_(normal(4, 48, dtype=BF16, seed=1))
    norms = torch.zeros(4)
    with checked(out="norms"):
        reduce.row_norms[2,](y, y, norms, 4, 48, 1, HALF, BIAS=False, BM=2, BN=16)
    close(norms, y.float().norm(dim=1))
    tall, tall_norms = far_apart((LONG, 1), (1, 1), BF16), far_apart((LONG,), (1,), FP32)
    tall[-16:].copy_(normal(16, 1, dtype=BF16, seed=1))
    programs_from(LONG // 16 - 1)
    with checked():
        reduce.row_norms[1,](tall, tall, tall_norms, LONG, 1, 1, 1, BIAS=False, BM=16, BN=16)
    close(tall_norms[-16:], tall[-16:, 0].float().abs())


LEVELS = torch.tensor(torch_codes.LEVELS)
NF4_GEMM = {"DOUBLE": True, "RANK": 1, "BR": 16, "LORA": False, "BIAS": False, "PRECISION": "ieee", "BM": 16, "BN": 32,
            "GROUP": 8}  # fmt: skip


def nf4_bytes(codes):
    """[N, K / 2], the first of two codes in the high half."""
    return codes[:, ::2] << 4 | codes[:, 1::2]


def far_scales(blocks, last):
    """(absmax, code, nested) of so many blocks, of which the last are known; and their values."""
    absmax, nested = far_apart((blocks,), (1,), torch.uint8), far_apart((-(-blocks // 256),), (1,), FP32)
    absmax[-last:], code = torch.arange(last) + 7, normal(256, seed=5)
    nested[-2:] = torch.tensor([3.0, 5.0])
    block = torch.arange(blocks - last, blocks)
    return (absmax, code, nested), code[absmax[-last:].long()] * nested[block // 256]


def test_columns_of_an_nf4_product(programs_from):
    """W [N, 64] has N / 2 times 64 bytes. The last 32 of its columns."""
    n = (1 << 26) + 32
    packed, (scales, values) = far_apart((n, 32), (32, 1), torch.uint8), far_scales(n, 32)
    y, x = far_apart((1, n), (n, 1), FP32), normal(1, 64, seed=1)
    codes = torch.randint(0, 16, (32, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    packed[-32:] = nf4_bytes(codes)
    programs_from(n // 32 - 1)
    with checked():
        nf4.lora_gemm_nf4[1,](x, packed, *scales, LEVELS, x, x, x, y, 1, 0.0, n, 64, 64, 0, 0, 0, n, **NF4_GEMM)
    close(y[:, -32:], x @ (LEVELS[codes.long()] * values[:, None]).T)


def test_rows_of_an_nf4_product():
    x, y = far_apart((4, 64), (HALF, 1), FP32).copy_(normal(4, 64, seed=1)), far_apart((4, 32), (HALF, 1), FP32)
    codes, ones = torch.arange(16, dtype=torch.uint8).repeat(32, 4), torch.ones(32)
    constants = NF4_GEMM | {"DOUBLE": False}
    with checked():
        nf4.lora_gemm_nf4[1,](
            x, nf4_bytes(codes), ones, ones, ones, LEVELS, x, x, x, y, 4, 0.0, 32, 64, HALF, 0, 0, 0, HALF, **constants
        )
    close(y, x @ LEVELS[codes.long()].T)


@pytest.mark.parametrize("kernel", ["lora_gemm", "lora_gemm_tma", "lora_expand", "lora_gemm_nf4"])
def test_an_adapter_with_far_rows_is_copied(kernel):
    """Epilogues read B by 32-bit offsets, which save registers."""
    s, b = normal(5, 4, dtype=BF16, seed=1), normal(32, 4, seed=2)
    far_b, nothing = far_apart((32, 4), (HALF // 8, 1), FP32).copy_(b), torch.zeros(5, 32, dtype=BF16)
    with checked() as check:
        if kernel == "lora_expand":
            y = triton_ops.low_rank(s, far_b)
        elif kernel == "lora_gemm_nf4":
            packed, absmax = torch.zeros(32 * 32, dtype=torch.uint8), torch.ones(32)
            y = nf4_ops.gemm(torch.zeros(5, 64, dtype=BF16), packed, absmax, None, 32, s, far_b)
        else:
            tiles = dispatch.Tiles(32, 32, 32, 4, 2, descriptor=kernel == "lora_gemm_tma")
            y = triton_ops.gemm(nothing, torch.zeros(32, 32, dtype=BF16), s, far_b, tiles=tiles)[0]
    assert [launch.kernel for launch in check.launches] == [kernel]
    close(y, (s.float() @ b.to(BF16).float().T).to(BF16))


@pytest.mark.parametrize("tail", [0, 17])
def test_blocks_of_nf4_decoding(tail, programs_from):
    """W has 2^32 elements; its last block may be short, and then it is masked."""
    size = (1 << 31) + 16 * 32 + tail
    blocks = -(-size // 32)
    packed, w = far_apart((size,), (1,), torch.uint8), far_apart((2 * size,), (1,), FP32)
    scales, values = far_scales(blocks, 16)
    count = size - (blocks - 16) * 32
    packed[-count:] = torch.arange(count) % 251
    first, programs = blocks // 16 - 1, 2 if tail else 1
    programs_from(first)
    with checked():
        nf4.decode_nf4[programs,](packed, *scales, LEVELS, w, size, 0.0, DOUBLE=True, BLOCKS=16)
    found = packed[-count:].long()
    codes = torch.stack([found >> 4, found & 15], -1).flatten()
    close(w[-2 * count :], LEVELS[codes] * values.repeat_interleave(64)[: 2 * count])


@pytest.mark.parametrize("e4m3", [False, True])
def test_the_last_rows_of_a_scaled_weight(e4m3, programs_from):
    """More than 2^31 elements of W, and of its scales."""
    n, k = HALF, 48
    q, w = far_apart((n, k), (k, 1), torch.int8), far_apart((n, k), (k, 1), FP32)
    scale = far_apart((n, 3), (3, 1), FP32)
    last = q[-16:].copy_(torch.arange(16 * k).view(16, k) % 127)
    scale[-16:] = 1 + torch.arange(48).view(16, 3)
    programs_from(n // 16 - 1)
    with checked():
        scaled.decode_scaled[1,](q, scale, w, n, 3, 1, 16, k, E4M3=e4m3, GRAIN=16, BN=16, BK=64)
    numbers = last.view(torch.float8_e4m3fn) if e4m3 else last
    close(w[-16:], reference.scaled(numbers, scale[-16:], (1, 16)).float())
