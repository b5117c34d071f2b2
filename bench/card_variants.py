"""How many variants of each kernel a training compiles, and how long that takes, over random token counts.

    python bench/card_variants.py [--seconds 300] [--out FILE] [--dry]

For ranks 8, 16 and 64, with and without dropout, one LoRA linear of 2,048 x 2,048 makes a step (forward and backward) with
200 token counts drawn from 1 to 16,384, in bfloat16, with each Triton strategy; Triton's cache is empty at the start. A
variant is a kernel that Triton compiles for other sizes, strides or settings than before. --dry: three small counts in
plain torch on the CPU, which compiles nothing.
"""

import argparse
import os
import random
import tempfile
import time
from pathlib import Path

CACHE = tempfile.TemporaryDirectory(prefix="card-variants-")
os.environ["TRITON_CACHE_DIR"] = CACHE.name  # before Triton reads it

import card_gpu
import measure
import torch
import triton

import plopfast as pf

RANKS, COUNTS, MOST, SIDE = (8, 16, 64), 200, 16_384, 2048


class Compilations:
    """What Triton compiles: kernel -> seconds of each variant."""

    def __init__(self) -> None:
        self.seconds: dict[str, list[float]] = {}
        triton.knobs.compilation.listener = self

    def __call__(self, *, src, times, cache_hit, **_) -> None:
        self.seconds.setdefault(src.name, []).append(times.total / 1e6)  # microseconds; a hit counts, too

    def counts(self) -> dict[str, int]:
        return {name: len(each) for name, each in self.seconds.items()}


def step(linear: pf.LoRALinear, x: torch.Tensor) -> None:
    torch.autograd.grad(linear(x).sum(), [x, linear.lora_A, linear.lora_B])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=300.0, help="begin no rank after this time (default: 300)")
    parser.add_argument("--out", type=Path, default=measure.RESULTS / "card_variants.json", help="the file to write")
    parser.add_argument("--dry", action="store_true", help="three token counts in plain torch on the CPU")
    given = parser.parse_args()
    ranks, count, most, side = ((8,), 3, 20, 32) if given.dry else (RANKS, COUNTS, MOST, SIDE)
    device, dtype = ("cpu", torch.float32) if given.dry else ("cuda", torch.bfloat16)
    draw, until, made = random.Random(0), time.monotonic() + given.seconds, Compilations()
    tokens = [draw.randint(1, most) for _ in range(count)]
    longest = torch.randn(most, side, device=device, dtype=dtype)
    inputs = [longest[:m].requires_grad_() for m in tokens]
    base = torch.nn.Linear(side, side, bias=False, device=device, dtype=dtype)
    rows, lines = [], [f"{'strategy':<12}{'rank':>5}{'dropout':>9}{'new variants':>14}{'compile, s':>12}{'all, s':>8}"]
    for strategy in ("torch",) if given.dry else ("lora-first", "fused"):
        for rank in ranks:
            for dropout in (0.0, 0.1):
                if time.monotonic() > until:
                    lines.append(f"time is up before {strategy}, rank {rank}, dropout {dropout}")
                    continue
                linear = pf.LoRALinear(base, rank, 2.0 * rank, dropout=dropout, backend=strategy)
                before, compiled = made.counts(), sum(map(sum, made.seconds.values()))
                seconds = card_gpu.seconds_of(lambda linear=linear: [step(linear, x) for x in inputs])
                new = {name: n - before.get(name, 0) for name, n in made.counts().items() if n > before.get(name, 0)}
                took = sum(map(sum, made.seconds.values())) - compiled
                rows.append(
                    {
                        "strategy": strategy,
                        "rank": rank,
                        "dropout": dropout,
                        "new": new,
                        "compile_s": took,
                        "seconds": seconds,
                    }
                )
                lines.append(f"{strategy:<12}{rank:>5}{dropout:>9}{sum(new.values()):>14}{took:>12.1f}{seconds:>8.1f}")
                print(lines[-1], flush=True)
    each = made.counts()
    lines += [f"{name}: {n} variants, {sum(made.seconds[name]):.1f} s" for name, n in sorted(each.items())]
    lines.append(f"the most of one kernel: {max(each.values(), default=0)}")
    measure.save(
        given.out, "\n".join(lines), {"cases": rows, "variants": each, "compile_s": made.seconds, "tokens": len(tokens)}
    )


if __name__ == "__main__":
    main()
