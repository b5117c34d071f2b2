"""`plopfast doctor`'s check of what is no linear module: norms, gates, rotary embedding, the loss, the experts of a mixture, and several
adapters on one weight.

Results and gradients are compared with float64, by the rule of errors (kernels/accuracy.py): off by at most twice as much as
plain torch's.

M tokens, K width, E experts.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from ..kernels import accuracy, block_ops, library_rows, reference
from ..lora.experts import Adapted
from ..lora.many_ops import lora_linear_grouped
from ..models.cross_entropy import chunked_cross_entropy

SHAPES = ((320, 576), (63, 504), (1, 64), (2, 8200))  # M, K; the last row is longer than a program keeps
EPS, HEADS, MULTIPLIER, CAP = 1e-6, 4, 0.5, 5.0
EXPERTS, WIDTH, RANK, SCALING = 5, 72, 8, 2.0
Run = Callable[[str], list[Tensor]]  # of a backend: the result and the gradients


def blocks(device: torch.device, backend: str, dtype: torch.dtype) -> str:
    """Runs each operation at each shape, and says which came out worst. Raises ArithmeticError if one is wrong."""
    found = []
    for m, k in SHAPES:
        for name, run, exact in _operations(m, k, device, dtype):
            for number, three in enumerate(zip(run(backend), run("torch"), exact, strict=True)):
                what = f"{name}'s {'gradient' if number else 'result'} at M={m} K={k}"
                found.append((accuracy.compare(*three).share, what))
    worst = "{1} has {0:.2g} of the allowed error".format(*max(found))
    if wrong := sum(not share <= 1 for share, _ in found):
        raise ArithmeticError(f"{wrong} of {len(found)} results are wrong; the worst: {worst}")
    return f"{len(found)} results; the worst: {worst}"


def _operations(
    m: int, k: int, device: torch.device, dtype: torch.dtype
) -> Iterator[tuple[str, Run, Sequence[Tensor]]]:
    """Name, how to run it on `device`, and the exact result and gradients on the CPU, as some devices have no float64."""
    generator = torch.Generator().manual_seed(m + k)
    x, g, dy, w = (torch.randn(*shape, generator=generator).to(dtype) for shape in ((m, k), (m, k), (m, k), (k,)))
    there = [one.to(device) for one in (x, g, dy, w)]
    yield "RMSNorm", _norm(*there), [reference.rms_norm(x, w, EPS), reference.rms_norm_grad(dy, x, w, EPS)]
    yield "gate", _gate(*there), [reference.gate(g, x, "silu"), *reference.gate_grad(dy, g, x, "silu")]
    q, cos, sin = (one.view(1, m, HEADS, k // HEADS).transpose(1, 2) for one in (x, g, dy))
    cos, sin = cos[:, 0], sin[:, 0]
    turned = -sin.roll(sin.shape[-1] // 2, -1)  # of the gradient: those of the other half, negative
    exact = [reference.rotary(q, cos, one) for one in (sin, turned)]
    yield "rotary embedding", _rotary(*(one.to(device) for one in (q, cos, sin))), exact
    h, weight = (torch.randn(rows, 64, generator=generator).div(8).to(dtype) for rows in (m, k))
    targets = torch.arange(m) * 7 % k
    leaf = h.double().requires_grad_()
    total = reference.cross_entropy(leaf @ weight.double().T, targets, None, MULTIPLIER, CAP).sum()
    exact = [total.detach(), *torch.autograd.grad(total, leaf)]
    yield "cross-entropy", _loss(*(one.to(device) for one in (h, weight, targets))), exact
    sizes = (EXPERTS, WIDTH, k), (EXPERTS, RANK, k), (EXPERTS, WIDTH, RANK), (m, WIDTH)
    weights, a, b, dy = (torch.randn(*size, generator=generator).div(8).to(dtype) for size in sizes)
    ends = torch.tensor([m // 3, m // 3, m // 2, m - 1, m], dtype=torch.int32)  # one has no rows, and one has one
    leaves = [one.double().requires_grad_() for one in (x, a, b)]
    wide_x, wide_a, wide_b = leaves
    y = reference.segments(wide_x, weights, wide_a, wide_b, ends.tolist(), SCALING)
    exact = [y.detach(), *torch.autograd.grad(y, leaves, dy.double())]
    yield "experts", _experts(*(one.to(device) for one in (x, weights, a, b, ends, dy))), exact
    y = reference.segments(wide_x, weights[:1].expand_as(weights), wide_a, wide_b, ends.tolist(), SCALING)
    exact = [y.detach(), *torch.autograd.grad(y, leaves, dy.double())]
    there = [one.to(device) for one in (x, weights[0], a, b, dy)]
    yield "several adapters", _adapters(ends.tolist(), *there), exact


def _norm(x: Tensor, g: Tensor, dy: Tensor, w: Tensor) -> Run:
    return lambda backend: _with_gradients(lambda x: block_ops.rms_norm(x, w, EPS, "wide", backend), dy, x)


def _gate(x: Tensor, g: Tensor, dy: Tensor, w: Tensor) -> Run:
    return lambda backend: _with_gradients(lambda g, u: block_ops.gate(g, u, "silu", backend), dy, g, x)


def _rotary(q: Tensor, cos: Tensor, sin: Tensor) -> Run:
    return lambda backend: [library_rows.rotary(q, q, cos, sin, False, way, backend)[0] for way in (False, True)]


def _loss(h: Tensor, weight: Tensor, targets: Tensor) -> Run:
    def run(backend: str) -> list[Tensor]:
        def loss(h: Tensor) -> Tensor:
            return chunked_cross_entropy(h, weight, targets, multiplier=MULTIPLIER, cap=CAP, backend=backend)

        return _with_gradients(loss, h.new_ones(()), h)

    return run


def _experts(x: Tensor, weights: Tensor, a: Tensor, b: Tensor, ends: Tensor, dy: Tensor) -> Run:
    def run(backend: str) -> list[Tensor]:
        def adapted(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
            y: Tensor = Adapted.apply(x, weights, a, b, a, b, ends, SCALING, backend)
            return y

        return _with_gradients(adapted, dy, x, a, b)

    return run


def _adapters(ends: Any, x: Tensor, weight: Tensor, a: Tensor, b: Tensor, dy: Tensor) -> Run:
    def run(backend: str) -> list[Tensor]:
        def adapted(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
            scalings = [SCALING] * EXPERTS
            return lora_linear_grouped(x, weight, a.unbind(), b.unbind(), [0, *ends], scalings, backend=backend)

        return _with_gradients(adapted, dy, x, a, b)

    return run


def _with_gradients(function: Callable[..., Tensor], dy: Tensor, *given: Tensor) -> list[Tensor]:
    leaves = [one.detach().requires_grad_() for one in given]
    y = function(*leaves)
    return [y.detach(), *torch.autograd.grad(y, leaves, dy.to(y.dtype))]
