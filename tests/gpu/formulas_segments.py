"""formulas.py's of products by segments. On meta tensors, where nobody knows the segments, all have as many rows.

M rows, K in, N out, R rank, C columns of T, E segments.
"""

from collections.abc import Callable

from costs import Cost, Launch, up


def rows_of(at: Launch) -> list[int]:
    """The rows of each segment."""
    count = len(at.ends)
    if at.ends.is_meta:
        m = (at.arguments.get("t") if "t" in at.arguments else at.x).shape[0]
        ends = [m * (e + 1) // count for e in range(count)]
    else:
        ends = at.ends.tolist()
    return [end - start for start, end in zip([0, *ends], ends, strict=False)]


def segment_shrink(at: Launch) -> Cost:
    """X and the adapters of segments that have rows in; for each split of K a part of S out."""
    rows, parts = rows_of(at), at.grid[1]
    used = sum(m > 0 for m in rows)
    return Cost(
        {"x": at.M * at.K * at.itemsize("x"), "a": used * at.RANK * at.K * at.itemsize("a"), "ends": at.ends.nbytes},
        {"s": parts * at.M * at.RANK * at.itemsize("s")},
        useful=2 * at.M * at.K * at.RANK,
        executed=2 * sum(up(m, at.BM) for m in rows) * up(at.K, at.BK) * at.RP,
    )  # fmt: skip


def segment_gemm(at: Launch) -> Cost:
    """X, S and what belongs to segments that have rows, W (or one for all) and B, a bias in; Y out."""
    rows = rows_of(at)
    used = sum(m > 0 for m in rows)
    weights = used if at.w.stride(0) else min(used, 1)
    loads = {"x": at.M * at.K * at.itemsize("x"), "w": weights * at.N * at.K * at.itemsize("w")}
    stores = {"y": at.M * at.N * at.itemsize("y")}
    own = sum(loads.values()) + sum(stores.values()) if at.frozen else 0  # else it is the low-rank term by itself
    loads["ends"] = at.ends.nbytes
    if at.LORA:
        loads |= {"s": at.M * at.RANK * at.itemsize("s"), "b": used * at.N * at.RANK * at.itemsize("b")}
    if at.BIAS:
        loads["bias"] = at.N * at.itemsize("bias")
    return Cost(
        loads, stores, own=own,
        useful=2 * at.M * at.N * (at.K + at.RANK * at.LORA),
        executed=2 * sum(up(m, at.BM) for m in rows) * up(at.N, at.BN) * (up(at.K, at.BK) + up(at.RANK, at.BR) * at.LORA),
    )  # fmt: skip


def segment_grads(at: Launch) -> Cost:
    """T, V and every U in; for each segment and each block of its rows a part of T^T V, for each stripe a part of T U out."""
    stripes, parts, count = at.grid
    rows, m = rows_of(at), at.t.shape[0]
    loads = {"t": m * at.C * at.itemsize("t"), "v": m * at.RANK * at.itemsize("v"), "ends": at.ends.nbytes}
    stores = {"g": parts * count * at.C * at.RANK * at.itemsize("g")}
    if at.WITH_DS:
        loads["u"] = count * at.C * at.RANK * at.itemsize("u")
        stores["ds"] = stripes * m * at.RANK * at.itemsize("ds")
    products = 1 + at.WITH_DS
    return Cost(
        loads, stores,
        useful=2 * m * at.C * at.RANK * products,
        executed=2 * sum(up(one, at.BM) for one in rows) * up(at.C, at.BC) * at.RP * products,
    )  # fmt: skip


def stacked(at: Launch) -> Cost:
    """torch.stack or torch.cat: every matrix in, all of them out."""
    return Cost({"parts": sum(one.nbytes for one in at.parts)}, {"y": at.y.nbytes})


def scaled(at: Launch) -> Cost:
    """torch.mul: a stack and a factor for each of its matrices in, the product out, which may be narrower."""
    return Cost({"x": at.x.nbytes, "c": at.c.nbytes}, {"y": at.y.nbytes})


def zeros(at: Launch) -> Cost:
    """What stacks are padded with."""
    return Cost({}, {"y": at.y.nbytes})


SEGMENTS: dict[str, Callable[[Launch], Cost]] = {
    "segment_shrink": segment_shrink,
    "segment_gemm": segment_gemm,
    "segment_grads": segment_grads,
    "stacked": stacked,
    "scaled stack": scaled,
    "padding": zeros,
}
