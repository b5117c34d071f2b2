"""Host time and launches of one LoRA linear and of one block on this GPU, and what a launch costs.

    python bench/card_profile.py [--seconds 240] [--out FILE] [--dry]

The shapes are SmolLM2-135M's (576 features, 1,536 in the MLP), 512 tokens, rank 16, bfloat16: so small that the GPU is
never what a step waits for. A step's time is the wall time of many steps enqueued one after the other, with autograd's own
thread for the backward pass, and with the calling thread. Launches are what torch's profiler sees on the GPU in one step:
kernels, copies and fills. Operators are those of torch and plopfast that the host goes through, nested ones too. Our
adapters are cast and share inputs as in training (lora/shared.py). --dry: fewer tokens and calls on the CPU.
"""

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from plopfast.support import threads

threads.set_waiting_policy()

import card_gpu
import measure
import torch

from plopfast.cli.bench_cases import adapted, adapters
from plopfast.lora.layer import LoRALinear
from plopfast.lora.shared import Prepared, find_shared_inputs

RANK = 16


def frozen(kind: str, hidden: int, inner: int, heads: int) -> torch.nn.Module:
    """A linear, or transformers' Llama of one block, from which the block is taken once it has adapters."""
    if kind == "linear":
        return torch.nn.Linear(hidden, hidden, bias=False)
    from transformers import LlamaConfig, LlamaModel

    return LlamaModel(
        LlamaConfig(
            vocab_size=8, hidden_size=hidden, intermediate_size=inner, num_hidden_layers=1, num_attention_heads=heads,
            num_key_value_heads=heads // 3, pad_token_id=0, attn_implementation="sdpa",  # type: ignore[call-arg]
        )
    )  # fmt: skip


def paths(base: torch.nn.Module, dry: bool, peft: bool) -> dict[str, torch.nn.Module]:
    """The frozen module and what puts adapters on it, by path."""
    found = {"frozen": base} | ({"PEFT": adapted(base, "peft", RANK)} if peft else {})
    for backend in ("torch",) if dry else ("torch", "lora-first", "fused"):
        found[backend] = adapted(base, LoRALinear, RANK, backend)
        if not isinstance(base, torch.nn.Linear):
            find_shared_inputs(found[backend])  # as the trainer does
    return found


def figures(module: torch.nn.Module, x: torch.Tensor, calls: int) -> dict[str, float]:
    dy, trained = torch.randn_like(x), adapters(module)
    run: Callable[[torch.Tensor], torch.Tensor] = module
    if hasattr(module, "rotary_emb"):
        angles = module.rotary_emb(x, torch.arange(x.shape[1], device=x.device)[None])
        run = lambda x: module.layers[0](x, position_embeddings=angles)  # noqa: E731

    def step() -> None:
        torch.autograd.grad(run(x), [x, *trained], dy)

    @torch.no_grad()
    def forward() -> None:
        run(x)

    with Prepared(module):
        step()
        found = {"step_us": card_gpu.wall_us(step, calls), "forward_us": card_gpu.wall_us(forward, calls)}
        with torch.autograd.set_multithreading_enabled(False):
            found["one_thread_us"] = card_gpu.wall_us(step, calls)
        busy_ms, launches = card_gpu.gpu_time(step)
        return found | {"gpu_us": round(busy_ms * 1e3, 1), "launches": launches, "operators": card_gpu.operators(step)}


def launch_us() -> dict[str, float]:
    """One launch of a small kernel: through Triton's front door, and by a plan (kernels/launch.py); one torch operator."""
    from plopfast.kernels.launch import summing
    from plopfast.kernels.reduce import sum_partials

    parts, out = torch.randn(2, 4096, device="cuda"), torch.empty(4096, device="cuda")
    planned = summing(parts.device, 2, (4096,), torch.float32, 1.0)
    front: Callable[[], Any] = lambda: sum_partials[(4,)](parts, out, 2, 4096, 1.0, ROOT=False, BLOCK=1024, num_warps=4)  # noqa: E731
    calls = {"kernel[grid]": front, "planned": lambda: planned(parts), "out.add_": lambda: out.add_(1)}
    return {name: card_gpu.wall_us(call, 100) for name, call in calls.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=measure.RESULTS / "card_profile.json", help="the file to write")
    parser.add_argument("--seconds", type=float, default=240.0, help="begin no path after this time (default: 240)")
    parser.add_argument("--dry", action="store_true", help="a few tokens on the CPU")
    given = parser.parse_args()
    device, dtype = (torch.device("cpu"), torch.float32) if given.dry else (torch.device("cuda"), torch.bfloat16)
    hidden, inner, heads, tokens = (48, 96, 3, 8) if given.dry else (576, 1536, 9, 512)
    until = time.monotonic() + given.seconds
    without, lines, found = card_gpu.missing("transformers", "peft"), [], {}
    for kind in ("linear", "block")[: 1 if "transformers" in without else 2]:
        base = frozen(kind, hidden, inner, heads).to(device, dtype).requires_grad_(False)
        x = torch.randn(1, tokens, hidden, device=device, dtype=dtype, requires_grad=True)
        lines.append(
            f"{kind:<12}{'step, us':>10}{'one thread':>12}{'forward':>10}{'GPU, us':>9}{'launches':>10}{'operators':>11}"
        )
        for path, module in paths(base, given.dry, "peft" not in without).items():
            if time.monotonic() > until:
                lines.append(f"{path:<12} left out: {given.seconds:g} s are spent")
                continue
            row = figures(module, x, 2 if given.dry else 100 if kind == "linear" else 20)
            found.setdefault(kind, {})[path] = row
            lines.append(
                f"{path:<12}{row['step_us']:>10.1f}{row['one_thread_us']:>12.1f}{row['forward_us']:>10.1f}"
                f"{row['gpu_us']:>9.1f}{row['launches']:>10}{row['operators']:>11}"
            )
    launch = {} if given.dry else launch_us()
    lines += [f"one launch, {name}: {us:.1f} us" for name, us in launch.items()]
    measure.save(given.out, "\n".join(lines), {"host": found, "launch_us": launch})


if __name__ == "__main__":
    main()
