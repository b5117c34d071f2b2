"""Does this machine compute what it should? Kernels against float64, a layer against PEFT, the path of every module.

A result passes where its error against float64 is at most twice that of plain torch (or PEFT) in the same dtype, plus
one rounding of the result: a fixed tolerance would be too wide for one dtype or shape and too narrow for another.

M tokens, K in, N out, R rank.
"""

import math
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from ..kernels import dispatch, library, philox, reference
from ..lora.layer import LoRALinear
from ..lora.ops import linear_norms, lora_linear, or_backend_error, path, row_norms
from ..models.linears import LinearInfo, linear_modules
from ..models.loading import load_model
from ..support import machine
from ..support.devices import device_for

SHAPES = (
    (320, 576, 1536, 16), (63, 507, 123, 5), (96, 256, 192, 16), (1, 64, 64, 8), (33, 96, 80, 256), (17, 33, 65, 3),
    (0, 64, 64, 8), (200, 304, 256, 64), (40, 48, 128, 1),
)  # M, N, K, R; the first takes the tiles of real models  # fmt: skip
VARIANTS = ((0.3, True, False), (0.0, False, True), (0.0, True, False), (0.3, False, True))  # dropout, bias, views
CASES = [(*shape, *VARIANTS[(turn + i) % 4]) for turn in range(4) for i, shape in enumerate(SHAPES)]
SCALING, SEED = 3, (1 << 64) - 3  # no power of two, which would never round; a seed that needs all 64 bits
Linear = Callable[[Tensor, Tensor, Tensor], Tensor]  # (x, lora_A, lora_B) -> y
Measures = dict[str, tuple[float, float]]  # result -> our error over the allowed one, relative difference from theirs


def examine(
    model: str | None = None, device: str = "auto", backend: str = "auto", dtype: torch.dtype = torch.float32, *,
    seconds: float = 60.0, tokens: int = 1024, rank: int = 16, out: Callable[[str], object] = print,
) -> bool:  # fmt: skip
    """Checks this machine and this model, one line to `out` for each check and a verdict at the end; True if healthy.

    `model` as in load_model; `device`, `backend` and `dtype` as in a run. Kernel cases are begun for `seconds`, one of
    each strategy and dtype in any case. Paths are those of `tokens` rows and adapters of `rank`. Whatever goes wrong is
    a failed check, except that a device which this machine does not have raises ConfigError.
    """
    where, start, names, failed = device_for(device), time.monotonic(), list[str](), list[str]()

    def check(name: str, function: Callable[..., Any], *arguments: Any, show: Callable[[Any], str] = str) -> Any:
        names.append(name)
        try:
            result = function(*arguments)
            out(f"ok      {name}: {show(result)}")
            return result
        except Exception as error:  # whatever one check runs into, the others are still worth having
            failed.append(name)
            out(f"FAILED  {name}: {_reason(error)}")

    def resolved(name: str) -> str:
        return f"{name} is {path(where, name)} on {where}: {dispatch.cannot_run(where) or dispatch.target_of(where)}"

    def load() -> tuple[nn.Module, list[LinearInfo]]:
        loaded = load_model(model, dtype=dtype, device=where)[0]
        infos = linear_modules(loaded)
        middle = infos[len(infos) // 2].layer
        return loaded, list({info.type: info for info in infos if info.layer == middle}.values())  # one of each type

    def table(rows: list[tuple[int, str, str, str]]) -> str:
        lines = ["\n{:>12} x {:<16} {:<14} {}".format(*row) for row in rows]
        return f"for {tokens} tokens and rank {rank}{''.join(lines)}"

    check("versions", lambda: " ".join(f"{name} {version}" for name, version in machine.versions().items()))
    gpus = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    check("machine", lambda: f"{machine.describe()}; GPUs: {', '.join(gpus) or 'none that torch can use'}")
    if not check("backend", resolved, backend):
        backend = "auto"
        out(f"        what follows is checked with backend {resolved(backend)}")
    strategies = ("torch",) if path(where, backend) == "torch" else ("fused", "lora-first", "torch")
    # Triton's interpreter multiplies the bits of bfloat16 as integers
    narrow = () if "fused" in strategies and where.type == "cpu" else (torch.bfloat16,)
    kinds = [(strategy, t) for strategy in strategies for t in dict.fromkeys((dtype, *narrow, torch.float32))]
    for i, kind in enumerate(kinds):  # each has its share of the time that is left
        share = (start + seconds - time.monotonic()) / (len(kinds) - i)
        check(f"{kind[0]} kernels in {kind[1]}", _kernels, where, *kind, share)
    loaded, layer = check("model", load, show=lambda found: found[0].name_or_path) or (None, [])
    if loaded is not None:
        for info in layer:
            check(info.name, _layer, info, backend, rank)
        check("paths", module_paths, loaded, where, dtype, tokens, rank, backend, show=table)
    bad = f"NOT healthy: {len(failed)} of {len(names)} checks failed: {'; '.join(failed)}"
    out(f"{bad if failed else f'healthy: {len(names)} checks passed'} ({time.monotonic() - start:.0f} s)")
    return not failed


def module_paths(
    model: nn.Module, device: torch.device, dtype: torch.dtype, tokens: int = 1024, rank: int = 16, backend: str = "auto"
) -> list[tuple[int, str, str, str]]:  # fmt: skip
    """(number of modules, their type, "in -> out", path and why) of the model's linear modules, were it on `device`.

    Raises BackendError where `backend` cannot run, and ModelError for a model without linear modules.
    """
    rows = Counter[tuple[str, str, str]]()
    for info in linear_modules(model):
        x_MK = torch.empty(1, 1, dtype=dtype, device=device).expand(tokens, info.n_in)
        w_NK = torch.empty_strided((info.n_out, info.n_in), info.frozen.weight_NK.stride(), dtype=dtype, device="meta")
        plan = or_backend_error(library.plan_of, x_MK, w_NK, rank, backend)
        rows[info.type, f"{info.n_in} -> {info.n_out}", str(plan)] += 1
    return [(number, *row) for row, number in rows.items()]


def _kernels(device: torch.device, strategy: str, dtype: torch.dtype, seconds: float) -> str:
    """Begins cases for so long, one at least; says how many, and the worst. Raises ArithmeticError if any is wrong."""
    deadline, found = time.monotonic() + seconds, list[tuple[float, str]]()
    for case in CASES:
        where = "M={} N={} K={} R={} dropout={} bias={} views={}".format(*case)
        try:
            (ratio, _), name = max((measure, name) for name, measure in _case(device, strategy, dtype, *case).items())
            found.append((ratio, f"{name} has {ratio:.2g} of the allowed error at {where}"))
        except Exception as error:  # as above
            found.append((math.inf, f"{_reason(error)} at {where}"))
        if time.monotonic() > deadline:
            break
    figures = f"{len(found)} of {len(CASES)} cases; the worst: {max(found)[1]}"
    if wrong := sum(ratio > 1 for ratio, _ in found):
        raise ArithmeticError(f"{wrong} wrong in {figures}")
    return figures


def _case(device: torch.device, strategy: str, dtype: torch.dtype, m, n, k, r, p, with_bias, views) -> Measures:
    """Measures of x [m, k] through W [n, k] at rank r; `views`: into buffers of NaN, so that a read outside shows."""
    generator = torch.Generator().manual_seed(m + n + k + r)

    def draw(rows: int, columns: int, scale: float = 1.0, dtype: torch.dtype = dtype) -> Tensor:
        value = (torch.randn(rows, columns, generator=generator) * scale).to(device, dtype)
        buffer = torch.full((rows * 2 + 3, columns + 5), math.nan, dtype=dtype, device=device)
        return buffer[1 : 1 + 2 * rows : 2, 2 : 2 + columns].copy_(value) if views else value

    x_MK, w_NK, dy_MN, shift_N = draw(m, k), draw(n, k, k**-0.5), draw(m, n), draw(1, n)[0] * with_bias
    adapters = draw(r, k, k**-0.5, torch.float32), draw(n, r, r**-0.5, torch.float32)
    bias_N = shift_N if with_bias else None
    how: dict[str, Any] = {"scaling": SCALING, "dropout_p": p, "seed": SEED, "backend": strategy}
    ours = lambda x, a, b: lora_linear(x, w_NK, a, b, bias=bias_N, **how)  # noqa: E731
    found = _compare(ours, None, (x_MK, *adapters, dy_MN), w_NK, bias_N, p)
    for name, got, plain, exact in (
        ("linear_norms", linear_norms(x_MK, w_NK, backend=strategy), x_MK.contiguous() @ w_NK.T, _f64(x_MK) @ _f64(w_NK).T),
        ("row_norms", row_norms(dy_MN, bias_N, backend=strategy), dy_MN.float() - shift_N, _f64(dy_MN) - _f64(shift_N)),
    ):  # fmt: skip
        found[name] = _measure(got, plain.float().norm(dim=1), exact.norm(dim=1))
    if p:  # unit adapters and no W: y and the gradients are zero just where the mask drops; 72 is no whole tile
        one, eye, want = torch.ones(72, 72).to(x_MK), torch.eye(72).to(x_MK), philox.keep_mask(SEED, 72, 72, p)
        masked = lambda x, a, b: lora_linear(x, one * 0, a, b, **how)  # noqa: E731
        masks = _results(masked, one, eye, eye, eye) | {"x": _results(masked, one, eye, eye, one)["x"]}
        if wrong := [name for name, mask in masks.items() if not torch.equal(mask.cpu() != 0, want)]:
            raise ArithmeticError(f"the dropout mask of {', '.join(wrong)} is not the CPU's")
    return found


def _layer(info: LinearInfo, backend: str, rank: int) -> str:
    """Our adapter and PEFT's on one module; says how far they are apart. Raises ArithmeticError where ours is worse."""
    base, w_NK, generator = info.module, info.frozen.weight_NK, torch.Generator().manual_seed(0)
    bias_N: Any = base.bias
    rank = min(rank, info.n_in, info.n_out)
    shapes = (96, info.n_in), (96, info.n_out), (rank, info.n_in), (info.n_out, rank)
    x_MK, dy_MN, a_RK, b_NR = (torch.randn(*shape, generator=generator).to(w_NK) for shape in shapes)
    operands = x_MK, a_RK.float() / info.n_in**0.5, b_NR.float() / rank**0.5, dy_MN
    module, theirs, whose = LoRALinear(base, rank, SCALING * rank, backend=backend), None, "PEFT's"
    ours = lambda x, a, b: functional_call(module, {"lora_A": a, "lora_B": b}, (x,))  # noqa: E731
    try:
        from peft import LoraConfig, inject_adapter_in_model

        config = LoraConfig(r=rank, lora_alpha=SCALING * rank, target_modules=["m"], fan_in_fan_out=info.transposed)
        peft = inject_adapter_in_model(config, nn.ModuleDict({"m": base})).get_submodule("m")
        at = "lora_{}.default.weight".format
        theirs = lambda x, a, b: functional_call(peft, {at("A"): a.to(x.dtype), at("B"): b.to(x.dtype)}, (x,))  # noqa: E731
    except ImportError as error:
        whose = f"plain torch's ({error}; to compare with PEFT's: pip install peft)"
    measures = _compare(ours, theirs, operands, w_NK, bias_N, 0.0)
    figures = f"relative difference from {whose}: " + ", ".join(f"{name} {d:.1e}" for name, (_, d) in measures.items())
    if any(ratio > 1 for ratio, _ in measures.values()):
        raise ArithmeticError(f"the error is too large; {figures}")
    return figures


def _compare(
    ours: Linear, theirs: Linear | None, operands: tuple[Tensor, ...], w_NK: Tensor, bias_N: Tensor | None, p: float
) -> Measures:  # fmt: skip
    """Y and the gradients by `ours` and `theirs` (None: plain torch) for the operands x, lora_A, lora_B and dy."""
    m, k = operands[0].shape
    keep_MK, q = (philox.keep_mask(SEED, m, k, p), philox.inverse_keep(p)) if p else (None, 1.0)
    keep, dense_NK = 1.0 if keep_MK is None else keep_MK.to(w_NK.device), w_NK.contiguous()
    low_rank = lambda x, a, b: x * keep * q @ a.to(x.dtype).T @ b.to(x.dtype).T * SCALING  # noqa: E731
    plain = lambda x, a, b: nn.functional.linear(x, dense_NK, bias_N) + low_rank(x, a, b)  # noqa: E731
    got, again = _results(ours, *operands), _results(ours, *operands)
    other = _results(theirs or plain, *(t.contiguous() for t in operands))
    if different := [name for name in got if got[name].isfinite().all() and not torch.equal(got[name], again[name])]:
        raise ArithmeticError(f"a second run gives other bits in {', '.join(different)}")
    x, a, b, dy, w = (_f64(t) for t in (*operands, w_NK))
    exact = reference.lora_linear_grads(dy, x, w, a, b, SCALING, keep_MK, q)
    exact["y"] = reference.lora_linear(x, w, a, b, SCALING, None if bias_N is None else _f64(bias_N), keep_MK, q)
    return {name: _measure(got[name], other[name], exact[name]) for name in got}


def _results(linear: Linear, x_MK: Tensor, a_RK: Tensor, b_NR: Tensor, dy_MN: Tensor) -> dict[str, Tensor]:
    """y [M, N], and under the names of their tensors the gradients."""
    leaves = [t.detach().requires_grad_() for t in (x_MK, a_RK, b_NR)]
    y_MN = linear(*leaves)
    dx_MK, da_RK, db_NR = torch.autograd.grad(y_MN, leaves, dy_MN)
    return {"y": y_MN.detach(), "x": dx_MK, "lora_A": da_RK, "lora_B": db_NR}


def _measure(got: Tensor, other: Tensor, exact: Tensor) -> tuple[float, float]:
    """Our error over the allowed one (infinite for NaN), and our relative difference from the other."""
    ours, theirs, apart = ((_f64(one) - _f64(two)).norm() for one, two in ((got, exact), (other, exact), (got, other)))
    roundings = 8 if got.dtype == torch.float32 else 1  # a library may split a long float32 sum where we go in order
    ratio = float(ours / (2 * theirs + roundings * torch.finfo(got.dtype).eps * exact.norm())) if ours else 0.0
    return ratio if math.isfinite(ratio) else math.inf, float(apart / exact.norm())


def _f64(tensor: Tensor) -> Tensor:
    return tensor.detach().cpu().double()  # there, as not every device has float64


def _reason(error: Exception) -> str:
    kind = "" if type(error) is ArithmeticError else f"{type(error).__name__}: "  # ours speak for themselves
    return kind + " ".join(str(error).split())[:600]
