"""Bytes and FLOPs of a launch, by formula: see traffic.py.

M tokens, K in, N out, R rank, C columns of T.
"""

from collections.abc import Callable

from costs import Cost, Launch, up
from formulas_segments import SEGMENTS


def lora_shrink(at: Launch) -> Cost:
    """X and the adapters in; for each split of K a part of S out."""
    parts, count = at.grid[1], at.ADAPTERS
    loads = {f"a{i}": at.RANK * at.K * at.itemsize("a0") for i in range(count)}
    stores = {"s": parts * count * at.M * at.RANK * at.itemsize("s")}
    return Cost(
        {"x": at.M * at.K * at.itemsize("x"), **loads}, stores,
        useful=2 * at.M * at.K * at.RANK * count,
        executed=2 * up(at.M, at.BM) * up(at.K, at.BK) * at.RP * count,
    )  # fmt: skip


def lora_gemm(at: Launch) -> Cost:
    """X and W, S and B, a bias in; Y, and for each column of tiles a part of the norms out."""
    x, w = ("x", "w") if "x" in at.arguments else ("x_desc", "w_desc")
    rows, columns = up(at.M, at.BM), up(at.N, at.BN)
    loads = {x: at.M * at.K * at.itemsize(x), w: at.N * at.K * at.itemsize(w)}
    stores = {"y": at.M * at.N * at.itemsize("y")} if at.STORE else {}
    own = sum(loads.values()) + sum(stores.values()) if at.frozen else 0
    if at.LORA:
        loads |= {"s": at.M * at.RANK * at.itemsize("s"), "b": at.N * at.RANK * at.itemsize("b")}
    if at.BIAS:
        loads["bias"] = at.N * at.itemsize("bias")
    if at.NORMS:
        stores["norms"] = columns // at.BN * at.M * at.itemsize("norms")
    return Cost(
        loads, stores, own=own,
        useful=2 * at.M * at.N * (at.K + at.RANK * at.LORA),
        executed=2 * rows * columns * (up(at.K, at.BK) + up(at.RANK, at.BR) * at.LORA),
    )  # fmt: skip


def lora_expand(at: Launch) -> Cost:
    """S and B, a bias in; L out."""
    loads = {"s": at.M * at.RANK * at.itemsize("s"), "b": at.N * at.RANK * at.itemsize("b")}
    if at.BIAS:
        loads["bias"] = at.N * at.itemsize("bias")
    return Cost(
        loads, {"y": at.M * at.N * at.itemsize("y")},
        useful=2 * at.M * at.N * at.RANK,
        executed=2 * up(at.M, at.BM) * up(at.N, at.BN) * up(at.RANK, at.BR),
    )  # fmt: skip


def lora_expands(at: Launch) -> Cost:
    """Of each member S and B, a bias in; L out."""
    loads, stores, useful, executed = {}, {}, 0, 0
    for i in range(at.COUNT):
        n = at.arguments[f"N{i}"]
        loads |= {f"s{i}": at.M * at.RANK * at.itemsize("s0"), f"b{i}": n * at.RANK * at.itemsize("b0")}
        if at.arguments[f"BIAS{i}"]:
            loads[f"bias{i}"] = n * at.itemsize(f"bias{i}")
        stores[f"y{i}"] = at.M * n * at.itemsize("y0")
        useful += 2 * at.M * n * at.RANK
        executed += 2 * up(at.M, at.BM) * up(n, at.BN) * up(at.RANK, at.BR)
    return Cost(loads, stores, useful, executed)


def lora_expand_sum(at: Launch) -> Cost:
    """Of each member S and B in; the sum of their terms out."""
    loads = {f"s{i}": at.M * at.RANK * at.itemsize("s0") for i in range(at.COUNT)}
    loads |= {f"b{i}": at.N * at.RANK * at.itemsize("b0") for i in range(at.COUNT)}
    return Cost(
        loads, {"y": at.M * at.N * at.itemsize("y")},
        useful=2 * at.M * at.N * at.RANK * at.COUNT,
        executed=2 * up(at.M, at.BM) * up(at.N, at.BN) * up(at.RANK, at.BR) * at.COUNT,
    )  # fmt: skip


def lora_grads(at: Launch) -> Cost:
    """T and V, U in; for each block of rows a part of T^T V, for each stripe of columns a part of T U out."""
    stripes, parts, _ = at.grid
    loads = {"t": at.M * at.C * at.itemsize("t"), "v": at.M * at.RANK * at.itemsize("v")}
    stores = {"g": parts * at.C * at.RANK * at.itemsize("g")}
    if at.WITH_DS:
        loads["u"] = at.C * at.RANK * at.itemsize("u")
        stores["ds"] = stripes * at.M * at.RANK * at.itemsize("ds")
    products = 1 + at.WITH_DS
    return Cost(
        loads, stores,
        useful=2 * at.M * at.C * at.RANK * products,
        executed=2 * up(at.M, at.BM) * up(at.C, at.BC) * at.RP * products,
    )  # fmt: skip


def sum_partials(at: Launch) -> Cost:
    """The parts in, their sum out."""
    return Cost({"partials": at.parts * at.itemsize("partials") * at.size}, {"out": at.out.nbytes})


def sum_both(at: Launch) -> Cost:
    """Two sums of parts in one launch."""
    loads = {
        "partials": at.parts * at.itemsize("partials") * at.size,
        "other_partials": at.other_parts * at.itemsize("other_partials") * at.other_size,
    }
    return Cost(loads, {"out": at.out.nbytes, "other_out": at.other_out.nbytes})


def row_norms(at: Launch) -> Cost:
    """Y and a bias in, the norms out."""
    loads = {"y": at.M * at.N * at.itemsize("y")}
    if at.BIAS:
        loads["bias"] = at.N * at.itemsize("bias")
    return Cost(loads, {"norms": at.M * at.itemsize("norms")})


def rms_norm(at: Launch) -> Cost:
    """Rows, a residual and a weight in; their norms, 1 / rms and the sum with the residual out."""
    moved = at.M * at.K * at.itemsize("x")
    loads = {"x": moved} | _norm_operands(at, moved)
    return Cost(loads, {"y": moved, "rstd": at.M * 4} | ({"h": moved} if at.RESIDUAL else {}))


def rms_norm_grad(at: Launch) -> Cost:
    """dY, rows, 1 / rms, a weight and another gradient in; dX out."""
    moved = at.M * at.K * at.itemsize("x")
    return Cost({"dy": moved, "x": moved, "rstd": at.M * 4} | _norm_operands(at, moved), {"dx": moved})


def _norm_operands(at: Launch, moved: int) -> dict[str, int]:
    weight = {"w": at.K * at.itemsize("w")} if at.MODE != "none" else {}
    return weight | ({"r": moved} if at.arguments.get("RESIDUAL") else {})


def rms_norm_shrink(at: Launch) -> Cost:
    """Rows, a weight and the adapters in; their norms, 1 / rms and every S out."""
    moved, size = at.M * at.K * at.itemsize("x"), at.itemsize("s")
    loads = {f"a{i}": at.RANK * at.K * at.itemsize("a0") for i in range(at.ADAPTERS)}
    return Cost(
        {"x": moved} | _norm_operands(at, moved) | loads,
        {"y": moved, "rstd": at.M * 4, "s": at.ADAPTERS * at.M * at.RANK * size},
        useful=2 * at.M * at.K * at.RANK * at.ADAPTERS,
        executed=2 * up(at.M, at.BM) * up(at.K, at.BK) * at.RP * at.ADAPTERS,
    )  # fmt: skip


def gated(*loads: str, stores: tuple[str, ...]) -> Callable[[Launch], Cost]:
    """Of a gate: every matrix once."""

    def of(at: Launch) -> Cost:
        moved = at.M * at.N * at.itemsize("g")
        return Cost(dict.fromkeys(loads, moved), dict.fromkeys(stores, moved))

    return of


def rotary(at: Launch) -> Cost:
    """q and k in and out, cos and sin in. In place the columns that are passed through do not move."""
    b, _, t, d = at.q.shape
    width, tables = 2 * at.P, 2 * at.P * t
    moved = {name: heads * b * t * (d if at.BREST else width) for name, heads in (("q", at.HQ), ("k", at.HK))}
    loads = {name: count * at.itemsize(name) for name, count in moved.items()}
    stores = {f"y_{name}": count * at.itemsize(f"y_{name}") for name, count in moved.items()}
    # the rows of the batch may share them
    shared = {"cos": tables * (b if at.scb else 1), "sin": tables * (b if at.ssb else 1)}
    return Cost(loads | {name: count * at.itemsize(name) for name, count in shared.items()}, stores)


def cross_entropy(at: Launch) -> Cost:
    """Logits and targets, a bias in; losses and, in place of the logits, their gradient out. The second read of the logits
    is of what the first has just brought."""
    n, v = at.grid[0], at.V
    loads = {"z": n * v * at.itemsize("z"), "targets": n * at.itemsize("targets")}
    if at.BIAS:
        loads["bias"] = v * at.itemsize("bias")
    stores = {"losses": n * at.itemsize("losses")}
    return Cost(loads, stores | ({"z": loads["z"]} if at.GRADIENT else {}))


def lora_gemm_nf4(at: Launch) -> Cost:
    """X, packed W and its scales, S and B, a bias in; Y out."""
    loads = {"x": at.M * at.K * at.itemsize("x")} | _nf4_operands(at, at.N * at.K // 2)
    if at.LORA:
        loads |= {"s": at.M * at.RANK * at.itemsize("s"), "b": at.N * at.RANK * at.itemsize("b")}
    if at.BIAS:
        loads["bias"] = at.N * at.itemsize("bias")
    rank = at.RANK if at.LORA else 0
    return Cost(
        loads, {"y": at.M * at.N * at.itemsize("y")},
        useful=2 * at.M * at.N * (at.K + rank),
        executed=2 * up(at.M, at.BM) * up(at.N, at.BN) * (at.K + up(rank, at.BR)),
    )  # fmt: skip


def decode_nf4(at: Launch) -> Cost:
    """Packed W and its scales in, W out: each byte once."""
    return Cost(_nf4_operands(at, at.size), {"w": 2 * at.size * at.itemsize("w")})


def _nf4_operands(at: Launch, size: int) -> dict[str, int]:
    """With all of the 256 codes of absmax that so many blocks can hold."""
    blocks = up(size, 32) // 32
    loads = {"packed": size, "absmax": blocks * at.itemsize("absmax"), "levels": 16 * 4}
    return loads | ({"code": 4 * min(blocks, 256), "nested": 4 * (up(blocks, 256) // 256)} if at.DOUBLE else {})


def decode_scaled(at: Launch) -> Cost:
    """Bytes and scales in, W out."""
    scales = at.columns * (up(at.N, at.rows_of) // at.rows_of)
    return Cost({"q": at.N * at.K, "scale": 4 * scales}, {"w": at.N * at.K * at.itemsize("w")})


def addmm_(at: Launch) -> Cost:
    """The vendor's Y = beta Y + alpha X W: X, W and, if beta is not 0, Y in; Y out. With L as its Y it is LoRA-first's GEMM."""
    product = mm(Launch("mm", (), {"x": at.x, "w": at.w, "y": at.y}, at.frozen))
    if not at.beta:
        return product
    loads = {**product.loads, "y": at.y.nbytes}
    return Cost(loads, product.stores, product.useful, product.executed, own=(product.own + at.y.nbytes) * at.frozen)


def addmm(at: Launch) -> Cost:
    """The vendor's Y = X W + bias."""
    product = mm(at)
    loads = {**product.loads, "bias": at.bias.nbytes}
    return Cost(loads, product.stores, product.useful, product.executed, own=product.own)


def mm(at: Launch) -> Cost:
    """The vendor's Y = X W. What it splits a sum into for itself is not known, and left out."""
    loads = {"x": at.x.nbytes, "w": at.w.nbytes}
    flops = 2 * at.x.shape[0] * at.x.shape[1] * at.w.shape[1]
    return Cost(loads, {"y": at.y.nbytes}, flops, flops, own=(sum(loads.values()) + at.y.nbytes) * at.frozen)


def elementwise(*loads: str, stores: tuple[str, ...]) -> Callable[[Launch], Cost]:
    """Of peft_path and of torch's casts: the named arguments in and out."""
    return lambda at: Cost(
        {name: at.arguments[name].nbytes for name in loads}, {s: at.arguments[s].nbytes for s in stores}
    )


BLOCKS: dict[str, Callable[[Launch], Cost]] = {
    "rms_norm": rms_norm,
    "rms_norm_grad": rms_norm_grad,
    "rms_norm_shrink": rms_norm_shrink,
    "gate": gated("g", "u", stores=("y",)),
    "gate_grad": gated("dy", "g", "u", stores=("dg", "du")),
}
QUANTIZED: dict[str, Callable[[Launch], Cost]] = {
    "lora_gemm_nf4": lora_gemm_nf4,
    "decode_nf4": decode_nf4,
    "decode_scaled": decode_scaled,
}
FORMULAS: dict[str, Callable[[Launch], Cost]] = {
    **BLOCKS,
    **QUANTIZED,
    **SEGMENTS,
    "lora_shrink": lora_shrink,
    "lora_gemm": lora_gemm,
    "lora_gemm_tma": lora_gemm,
    "lora_expand": lora_expand,
    "lora_expands": lora_expands,
    "lora_expand_sum": lora_expand_sum,
    "lora_grads": lora_grads,
    "sum_partials": sum_partials,
    "sum_both": sum_both,
    "row_norms": row_norms,
    "rotary": rotary,
    "cross_entropy": cross_entropy,
    "addmm_": addmm_,
    "addmm": addmm,
    "mm": mm,
    "cast": elementwise("x", stores=("y",)),
    "scale": elementwise("x", stores=("y",)),
    "add": elementwise("x", "y", stores=("z",)),
    "dropout": elementwise("x", stores=("y", "mask")),
    "dropout_backward": elementwise("dy", "mask", stores=("dx",)),
}


def cost(launch: Launch) -> Cost:
    assert launch.kernel in FORMULAS, f"{launch.kernel} has no formula: add one to FORMULAS, and record its arguments"
    return FORMULAS[launch.kernel](launch)
