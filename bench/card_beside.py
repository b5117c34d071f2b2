"""What lies beside the products on this GPU: norms, gates, rotary embedding, the loss, and codes, by whose kernels.

    python bench/card_beside.py [--seconds 240] [--out FILE] [--dry]

Forward and backward in bfloat16, at Llama-3-8B's sizes and 8,192 tokens: plopfast's Triton kernels, transformers' or torch's
own operations, and liger-kernel's. The loss is that of 4,096 tokens under Llama-3.2-1B's head. Codes: a weight of 14336 x 4096
decoded, and multiplied with a few rows, beside bitsandbytes and the bare product with a dense weight. Microseconds are
first those of a call and its end, medians of turns with the cache flushed before each, then those of its kernels alone, in
one more call; memory is what a call takes above what it is given. --dry: tiny sizes on the CPU.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from plopfast.support import threads

threads.set_waiting_policy()

import card_gpu
import measure
import torch
from torch import nn
from torch.nn import functional
from transformers.models.llama.modeling_llama import LlamaRMSNorm, apply_rotary_pos_emb

from plopfast.kernels import block_ops
from plopfast.models.cross_entropy import chunked_cross_entropy
from plopfast.models.quantized import quantized
from plopfast.models.rotary import rotary

Calls = dict[str, Callable[[], Any]]
BF16 = torch.bfloat16


class Sizes:
    def __init__(self, dry: bool) -> None:
        self.device = torch.device("cpu" if dry else "cuda")
        self.tokens, self.hidden, self.inner, self.heads, self.keys, self.width = (
            (16, 64, 128, 4, 2, 16) if dry else (8192, 4096, 14336, 32, 8, 128)
        )
        self.judged, self.small, self.vocabulary = (16, 64, 300) if dry else (4096, 2048, 128_256)
        self.liger = not dry and not card_gpu.missing("liger_kernel")
        self.bitsandbytes = not dry and not card_gpu.missing("bitsandbytes")

    def draw(self, *shape: int) -> torch.Tensor:
        return torch.randn(*shape, device=self.device).to(BF16).requires_grad_()


def back(call: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor, dy: torch.Tensor) -> Callable[[], Any]:
    return lambda: torch.autograd.grad(call(x), x, dy)


def norms(s: Sizes) -> Calls:
    x, dy, theirs = (
        s.draw(s.tokens, s.hidden),
        s.draw(s.tokens, s.hidden).detach(),
        LlamaRMSNorm(s.hidden).to(s.device, BF16),
    )
    theirs.requires_grad_(False)
    found: Calls = {
        "plopfast": back(lambda x: block_ops.rms_norm(x, theirs.weight, 1e-6), x, dy),
        "torch": back(theirs, x, dy),
    }
    if s.liger:
        from liger_kernel.transformers import LigerRMSNorm

        liger = LigerRMSNorm(s.hidden, in_place=False).to(s.device, BF16).requires_grad_(False)
        found["liger-kernel"] = back(liger, x, dy)
    return found


def gates(s: Sizes) -> Calls:
    g, u, dy = (s.draw(s.tokens, s.inner) for _ in range(3))
    dy = dy.detach()
    found: Calls = {
        "plopfast": lambda: torch.autograd.grad(block_ops.gate(g, u, "silu"), (g, u), dy),
        "torch": lambda: torch.autograd.grad(functional.silu(g) * u, (g, u), dy),
    }
    if s.liger:
        from liger_kernel.ops.swiglu import LigerSiLUMulFunction

        # its backward pass writes over g and u, so it gets its own, which the next call spoils again
        own = [t.detach().clone().requires_grad_() for t in (g, u)]
        found["liger-kernel"] = lambda: torch.autograd.grad(LigerSiLUMulFunction.apply(*own), own, dy)
    return found


def rotations(s: Sizes) -> Calls:
    q, k = (s.draw(1, s.tokens, h * s.width) for h in (s.heads, s.keys))
    angle = torch.randn(1, s.tokens, s.width // 2, device=s.device).repeat(1, 1, 2)
    cos, sin = angle.cos().to(BF16), angle.sin().to(BF16)
    dy = [torch.randn(1, s.tokens, h, s.width, device=s.device).to(BF16).transpose(1, 2) for h in (s.heads, s.keys)]

    def of(function: Callable[..., Any]) -> Callable[[], Any]:
        def run() -> Any:
            y = function(*(x.unflatten(2, (-1, s.width)).transpose(1, 2) for x in (q, k)), cos, sin)
            return torch.autograd.grad(y, [q, k], dy)

        return run

    found = {"plopfast": of(rotary), "torch": of(apply_rotary_pos_emb)}
    if s.liger:
        from liger_kernel.transformers import liger_rotary_pos_emb

        found["liger-kernel"] = of(liger_rotary_pos_emb)
    return found


def losses(s: Sizes) -> Calls:
    hidden, weight = s.draw(s.judged, s.small), s.draw(s.vocabulary, s.small).detach() * 3 * s.small**-0.5
    targets = torch.randint(0, s.vocabulary, (s.judged,), device=s.device)

    def of(loss: Callable[[], torch.Tensor]) -> Callable[[], Any]:
        return lambda: torch.autograd.grad(loss(), hidden)

    found = {
        "plopfast": of(lambda: chunked_cross_entropy(hidden, weight, targets)),
        "torch": of(lambda: functional.cross_entropy((hidden @ weight.T).float(), targets, reduction="sum")),
        "products alone": lambda: (hidden.detach() @ weight.T) @ weight,
    }
    if s.liger:
        from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

        liger = LigerFusedLinearCrossEntropyLoss(reduction="sum")
        found["liger-kernel"] = of(lambda: liger(weight, hidden, targets))
    return found


def codes(s: Sizes, rows: int) -> dict[str, Calls]:
    """What a frozen linear of codes takes with `rows` tokens, forward and back to x; 0 rows: decoding alone."""
    dense = nn.Linear(s.hidden, s.inner, bias=False, device=s.device, dtype=BF16).requires_grad_(False)
    x, dy = s.draw(rows or 1, s.hidden), s.draw(rows or 1, s.inner).detach()
    found: dict[str, Calls] = {}
    for kind in ("nf4", "int8", "fp8"):
        held = quantized(dense, kind)
        out = torch.empty_like(dense.weight)
        found[kind] = {"plopfast": back(held, x, dy) if rows else partial(held.codes.decode, out)}
        if rows:
            found[kind]["dense"] = back(dense, x, dy)
    if s.bitsandbytes:
        import bitsandbytes as bnb

        packed, state = bnb.functional.quantize_4bit(dense.weight.data, quant_type="nf4")
        four = bnb.nn.Linear4bit(s.hidden, s.inner, bias=False, compute_dtype=BF16, quant_type="nf4")
        four.weight = bnb.nn.Params4bit(
            packed, requires_grad=False, quant_state=state, bnb_quantized=True, quant_type="nf4"
        )
        four.weight.quant_state = state
        found["nf4"]["bitsandbytes"] = (
            back(four, x, dy) if rows else partial(bnb.functional.dequantize_4bit, packed, state)
        )
    return found


def timed(calls: Calls, device: torch.device, turns: int = 20) -> dict[str, dict[str, float]]:
    found: dict[str, dict[str, float]] = {}
    for name, call in calls.items():
        call()
        if device.type == "cuda":
            torch.cuda.synchronize()
            before = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
            call()
            torch.cuda.synchronize()
            found[name] = {"mib": (torch.cuda.max_memory_allocated() - before) / 2**20}
        else:
            found[name] = {"mib": 0.0}
    flush = torch.empty(256 << 20 if device.type == "cuda" else 1, dtype=torch.uint8, device=device)
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(turns):
        for name, call in calls.items():
            flush.zero_()
            seconds[name].append(card_gpu.seconds_of(call))
    for name, values in seconds.items():
        found[name] |= {"us": statistics.median(values) * 1e6, "gpu_us": card_gpu.gpu_time(calls[name])[0] * 1e3}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=240.0, help="begin no case after this time (default: 240)")
    parser.add_argument("--out", type=Path, default=measure.RESULTS / "card_beside.json", help="the file to write")
    parser.add_argument("--dry", action="store_true", help="tiny sizes on the CPU")
    given = parser.parse_args()
    until, s = time.monotonic() + given.seconds, Sizes(given.dry)
    torch.manual_seed(0)
    cases: dict[str, Callable[[], Calls]] = {
        "RMSNorm": lambda: norms(s), "SwiGLU": lambda: gates(s), "rotary": lambda: rotations(s), "loss": lambda: losses(s),
    }  # fmt: skip
    for rows in (0, 1, 8, 64, 2048):
        for kind in ("nf4", "int8", "fp8"):
            name = f"{kind}, {rows} rows" if rows else f"{kind} decoded"
            cases[name] = lambda rows=rows, kind=kind: codes(s, rows)[kind]  # type: ignore[misc]
    lines, figures = [], {}
    for name, make in cases.items():
        if time.monotonic() > until:
            lines.append(f"time is up before {name}")
            break
        figures[name] = found = timed(make(), s.device)
        base = found["plopfast"]["us"]
        each = "; ".join(
            f"{key} {one['us']:.0f} us ({one['us'] / base:.2f}), kernels {one['gpu_us']:.0f}, {one['mib']:.0f} MiB"
            for key, one in found.items()
        )
        lines.append(f"{name:<18} {each}")
        print(lines[-1], flush=True)
    measure.save(given.out, "\n".join(lines), {"cases": figures})


if __name__ == "__main__":
    main()
