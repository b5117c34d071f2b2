"""What fits on a card: models x settings x GiB, counted on shapes alone, no card and no weights.

Each row is a whole optimizer step of two micro-batches of one row of 2048 tokens, rank 16, bfloat16 (see plopfast/training/dry.py
for what is counted, and what is not). Rows with a goal are counted on the whole model; the others on four and on six layers,
from which the rest is reckoned, as `plopfast estimate --fit` does while it chooses ("whole": false). The table is written
after each row, as the large ones take minutes; rows that are there already are kept.

python bench/what_fits.py            writes results/what_fits.json
"""

import dataclasses
import json
import time
from functools import partial

import torch
from measure import RESULTS, save

from plopfast.placing.by_settings import unscored
from plopfast.run.fit import reckon
from plopfast.run.shapes import Shapes, without_scores
from plopfast.support.config import RunConfig

TOKENS, RANK = 2048, 16
FEW, ALL = "v_proj,o_proj,down_proj", "all"
NF4 = {"quantize": "nf4", "checkpointing": True}
HEAD = {"quantize_head": True, "embedding": "cpu"}
LEAN = {"mlp_rows": 512, "offload": True, "keep_best": "cpu", "optimizer": "adamw8bit"}
SETTINGS = {
    "NF4, recomputed": NF4,
    "resident": NF4 | HEAD | LEAN,
    "streamed": NF4 | HEAD | LEAN | {"stream": True},
}
ROWS = [  # model, placement, setting, goal in GiB
    ("meta-llama-3-8b", FEW, "resident", 4.5), ("meta-llama-3-8b", FEW, "streamed", 1.5),
    ("meta-llama-3-70b", FEW, "streamed", 4.0), ("meta-llama-3-8b", ALL, "resident", None),
    ("meta-llama-3-8b", ALL, "streamed", None), ("meta-llama-3-70b", ALL, "streamed", None),
    ("meta-llama-3-8b", FEW, "NF4, recomputed", None), ("qwen3-0.6b", FEW, "NF4, recomputed", None),
    ("smollm2-135m", FEW, "NF4, recomputed", None), ("qwen3-0.6b", FEW, "resident", None),
    ("smollm2-135m", FEW, "resident", None),
]  # fmt: skip
MEASURED = [  # by others, on their cards
    "torchtune, QLoRA of Llama-3-8B, 2 x 2048 tokens, RTX 4090: 7.4 GiB, measured by torchtune",
    "Unsloth, QLoRA of an 8B: 7.37 GB and 212 kB a token, measured by Unsloth",
]


def counted(model, rule, changes, whole):
    tied = model in ("qwen3-0.6b", "smollm2-135m")  # neither their head nor their embedding can be apart
    config = RunConfig(
        rule=rule,
        rank=RANK,
        accumulate=2,
        **(changes | ({"quantize_head": False, "embedding": "device"} if tied else {})),
    )

    def place(made, settings):
        return without_scores(unscored(made), settings)

    shapes = Shapes(model, 1, TOKENS, TOKENS - 1, torch.device("meta"), torch.bfloat16, place)
    return (shapes.count if whole else partial(reckon, shapes))(config), config


def table(rows):
    lines = [
        f"{'model':<18}{'adapters on':<26}{'setting':<18}{'GiB':>7}{'goal':>6}{'CPU GiB':>9}{'GiB a step':>12}{'TFLOPs':>8}  largest part"
    ]
    for row in rows:
        e = row["estimate"]
        part = max(e["parts"], key=e["parts"].get)
        lines.append(
            f"{row['model']:<18}{row['rule']:<26}{row['setting']:<18}{e['total_mib'] / 1024:>7.2f}{row['goal'] or '':>6}"
            f"{e['host_mib'] / 1024:>9.2f}{e['crossed_mib'] / 1024:>12.2f}{e['tflops_per_step']:>8.1f}  {part} {e['parts'][part] / 1024:.2f}"
        )
    lines += [
        "2 x (1 x 2048) tokens, rank 16, bfloat16. Counted, not measured on a card; the CUDA context is not in it.",
        *MEASURED,
    ]
    return "\n".join(lines)


def main():
    path, rows = RESULTS / "what_fits.json", []
    kept = json.loads(path.read_text())["rows"] if path.exists() else []
    for model, rule, setting, goal in ROWS:
        known = [row for row in kept if (row["model"], row["rule"], row["setting"]) == (model, rule, setting)]
        if not known:
            began = time.process_time()
            found, config = counted(model, rule, SETTINGS[setting], goal is not None)
            options = {name: value for name in SETTINGS["streamed"] if (value := getattr(config, name))}
            known = [{
                "model": model, "rule": rule, "setting": setting, "options": options, "goal": goal, "whole": goal is not None,
                "estimate": dataclasses.asdict(found), "seconds": time.process_time() - began,
            }]  # fmt: skip
        rows += known
        save("what_fits", table(rows), {"rows": rows, "measured_by_others": MEASURED})


if __name__ == "__main__":
    main()
