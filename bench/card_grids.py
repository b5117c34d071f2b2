"""What kernels/grids.py rests on: lora_grads and lora_shrink with other tiles, programs, stages and warps than it chooses.

    python bench/card_grids.py [--seconds 240] [--shipped] [--out FILE]

Times are the GPU's alone: ten calls in a CUDA graph, sums of parts included, inputs in L2 where they fit; the median of
four replays. "vendor" is what plain torch does: for dS and dB both products, the factor and the cast; for dA and S the
product without its mask, so that nothing with dropout can reach it. `--shipped` times no other grids.
"""

import argparse
import itertools
import multiprocessing
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import measure
import torch
import triton

from plopfast.kernels import philox, triton_ops
from plopfast.kernels.grads import lora_grads
from plopfast.kernels.launch import padded_rank, summing, summing_both
from plopfast.kernels.shrink import lora_shrink

BF16, FP32, CUDA = torch.bfloat16, torch.float32, torch.device("cuda", 0)
SHAPES = [  # tokens, columns
    (512, 576), (512, 4096), (2048, 1024), (2048, 4096), (2048, 14336), (8192, 576), (8192, 1024), (8192, 4096),
    (8192, 14336), (16384, 4096),
]  # fmt: skip
KINDS = [("dS, dB", 16), ("dA", 16), ("S", 16), ("S of 3", 16), ("dS, dB", 64), ("dA", 64), ("S", 64)]  # with ranks
GRADS = [c for c in itertools.product((32, 64, 128), (64, 128, 256, 512), (2, 3, 4), (4, 8)) if c[0] * c[1] <= 32768]
SHRINK = [c for c in itertools.product((16, 32, 64, 128), (32, 64, 128), (2, 3, 4), (4, 8)) if c[0] * c[1] <= 8192]
P, SEED, C, CALLS = 0.1, 1 << 40, 2.0, 10
Config = tuple[int, int, int, int]  # rows and columns of a tile, stages, warps


def of_grads(m: int, columns: int, rank: int, with_ds: bool, config: Config, waves: float, units: int) -> Any:
    """(call, grid) of lora_grads and its sums."""
    (bm, bc, stages, warps), p = config, 0.0 if with_ds else P
    t, v, u = (torch.randn(*shape, device=CUDA).to(BF16) for shape in ((m, columns), (m, rank), (columns, rank)))
    stripes, blocks = triton.cdiv(columns, bc), triton.cdiv(m, bm)
    parts = max(1, min(round(waves * units / stripes), blocks))
    parts = triton.cdiv(blocks, triton.cdiv(blocks, parts))
    shape, order = ((columns, rank), (rank, 1)) if with_ds else ((rank, columns), (1, columns))
    g = v.new_empty(parts, *shape, dtype=FP32)
    ds = v.new_empty((stripes, m, rank) if with_ds else (0,), dtype=FP32)
    both = summing_both(CUDA, (parts, shape, FP32, 1.0), (stripes, (m, rank), BF16, C))
    one = summing(CUDA, parts, shape, FP32, 1.0)

    def call() -> None:
        lora_grads[(stripes, parts)](
            t, v, u if with_ds else t, g, ds, m, triton.cdiv(blocks, parts) * bm, SEED, m * rank, columns, 1.0,
            philox.threshold(p), *t.stride(), v.stride(0), *(u.stride() if with_ds else (0, 0)), columns * rank, *order,
            RANK=rank, RP=padded_rank(rank), WITH_DS=with_ds, DROP=p > 0, PRECISION="ieee", BM=bm, BC=bc,
            num_warps=warps, num_stages=stages,
        )  # fmt: skip
        both(g, ds) if with_ds else one(g)

    return call, (stripes, parts)


def of_shrink(m: int, k: int, rank: int, count: int, config: Config, waves: float, units: int) -> Any:
    """(call, grid) of lora_shrink with dropout, and its sum."""
    bm, bk, stages, warps = config
    x, a = torch.randn(m, k, device=CUDA).to(BF16), torch.randn(rank, k, device=CUDA)
    rows, steps = triton.cdiv(m, bm), triton.cdiv(k, bk)
    chunk = triton.cdiv(steps, min(max(1, round(waves * units / rows)), max(1, steps // 2))) * bk
    splits = triton.cdiv(k, chunk)
    s = x.new_empty(splits, count, m, rank, dtype=FP32)
    gather = summing(CUDA, splits, (count, m, rank), BF16, C)

    def call() -> None:
        lora_shrink[(rows, splits)](
            x, a, a, a, s, m, SEED, SEED + 1, SEED + 2, k, chunk, philox.threshold(P), *x.stride(), *a.stride(),
            RANK=rank, RP=padded_rank(rank), ADAPTERS=count, DROP=True, PRECISION="ieee", BM=bm, BK=bk,
            num_warps=warps, num_stages=stages,
        )  # fmt: skip
        gather(s)

    return call, (rows, splits)


def made(kind: str, rank: int, m: int, columns: int, config: Config, waves: float, units: int) -> Any:
    if kind.startswith("S"):
        return of_shrink(m, columns, rank, 3 if "3" in kind else 1, config, waves, units)
    return of_grads(m, columns, rank, kind == "dS, dB", config, waves, units)


def known(kind: str, rank: int, m: int, columns: int) -> tuple[Callable[[], Any], Callable[[], Any]]:
    """The launcher as it ships, and plain torch."""
    t, v, u = (torch.randn(*shape, device=CUDA) for shape in ((m, columns), (m, rank), (columns, rank)))
    t, v, low, count = t.to(BF16), v.to(BF16), u.to(BF16), 3 if "3" in kind else 1
    if kind == "dS, dB":
        return lambda: triton_ops.grad_s_and_b(t, v, u, C), lambda: (C * (t @ low), (t.T @ v).float())
    if kind == "dA":
        return lambda: triton_ops.grad_a(v, t, P, SEED, FP32), lambda: (v.T @ t).float()
    a, stacked = u.T.contiguous(), torch.cat([low] * count, dim=1).T.contiguous()
    return lambda: triton_ops.shrink_stacked(t, (a,) * count, C, P, (SEED,) * count), lambda: t @ stacked.T


def compiled(job: tuple[str, int, Config]) -> tuple[tuple[str, int, Config], str]:
    """Fills Triton's cache on disk; why a variant cannot be launched, or ""."""
    try:
        made(*job[:2], 512, 4096, job[2], 1, 132)[0]()
        torch.cuda.synchronize()
    except (triton.runtime.errors.OutOfResources, RuntimeError) as error:
        return job, type(error).__name__
    return job, ""


def graph_us(call: Callable[[], Any]) -> float:
    call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(CALLS):
            call()
    graph.replay()
    events = [torch.cuda.Event(enable_timing=True) for _ in range(5)]
    for event in events[:-1]:
        event.record()
        graph.replay()
    events[-1].record()
    torch.cuda.synchronize()
    times = [one.elapsed_time(other) for one, other in itertools.pairwise(events)]
    return round(statistics.median(times) / CALLS * 1e3, 2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=240.0, help="begin no shape after this time (default: 240)")
    parser.add_argument("--shipped", action="store_true", help="time no other grids than the shipped ones")
    parser.add_argument("--out", type=Path, help="where the figures go (default: card_grids.json among the results)")
    given = parser.parse_args()
    until, units = time.monotonic() + given.seconds, torch.cuda.get_device_properties(0).multi_processor_count
    jobs = [
        (kind, rank, config)
        for kind, rank in KINDS
        for config in (() if given.shipped else SHRINK if kind.startswith("S") else GRADS)
        if kind != "dS, dB" or rank * config[1] <= 16384
    ]
    with ProcessPoolExecutor(14, multiprocessing.get_context("spawn")) as pool:
        refused = {job: why for job, why in pool.map(compiled, jobs, chunksize=4) if why}
    lines = [
        f"{len(jobs)} variants, {len(refused)} of them too large",
        f"{'':<28}{'shipped':>9}{'vendor':>9}{'best':>9}, us",
    ]
    found = []
    for (kind, rank), (m, columns) in itertools.product(KINDS, SHAPES):
        if time.monotonic() > until:
            lines.append(f"time was up before {kind}, rank {rank}, {m} x {columns}")
            break
        ours, theirs = known(kind, rank, m, columns)
        shipped = graph_us(ours) if kind != "dS, dB" or rank <= 32 else None
        row = {
            "kind": kind,
            "rank": rank,
            "rows": m,
            "columns": columns,
            "shipped": shipped,
            "vendor": graph_us(theirs),
        }
        swept: dict[Any, float] = {}
        for job in (job for job in jobs if job[:2] == (kind, rank) and job not in refused):
            for waves in (1, 2, 4):
                call, grid = made(kind, rank, m, columns, job[2], waves, units)
                if (job[2], grid) not in swept:
                    swept[job[2], grid] = graph_us(call)
        row["swept"] = [(us, *what) for what, us in sorted(swept.items(), key=lambda item: item[1])[:8]]
        found.append(row)
        best = f"{row['swept'][0][0]:>9.1f}  {row['swept'][0][1:]}" if swept else ""
        lines.append(f"{f'{kind}, R {rank}, {m} x {columns}':<28}{shipped or 0:>9.1f}{row['vendor']:>9.1f}{best}")
        print(lines[-1], flush=True)
    measure.save(given.out or "card_grids", "\n".join(lines), {"gpu": torch.cuda.get_device_name(), "rows": found})


if __name__ == "__main__":
    main()
