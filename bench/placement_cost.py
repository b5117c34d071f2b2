"""What a training step costs with adapters in one place or another, at the same number of parameters and at the same rank.

    OMP_NUM_THREADS=1 python bench/placement_cost.py [--rank 16] [--rows 4] [--tokens 64] [--turns 9] [--steps 2]

SmolLM2-135M in float32 on one core. PLoP's placement at the rank sets the parameters of the other placements ("matched"); then each
has the rank itself. CPU time of the steps, in turns: the ratio to PLoP's placement in each turn, and its median with the 20 % and
80 % quantiles. "peak" are the bytes of all tensors that are alive at one time, counted in a real step.
"""

import argparse
import time
from typing import Any

from plopfast.support import threads

threads.set_waiting_policy()

import measure
import torch
from memory_options import MIB, Arm

import plopfast as pf
from plopfast.data.batches import collate
from plopfast.data.example import Example
from plopfast.data.rows import DEMO
from plopfast.lora.injection import unload
from plopfast.lora.shared import find_shared_inputs

RULES = ("plop", "mlp", "attn", "no-qk", "all")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in (("rank", 16), ("rows", 4), ("tokens", 64), ("turns", 9), ("steps", 2)):
        parser.add_argument(f"--{name}", type=int, default=value)
    given = parser.parse_args()
    torch.set_num_threads(1)
    model, tokenizer = pf.load_model()
    examples = pf.tokenize(pf.read_jsonl(DEMO["train"])[:64], tokenizer)
    report = pf.score(model, [collate(examples[at : at + 8]) for at in range(0, 64, 8)])
    budget = pf.place(report, "plop", rank=given.rank).parameters
    placements = {("matched", rule): pf.place(report, rule, budget=budget) for rule in RULES}
    placements |= {("same rank", rule): pf.place(report, rule, rank=given.rank) for rule in RULES}
    ids = torch.randint(5, 40000, (given.rows, given.tokens), generator=torch.Generator().manual_seed(0)).tolist()
    batch = collate([Example.after_prompt(tuple(row), given.tokens - given.tokens // 8, None, "") for row in ids])

    def arm(placement: pf.Placement) -> Arm:
        unload(model)
        pf.inject(model, placement)
        find_shared_inputs(model)
        return Arm(model, pf.TrainConfig(max_steps=1), batch)

    peaks = {which: arm(placement).peak() / MIB for which, placement in placements.items()}
    seconds: dict[Any, list[float]] = {which: [] for which in placements}
    for _ in range(given.turns):
        for which, placement in placements.items():
            one = arm(placement)
            one.step()
            began = time.process_time()
            one.step(given.steps)
            seconds[which].append(time.process_time() - began)
    rows, lines = [], ["parameters    placement  number  time / plop's        peak / plop's"]
    for way, rule in placements:
        middle, low, high = measure.ratios(seconds, (way, rule), (way, "plop"))  # type: ignore[arg-type]
        row = {
            "parameters": way, "placement": rule, "number": placements[way, rule].parameters, "time": round(middle, 3),
            "time_low": round(low, 3), "time_high": round(high, 3), "peak_mib": round(peaks[way, rule], 1),
            "peak": round(peaks[way, rule] / peaks[way, "plop"], 3),
        }  # fmt: skip
        rows.append(row)
        lines.append(
            f"{way:12}  {rule:9}  {row['number']:9,}  {middle:.3f} ({low:.3f} to {high:.3f})  {row['peak']:.3f} ({row['peak_mib']} MiB)"
        )
    measure.save("placement_cost", "\n".join(lines), {"settings": vars(given), "rows": rows})


if __name__ == "__main__":
    main()
