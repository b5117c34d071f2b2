"""What the default steps for little data bring: 60 rows of the demo task as messages, on the default model.

    python bench/small_data.py [--seeds 3] [--rows 60] [--schedules 5]

Every 20th row is held out, as `plopfast run` does, and chooses the step that is kept. Other validation rows of the demo,
which neither trained nor chose, give loss and accuracy. The schedules are compared on the same rows and first values.
"""

import argparse
import random
import statistics
from typing import Any

from plopfast.support import threads

threads.set_waiting_policy()

import measure

import plopfast as pf
from plopfast.data.rows import DEMO
from plopfast.training.evaluate import choices_of, evaluate

TYPES = ["v_proj", "up_proj", "down_proj"]  # the default placement on this task
ONE_EPOCH = {"batch_tokens": 1024, "epochs": 1}
SCHEDULES: dict[str, dict[str, Any]] = {
    "one epoch of 1024 tokens a step": ONE_EPOCH,
    "default": {},
    "8 rows, 4 epochs": {"batch_rows": 8, "epochs": 4, "eval_every": 8},
    "4 rows, 4 epochs": {"batch_rows": 4, "epochs": 4, "eval_every": 15},
    "8 rows, 16 epochs": {"batch_rows": 8, "epochs": 16, "eval_every": 8},
}


def messages(rows: list[Any]) -> list[Any]:
    """The rows as a chat has them."""
    told = ("user", "prompt"), ("assistant", "completion")
    return [
        (where, {"messages": [{"role": who, "content": row[key].strip()} for who, key in told]}) for where, row in rows
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--rows", type=int, default=60)
    parser.add_argument("--judged", type=int, default=200, help="validation rows of the demo that judge")
    parser.add_argument("--schedules", type=int, default=len(SCHEDULES), help="take only the first ones")
    arguments = parser.parse_args()
    schedules = dict(list(SCHEDULES.items())[: arguments.schedules])
    model, tokenizer = pf.load_model()
    placement = pf.Placement(
        {m.name: (16, 32.0) for m in pf.linear_modules(model) if m.type in TYPES}, TYPES, "explicit", 0
    )
    judged = pf.tokenize(messages(pf.read_jsonl(DEMO["valid"])[: arguments.judged]), tokenizer)
    choices, pool = choices_of(judged), pf.read_jsonl(DEMO["train"])
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in schedules}
    for seed in range(arguments.seeds):
        rows = pf.tokenize(messages(random.Random(seed).sample(pool, arguments.rows)), tokenizer)
        train, valid = [row for i, row in enumerate(rows) if i % 20], rows[::20]
        for name, settings in schedules.items():
            pf.inject(model, placement, seed=seed)
            trainer = pf.Trainer(model, pf.TrainConfig(**settings, seed=seed), train, valid)
            result = trainer.fit()
            found = evaluate(model, judged, choices=choices)
            pf.unload(model)
            run = {"loss": found.loss, "accuracy": found.accuracy, "metric": found.metric, "steps": result.steps,
                   "best_step": result.best_step, "tokens": result.tokens, "seconds": result.seconds}  # fmt: skip
            runs[name].append(run)
            print(f"seed {seed}  {name:<32} {trainer.plan}  ->  {run}", flush=True)
    base = evaluate(model, judged, choices=choices)
    lines = [f"{'':<32}  loss  accuracy  steps", f"{'before training':<32} {base.loss:5.3f}  {base.accuracy:8.3f}"]
    for name, of in runs.items():
        loss, accuracy, steps = (statistics.fmean(run[key] for run in of) for key in ("loss", "accuracy", "steps"))
        lines.append(f"{name:<32} {loss:5.3f}  {accuracy:8.3f}  {steps:5.0f}")
    measure.save("small_data", "\n".join(lines), {"rows": arguments.rows, "base": base.summary(), "runs": runs})


if __name__ == "__main__":
    main()
