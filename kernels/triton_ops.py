"""Launchers: they take torch tensors, launch Triton kernels and return torch tensors. Callers check shapes and dtypes.

c = scaling / (1 - p) is folded into S and dS, as in torch_ops.py. Every launch goes to the current stream of the
tensors' device, which is read at each call. Empty outputs are returned without a launch, and empty sums are zeros.

Each launcher comes in two parts. The second takes shapes, strides and dtypes, and makes the plan: tiles, grids, constants.
The first looks the plan up and gives it the tensors.

M tokens, K in, N out, R rank, G adapters that share an input.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import triton
from triton.tools.tensor_descriptor import TensorDescriptor

from . import dispatch, philox
from .dispatch import Plan, Tiles
from .expand import lora_expand
from .gemm import lora_gemm
from .gemm_tma import lora_gemm_tma
from .grads import lora_grads
from .grids import STAGES, grads_grid, shrink_grid
from .launch import (
    Planned,
    gradients,
    is_near,
    low_rank_facts,
    on_device,
    padded_rank,
    plan,
    precision,
    rank_chunk,
    summing,
)
from .reduce import row_norms as row_norms_kernel
from .shrink import lora_shrink

MAX_STACKED = 3


def shrink(x_MK: torch.Tensor, a_RK: torch.Tensor, c: float, p: float = 0.0, seed: philox.Seed = 0) -> torch.Tensor:
    """S = c drop(X) A^T, [M, R] in X's dtype; `drop` zeroes elements and does not rescale."""
    return shrink_stacked(x_MK, (a_RK,), c, p, (seed,))[0]


def shrink_stacked(
    x_MK: torch.Tensor,
    adapters: Sequence[torch.Tensor],
    c: float,
    p: float = 0.0,
    seeds: Sequence[philox.Seed] = (0, 0, 0),
) -> torch.Tensor:
    """S [G, M, R] of up to three adapters A [R, K] of one rank and layout; reads X once."""
    first = adapters[0]
    for a in adapters[1:]:
        assert a.shape == first.shape and a.stride() == first.stride()
    run = plan(
        _shrink, x_MK.device, x_MK.dtype, x_MK.shape, x_MK.stride(), first.dtype, first.shape, first.stride(),
        len(adapters), c, p, precision(x_MK),
    )  # fmt: skip
    return run(x_MK, adapters, seeds)


def _shrink(
    device: torch.device, dtype: torch.dtype, shape: torch.Size, strides: tuple[int, ...], a_dtype: torch.dtype,
    a_shape: torch.Size, a_strides: tuple[int, ...], count: int, c: float, p: float, exact: str,
) -> Callable[..., torch.Tensor]:  # fmt: skip
    (m, k), rank = shape, a_shape[0]
    assert count <= MAX_STACKED
    if not m:
        return lambda x, adapters, seeds: x.new_empty(count, m, rank)
    padded = padded_rank(rank)
    if padded * count > 128 and count > 1:  # together their accumulators would spill, so X is read once for each
        return lambda x, adapters, seeds: torch.cat(
            [shrink_stacked(x, (a,), c, p, (seed,)) for a, seed in zip(adapters, seeds, strict=False)]
        )
    bm, bk, rows, splits, chunk, warps = shrink_grid(dispatch.target_of(device), dtype, m, k, padded * count, p > 0)
    launch = Planned(
        lora_shrink, (rows, splits), (k, chunk, philox.threshold(p), *strides, *a_strides),
        {"RANK": rank, "RP": padded, "ADAPTERS": count, "DROP": p > 0, "PRECISION": exact, "BM": bm, "BK": bk},
        device, num_warps=warps, num_stages=STAGES if padded <= 128 else 2,
    )  # fmt: skip
    gather = summing(device, splits, (count, m, rank), dtype, c)

    def run(x: torch.Tensor, adapters: Sequence[torch.Tensor], seeds: Sequence[philox.Seed]) -> torch.Tensor:
        a0, a1, a2 = (*adapters, *[adapters[0]] * (MAX_STACKED - count))
        s = x.new_empty(splits, count, m, rank, dtype=torch.float32)
        launch((x, a0, a1, a2, s), (m, *(*seeds, 0, 0)[:3]))
        return gather(s)

    return run


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
    dy_MN: torch.Tensor,
    ds_MR: torch.Tensor,
    w_NK: torch.Tensor,
    a_RK: torch.Tensor,
    p: float,
    seed: philox.Seed,
    plan: Plan,
) -> torch.Tensor:
    """dX = dY W + mask (dS A); dS holds the factor 1 / (1 - p)"""
    if plan.strategy == "fused":
        return gemm(dy_MN, w_NK.T, ds_MR, a_RK.T, p=p, seed=seed, tiles=plan.tiles)[0]
    return low_rank(ds_MR, a_RK.T, p=p, seed=seed).addmm_(dy_MN, w_NK)


def grad_s_and_b(
    dy_MN: torch.Tensor, s_MR: torch.Tensor, b_NR: torch.Tensor, c: float, dtype: torch.dtype | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """dS = c dY B in dY's dtype and dB = dY^T S in `dtype` (default: B's), from one read of dY. Up to rank MOST_DS_RANK."""
    assert s_MR.shape[1] <= dispatch.MOST_DS_RANK
    db_NR, ds_MR = _grads(dy_MN, s_MR, dtype or b_NR.dtype, u=b_NR, c=c)
    assert ds_MR is not None
    return ds_MR, db_NR


def grad_a(ds_MR: torch.Tensor, x_MK: torch.Tensor, p: float, seed: philox.Seed, dtype: torch.dtype) -> torch.Tensor:
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
    seed: philox.Seed = 0,
    norms: bool = False,
    store: bool = True,
    tiles: Tiles | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Y = X W^T + mask (S B^T) + bias, and ||x W^T|| [M] if `norms`. A mask if p > 0; Y is empty unless `store`."""
    assert not p or (s_MR is not None and not norms)
    if x_MK.shape[0] and w_NK.shape[0]:
        target = dispatch.target_of(x_MK.device)
        tiles = tiles or dispatch.candidates(target, x_MK.dtype)[0]
        if not (describable(x_MK, w_NK) if tiles.descriptor else copyable(x_MK, w_NK)):
            tiles = dispatch.unaligned(target)
    b_NR, lora = low_rank_facts(s_MR, b_NR)
    run = plan(
        _gemm, x_MK.device, x_MK.dtype, x_MK.shape, x_MK.stride(), w_NK.shape[0], w_NK.stride(), lora, bias_N is not None,
        p, norms, store, tiles, precision(x_MK),
    )  # fmt: skip
    return run(x_MK, w_NK, s_MR, b_NR, bias_N, seed)


def _gemm(
    device: torch.device, dtype: torch.dtype, shape: torch.Size, x_strides: tuple[int, ...], n: int,
    w_strides: tuple[int, ...], lora: tuple[Any, ...], biased: bool, p: float, norms: bool, store: bool, tiles: Tiles,
    exact: str,
) -> Callable[..., tuple[torch.Tensor, torch.Tensor | None]]:  # fmt: skip
    (m, k), (rank, s_strides, b_strides, _) = shape, lora
    y_shape = (m, n) if store else (0, 1)
    if not m or not n:
        return lambda x, *_: (x.new_empty(y_shape), x.new_zeros(m, dtype=torch.float32) if norms else None)
    bn = min(tiles.bn, 128) if p else tiles.bn  # the random words of the mask need registers
    tiles_n = triton.cdiv(n, bn)
    count = triton.cdiv(m, tiles.bm) * tiles_n
    options = {"num_warps": tiles.warps, "num_stages": tiles.stages}
    constants = {"RANK": rank, "BR": rank_chunk(rank), "LORA": bool(s_strides), "MASK": p > 0, "BIAS": biased, "NORMS": norms,
                 "STORE": store}  # fmt: skip
    sizes = {"PRECISION": exact, "BM": tiles.bm, "BN": bn, "BK": tiles.bk, "GROUP": tiles.group}
    strides = (*(s_strides or (0,)), *(b_strides or (0, 0)), y_shape[1])
    threshold, units = philox.threshold(p), dispatch.target_of(device).units
    launch = Planned(
        lora_gemm, (count,), (n, k, threshold, *x_strides, *w_strides, *strides),
        {**constants, "EVEN_K": k % tiles.bk == 0, **sizes}, device, **options,
    )  # fmt: skip
    root = summing(device, tiles_n, (m,), torch.float32, 1.0, root=True)

    def run(
        x: torch.Tensor,
        w: torch.Tensor,
        s: torch.Tensor | None,
        b: torch.Tensor | None,
        bias: torch.Tensor | None,
        seed: philox.Seed,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        y = x.new_empty(y_shape)
        parts = x.new_empty(tiles_n, m, dtype=torch.float32) if norms else y
        others = x if s is None else s, x if b is None else b, x if bias is None else bias.contiguous(), y, parts
        if tiles.descriptor:
            nk = w.stride(1) == 1
            x_desc = TensorDescriptor.from_tensor(x, [tiles.bm, tiles.bk])
            w_desc = TensorDescriptor.from_tensor(*((w, [bn, tiles.bk]) if nk else (w.T, [tiles.bk, bn])))
            with on_device(x):
                lora_gemm_tma[(min(count, units),)](
                    x_desc, w_desc, *others, m, n, k, seed, threshold, *strides, W_IS_NK=nk, **constants, **sizes, **options
                )  # fmt: skip
        else:
            launch((x, w, *others), (m, seed))
        return y, root(parts) if norms else None

    return run


def describable(*matrices: torch.Tensor) -> bool:
    """Whether TMA descriptors can hold these: 16-bit, one stride 1, the other and the address multiples of 16 bytes."""
    for matrix in matrices:
        size, (outer, inner) = matrix.element_size(), sorted(matrix.stride(), reverse=True)
        if size != 2 or inner != 1 or outer * size % 16 or matrix.data_ptr() % 16 or not matrix.numel():
            return False
    return matrices[0].stride(1) == 1


def copyable(*matrices: torch.Tensor) -> bool:
    """Whether tiles come in 16-byte copies: Triton wants one stride 1 and the others multiples of 16 elements."""
    strides = (sorted(m.stride()) for m in matrices)
    return all(s[0] == 1 and not any(one % 16 for one in s[1:]) for s in strides) and not any(
        m.data_ptr() % 16 for m in matrices
    )


def low_rank(
    s_MR: torch.Tensor, b_NR: torch.Tensor, bias_N: torch.Tensor | None = None, *, p: float = 0.0, seed: philox.Seed = 0,
    out: torch.Tensor | None = None,
) -> torch.Tensor:  # fmt: skip
    """L = mask (S B^T) + bias in S's dtype, in `out` [M, N] (dense) or in new memory. The mask is there if p > 0."""
    run = plan(
        _low_rank, s_MR.device, s_MR.dtype, s_MR.shape, s_MR.stride(0), b_NR.dtype, b_NR.shape, b_NR.stride(),
        bias_N is not None, p, precision(s_MR),
    )  # fmt: skip
    return run(s_MR, b_NR, bias_N, seed, out)


def _low_rank(
    device: torch.device, dtype: torch.dtype, shape: torch.Size, row: int, b_dtype: torch.dtype, b_shape: torch.Size,
    b_strides: tuple[int, ...], biased: bool, p: float, exact: str,
) -> Callable[..., torch.Tensor]:  # fmt: skip
    (m, rank), n, (bm, bn), near = shape, b_shape[0], dispatch.expand_tiles(dtype), is_near(b_shape, b_strides)
    launch = Planned(
        lora_expand, (triton.cdiv(m, bm), triton.cdiv(n, bn)),
        (n, philox.threshold(p), row, *(b_strides if near else (rank, 1)), n),
        {"RANK": rank, "BR": rank_chunk(rank), "MASK": p > 0, "BIAS": biased, "PRECISION": exact, "BM": bm, "BN": bn},
        device, num_warps=8 if exact == "tf32" else 4, num_stages=2,
    )  # fmt: skip

    def run(
        s: torch.Tensor, b: torch.Tensor, bias: torch.Tensor | None, seed: philox.Seed, out: torch.Tensor | None
    ) -> torch.Tensor:
        y = s.new_empty(m, n) if out is None else out
        if m and n:
            b = b if near else b.contiguous()
            launch((s, b, s if bias is None else bias.contiguous(), y), (m, seed))
        return y

    return run


def frozen_norms(x_MK: torch.Tensor, w_NK: torch.Tensor, tiles: Tiles | None = None) -> torch.Tensor:
    """||x W^T|| [M] in float32. Y is never written."""
    norms = gemm(x_MK, w_NK, norms=True, store=False, tiles=tiles)[1]
    assert norms is not None
    return norms


def row_norms(y_MN: torch.Tensor, bias_N: torch.Tensor | None = None) -> torch.Tensor:
    """||y - bias|| [M] in float32, from one read of Y."""
    run = plan(_row_norms, y_MN.device, y_MN.dtype, y_MN.shape, y_MN.stride(), None if bias_N is None else bias_N.dtype)
    return run(y_MN, bias_N)


def _row_norms(
    device: torch.device, dtype: torch.dtype, shape: torch.Size, strides: tuple[int, ...], bias: torch.dtype | None
) -> Callable[..., torch.Tensor]:
    m, n = shape
    bn = min(1024, max(64, triton.next_power_of_2(n)))
    bm = max(1, 2048 // bn)
    launch = Planned(
        row_norms_kernel, (triton.cdiv(m, bm),), (n, *strides), {"BIAS": bias is not None, "BM": bm, "BN": bn}, device,
        num_warps=4,
    )  # fmt: skip

    def run(y: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        norms = y.new_empty(m, dtype=torch.float32)
        if m:
            launch((y, y if bias is None else bias.contiguous(), norms), (m,))
        return norms

    return run


def _grads(
    t_MC: torch.Tensor, v_MR: torch.Tensor, dtype: torch.dtype, *, u: torch.Tensor | None = None, c: float = 1.0,
    p: float = 0.0, seed: philox.Seed = 0, transposed: bool = False,
) -> tuple[torch.Tensor, torch.Tensor | None]:  # fmt: skip
    """T^T V as [C, R] ([R, C] if `transposed`), and c T U [M, R] if `u` is given. See grads.py."""
    run = plan(
        _grads_plan, t_MC.device, t_MC.dtype, t_MC.shape, t_MC.stride(), v_MR.shape[1], v_MR.stride(0), v_MR.dtype, dtype,
        None if u is None else (u.dtype, u.stride()), c, p, transposed,
        precision(t_MC),
    )  # fmt: skip
    return run(t_MC, v_MR, u, (), (seed,))


def _grads_plan(
    device: torch.device, t_dtype: torch.dtype, t_shape: torch.Size, t_strides: tuple[int, ...], rank: int, row: int,
    v_dtype: torch.dtype, dtype: torch.dtype, u: tuple[Any, ...] | None, c: float, p: float, transposed: bool, exact: str,
) -> Callable[..., tuple[torch.Tensor, torch.Tensor | None]]:  # fmt: skip
    m, columns = t_shape
    shape = (rank, columns) if transposed else (columns, rank)
    if not m or not columns:
        return lambda t, v, *_: (v.new_zeros(shape, dtype=dtype), None if u is None else v.new_zeros(m, rank))
    target = dispatch.target_of(device)
    bm, bc, warps, parts, stripes = grads_grid(target, t_dtype, m, columns, rank, u is not None, p > 0)
    order = (columns * rank, *((1, columns) if transposed else (rank, 1)))
    launch = Planned(
        lora_grads, (stripes, parts),
        (columns, c if stripes == 1 else 1.0, philox.threshold(p), *t_strides, row, *(u[1] if u else (0, 0)), *order),
        {"RANK": rank, "RP": padded_rank(rank), "WITH_DS": u is not None, "DROP": p > 0, "PRECISION": exact, "BM": bm,
         "BC": bc}, device, num_warps=warps, num_stages=STAGES,
    )  # fmt: skip
    chunk = triton.cdiv(triton.cdiv(m, bm), parts) * bm
    return gradients(launch, device, parts, shape, dtype, stripes, (m, rank), v_dtype, c, u is not None, (m, chunk))
