"""NF4 frozen weights (Dettmers et al., QLoRA, arXiv 2305.14314, appendix E): 4-bit codes, one absmax for 64 elements.

In memory as bitsandbytes writes it: byte i of the row-major stream holds element 2 i in its high half and 2 i + 1 in its
low half, and a block of 64 elements may run across the end of a row. absmax is float32; or double-quantised, one byte a
block, which stands for code[byte] * nested[block // 256] + offset: two roundings in float32, so no multiply-add may be
made of them.

For many tokens `decode_nf4` writes W once into a workspace, and the ordinary product follows. For few tokens
`lora_gemm_nf4` decodes inside the product. The two halves of a byte become neighbours inside one thread: nothing is
shuffled, and X is read as it lies. Two products, of X's even columns with the high halves and of its odd ones with the
low, take up to 1.4 times as many instructions.

M tokens, K in, N out, R rank.
"""

import triton
import triton.language as tl

from .gemm import finish, tile_of


@triton.jit
def _levels(code, table):
    """Levels of a 2-D block of codes, from a table kept in registers."""
    flat = tl.reshape(code.to(tl.int32), (code.shape[0] * code.shape[1],))
    return tl.reshape(tl.gather(table, flat, 0), (code.shape[0], code.shape[1]))


@triton.jit
def _values(pair, scale, table, dtype: tl.constexpr):
    """[B, 2 C] in `dtype` out of bytes [B, C] and scales [B]: one rounding, of level times scale in float32."""
    high, low = _levels(pair >> 4, table) * scale[:, None], _levels(pair & 15, table) * scale[:, None]
    return tl.reshape(tl.join(high.to(dtype), low.to(dtype)), (pair.shape[0], 2 * pair.shape[1]))


@triton.jit
def _absmax(absmax, code, nested, offset, block, DOUBLE: tl.constexpr):
    """The scales of blocks, in float32."""
    if DOUBLE:
        index = tl.load(absmax + block).to(tl.int32)
        return tl.load(code + index) * tl.load(nested + block // 256) + offset
    else:
        return tl.load(absmax + block)


@triton.jit(do_not_specialize=["M"])
def lora_gemm_nf4(
    x, packed, absmax, code, nested, levels, s, b, bias, y, M, offset, N, K, sxm, ssm, sbn, sbr, sym,
    DOUBLE: tl.constexpr, RANK: tl.constexpr, BR: tl.constexpr, LORA: tl.constexpr, BIAS: tl.constexpr,
    PRECISION: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """Y = X W^T + S B^T + bias with W [N, K] decoded in registers; K is a multiple of 64."""
    dtype: tl.constexpr = x.dtype.element_ty
    tile_m, tile_n = tile_of(tl.program_id(0), M, N, BM, BN, GROUP)
    rm = tile_m.to(tl.int64) * BM + tl.arange(0, BM)
    row_M = tl.where(rm < M, rm, 0)
    rn = tile_n * BN + tl.arange(0, BN)
    col_N = tl.where(rn < N, rn, 0).to(tl.int64)  # columns beyond the edge decode column 0 and are not stored
    table = tl.load(levels + tl.arange(0, 16))
    bytes_NK = packed + col_N[:, None] * (K // 2) + tl.arange(0, 32)[None, :]
    block_N = col_N * (K // 64)
    x_MK = x + row_M[:, None] * sxm + tl.arange(0, 64)[None, :]
    acc = tl.zeros((BM, BN), tl.float32)
    for _ in range(0, K // 64):
        scale_N = _absmax(absmax, code, nested, offset, block_N, DOUBLE)
        w_NK = _values(tl.load(bytes_NK), scale_N, table, dtype)
        acc = tl.dot(tl.load(x_MK), w_NK.T, acc, input_precision=PRECISION)
        bytes_NK += 32
        block_N += 1
        x_MK += 64
    finish(
        acc, s, b, bias, y, y, tile_n, rm, row_M, rn, M, N, ssm, sbn, sbr, sym, dtype,
        RANK, BR, LORA, BIAS, False, True, PRECISION,
    )  # fmt: skip


@triton.jit
def _decode(
    packed, absmax, code, nested, levels, w, first, size, offset,
    DOUBLE: tl.constexpr, MASKED: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    dtype: tl.constexpr = w.dtype.element_ty
    # as many bytes to a thread as make a store of 16: loads and stores then share one layout, and nothing is shuffled
    PER_THREAD: tl.constexpr = 64 // dtype.primitive_bitwidth
    block = first + tl.arange(0, BLOCKS)
    at = block[:, None] * 32 + tl.max_contiguous(tl.arange(0, 32), PER_THREAD)[None, :]
    pair = tl.load(packed + at, mask=at < size, other=0) if MASKED else tl.load(packed + at)
    known = tl.minimum(block, (size - 1) // 32) if MASKED else block
    table = tl.load(levels + tl.arange(0, 16))
    value = _values(pair, _absmax(absmax, code, nested, offset, known, DOUBLE), table, dtype)
    out = block[:, None] * 64 + tl.arange(0, 64)[None, :]
    tl.store(w + out, value, mask=out < 2 * size if MASKED else None)


@triton.jit(do_not_specialize=["size"])
def decode_nf4(packed, absmax, code, nested, levels, w, size, offset, DOUBLE: tl.constexpr, BLOCKS: tl.constexpr):
    """w [2 size] in w's dtype out of packed [size]; the last block may be shorter than 64."""
    first = tl.program_id(0).to(tl.int64) * BLOCKS
    if (first + BLOCKS) * 32 <= size:  # without masks loads and stores are wide whatever the size
        _decode(packed, absmax, code, nested, levels, w, first, size, offset, DOUBLE, False, BLOCKS)
    else:
        _decode(packed, absmax, code, nested, levels, w, first, size, offset, DOUBLE, True, BLOCKS)
