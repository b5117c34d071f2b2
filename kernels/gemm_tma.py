"""`lora_gemm` for sm_90, sm_100 and sm_103: tiles come through tensor descriptors (TMA), and programs take them in turn.

The epilogue is gemm.py's. Other targets never get this version, because descriptors become 2-byte loads below sm_90 and
on AMD. `flatten` overflows tensor memory on sm_100, and `warp_specialize` fails or overflows, so both are off.

M rows, K reduced, N columns, R rank.
"""

import triton
import triton.language as tl

from .gemm import finish, masked_low_rank, tile_of


@triton.jit(do_not_specialize=["M", "seed", "threshold"])
def lora_gemm_tma(
    x_desc, w_desc, s, b, bias, y, norms, M, N, K, seed, threshold, ssm, sbn, sbr, sym,
    RANK: tl.constexpr, BR: tl.constexpr, LORA: tl.constexpr, MASK: tl.constexpr, BIAS: tl.constexpr,
    NORMS: tl.constexpr, STORE: tl.constexpr, W_IS_NK: tl.constexpr, PRECISION: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """x_desc [M, K] in blocks [BM, BK]; w_desc [N, K] in blocks [BN, BK], or [K, N] in [BK, BN] if not W_IS_NK."""
    dtype: tl.constexpr = y.dtype.element_ty
    tiles = tl.cdiv(M, BM) * tl.cdiv(N, BN)
    for tile in tl.range(tl.program_id(0), tiles, tl.num_programs(0)):
        tile_m, tile_n = tile_of(tile, M, N, BM, BN, GROUP)
        rm = tile_m.to(tl.int64) * BM + tl.arange(0, BM)
        row_M = tl.where(rm < M, rm, 0)
        rn = tile_n * BN + tl.arange(0, BN)
        acc = tl.zeros((BM, BN), tl.float32)
        if MASK:
            acc = masked_low_rank(
                s, b, row_M, rm, rn, tile_n, seed, N, threshold, ssm, sbn, sbr, dtype, RANK, BR, PRECISION, BM, BN
            )
        for k in range(0, tl.cdiv(K, BK)):  # beyond the edges a descriptor reads zeros
            x_tile = x_desc.load([tile_m * BM, k * BK])
            if W_IS_NK:
                w_tile = w_desc.load([tile_n * BN, k * BK]).T
            else:
                w_tile = w_desc.load([k * BK, tile_n * BN])
            acc = tl.dot(x_tile, w_tile, acc, input_precision=PRECISION)
        finish(
            acc, s, b, bias, y, norms, tile_n, rm, row_M, rn, M, N, ssm, sbn, sbr, sym, dtype,
            RANK, BR, LORA and not MASK, BIAS, NORMS, STORE, PRECISION,
        )  # fmt: skip
