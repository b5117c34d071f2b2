"""Several adapters on one frozen weight: rows sorted into segments, each of which has an adapter of its own, or none.

    S = c drop(X) A_e^T;  Y = X W^T + S B_e^T + bias          for the rows of segment e;  c = scaling_e / (1 - p_e)
    dS = c dY B_e;  dB_e = dY^T S;  dA_e = dS^T drop(X);  dX = dY W + mask (dS A_e)

One pass through a model then serves several adapters: the frozen weight, which is nearly all of the work, is read once for all
rows, and the low-rank terms are those of `lora_linear` (ops.py), with its dropout masks.

M rows, K in, N out, R rank, E segments.
"""

from collections.abc import Sequence
from typing import Any

import torch

from ..kernels import dispatch, library_many
from ..kernels.autograd import once
from ..kernels.codes import Codes, Weight, dense
from ..support.errors import BackendError
from .ops import check, check_frozen, is_direct

Low = Sequence[tuple[torch.Tensor, torch.Tensor] | None]


def lora_linear_grouped(
    x: torch.Tensor,
    weight: Weight,
    lora_As: Sequence[torch.Tensor | None],
    lora_Bs: Sequence[torch.Tensor | None],
    cuts: Sequence[int],
    scalings: Sequence[float],
    *,
    bias: torch.Tensor | None = None,
    dropout_ps: Sequence[float] | None = None,
    seeds: Sequence[int | torch.Tensor | None] | None = None,
    backend: str = "auto",
    low: Low | None = None,
) -> torch.Tensor:
    """Applies one frozen linear layer to all rows, and to each segment of rows its own low-rank update.

    x [..., K] counts as M rows, of which segment e has cuts[e] to cuts[e + 1]: `cuts` are E + 1 ints, 0 first and M last, and a
    segment may be empty. Its adapter is lora_As[e] [R_e, K] and lora_Bs[e] [N, R_e], with scalings[e]; ranks may differ. Where
    both are None, the rows get the frozen weight alone. One adapter may serve several segments, and its gradients add up.
    Returns [..., N] in x's dtype: for the rows of segment e what `lora_linear` gives on them alone, dropout mask included.

    weight [N, K] (a tensor, a transposed view, or codes), bias [N], dtypes and autocast are as in `lora_linear`.
    `dropout_ps` and `seeds` have one entry for each segment. The backward pass keeps only x and the S's.

    `backend`: "torch" multiplies segment by segment, but by the frozen weight once. "triton", "fused" and "lora-first" take
    kernels that work on all segments at once; "auto" takes these wherever they run and more than one adapter has rows. With
    dropout on a GPU, the low-rank products go segment by segment through `lora_linear`'s kernels, which make no mask in memory.

    In eager mode, a caller can pass `low`: for each segment copies of its A and B in x's dtype (or None), which saves casts.

    Raises ValueError for lists, cuts, shapes, dtypes, devices and dropout rates that cannot work, naming the segment, and
    BackendError where `backend` cannot run.

        y = pf.lora_linear_grouped(x, linear.weight, [A0, A1], [B0, B1], [0, 96, 160], [2.0, 1.0], bias=linear.bias)

    >>> y = pf.lora_linear_grouped(x, weight, [lora_A, None], [lora_B, None], [0, 4, 6], [2.0, 1.0])
    >>> torch.allclose(y[4:], x[4:] @ weight.T, atol=1e-5)  # the last two rows have no adapter
    True
    """
    kind = x.device.type
    autocast = kind != "meta" and torch.is_autocast_enabled(kind)  # which raises for meta, where tools trace
    if autocast:
        dtype = torch.get_autocast_dtype(kind)
        x, weight, bias = x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
    elif isinstance(weight, Codes):
        weight = weight.to(x.dtype)
    _check(x, weight, lora_As, lora_Bs, cuts, scalings, bias, dropout_ps, seeds, low)
    ps, numbers = _dropout(lora_As, dropout_ps, seeds)
    given = () if is_direct(x) else _tensors(numbers)
    # dense, as lora_linear's are
    x_MK = (x if x.dim() == 2 else x.reshape(-1, x.shape[-1])).contiguous()
    how = cuts, scalings, ps, numbers, backend, low
    try:
        if autocast:
            with torch.autocast(kind, enabled=False):
                y_MN = _Grouped.apply(x_MK, weight, bias, how, *lora_As, *lora_Bs, *given)
        else:
            y_MN = _Grouped.apply(x_MK, weight, bias, how, *lora_As, *lora_Bs, *given)
    except dispatch.UnsupportedError as error:
        raise BackendError(str(error)) from None
    return y_MN if x.dim() == 2 else y_MN.view(*x.shape[:-1], weight.shape[0])


class _Grouped(torch.autograd.Function):
    """`apply(x, weight, bias, how, *lora_As, *lora_Bs, *seeds)`; the seeds, tensors or None, only for the operation."""

    @staticmethod
    def forward(ctx: Any, x_MK, w_NK, bias_N, how, *tensors):
        cuts, scalings, ps, numbers, backend, low = how
        count = len(cuts) - 1
        a: Any
        b: Any
        a, b, seeds = tensors[:count], tensors[count : 2 * count], tensors[2 * count :]
        ctx.codes, ctx.count = w_NK if isinstance(w_NK, Codes) else None, count
        if not is_direct(x_MK):
            op = torch.ops.plopfast.many_forward.default
            y_MN, s = op(x_MK, dense(w_NK), a, b, bias_N, cuts, scalings, ps, seeds, backend)
            ctx.direct, ctx.settings = None, (cuts, scalings, ps, backend)
        else:
            way = library_many.way_of(x_MK, w_NK, a, cuts, scalings, ps, numbers, backend)
            dtypes = library_many.dtypes_of(a, b)
            if low is not None:
                a, b = _copies(a, b, low, x_MK.dtype)
            y_MN, s = library_many.forward(x_MK, w_NK, a, b, bias_N, way)
            ctx.direct = way, dtypes
        ctx.save_for_backward(x_MK, w_NK if ctx.codes is None else None, *a, *b, *s, *seeds)
        ctx.parts = len(s)
        return y_MN

    @staticmethod
    @once
    def backward(ctx: Any, dy_MN: torch.Tensor) -> tuple[Any, ...]:
        x_MK, w_NK, *rest = ctx.saved_tensors
        count, parts = ctx.count, ctx.parts
        a, b, s, seeds = (
            rest[:count],
            rest[count : 2 * count],
            rest[2 * count : 2 * count + parts],
            rest[2 * count + parts :],
        )
        if ctx.codes is not None:
            w_NK = ctx.codes
        need = ctx.needs_input_grad
        need_x, need_a, need_b = need[0], need[4 : 4 + count], need[4 + count : 4 + 2 * count]
        dy_MN = dy_MN.contiguous()  # the gradient of a sum comes with stride 0
        if ctx.direct:
            way, dtypes = ctx.direct
            dx_MK, da, db = library_many.backward(dy_MN, x_MK, s, w_NK, a, b, way, need_x, need_a, need_b, dtypes)
        else:
            op = torch.ops.plopfast.many_backward.default
            found = op(
                dy_MN, x_MK, s, dense(w_NK), a, b, *ctx.settings[:3], seeds, ctx.settings[3], need_x, need_a, need_b
            )
            dx_MK, da, db = (found[0] if need_x else None), found[1 : 1 + count], found[1 + count :]
            da, db = (
                [g if want else None for g, want in zip(of, w, strict=True)] for of, w in ((da, need_a), (db, need_b))
            )
        return dx_MK, None, None, None, *da, *db, *[None] * (len(need) - 4 - 2 * count)


def _dropout(
    lora_As: Sequence[torch.Tensor | None],
    ps: Sequence[float] | None,
    seeds: Sequence[int | torch.Tensor | None] | None,
) -> tuple[tuple[float, ...], tuple[int | torch.Tensor | None, ...]]:
    """The rates and the seeds in force; both empty where nothing is dropped."""
    if ps is None or not any(ps):
        return (), ()
    rates = tuple(0.0 if one is None else p for one, p in zip(lora_As, ps, strict=True))
    numbers = tuple(_signed(seed) if p else None for p, seed in zip(rates, seeds or ps, strict=True))
    return rates, numbers


def _signed(seed: Any) -> int | torch.Tensor:
    return seed - (1 << 64) if isinstance(seed, int) and seed >= 1 << 63 else seed


def _tensors(seeds: Sequence[int | torch.Tensor | None]) -> list[torch.Tensor | None]:
    return [torch.tensor(seed, device="cpu") if isinstance(seed, int) else seed for seed in seeds]


def _copies(a: Any, b: Any, low: Low, dtype: torch.dtype) -> tuple[list[Any], list[Any]]:
    """A and B of each segment, or the copies in x's dtype that `low` has of them."""
    taken = [
        pair if pair is not None and one is not None and pair[0].dtype == dtype else (one, other)
        for one, other, pair in zip(a, b, low, strict=True)
    ]
    return [one for one, _ in taken], [other for _, other in taken]


def _check(x, weight, lora_As, lora_Bs, cuts, scalings, bias, ps, seeds, low) -> None:
    """Each segment has `check`'s one fast check; `_explain_lists` builds the errors of lists and cuts."""
    count = len(cuts) - 1
    lists = lora_As, lora_Bs, scalings, ps, seeds, low
    if any(one is not None and len(one) != count for one in lists) or not _fit(cuts, x):
        _explain_lists(x, cuts, *lists)
    checked = False
    for e in range(count):
        a, b = lora_As[e], lora_Bs[e]
        if a is None and b is None:
            continue
        if a is None or b is None:
            has, lacks = ("lora_As", "lora_Bs") if b is None else ("lora_Bs", "lora_As")
            raise ValueError(
                f"segment {e}: expected a tensor in both lora_As and lora_Bs, or None in both for the frozen weight alone; got "
                f"one in {has} and None in {lacks}"
            )
        try:
            check(x, weight, a, b, bias, scalings[e], ps[e] if ps else 0.0, seeds[e] if seeds else None)
        except ValueError as error:
            check_frozen(x, weight, bias)  # which is no segment's
            raise ValueError(f"segment {e}: {error}") from None
        checked = True
    if not checked:
        check_frozen(x, weight, bias)


def _fit(cuts: Sequence[int], x: torch.Tensor) -> bool:
    """Whether cuts are ints from 0 to the number of x's rows, none below the one before."""
    before = 0
    for cut in cuts:
        if not isinstance(cut, int) or cut < before:
            return False
        before = cut
    return x.dim() > 0 and len(cuts) > 0 and cuts[0] == 0 and before == x.shape[:-1].numel()


def _explain_lists(x, cuts, lora_As, lora_Bs, scalings, ps, seeds, low) -> None:
    """Raises the ValueError that says which list or cut is wrong."""
    if isinstance(cuts, torch.Tensor):
        raise ValueError(
            "cuts: expected a list of ints on the host, got a tensor; cuts.tolist() makes one, and waits for a GPU once"
        )
    for e, cut in enumerate(cuts):
        if not isinstance(cut, int):
            raise ValueError(f"cuts[{e}]: expected an int, got {cut!r} of type {type(cut).__name__}; pass int(...)")
    count = len(cuts) - 1
    named = {"lora_As": lora_As, "lora_Bs": lora_Bs, "scalings": scalings, "dropout_ps": ps, "seeds": seeds, "low": low}
    for name, one in named.items():
        if one is not None and len(one) != count:
            raise ValueError(
                f"{name}: expected {count} entries, one for each segment, as cuts has {len(cuts)}; got {len(one)}: cuts begin "
                "with 0 and have one more entry than there are segments"
            )
    if x.dim() < 1:
        raise ValueError(f"lora_linear_grouped: expected x [..., K], got x {list(x.shape)}; pass x.view(1, -1)")
    rows = x.shape[:-1].numel()
    if not cuts or cuts[0] != 0 or cuts[-1] != rows:
        raise ValueError(
            f"cuts: expected 0 first and {rows} last, the rows of x {list(x.shape)}, got {list(cuts)}; rows without an adapter "
            "are a segment with None for A and B"
        )
    for e in range(count):
        if cuts[e + 1] < cuts[e]:
            raise ValueError(
                f"cuts: segment {e} ends at row {cuts[e + 1]}, before its start at {cuts[e]}; sort x's rows by segment, and pass "
                "cuts in that order"
            )
