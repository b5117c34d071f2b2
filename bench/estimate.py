"""The estimate of a step's memory and FLOPs against measurement, on the default model: each case trains in a process of its
own, whose peak resident memory, less what was resident before the model was loaded, and whose counted FLOPs are compared.

python bench/estimate.py            writes results/estimate.json
"""

import dataclasses
import json
import subprocess
import sys
import time

from measure import save

from plopfast import machine

CHOICES = ("plop", "attn", "all", "full")
SHAPES = ((8, 20), (4, 256))  # rows, tokens
PLOP = ("v_proj", "up_proj", "down_proj")  # what PLoP chooses for the default model on the demo data
STEPS, RANK = 3, 16


def placement_of(choice, model):
    from plopfast.models import linear_modules
    from plopfast.placement import Placement

    types = {"plop": PLOP, "attn": ("q_proj", "k_proj", "v_proj")}.get(choice)
    chosen = [info for info in linear_modules(model) if types is None or info.type in types]
    size = sum(RANK * (info.n_in + info.n_out) for info in chosen)
    return Placement({info.name: (RANK, 32.0) for info in chosen}, sorted({i.type for i in chosen}), choice, size)


def measured(choice, rows, tokens):
    """Peak MiB and TFLOPs of real training steps, as JSON on the last line: run in a process of its own."""
    import torch
    import transformers  # noqa: F401  # resident before the model is

    import plopfast as pf
    from plopfast.blocks import prepared_blocks
    from plopfast.config import RunConfig
    from plopfast.data import Example
    from plopfast.estimate import flop_counter
    from plopfast.lora import inject, prepared
    from plopfast.train import Trainer

    torch.set_num_threads(1)
    torch.nn.functional.linear(torch.ones(64, 64), torch.ones(64, 64))  # libraries take their buffers
    before = resident_mib()
    model, _ = pf.load_model()
    if choice == "full":
        model.requires_grad_(True)
    else:
        inject(model, placement_of(choice, model))
    draw = torch.Generator().manual_seed(0)
    examples = [
        Example(tuple(torch.randint(9, 40_000, (tokens,), generator=draw).tolist()), 1, None, f"row {i}")
        for i in range(rows * STEPS)
    ]
    config = RunConfig(batch_tokens=rows * tokens, max_steps=STEPS, lr=1e-5)
    trainer = Trainer(model, config, examples, examples[:1])
    machine.reset_peak()
    trainer.fit()
    mib = machine.peak_mib() - before
    batch = trainer._collate(examples[:rows])
    model.train()
    with prepared_blocks(model, config), prepared(model), flop_counter() as flops:
        trainer.objective(batch).backward()
    print(json.dumps({"mib": mib, "tflops": flops.get_total_flops() / 1e12}))


def resident_mib():
    machine.reset_peak()
    return machine.peak_mib()


def main():
    import plopfast as pf
    from plopfast.config import RunConfig
    from plopfast.estimate import estimate

    model, _ = pf.load_model()
    cases = []
    for rows, tokens in SHAPES:
        placements = {choice: None if choice == "full" else placement_of(choice, model) for choice in CHOICES}
        began = time.perf_counter()
        found = estimate(model, placements, RunConfig(), rows=rows, row_tokens=tokens)
        seconds = (time.perf_counter() - began) / len(found)
        for e in found:
            command = [sys.executable, __file__, e.name, str(rows), str(tokens)]
            real = json.loads(
                subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1]
            )
            case = {
                "rows": rows,
                "tokens": tokens,
                "seconds": seconds,
                "estimate": dataclasses.asdict(e),
                "measured": real,
            }
            case["memory_error"] = e.total_mib / real["mib"] - 1
            case["flops_error"] = e.tflops_per_step / real["tflops"] - 1
            cases.append(case)
            print(case, file=sys.stderr, flush=True)
    lines = [
        f"{'':<6}{'batch':>9}{'est. MiB':>10}{'resident':>10}{'error':>8}{'est. TFLOP':>12}{'counted':>9}{'error':>8}"
    ]
    for c in cases:
        e, real = c["estimate"], c["measured"]
        lines.append(
            f"{e['name']:<6}{c['rows']:>4} x {c['tokens']:>3}{e['total_mib']:>9,.0f}{real['mib']:>10,.0f}"
            f"{c['memory_error']:>+8.1%}{e['tflops_per_step']:>12.4f}{real['tflops']:>9.4f}{c['flops_error']:>+8.1%}"
        )
    worst = max(abs(c[key]) for c in cases for key in ("memory_error", "flops_error"))
    lines.append(f"largest error {worst:.1%}; an estimate takes {max(c['seconds'] for c in cases):.1f} s a choice")
    save("estimate", "\n".join(lines), {"cases": cases, "worst": worst})


if __name__ == "__main__":
    if len(sys.argv) > 1:
        measured(sys.argv[1], *map(int, sys.argv[2:]))
    else:
        main()
