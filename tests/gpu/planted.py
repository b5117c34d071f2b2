"""Small kernels with bugs planted in them, which the tests of the checked interpreter share.

Names carry shapes: M rows, N columns, K inner. A kernel takes the name of a bug as `BUG`, "" for none.
"""

import torch
import triton
import triton.language as tl
from interpreter import checked

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
