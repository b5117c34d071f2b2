"""Where a LoRA linear's time goes on this GPU: host time of a step, one launch, and launch parameters of the gradients.

    python bench/card_profile.py [--seconds 120]

Host time is the wall time of small steps enqueued one after the other (512 tokens, 576 -> 576, rank 16, bfloat16): the
GPU is never what they wait for. The sweep times `lora_grads` (kernels/grads.py) with other tiles, row parts, stages and
warps than its launcher chooses, beside plain torch. Its inputs stay in the L2 cache where they fit, for all alike.
"""

import argparse
import itertools
import statistics
import time
from collections.abc import Callable
from typing import Any

import measure
import torch
import triton
from triton.testing import do_bench

import plopfast as pf
from plopfast.kernels import triton_ops
from plopfast.kernels.grads import lora_grads
from plopfast.kernels.launch import sum_parts
from plopfast.kernels.reduce import sum_partials

SHAPES = ((8192, 4096), (8192, 14336), (8192, 1024), (8192, 576), (2048, 4096), (512, 4096))  # rows, columns
RANK, SCALE, BF16 = 16, 2.0, torch.bfloat16
SWEEP = tuple(itertools.product((32, 64, 128), (64, 128, 256), (1, 2, 4), (2, 3, 4), (4, 8)))
KEPT = 4  # best settings that are reported


def wall_us(call: Callable[[], Any], calls: int = 100) -> float:
    """Microseconds a call, median of five rounds."""
    rounds = []
    for _ in range(6):
        torch.cuda.synchronize()
        began = time.perf_counter()
        for _ in range(calls):
            call()
        torch.cuda.synchronize()
        rounds.append((time.perf_counter() - began) / calls * 1e6)
    return round(statistics.median(rounds[1:]), 1)


def host_us() -> dict[str, tuple[float, float]]:
    """Path -> (step, forward pass) of one small linear."""
    found = {}
    for path in ("frozen", "peft", "torch", "lora-first", "fused"):
        base = torch.nn.Linear(576, 576, bias=False, device="cuda", dtype=BF16).requires_grad_(False)
        module: torch.nn.Module = base
        if path == "peft":
            from peft import LoraConfig, inject_adapter_in_model

            config = LoraConfig(r=RANK, lora_alpha=32, target_modules=["m"])
            module = inject_adapter_in_model(config, torch.nn.ModuleDict({"m": base}))["m"].to(BF16)
        elif path != "frozen":
            module = pf.LoRALinear(base, RANK, 32, backend=path)
        x = torch.randn(512, 576, device="cuda", dtype=BF16, requires_grad=True)
        dy = torch.randn(512, 576, device="cuda", dtype=BF16)

        def forward(module=module, x=x) -> None:
            with torch.no_grad():
                module(x)

        found[path] = wall_us(lambda module=module, x=x, dy=dy: module(x).backward(dy)), wall_us(forward)
    return found


def launch_us() -> dict[str, float]:
    """One launch of a small kernel: through Triton's front door, and of the compiled kernel itself; one torch operator."""
    parts, out = torch.randn(2, 4096, device="cuda"), torch.empty(4096, device="cuda")
    stream = torch.cuda.current_stream().cuda_stream

    def front() -> Any:
        return sum_partials[(4,)](parts, out, 2, 4096, 1.0, ROOT=False, BLOCK=1024, num_warps=4)

    kernel = front()
    hidden = kernel.function, kernel.packed_metadata, None, None, None
    direct = lambda: kernel.run(4, 1, 1, stream, *hidden, parts, out, 2, 4096, 1.0, False, 1024)  # noqa: E731
    return {
        "kernel[grid]": wall_us(front),
        "compiled kernel": wall_us(direct),
        "out.add_": wall_us(lambda: out.add_(1)),
    }


def grads_ms(rows: int, columns: int, until: float) -> dict[str, Any]:
    """dA, and dS with dB, of one shape: as shipped, by torch, and by the fastest settings of the sweep."""
    t = torch.randn(rows, columns, device="cuda", dtype=BF16)
    v, u = torch.randn(rows, RANK, device="cuda", dtype=BF16), torch.randn(columns, RANK, device="cuda")
    ms = lambda call, rep=60: round(do_bench(call, warmup=15, rep=rep, return_mode="median"), 4)  # noqa: E731
    found: dict[str, Any] = {
        "dA": {
            "shipped": ms(lambda: triton_ops.grad_a(v, t, 0.0, 0, torch.float32)), "torch": ms(lambda: v.T @ t)
        },
        "dS and dB": {
            "shipped": ms(lambda: triton_ops.grad_s_and_b(t, v, u, SCALE)),
            "torch": ms(lambda: (SCALE * (t @ u.to(BF16)), t.T @ v)),
        },
    }  # fmt: skip
    for name, with_ds in (("dA", False), ("dS and dB", True)):
        best = []
        for bm, bc, waves, stages, warps in SWEEP:
            if bm * bc > 16384 or time.monotonic() > until:
                continue
            stripes, blocks = triton.cdiv(columns, bc), triton.cdiv(rows, bm)
            parts = max(1, min(round(waves * 132 / stripes), blocks))
            parts = triton.cdiv(blocks, triton.cdiv(blocks, parts))
            grid = {"BM": bm, "BC": bc, "parts": parts, "num_stages": stages, "num_warps": warps}
            try:
                best.append(
                    (
                        ms(lambda grid=grid, with_ds=with_ds: launch_grads(t, v, u if with_ds else None, **grid), 15),
                        grid,
                    )
                )
            except triton.runtime.errors.OutOfResources:
                continue
        found[name]["swept"] = sorted(best, key=lambda row: row[0])[:KEPT]
    return found


def launch_grads(t, v, u, *, BM, BC, parts, num_stages, num_warps) -> None:
    """The launch of kernels/triton_ops.py with settings of one's own, and the sums of its parts."""
    (m, columns), stripes = t.shape, triton.cdiv(t.shape[1], BC)
    layout = (columns, RANK) if u is not None else (RANK, columns)
    g = v.new_empty(parts, *layout, dtype=torch.float32)
    ds = v.new_empty((stripes, m, RANK) if u is not None else (0,), dtype=torch.float32)
    lora_grads[(stripes, parts)](
        t, v, t if u is None else u, g, ds, m, columns, triton.cdiv(triton.cdiv(m, BM), parts) * BM, 1.0, 0, 0,
        *t.stride(), v.stride(0), *((0, 0) if u is None else u.stride()), columns * RANK,
        *((RANK, 1) if u is not None else (1, columns)), m * RANK,
        RANK=RANK, RP=16, WITH_DS=u is not None, DROP=False, PRECISION="ieee", BM=BM, BC=BC, TILES=1,
        num_warps=num_warps, num_stages=num_stages,
    )  # fmt: skip
    sum_parts(g, 1.0, torch.float32)
    if u is not None:
        sum_parts(ds, SCALE, BF16)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=120.0, help="for the sweep (default: 120)")
    until = time.monotonic() + parser.parse_args().seconds
    host, launch = host_us(), launch_us()
    lines = [f"{'path':<12}{'step, us':>10}{'forward, us':>13}"]
    lines += [f"{name:<12}{step:>10.1f}{forward:>13.1f}" for name, (step, forward) in host.items()]
    lines += [f"one launch, {name}: {us:.1f} us" for name, us in launch.items()]
    swept = {f"{m} x {columns}": grads_ms(m, columns, until) for m, columns in SHAPES}
    lines.append(f"{'gradients':<24}{'shipped, ms':>12}{'torch':>9}{'swept':>9}")
    for shape, kinds in swept.items():
        for kind, row in kinds.items():
            best = f"{row['swept'][0][0]:9.4f}" if row["swept"] else f"{'-':>9}"
            lines.append(f"{shape + ', ' + kind:<24}{row['shipped']:>12.4f}{row['torch']:>9.4f}{best}")
    measure.save("h100/card_profile", "\n".join(lines), {"host_us": host, "launch_us": launch, "grads_ms": swept})


if __name__ == "__main__":
    main()
