"""How many prompts the stopping rule needs on the default model and task, and whether it picks what 200 prompts pick.

    python bench/early_stopping.py [--pool 600] [--orders 200]

A pool of training prompts is scored once. A prompt's statistics do not depend on its neighbours, so the rule can be
replayed on many random samples of 200 prompts (the paper's number), for every k. Then both are timed in turn.
"""

import argparse
import random
from collections import Counter

from plopfast.support import threads

threads.set_waiting_policy()

import measure

import plopfast as pf
from plopfast.data.batches import batches_of
from plopfast.data.rows import DEMO
from plopfast.scoring.stopping import decide, next_look

PAPER = 200


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pool", type=int, default=600)
    parser.add_argument("--orders", type=int, default=200)
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    model, tokenizer = pf.load_model()
    rows = random.Random(0).sample(pf.read_jsonl(DEMO["train"]), arguments.pool)
    batches = batches_of(pf.tokenize(rows, tokenizer), 8)
    report = pf.score(model, batches, progress=True)
    assert report.prompt_stats is not None
    types = [score.type for score in report.scores.values()]
    lines = [f"{'k':>2} {'types':<52} {'prompts needed':<28} same as {PAPER}"]
    figures = []
    for k in range(1, len(report.types)):
        needed, same = Counter(), 0
        for seed in range(arguments.orders):
            order = random.Random(seed).sample(range(arguments.pool), PAPER)
            stats = report.prompt_stats[:, :, order]
            looks, seen = [], 0
            while seen < PAPER:
                seen = min(next_look(seen), PAPER)
                looks.append(seen)
                decision = decide(stats[:, :, :seen], types, k, 0.95, looks)
                if decision.decided:
                    break
            needed[seen if decision.decided else f"undecided at {PAPER}"] += 1
            same += set(decision.types) == set(decide(stats, types, k, 0.95, [PAPER]).types)
        share = ", ".join(f"{n}: {count / arguments.orders:.0%}" for n, count in sorted(needed.items(), key=str))
        lines.append(f"{k:>2} {', '.join(list(report.types)[:k]):<52} {share:<28} {same / arguments.orders:.1%}")
        figures.append({"k": k, "needed": {str(n): c for n, c in needed.items()}, "same": same})
    seconds = measure.interleaved(
        {
            "stopping": lambda: pf.score(model, batches[: PAPER // 8], confidence=0.95),
            "all": lambda: pf.score(model, batches[: PAPER // 8]),
        },
        arguments.repeats,
    )
    ratio, low, high = measure.ratios(seconds, "stopping", "all")
    lines.append(f"time of scoring with the rule (k = 3), against all {PAPER}: {ratio:.2f} ({low:.2f} to {high:.2f})")
    measure.save("early_stopping", "\n".join(lines), {"rules": figures, "seconds": seconds})


if __name__ == "__main__":
    main()
