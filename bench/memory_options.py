"""What each option that saves memory saves, and what it costs, on a CPU.

    OMP_NUM_THREADS=1 python bench/memory_options.py [--steps 1] [--turns 3] [--rows 2] [--tokens 128]

A training step of SmolLM2-135M (rank 16 on v, up and down, float32) with each option off and on. "peak" are the bytes of
all tensors that are alive at one time, counted in a real step by plopfast's Meter; "estimate" is what plopfast estimate says
of the same step before it. Times are of the same model in turns, without the counting: each option's ratio to the plain
step within a turn, as the geometric mean. --offload and --embedding cpu do nothing on a CPU, and --keep-best cpu neither.
"""

import argparse
import importlib.metadata
import json
import math
import os
import platform
import statistics
import time
from pathlib import Path
from typing import Any

from plopfast.support import threads

threads.set_waiting_policy()

import torch

import plopfast as pf
from plopfast.data.example import Example
from plopfast.lora.injection import unload
from plopfast.lora.shared import Prepared, find_shared_inputs
from plopfast.training import moments
from plopfast.training.blocks import prepared_blocks
from plopfast.training.estimate import estimate
from plopfast.training.loss import Objective
from plopfast.training.meter import Meter
from plopfast.training.optimizer import make_optimizer

MIB = 2**20
TYPES = ("v_proj", "up_proj", "down_proj")
ARMS: dict[str, dict[str, Any]] = {
    "plain": {},
    "--mlp-rows 64": {"mlp_rows": 64},
    "--checkpointing": {"checkpointing": True},
    "--checkpointing --mlp-rows 64": {"checkpointing": True, "mlp_rows": 64},
    "--optimizer adamw8bit": {"optimizer": "adamw8bit"},
}


class Arm:
    """An option's training: a step with its own optimizer on the one model."""

    def __init__(self, model: Any, config: pf.TrainConfig, batch: dict[str, Any]) -> None:
        self.model, self.config, self.batch = model, config, batch
        self.objective = Objective(model, recomputed=config.checkpointing)
        self.parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.optimizer = make_optimizer(self.parameters, config)

    def step(self, count: int = 1) -> float:
        """Seconds of the steps."""
        prepared = Prepared(self.model)
        self.model.train()
        with prepared_blocks(self.model, self.config):
            began = time.perf_counter()
            for _ in range(count):
                with prepared:
                    self.objective(self.batch).backward()
                self.optimizer.step()
                self.optimizer.zero_grad(set_to_none=True)
            return time.perf_counter() - began

    def peak(self) -> int:
        """Bytes of a second step, with the optimizer's state and a copy of the best values as in a training."""
        self.step()
        with Meter() as meter:
            for tensor in (*self.model.parameters(), *self.model.buffers()):
                meter.add(tensor)
            self.step()
        best = sum(p.nbytes for p in self.parameters.values())
        kept = [moments.moments_of(self.optimizer, p) for p in self.parameters.values()]
        return meter.peak + best + sum(t.nbytes for of in kept for name, t in of.items() if name != "step")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in (("steps", 1), ("turns", 3), ("rows", 2), ("tokens", 128)):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--out", default=str(Path(__file__).parent / "results" / "memory_options.json"))
    given = parser.parse_args()
    torch.set_num_threads(1)
    model, _ = pf.load_model()
    names = [info.name for info in pf.linear_modules(model) if info.type in TYPES]
    placement = pf.Placement(dict.fromkeys(names, (16, 32.0)), list(TYPES), "types", 0)
    shape = {"rows": given.rows, "row_tokens": given.tokens, "label_tokens": given.tokens // 8}
    configs = {name: pf.TrainConfig(max_steps=1, **settings) for name, settings in ARMS.items()}
    told = {name: estimate(model, {name: placement}, config, **shape)[0].total_mib for name, config in configs.items()}
    pf.inject(model, placement)
    find_shared_inputs(model)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(5, 40000, (given.rows, given.tokens), generator=generator).tolist()
    from plopfast.data.batches import collate

    batch = collate([Example.after_prompt(tuple(row), given.tokens - given.tokens // 8, None, "") for row in ids])
    arms = {name: Arm(model, config, batch) for name, config in configs.items()}
    peaks = {name: arm.peak() / MIB for name, arm in arms.items()}
    seconds: dict[str, list[float]] = {name: [] for name in arms}
    for _ in range(given.turns):
        for name, arm in arms.items():
            seconds[name].append(arm.step(given.steps) / given.steps)
    unload(model)
    rows = []
    for name in arms:
        logs = [math.log(a / b) for a, b in zip(seconds[name], seconds["plain"], strict=True)]
        rows.append({
            "option": name, "peak_mib": round(peaks[name], 1), "estimate_mib": round(told[name], 1),
            "estimate_over_peak": round(told[name] / peaks[name], 4), "peak_over_plain": round(peaks[name] / peaks["plain"], 3),
            "step_s": [round(s, 3) for s in seconds[name]], "step_over_plain": round(math.exp(statistics.mean(logs)), 3),
        })  # fmt: skip
        print(rows[-1], flush=True)
    packages = {name: importlib.metadata.version(name) for name in ("torch", "transformers", "bitsandbytes")}
    value = {
        "command": "python bench/memory_options.py " + " ".join(f"--{k} {v}" for k, v in vars(given).items() if k != "out"),
        "machine": f"AMD EPYC, {os.cpu_count()} cores, one used", "python": platform.python_version(), **packages,
        "shape": shape, "rows": rows,
    }  # fmt: skip
    Path(given.out).write_text(json.dumps(value, indent=1) + "\n")


if __name__ == "__main__":
    main()
