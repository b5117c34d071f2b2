"""`plopfast doctor`: does this machine compute correctly?

It compares the kernels with float64, one layer of the model with PEFT, and lists the path that each module takes. A
result passes by the rule of errors (kernels/accuracy.py): off by at most twice as much as plain torch's, or PEFT's.

M tokens, K in, N out, R rank.
"""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from ..kernels import accuracy, compile_time, dispatch, philox, reference
from ..lora.layer import LoRALinear
from ..lora.ops import linear_norms, lora_linear, path, row_norms
from ..lora.placement import full_rank
from ..models.linears import LinearInfo, linear_modules, words_of_codes
from ..models.loading import load_model
from ..support import machine
from ..support.devices import device_for
from .doctor_blocks import blocks
from .info import TOKENS, module_paths


@dataclass(frozen=True)
class Case:
    """One linear: its sizes, the dropout rate, and whether it has a bias and its operands are views."""

    m: int
    n: int
    k: int
    r: int
    dropout: float
    bias: bool
    views: bool

    def __str__(self) -> str:
        return "M={m} N={n} K={k} R={r} dropout={dropout} bias={bias} views={views}".format(**vars(self))


SHAPES = (
    (320, 576, 1536, 16), (63, 507, 123, 5), (96, 256, 192, 16), (1, 64, 64, 8), (33, 96, 80, 256), (17, 33, 65, 3),
    (0, 64, 64, 8), (200, 304, 256, 64), (40, 48, 128, 1),
)  # M, N, K, R; the first takes the tiles of real models  # fmt: skip
VARIANTS = ((0.3, True, False), (0.0, False, True), (0.0, True, False), (0.3, False, True))  # dropout, bias, views
CASES = [Case(*shape, *VARIANTS[(turn + i) % 4]) for turn in range(4) for i, shape in enumerate(SHAPES)]
LEAST = len(SHAPES)  # cases that always run: every shape once, and each variant at least twice
SCALING = 3  # not a power of two, because those never round
SEED = (1 << 62) - 3  # Triton compiles another kernel for seeds from 2^32 on, the one that training uses
Linear = Callable[[Tensor, Tensor, Tensor], Tensor]  # (x, lora_A, lora_B) -> y


@dataclass(frozen=True)
class Operands:
    """What a LoRA linear and its backward pass take: x [M, K], a [R, K], b [N, R], dy [M, N], w [N, K], bias [N].

    The adapters a and b may have a wider dtype than the rest.
    """

    x: Tensor
    a: Tensor
    b: Tensor
    dy: Tensor
    w: Tensor
    bias: Tensor | None
    dropout: float = 0.0


@dataclass(frozen=True)
class Measure:
    """A result's share of the allowed error (1 passes), and its relative difference from the other result."""

    share: float
    difference: float


class _Checks:
    """Runs checks, writes a line for each, and remembers which of them failed."""

    def __init__(self, out: Callable[[str], object]) -> None:
        self.out, self.start = out, time.monotonic()
        self.count = 0
        self.failed: list[str] = []

    def run(self, name: str, function: Callable[[], Any], show: Callable[[Any], str] = str) -> Any:
        """What `function` returns; None if it raises, which is a failed check."""
        self.count += 1
        try:
            result = function()
            self.out(f"ok      {name}: {show(result)}")
            return result
        except Exception as error:  # whatever one check runs into, the others are still worth having
            self.failed.append(name)
            self.out(f"FAILED  {name}: {_reason(error)}")

    def verdict(self, compiling: compile_time.Compiling) -> bool:
        """Writes the last line; True if no check failed."""
        text = f"healthy: {self.count} checks passed"
        if self.failed:
            text = f"NOT healthy: {len(self.failed)} of {self.count} checks failed: {'; '.join(self.failed)}"
        self.out(f"{text} ({time.monotonic() - self.start:.0f} s{_of_which(compiling)})")
        return not self.failed


def examine(
    model: str | None = None, device: str = "auto", backend: str = "auto", dtype: torch.dtype = torch.float32, *,
    quantize: str | None = None, quantize_head: bool = False, seconds: float = 60.0, rank: int = 16,
    out: Callable[[str], object] = print,
) -> bool:  # fmt: skip
    """Checks this machine and this model: one line to `out` for each check, then a verdict. True if healthy.

    `model`, `quantize` and `quantize_head` are as in load_model; `device`, `backend` and `dtype` are as in a run. Each
    strategy and dtype runs nine kernel cases, one of each shape, and more while `seconds` last. The time that Triton compiles
    does not count, so the first visit on a GPU checks as much as later ones, and takes longer. Adapters have `rank`. Whatever
    goes wrong is a failed check, except that ConfigError is raised for a device that this machine does not have.
    """
    with compile_time.watched() as compiling:
        checks = _Checks(out)
        where = device_for(device)
        load = partial(load_model, model, dtype=dtype, device=where, quantize=quantize, quantize_head=quantize_head)
        _examine(checks, compiling, lambda: load()[0], where, backend, dtype, seconds, rank)
        return checks.verdict(compiling)


def _examine(
    checks: _Checks, compiling: compile_time.Compiling, load: Callable[[], Any], where: torch.device, backend: str,
    dtype: torch.dtype, seconds: float, rank: int,
) -> None:  # fmt: skip
    checks.run("versions", lambda: " ".join(f"{name} {version}" for name, version in machine.versions().items()))
    checks.run("machine", _machine)
    if not checks.run("backend", lambda: _resolved(where, backend)):
        backend = "auto"
        checks.out(f"        the checks below use backend {_resolved(where, backend)}")
    kinds = _kinds(where, backend, dtype)
    for i, (strategy, kind) in enumerate(kinds):  # each has its share of the time that is left
        spent_s = time.monotonic() - checks.start - compiling.seconds
        share_s = (seconds - spent_s) / (len(kinds) - i)
        checks.run(f"{strategy} kernels in {kind}", partial(kernels, where, strategy, kind, share_s))
    for kind in dict.fromkeys(kind for _, kind in kinds):
        checks.run(
            f"norms, gates, rotary embedding, loss, experts and several adapters in {kind}",
            partial(blocks, where, backend, kind),
        )
    loaded = checks.run(
        "model", load, lambda found: ", ".join(filter(None, (found.name_or_path, words_of_codes(found))))
    )
    if loaded is not None:
        for info in _middle_layer(loaded):
            checks.run(info.name, partial(_layer, info, backend, rank))
        listed = lambda rows: "".join("\n{:>12} x {:<16} {:<14} {}".format(*row) for row in rows)  # noqa: E731
        paths = partial(module_paths, loaded, where, dtype, rank, backend)
        checks.run("paths", paths, lambda rows: f"for {TOKENS} tokens and rank {rank}{listed(rows)}")


def _machine() -> str:
    gpus = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return f"{machine.describe()}; GPUs: {', '.join(gpus) or 'none that torch can use'}"


def _resolved(device: torch.device, backend: str) -> str:
    why = dispatch.cannot_run(device) or dispatch.target_of(device)
    return f"{backend} is {path(device, backend)} on {device}: {why}"


def _kinds(device: torch.device, backend: str, dtype: torch.dtype) -> list[tuple[str, torch.dtype]]:
    """The strategies and dtypes whose kernels are checked."""
    strategies = ("torch",) if path(device, backend) == "torch" else ("fused", "lora-first", "torch")
    # Triton's interpreter multiplies the bits of bfloat16 as integers
    narrow = () if "fused" in strategies and device.type == "cpu" else (torch.bfloat16,)
    return [(strategy, kind) for strategy in strategies for kind in dict.fromkeys((dtype, *narrow, torch.float32))]


def _middle_layer(model: nn.Module) -> list[LinearInfo]:
    """One module of each type, from the layer in the middle."""
    infos = linear_modules(model)
    middle = infos[len(infos) // 2].layer
    return list({info.type: info for info in infos if info.layer == middle}.values())


def kernels(device: torch.device, strategy: str, dtype: torch.dtype, seconds: float) -> str:
    """Runs LEAST cases, and more until `seconds` are over, without the time that Triton compiles; says how many of how
    many ran, how long it compiled, and which came out worst.

    Raises ArithmeticError if a case is wrong or does not run.
    """
    start, found = time.monotonic(), list[tuple[float, str]]()
    with compile_time.watched() as compiling:
        for case in CASES:
            if len(found) >= LEAST and time.monotonic() - start - compiling.seconds > seconds:
                break
            try:
                measures = _case(device, strategy, dtype, case)
                share, name = max((measure.share, name) for name, measure in measures.items())
                found.append((share, f"{name} has {share:.2g} of the allowed error at {case}"))
            except Exception as error:  # a crash is one wrong case; the others still run
                found.append((math.inf, f"{_reason(error)} at {case}"))
    figures = f"{len(found)} of {len(CASES)} cases{_of_which(compiling)}; the worst: {max(found)[1]}"
    if wrong := sum(share > 1 for share, _ in found):
        raise ArithmeticError(f"{wrong} wrong in {figures}")
    return figures


def _of_which(compiling: compile_time.Compiling) -> str:
    if not compiling.kernels:
        return ""
    return f", and {compiling.seconds:.0f} s for compiling {compiling.kernels} kernels"


def _case(device: torch.device, strategy: str, dtype: torch.dtype, case: Case) -> dict[str, Measure]:
    """Every result of one case: the output, the gradients, and both kinds of norms.

    Where the operands are dense the kernels get copies of the adapters in x's dtype, as in training.
    """
    given = _operands(device, dtype, case)

    def linear(x: Tensor, w: Tensor, a: Tensor, b: Tensor, bias: Tensor | None = None) -> Tensor:
        low = None if case.views else (a.detach().to(x.dtype), b.detach().to(x.dtype))
        return lora_linear(
            x, w, a, b, scaling=SCALING, bias=bias, dropout_p=case.dropout, seed=SEED, backend=strategy, low=low
        )

    found = _compare(lambda x, a, b: linear(x, given.w, a, b, bias=given.bias), None, given)
    shift_N = given.dy.new_zeros(()) if given.bias is None else given.bias
    norms, exact_norms = linear_norms(given.x, given.w, backend=strategy), (_f64(given.x) @ _f64(given.w).T).norm(dim=1)
    found["linear_norms"] = _measure(norms, (given.x.contiguous() @ given.w.T).float().norm(dim=1), exact_norms)
    norms, exact_norms = row_norms(given.dy, given.bias, backend=strategy), (_f64(given.dy) - _f64(shift_N)).norm(dim=1)
    found["row_norms"] = _measure(norms, (given.dy.float() - shift_N).norm(dim=1), exact_norms)
    if case.dropout:
        _check_masks(linear, given.x, case.dropout)
    return found


def _operands(device: torch.device, dtype: torch.dtype, case: Case) -> Operands:
    """Random operands; as views they lie in buffers of NaN, so that a read outside them shows."""
    generator = torch.Generator().manual_seed(case.m + case.n + case.k + case.r)

    def draw(rows: int, columns: int, scale: float = 1.0, dtype: torch.dtype = dtype) -> Tensor:
        value = (torch.randn(rows, columns, generator=generator) * scale).to(device, dtype)
        buffer = torch.full((rows * 2 + 3, columns + 5), math.nan, dtype=dtype, device=device)
        return buffer[1 : 1 + 2 * rows : 2, 2 : 2 + columns].copy_(value) if case.views else value

    x_MK, w_NK, dy_MN = draw(case.m, case.k), draw(case.n, case.k, case.k**-0.5), draw(case.m, case.n)
    bias_N = draw(1, case.n)[0]
    a_RK = draw(case.r, case.k, case.k**-0.5, torch.float32)
    b_NR = draw(case.n, case.r, case.r**-0.5, torch.float32)
    return Operands(x_MK, a_RK, b_NR, dy_MN, w_NK, bias_N if case.bias else None, case.dropout)


def _check_masks(linear: Callable[..., Tensor], like: Tensor, p: float) -> None:
    """Raises ArithmeticError unless forward and backward drop what philox.keep_mask says.

    With identities as adapters and W = 0, y and the gradients are zero exactly where an element is dropped. 72 fills no
    whole number of tiles.
    """
    one, eye = torch.ones(72, 72).to(like), torch.eye(72).to(like)
    masked = lambda x, a, b: linear(x, one * 0, a, b)  # noqa: E731
    found = _results(masked, one, eye, eye, eye) | {"x": _results(masked, one, eye, eye, one)["x"]}
    expected = philox.keep_mask(SEED, 72, 72, p)
    if wrong := [name for name, mask in found.items() if not torch.equal(mask.cpu() != 0, expected)]:
        raise ArithmeticError(f"the dropout mask of {', '.join(wrong)} is not the CPU's")


def _layer(info: LinearInfo, backend: str, rank: int) -> str:
    """Compares our adapter on one module with PEFT's, says how far they differ. ArithmeticError if ours is worse."""
    base, w_NK, generator = info.module, info.frozen.dequantize(), torch.Generator().manual_seed(0)
    bias_N: Any = base.bias
    rank = min(rank, full_rank(info.n_in, info.n_out))
    shapes = (96, info.n_in), (96, info.n_out), (rank, info.n_in), (info.n_out, rank)
    x_MK, dy_MN, a_RK, b_NR = (torch.randn(*shape, generator=generator).to(w_NK) for shape in shapes)
    given = Operands(x_MK, a_RK.float() / info.n_in**0.5, b_NR.float() / rank**0.5, dy_MN, w_NK, bias_N)
    module, theirs, whose = LoRALinear(base, rank, SCALING * rank, backend=backend), None, "PEFT's"
    ours = lambda x, a, b: functional_call(module, {"lora_A": a, "lora_B": b}, (x,))  # noqa: E731
    try:
        if info.frozen.kind != "dense":
            raise ImportError(f"PEFT takes {info.frozen.kind} weights with bitsandbytes alone")
        from peft import LoraConfig, inject_adapter_in_model

        config = LoraConfig(r=rank, lora_alpha=SCALING * rank, target_modules=["m"], fan_in_fan_out=info.transposed)
        peft = inject_adapter_in_model(config, nn.ModuleDict({"m": base})).get_submodule("m")
        at = "lora_{}.default.weight".format
        theirs = lambda x, a, b: functional_call(peft, {at("A"): a.to(x.dtype), at("B"): b.to(x.dtype)}, (x,))  # noqa: E731
    except ImportError as error:
        hint = "" if info.frozen.kind != "dense" else "; to compare with PEFT's: pip install peft"
        whose = f"plain torch's ({error}{hint})"
    found = _compare(ours, theirs, given)
    apart = ", ".join(f"{name} {one.difference:.1e}" for name, one in found.items())
    figures = f"relative difference from {whose}: {apart}"
    if any(one.share > 1 for one in found.values()):
        raise ArithmeticError(f"the error is too large; {figures}")
    return figures


def _compare(ours: Linear, theirs: Linear | None, given: Operands) -> dict[str, Measure]:
    """Compares y and the gradients by `ours` with those by `theirs` (None: plain torch).

    Raises ArithmeticError if a second run of ours gives other bits.
    """
    (m, k), p, w_NK, bias_N = given.x.shape, given.dropout, given.w, given.bias
    keep_MK, q = (philox.keep_mask(SEED, m, k, p), philox.inverse_keep(p)) if p else (None, 1.0)
    keep, dense_NK = 1.0 if keep_MK is None else keep_MK.to(w_NK.device), w_NK.contiguous()
    low_rank = lambda x, a, b: x * keep * q @ a.to(x.dtype).T @ b.to(x.dtype).T * SCALING  # noqa: E731
    plain = lambda x, a, b: nn.functional.linear(x, dense_NK, bias_N) + low_rank(x, a, b)  # noqa: E731
    operands = given.x, given.a, given.b, given.dy
    got, again = _results(ours, *operands), _results(ours, *operands)
    other = _results(theirs or plain, *(t.contiguous() for t in operands))
    if different := [name for name in got if got[name].isfinite().all() and not torch.equal(got[name], again[name])]:
        raise ArithmeticError(f"a second run gives other bits in {', '.join(different)}")
    x, a, b, dy, w = (_f64(t) for t in (*operands, w_NK))
    exact = reference.lora_linear_grads(dy, x, w, a, b, SCALING, keep_MK, q)
    exact["y"] = reference.lora_linear(x, w, a, b, SCALING, None if bias_N is None else _f64(bias_N), keep_MK, q)
    return {name: _measure(got[name], other[name], exact[name]) for name in got}


def _results(linear: Linear, x_MK: Tensor, a_RK: Tensor, b_NR: Tensor, dy_MN: Tensor) -> dict[str, Tensor]:
    """y [M, N], and the gradients under the names of their tensors."""
    leaves = [t.detach().requires_grad_() for t in (x_MK, a_RK, b_NR)]
    y_MN = linear(*leaves)
    dx_MK, da_RK, db_NR = torch.autograd.grad(y_MN, leaves, dy_MN)
    return {"y": y_MN.detach(), "x": dx_MK, "lora_A": da_RK, "lora_B": db_NR}


def _measure(got: Tensor, other: Tensor, exact: Tensor) -> Measure:
    apart = float((_f64(got) - _f64(other)).norm() / exact.norm())
    return Measure(accuracy.compare(got, other, exact).share, apart)


def _f64(tensor: Tensor) -> Tensor:
    return tensor.detach().cpu().double()  # on the CPU, because some devices have no float64


def _reason(error: Exception) -> str:
    kind = "" if type(error) is ArithmeticError else f"{type(error).__name__}: "  # ours speak for themselves
    return kind + " ".join(str(error).split())[:600]
