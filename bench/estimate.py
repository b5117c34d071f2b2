"""The estimate of a step's memory and FLOPs against measurement, on the default model.

Each case trains in its own process. Compared are FLOPs, by torch's counter, and peak resident memory, less what was
resident after loading libraries and tokenizer and a first training, of a single layer. Resident memory is measured twice: with an
allocator that gives freed blocks back (glibc's MALLOC_MMAP_THRESHOLD_, fixed), which is what the estimate means, and with
glibc's defaults, which keep and fragment freed blocks.

python bench/estimate.py            writes results/estimate.json
python bench/estimate.py --ways     dense and nf4 weights, resident and streamed, estimated from shapes alone: writes
                                    results/estimate_ways.json

A streamed model's blocks lie in mapped files, whose pages are resident, too, as long as the system does not need them: the
estimate of resident memory is then the sum of both. Anonymous memory, which the system cannot drop, is sampled beside it.
"""

import dataclasses
import gc
import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

from measure import save

from plopfast.support import memory

CHOICES = ("plop", "attn", "all", "full")
SHAPES = ((8, 20), (4, 256))  # rows, tokens
PLOP = ("v_proj", "up_proj", "down_proj")  # what PLoP chooses for the default model on the demo data
STEPS, RANK = 2, 16
WAYS = {  # of keeping the frozen weights: what is given to load_model, and whether blocks are recomputed
    "dense": ({}, False),
    "dense, recomputed": ({}, True),
    "nf4, recomputed": ({"quantize": "nf4"}, True),
    "dense, streamed, recomputed": ({"stream": True}, True),
    "nf4, streamed, recomputed": ({"quantize": "nf4", "stream": True}, True),
}
STRICT = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}


def placement_of(choice, model):
    from plopfast.lora.placement import Placement
    from plopfast.models.linears import linear_modules

    types = {"plop": PLOP, "attn": ("q_proj", "k_proj", "v_proj")}.get(choice)
    chosen = [info for info in linear_modules(model) if types is None or info.type in types]
    size = sum(RANK * (info.n_in + info.n_out) for info in chosen)
    return Placement({info.name: (RANK, 32.0) for info in chosen}, sorted({i.type for i in chosen}), choice, size)


def measured(choice, rows, tokens, way="dense"):
    """Peak MiB and TFLOPs of real training steps, as JSON on the last line: run in a process of its own."""
    import torch
    import transformers
    from torch.utils.flop_counter import FlopCounterMode

    import plopfast as pf
    from plopfast.data.batches import collate
    from plopfast.data.example import Example
    from plopfast.lora.injection import inject
    from plopfast.lora.shared import Prepared
    from plopfast.models.loading import shapes_source
    from plopfast.support.config import RunConfig
    from plopfast.training.blocks import prepared_blocks
    from plopfast.training.meter import FORMULAS
    from plopfast.training.trainer import Trainer

    how, recomputed = WAYS[way]

    def trainer_of(model, rows, tokens):
        inject(model, placement_of(choice, model)) if choice != "full" else model.requires_grad_(True)
        draw = torch.Generator().manual_seed(0)
        drawn = torch.randint(
            9, len(model.get_input_embeddings().weight), (rows * STEPS, tokens), generator=draw
        ).tolist()
        examples = [Example.after_prompt(tuple(row), 1, None, f"row {i}") for i, row in enumerate(drawn)]
        config = RunConfig(batch_tokens=rows * tokens, max_steps=STEPS, lr=1e-5, checkpointing=recomputed)
        return Trainer(model, config, examples, examples[:1])

    _tokenizer = pf.load_model()[1]  # it stays, with the code that was loaded
    one_layer = transformers.AutoConfig.from_pretrained(shapes_source(None), num_hidden_layers=1, dtype=torch.float32)
    trainer_of(transformers.AutoModelForCausalLM.from_config(one_layer), rows, tokens).fit()
    before = resident_mib()
    anonymous_before = anonymous_mib()
    model = pf.load_model(**how)[0]
    trainer = trainer_of(model, rows, tokens)
    memory.reset_peak()
    with Sampled() as sampled:
        trainer.fit()
    mib = memory.peak_mib() - before
    batch, config = collate(trainer.rows[:rows]), trainer.config
    model.train()
    flops = FlopCounterMode(display=False, custom_mapping=FORMULAS)
    with prepared_blocks(model, config), Prepared(model), flops:
        trainer.objective(batch).backward()
    figures = {"mib": mib, "anonymous_mib": sampled.peak - anonymous_before}
    print(json.dumps(figures | {"tflops": flops.get_total_flops() / 1e12}))


def anonymous_mib():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) / 1024


class Sampled:
    """The largest anonymous memory that a thread saw, every 5 ms, while it lasts."""

    def __enter__(self):
        self.peak, self.ends = 0.0, threading.Event()
        self.thread = threading.Thread(target=self._sample)
        self.thread.start()
        return self

    def __exit__(self, *raised):
        self.ends.set()
        self.thread.join()

    def _sample(self):
        while not self.ends.wait(0.005):
            self.peak = max(self.peak, anonymous_mib())


def resident_mib():
    gc.collect()
    memory.reset_peak()
    return memory.peak_mib()


def in_process(choice, rows, tokens, environment, way="dense"):
    command = [sys.executable, __file__, choice, str(rows), str(tokens), way]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=os.environ | environment)
    return json.loads(done.stdout.splitlines()[-1])


def ways(rows=4, tokens=256):
    import torch

    from plopfast.models.loading import shapes_source
    from plopfast.models.shapes import model_of
    from plopfast.support.config import RunConfig
    from plopfast.training.estimate import estimate_shapes

    cases, folder = [], shapes_source(None)
    for way, (how, recomputed) in WAYS.items():
        model = model_of(folder, dtype=torch.float32, quantize=how.get("quantize"))
        (e,) = estimate_shapes(
            model, {"plop": placement_of("plop", model)}, RunConfig(checkpointing=recomputed), rows=rows, row_tokens=tokens,
            device="cpu", resident_share=0.0 if how.get("stream") else None,
        )  # fmt: skip
        real = in_process("plop", rows, tokens, STRICT, way)
        resident = e.total_mib + e.host_mib
        cases.append({
            "way": way, "rows": rows, "tokens": tokens, "estimate": dataclasses.asdict(e), "resident_mib": resident,
            "measured": real, "memory_error": resident / real["mib"] - 1, "flops_error": e.tflops_per_step / real["tflops"] - 1,
            "anonymous_error": e.total_mib / real["anonymous_mib"] - 1,
        })  # fmt: skip
    lines = [
        f"{'':<28}{'est. MiB':>9}{'of it mapped':>13}{'resident':>9}{'error':>8}{'est. anonymous':>15}{'sampled':>8}{'error':>8}"
    ]
    for c in cases:
        e, real = c["estimate"], c["measured"]
        lines.append(
            f"{c['way']:<28}{c['resident_mib']:>9,.0f}{e['host_mib']:>13,.0f}{real['mib']:>9,.0f}{c['memory_error']:>+8.1%}"
            f"{e['total_mib']:>15,.0f}{real['anonymous_mib']:>8,.0f}{c['anonymous_error']:>+8.1%}"
        )
    worst = max(abs(c[key]) for c in cases for key in ("memory_error", "flops_error"))
    lines.append(
        f"{rows} rows of {tokens} tokens, rank {RANK} on v, up and down, float32; largest error of resident memory and FLOPs {worst:.1%}"
    )
    save("estimate_ways", "\n".join(lines), {"cases": cases, "worst": worst})


def main():
    import plopfast as pf
    from plopfast.support.config import RunConfig
    from plopfast.training.estimate import estimate

    model, _ = pf.load_model()
    cases = []
    for rows, tokens in SHAPES:
        placements = {choice: None if choice == "full" else placement_of(choice, model) for choice in CHOICES}
        began = time.process_time()
        found = estimate(model, placements, RunConfig(), rows=rows, row_tokens=tokens)
        seconds = (time.process_time() - began) / len(found)
        for e in found:
            real, default = (in_process(e.name, rows, tokens, more) for more in (STRICT, {}))
            case = {"rows": rows, "tokens": tokens, "seconds": seconds, "estimate": dataclasses.asdict(e)}
            case |= {"measured": real, "default_allocator_mib": default["mib"]}
            case["memory_error"] = e.total_mib / real["mib"] - 1
            case["flops_error"] = e.tflops_per_step / real["tflops"] - 1
            cases.append(case)
    lines = [
        f"{'':<6}{'batch':>9}{'est. MiB':>10}{'resident':>10}{'error':>8}{'(glibc)':>9}{'est. TFLOP':>12}{'counted':>9}"
        f"{'error':>8}"
    ]
    for c in cases:
        e, real = c["estimate"], c["measured"]
        lines.append(
            f"{e['name']:<6}{c['rows']:>4} x {c['tokens']:>3}{e['total_mib']:>9,.0f}{real['mib']:>10,.0f}"
            f"{c['memory_error']:>+8.1%}{c['default_allocator_mib']:>9,.0f}{e['tflops_per_step']:>12.4f}"
            f"{real['tflops']:>9.4f}{c['flops_error']:>+8.1%}"
        )
    worst = max(abs(c[key]) for c in cases for key in ("memory_error", "flops_error"))
    lines.append(
        f"largest error {worst:.1%}; an estimate takes {max(c['seconds'] for c in cases):.1f} s of processor time a choice"
    )
    save("estimate", "\n".join(lines), {"cases": cases, "worst": worst})


if __name__ == "__main__":
    if sys.argv[1:] == ["--ways"]:
        ways()
    elif len(sys.argv) > 1:
        measured(sys.argv[1], *map(int, sys.argv[2:4]), *sys.argv[4:])
    else:
        main()
