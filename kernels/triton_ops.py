"""Launchers: they take torch tensors, launch Triton kernels and return torch tensors. Callers check shapes and dtypes.

c = scaling / (1 - p) is folded into S and dS, as in torch_ops.py. Every launch goes to the current stream of the
tensors' device, which Triton reads at each call. Empty outputs are returned without a launch, and empty sums are zeros.

M tokens, K in, N out, R rank, G adapters that share an input.
"""

from collections.abc import Sequence

import torch
import triton
from triton.tools.tensor_descriptor import TensorDescriptor

from . import dispatch, philox
from .dispatch import Plan, Tiles
from .expand import lora_expand
from .gemm import lora_gemm
from .gemm_tma import lora_gemm_tma
from .grads import lora_grads
from .grads_grid import grads_grid, stripe_widths
from .launch import near, on_device, padded_rank, precision, rank_chunk, sum_parts
from .reduce import row_norms as row_norms_kernel
from .shrink import lora_shrink

MAX_STACKED = 3


def shrink(x_MK: torch.Tensor, a_RK: torch.Tensor, c: float, p: float = 0.0, seed: int = 0) -> torch.Tensor:
    """S = c drop(X) A^T, [M, R] in X's dtype; `drop` zeroes elements and does not rescale."""
    return shrink_stacked(x_MK, (a_RK,), c, p, (seed,))[0][0]


def shrink_stacked(
    x_MK: torch.Tensor,
    adapters: Sequence[torch.Tensor],
    c: float,
    p: float = 0.0,
    seeds: Sequence[int] = (0, 0, 0),
    *,
    norms: bool = False,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """S [G, M, R] of up to three adapters A [R, K] of one rank and layout, and ||x|| [M] in float32; reads X once."""
    (m, k), rank, count = x_MK.shape, adapters[0].shape[0], len(adapters)
    assert count <= MAX_STACKED and all(a.shape == adapters[0].shape for a in adapters)
    assert all(a.stride() == adapters[0].stride() for a in adapters)
    if not m:
        return x_MK.new_empty(count, m, rank), x_MK.new_empty(m, dtype=torch.float32) if norms else None
    padded = padded_rank(rank)
    if padded * count > 128 and count > 1:  # together their accumulators would spill, so X is read once for each
        parts = [shrink_stacked(x_MK, (a,), c, p, (seed,)) for a, seed in zip(adapters, seeds, strict=False)]
        return torch.cat([s for s, _ in parts]), row_norms(x_MK) if norms else None
    units = dispatch.target_of(x_MK.device).units
    bm = next((b for b in (64, 32) if triton.cdiv(m, b) >= units), 16)
    bk = 32 if x_MK.dtype == torch.float32 or padded * count > (32 if p else 64) else 64
    rows = triton.cdiv(m, bm)
    steps = max(1, triton.cdiv(k, bk))
    # as many parts as fill the GPU with programs, each with at least four steps
    splits = min(max(1, units // rows), max(1, steps // 4))
    chunk = triton.cdiv(steps, splits) * bk
    splits = max(1, triton.cdiv(k, chunk))
    s = x_MK.new_empty(splits, count, m, rank, dtype=x_MK.dtype if splits == 1 else torch.float32)
    squares = x_MK.new_empty(splits, m, dtype=torch.float32) if norms else None
    a0, a1, a2 = (*adapters, *[adapters[0]] * (MAX_STACKED - count))
    seed0, seed1, seed2 = (*seeds, 0, 0)[:3]
    with on_device(x_MK):
        lora_shrink[(rows, splits)](
            x_MK, a0, a1, a2, s, squares if norms else s, m, k, chunk, c if splits == 1 else 1.0, seed0, seed1, seed2,
            philox.threshold(p), *x_MK.stride(), *a0.stride(),
            RANK=rank, RP=padded, ADAPTERS=count, DROP=p > 0, NORMS=norms, PRECISION=precision(x_MK), BM=bm, BK=bk,
            num_warps=8 if padded * count > 128 else 4, num_stages=3 if padded <= 128 else 2,
        )  # fmt: skip
        s = s[0] if splits == 1 else sum_parts(s, c, x_MK.dtype)
        return s, sum_parts(squares, 1.0, torch.float32, root=True) if squares is not None else None


def forward(
    x_MK: torch.Tensor,
    s_MR: torch.Tensor,
    w_NK: torch.Tensor,
    b_NR: torch.Tensor,
    bias_N: torch.Tensor | None,
    plan: Plan,
) -> torch.Tensor:
    """Y = X W^T + S B^T + bias"""
    if plan.strategy == "fused":
        return gemm(x_MK, w_NK, s_MR, b_NR, bias_N, tiles=plan.tiles)[0]
    return low_rank(s_MR, b_NR, bias_N).addmm_(x_MK, w_NK.T)


def grad_x(
    dy_MN: torch.Tensor, ds_MR: torch.Tensor, w_NK: torch.Tensor, a_RK: torch.Tensor, p: float, seed: int, plan: Plan
) -> torch.Tensor:
    """dX = dY W + mask (dS A); dS holds the factor 1 / (1 - p)"""
    if plan.strategy == "fused":
        return gemm(dy_MN, w_NK.T, ds_MR, a_RK.T, p=p, seed=seed, tiles=plan.tiles)[0]
    return low_rank(ds_MR, a_RK.T, p=p, seed=seed).addmm_(dy_MN, w_NK)


def grad_s_and_b(
    dy_MN: torch.Tensor, s_MR: torch.Tensor, b_NR: torch.Tensor, c: float, dtype: torch.dtype | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """dS = c dY B in dY's dtype and dB = dY^T S in `dtype` (default: B's); reads dY once, or twice for a high rank."""
    dtype = dtype or b_NR.dtype
    if not stripe_widths(dispatch.target_of(dy_MN.device), dy_MN.dtype, s_MR.shape[1], with_ds=True):
        return grad_s(dy_MN, b_NR, c), grad_b(dy_MN, s_MR, dtype)
    db_NR, ds_MR = _grads(dy_MN, s_MR, dtype, u=b_NR, c=c)
    assert ds_MR is not None
    return ds_MR, db_NR


def grad_s(dy_MN: torch.Tensor, b_NR: torch.Tensor, c: float) -> torch.Tensor:
    """dS = c dY B, a shrink whose A is B^T."""
    return shrink(dy_MN, b_NR.T, c)


def grad_b(dy_MN: torch.Tensor, s_MR: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """dB = dY^T S"""
    return _grads(dy_MN, s_MR, dtype)[0]


def grad_a(ds_MR: torch.Tensor, x_MK: torch.Tensor, p: float, seed: int, dtype: torch.dtype) -> torch.Tensor:
    """dA = dS^T drop(X)"""
    return _grads(x_MK, ds_MR, dtype, p=p, seed=seed, transposed=True)[0]


def gemm(
    x_MK: torch.Tensor,
    w_NK: torch.Tensor,
    s_MR: torch.Tensor | None = None,
    b_NR: torch.Tensor | None = None,
    bias_N: torch.Tensor | None = None,
    *,
    p: float = 0.0,
    seed: int = 0,
    norms: bool = False,
    store: bool = True,
    tiles: Tiles | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Y = X W^T + mask (S B^T) + bias, and ||x W^T|| [M] if `norms`. A mask if p > 0; Y is empty unless `store`."""
    (m, k), n = x_MK.shape, w_NK.shape[0]
    assert not p or (s_MR is not None and not norms)
    y_MN = x_MK.new_empty(m, n) if store else x_MK.new_empty(0, 1)
    if not m or not n:
        return y_MN, x_MK.new_zeros(m, dtype=torch.float32) if norms else None
    target = dispatch.target_of(x_MK.device)
    tiles = tiles or dispatch.candidates(target, x_MK.dtype, m)[0]
    if not (describable(x_MK, w_NK) if tiles.descriptor else copyable(x_MK, w_NK)):
        tiles = dispatch.unaligned(target)
    lora, rank = s_MR is not None, 1 if s_MR is None else s_MR.shape[1]
    bn = min(tiles.bn, 128) if p else tiles.bn  # the random words of the mask need registers
    tiles_n = triton.cdiv(n, bn)
    parts = x_MK.new_empty(tiles_n, m, dtype=torch.float32) if norms else y_MN
    s, b = (s_MR, near(b_NR)) if s_MR is not None and b_NR is not None else (x_MK, x_MK)
    bias = x_MK if bias_N is None else bias_N.contiguous()
    options = {
        "RANK": rank, "BR": rank_chunk(rank), "LORA": lora, "MASK": p > 0, "BIAS": bias_N is not None,
        "NORMS": norms, "STORE": store, "PRECISION": precision(x_MK), "BM": tiles.bm, "BN": bn, "BK": tiles.bk,
        "GROUP": tiles.group, "num_warps": tiles.warps, "num_stages": tiles.stages,
    }  # fmt: skip
    strides = (*(s.stride()[:1] if lora else (0,)), *(b.stride() if lora else (0, 0)), y_MN.stride(0))
    drop = (seed, philox.threshold(p))
    count = triton.cdiv(m, tiles.bm) * tiles_n
    with on_device(x_MK):
        if tiles.descriptor:
            nk = w_NK.stride(1) == 1
            x_desc = TensorDescriptor.from_tensor(x_MK, [tiles.bm, tiles.bk])
            w_desc = TensorDescriptor.from_tensor(*((w_NK, [bn, tiles.bk]) if nk else (w_NK.T, [tiles.bk, bn])))
            lora_gemm_tma[(min(count, target.units),)](
                x_desc, w_desc, s, b, bias, y_MN, parts, m, n, k, *drop, *strides, W_IS_NK=nk, **options
            )  # fmt: skip
        else:
            lora_gemm[(count,)](
                x_MK, w_NK, s, b, bias, y_MN, parts, m, n, k, *drop, *x_MK.stride(), *w_NK.stride(), *strides,
                EVEN_K=k % tiles.bk == 0, **options,
            )  # fmt: skip
        return y_MN, sum_parts(parts, 1.0, torch.float32, root=True) if norms else None


def describable(*matrices: torch.Tensor) -> bool:
    """Whether TMA descriptors can hold these: 16-bit, one stride 1, the other and the address multiples of 16 bytes."""
    for matrix in matrices:
        size, (outer, inner) = matrix.element_size(), sorted(matrix.stride(), reverse=True)
        if size != 2 or inner != 1 or outer * size % 16 or matrix.data_ptr() % 16 or not matrix.numel():
            return False
    return matrices[0].stride(1) == 1


def copyable(*matrices: torch.Tensor) -> bool:
    """Whether tiles come in 16-byte copies: Triton wants one stride 1 and the other a multiple of 16 elements."""
    return all(1 in m.stride() and max(m.stride()) % 16 == 0 and m.data_ptr() % 16 == 0 for m in matrices)


def low_rank(
    s_MR: torch.Tensor, b_NR: torch.Tensor, bias_N: torch.Tensor | None = None, *, p: float = 0.0, seed: int = 0
) -> torch.Tensor:
    """L = mask (S B^T) + bias in S's dtype. The mask is there if p > 0."""
    (m, rank), n = s_MR.shape, b_NR.shape[0]
    y_MN = s_MR.new_empty(m, n)
    if not m or not n:
        return y_MN
    bm, bn = dispatch.expand_tiles(s_MR.dtype)
    b_NR = near(b_NR)
    with on_device(s_MR):
        lora_expand[(triton.cdiv(m, bm), triton.cdiv(n, bn))](
            s_MR, b_NR, s_MR if bias_N is None else bias_N.contiguous(), y_MN, m, n, seed, philox.threshold(p),
            s_MR.stride(0), *b_NR.stride(), n,
            RANK=rank, BR=rank_chunk(rank), MASK=p > 0, BIAS=bias_N is not None, PRECISION=precision(s_MR),
            BM=bm, BN=bn, num_warps=4, num_stages=2,
        )  # fmt: skip
    return y_MN


def frozen_norms(x_MK: torch.Tensor, w_NK: torch.Tensor, tiles: Tiles | None = None) -> torch.Tensor:
    """||x W^T|| [M] in float32. Y is never written."""
    norms = gemm(x_MK, w_NK, norms=True, store=False, tiles=tiles)[1]
    assert norms is not None
    return norms


def row_norms(y_MN: torch.Tensor, bias_N: torch.Tensor | None = None) -> torch.Tensor:
    """||y - bias|| [M] in float32, from one read of Y."""
    m, n = y_MN.shape
    norms = y_MN.new_empty(m, dtype=torch.float32)
    if m:
        bn = min(1024, max(64, triton.next_power_of_2(n)))
        bm = max(1, 2048 // bn)
        with on_device(y_MN):
            row_norms_kernel[(triton.cdiv(m, bm),)](
                y_MN, y_MN if bias_N is None else bias_N.contiguous(), norms, m, n, *y_MN.stride(), BIAS=bias_N is not None,
                BM=bm, BN=bn, num_warps=4,
            )  # fmt: skip
    return norms


def _grads(
    t_MC: torch.Tensor, v_MR: torch.Tensor, dtype: torch.dtype, *, u: torch.Tensor | None = None, c: float = 1.0,
    p: float = 0.0, seed: int = 0, transposed: bool = False,
) -> tuple[torch.Tensor, torch.Tensor | None]:  # fmt: skip
    """T^T V as [C, R] ([R, C] if `transposed`), and c T U [M, R] if `u` is given. See grads.py."""
    (m, columns), rank = t_MC.shape, v_MR.shape[1]
    shape = (rank, columns) if transposed else (columns, rank)
    if not m or not columns:
        return v_MR.new_zeros(shape, dtype=dtype), None if u is None else v_MR.new_zeros(m, rank)
    target = dispatch.target_of(t_MC.device)
    bm, bc, tiles, parts, stripes = grads_grid(target, t_MC.dtype, m, columns, rank, u is not None)
    g = v_MR.new_empty(parts, *shape, dtype=dtype if parts == 1 else torch.float32)
    shape_ds = (stripes, m, rank) if u is not None else (0,)
    ds = v_MR.new_empty(shape_ds, dtype=v_MR.dtype if stripes == 1 else torch.float32)
    warps = 8 if bc * tiles * padded_rank(rank) >= 4096 or (u is not None and t_MC.dtype == torch.float32) else 4
    stages = 3 if u is None and rank <= 64 else 2
    if target.name == "sm_90" and bc * tiles > 512:
        stages = 1  # it would spill with copies in flight
    with on_device(t_MC):
        lora_grads[(stripes, parts)](
            t_MC, v_MR, t_MC if u is None else u, g, ds, m, columns, triton.cdiv(triton.cdiv(m, bm), parts) * bm,
            c if stripes == 1 else 1.0, seed, philox.threshold(p), *t_MC.stride(), v_MR.stride(0),
            *((0, 0) if u is None else u.stride()), columns * rank, *((1, columns) if transposed else (rank, 1)), m * rank,
            RANK=rank, RP=padded_rank(rank), WITH_DS=u is not None, DROP=p > 0, PRECISION=precision(t_MC),
            BM=bm, BC=bc, TILES=tiles, num_warps=warps,
            num_stages=stages,
        )  # fmt: skip
        g = g[0] if parts == 1 else sum_parts(g, 1.0, dtype)
        if u is None:
            return g, None
        return g, ds[0] if stripes == 1 else sum_parts(ds, c, v_MR.dtype)
