"""The cost of NFN scoring against a plain forward pass and the PLoP authors' procedure, interleaved in one process.

    python bench/score_cost.py [--prompts 64] [--repeats 5]

The plain forward pass is `model(**batch)` on the same prompts, in batches of 8 in their order. Targets: score takes at
most 0.65 of its time, 1.05 of its peak memory, and 1/6 of the time of the authors' procedure.
"""

import argparse

from plopfast.support import threads

threads.set_waiting_policy()

import measure
import torch

import plopfast as pf
from plopfast.data.batches import batches_of
from plopfast.data.rows import DEMO


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    model, tokenizer = pf.load_model()
    examples = pf.tokenize(pf.read_jsonl(DEMO["train"])[: arguments.prompts], tokenizer)
    batches = [{k: b[k] for k in ("input_ids", "attention_mask")} for b in batches_of(examples, 8)]
    real = sum(int(b["attention_mask"].sum()) for b in batches)
    padded = sum(b["input_ids"].numel() for b in batches)

    def forward() -> None:
        with torch.no_grad():
            for batch in batches:
                model(**batch)

    candidates = {
        "forward": forward,
        "score": lambda: pf.score(model, batches),
        "official": lambda: pf.score(model, batches, compat="official"),
    }
    # the second round counts: the first one leaves warm heaps to both
    peaks = {name: measure.peak_mib(candidates[name]) for name in ("forward", "score", "forward", "score")}
    seconds = measure.interleaved(candidates, arguments.repeats)
    to_forward, to_official = (measure.ratios(seconds, "score", base) for base in ("forward", "official"))
    memory = peaks["score"] / peaks["forward"]
    table = "\n".join(
        [
            f"{arguments.prompts} prompts, {real} tokens, {padded} with padding; {arguments.repeats} interleaved repeats",
            f"time, score / forward:     {to_forward[0]:.3f} ({to_forward[1]:.3f} to {to_forward[2]:.3f}), target 0.65",
            f"time, score / official:    1/{1 / to_official[0]:.1f} (1/{1 / to_official[2]:.1f} to 1/{1 / to_official[1]:.1f}), target 1/6",
            f"peak memory, score / forward: {memory:.3f} ({peaks['score']:.0f} / {peaks['forward']:.0f} MiB), target 1.05",
        ]
    )
    measure.save("score_cost", table, {"seconds": seconds, "peak_mib": peaks})


if __name__ == "__main__":
    main()
