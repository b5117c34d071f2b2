"""Does it cost quality to take rows of similar length together? Short trainings of the demo task, in several orders.

    OMP_NUM_THREADS=1 python bench/length_order.py [--seeds 8] [--sizes 96 192 384] [--conditions short warmup default]

Every training has the same model (SmolLM2-135M), placement, learning rate and number of steps; the seed draws its rows, its
order and the adapters' first values. So arms differ in the order of the rows alone, and are compared in pairs within a
seed: the ratio of the losses after the last step, with the 95 % interval of Student's t for the mean of its logarithm.
The loss is that of 200 validation rows of the demo, a mean over label tokens; none of them chose a step.

Arms: rows of similar length in a step, as many as a budget of tokens takes (what --batch-tokens does) or 8 of them (what
little data does by itself); the same with lengths blurred by up to 8 tokens; 8 rows at random; and PEFT with the Hugging
Face Trainer, in random order or grouped by length. Whether a random step is computed at once or in micro-batches of similar
length changes its padding, which is counted, but not its gradient: the loss of a step is the mean over all its label tokens.

Conditions: `short` is one epoch of 8 rows a step without warmup (12 steps of 96 rows), `warmup` the same with a tenth of
the steps as warmup, `default` takes the steps and the warmup of a training whose settings say nothing.

Finished trainings are kept in results/length_order.jsonl, one a line, until the table is made; those of the table stay. So
the same command goes on after a kill, and --seeds 0 makes the table of what there is.
"""

import argparse
import importlib.metadata
import json
import math
import random
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from plopfast.support import machine, threads

threads.set_waiting_policy()

import measure
import torch

import plopfast as pf
from plopfast.cli import bench_arms
from plopfast.data.batches import group_by_length
from plopfast.data.rows import DEMO, IGNORE
from plopfast.scoring.stopping import student_t
from plopfast.training.evaluate import evaluate

TYPES = ["v_proj", "up_proj", "down_proj"]
RANK, ALPHA, ROWS, LR = 16, 32.0, 8, 1e-3
CONDITIONS: dict[str, dict[str, Any]] = {
    "short": {"warmup": 0.0, "epochs": 1},
    "warmup": {"warmup": 0.1, "epochs": 1},
    "default": {},
}
KEYS = ("arm", "condition", "size", "seed", "dtype")
RESULT, PARTIAL = measure.RESULTS / "length_order.json", measure.RESULTS / "length_order.jsonl"
Steps = list[list[int]]


def by_tokens(lengths: Sequence[int], seed: int) -> Steps:
    """Groups of similar length, of the smallest budget of tokens that needs no more steps than 8 rows a step do."""
    budget, most = max(lengths), math.ceil(len(lengths) / ROWS)
    while len(group_by_length(lengths, budget)) > most:
        budget = math.ceil(budget * 1.02)
    return group_by_length(lengths, budget, seed)


def by_length(lengths: Sequence[int], seed: int, noise: float = 0.0) -> Steps:
    """Shuffled groups of 8 rows of similar length; with `noise`, of lengths that are changed by up to that many tokens."""
    rng = random.Random(seed)
    order = list(range(len(lengths)))
    rng.shuffle(order)
    order.sort(key=lambda i: lengths[i] + noise * rng.random())
    groups = [order[i : i + ROWS] for i in range(0, len(order), ROWS)]
    rng.shuffle(groups)
    return groups


def at_random(lengths: Sequence[int], seed: int) -> Steps:
    order = list(range(len(lengths)))
    random.Random(seed).shuffle(order)
    return [order[i : i + ROWS] for i in range(0, len(order), ROWS)]


ORDERS: dict[str, Callable[[Sequence[int], int], Steps]] = {
    "similar length, by tokens": by_tokens,
    "similar length, 8 rows": by_length,
    "blurred length, 8 rows": partial(by_length, noise=8.0),
    "random": at_random,
}
PEERS = {"HF random": "random", "HF grouped": "group_by_length"}
ARMS = [*ORDERS, *PEERS]


class Study:
    """The model, the rows, and one training after the other."""

    def __init__(self, dtype: str) -> None:
        self.dtype = dtype
        self.model, self.tokenizer = pf.load_model(dtype=getattr(torch, dtype))
        self.pool = pf.tokenize(pf.read_jsonl(DEMO["train"]), self.tokenizer)
        self.judged = pf.tokenize(pf.read_jsonl(DEMO["valid"])[:200], self.tokenizer)
        modules = {m.name: (RANK, ALPHA) for m in pf.linear_modules(self.model) if m.type in TYPES}
        self.placement = pf.Placement(modules, TYPES, "explicit", 0)

    def train(self, arm: str, condition: str, size: int, seed: int) -> dict[str, Any]:
        rows = random.Random(seed).sample(self.pool, size)
        settings = CONDITIONS[condition]
        steps = settings.get("epochs", max(1, round(60 / (size / ROWS)))) * math.ceil(size / ROWS)
        began = time.perf_counter()
        if arm in PEERS:
            found = self._peer(rows, steps, PEERS[arm], settings.get("warmup", 0.1), seed)
        else:
            found = self._ours(rows, steps, ORDERS[arm], settings.get("warmup", 0.1), seed)
        seconds = time.perf_counter() - began
        return {"arm": arm, "condition": condition, "size": size, "seed": seed, "dtype": self.dtype,
                "seconds": round(seconds, 2), "asked": steps, **found}  # fmt: skip

    def _ours(self, rows: list[Any], steps: int, order: Any, warmup: float, seed: int) -> dict[str, Any]:
        lengths, epochs = [len(row.tokens) for row in rows], math.ceil(steps * ROWS / len(rows))
        groups = [group for epoch in range(epochs) for group in order(lengths, 1000 * seed + epoch)]
        pf.inject(self.model, self.placement, seed=seed)
        config = pf.TrainConfig(lr=LR, warmup=warmup, max_steps=len(groups), batch_tokens=10**6, seed=seed)
        trainer = pf.Trainer(self.model, config, rows)
        trainer.plan.groups = lambda first_step=0: iter(groups[first_step:])  # type: ignore[method-assign]
        result = trainer.fit()
        loss = evaluate(self.model, self.judged).loss
        pf.unload(self.model)
        return {"loss": loss, "steps": result.steps, "padding": result.padding}

    def _peer(self, rows: list[Any], steps: int, order: str, warmup: float, seed: int) -> dict[str, Any]:
        import datasets
        import transformers

        model = bench_arms.peft_model(self.model, self.placement, seed)
        seen = {"positions": 0}

        def count(_module: Any, arguments: Any, _output: Any) -> None:
            seen["positions"] += arguments[0].numel()

        labels = [
            [t if learned else IGNORE for t, learned in zip(row.tokens, row.is_learned(), strict=True)] for row in rows
        ]
        data = datasets.Dataset.from_dict({"input_ids": [row.tokens for row in rows], "labels": labels})
        with tempfile.TemporaryDirectory() as folder:
            settings = bench_arms.hf_settings(folder, ROWS, LR, seed, self.model)
            settings |= {"warmup_steps": round(warmup * steps), "train_sampling_strategy": order, "max_steps": steps}
            arguments = transformers.TrainingArguments(**settings)
            collator = transformers.DataCollatorForSeq2Seq(self.tokenizer)
            trainer = transformers.Trainer(model, arguments, collator, train_dataset=data)
            trainer.remove_callback(transformers.PrinterCallback)
            hook = self.model.get_input_embeddings().register_forward_hook(count)
            done = int(trainer.train().global_step)
            hook.remove()
        trainer.accelerator.unwrap_model(model, keep_fp32_wrapper=False)  # or the next one would wrap it once more
        loss = evaluate(model, self.judged).loss
        model.unload()
        epochs = steps * ROWS / len(rows)
        tokens = sum(len(row.tokens) for row in rows) * epochs
        return {"loss": loss, "steps": done, "padding": 1 - tokens / seen["positions"]}


def counts(pool: Sequence[int], size: int, draws: int = 20) -> dict[str, dict[str, float]]:
    """What an order does to the steps, without training: padding, rows of the smallest and the largest step, and the
    weight that the shortest and the longest tenth of the rows have in an epoch (1: that of the mean row)."""
    found: dict[str, dict[str, float]] = {}
    for name, order in ORDERS.items():
        for parts in (1, 2, 3, 4) if name == "random" else (1,):
            padding, rows, weights = [], [], []
            for seed in range(draws):
                lengths = random.Random(seed).sample(pool, size)
                steps = order(lengths, seed)
                padding.append(_padding(steps, lengths, parts))
                rows += [len(step) for step in steps]
                of = sorted((lengths[i], size / len(step) / len(steps)) for step in steps for i in step)
                tenth = size // 10
                weights.append([statistics.fmean(w for _, w in part) for part in (of[:tenth], of[-tenth:])])
            shortest, longest = (statistics.fmean(each) for each in zip(*weights, strict=True))
            found[name + (f", {parts} micro-batches a step" if parts > 1 else "")] = {
                "padding": statistics.fmean(padding), "fewest_rows": min(rows), "most_rows": max(rows),
                "weight_of_shortest": shortest, "weight_of_longest": longest,
            }  # fmt: skip
    return found


def _padding(steps: Steps, lengths: Sequence[int], parts: int) -> float:
    """The share of padding where each step is cut, by length, into so many micro-batches."""
    positions = 0
    for step in steps:
        longest_first = sorted((lengths[i] for i in step), reverse=True)
        rows = math.ceil(len(step) / parts)
        positions += sum(max(part) * len(part) for part in batched(longest_first, rows))
    return 1 - sum(lengths) / positions


def batched(values: Sequence[int], size: int) -> list[Sequence[int]]:
    return [values[i : i + size] for i in range(0, len(values), size)]


def table(
    runs: Sequence[dict[str, Any]], counted: dict[int, dict[str, dict[str, float]]]
) -> tuple[str, dict[str, Any]]:
    """The table, and the ratios to random order by condition, size ("all": all sizes pooled) and arm."""
    lines, ratios = [], {}
    arms = [arm for arm in ARMS if any(run["arm"] == arm for run in runs)]
    found: dict[tuple[str, str, int], dict[int, dict[str, Any]]] = {}
    for run in runs:
        found.setdefault((f"{run['condition']}, {run['dtype']}", run["arm"], run["size"]), {})[run["seed"]] = run
    for condition in dict.fromkeys(key[0] for key in found):
        pooled: dict[str, list[float]] = {arm: [] for arm in arms}
        lines.append(f"{condition:<38} seeds   loss  padding  loss / random order (95 %)")
        for size in sorted({size for of, _, size in found if of == condition}):
            random_order = found.get((condition, "random", size), {})
            for arm in arms:
                of = found.get((condition, arm, size), {})
                logs = [math.log(of[s]["loss"] / random_order[s]["loss"]) for s in of if s in random_order]
                pooled[arm] += logs
                text = "" if arm == "random" else _said(logs)
                if of:
                    loss, padding = (statistics.fmean(run[key] for run in of.values()) for key in ("loss", "padding"))
                    lines.append(f"{size:>5} rows, {arm:<26} {len(of):>5}  {loss:.3f}  {padding:7.3f}  {text}")
                if text:
                    ratios[f"{condition}, {size} rows, {arm}"] = interval(logs)
        for arm, logs in pooled.items():
            if arm != "random" and (text := _said(logs)):
                lines.append(f"  all sizes, {arm:<26} {len(logs):>5} {'':>15}  {text}")
                ratios[f"{condition}, all sizes, {arm}"] = interval(logs)
        lines.append("")
    for size, of_order in counted.items():
        lines.append(f"{size} rows, 20 draws: {'':<19} padding  rows of a step  weight of the shortest, longest tenth")
        for name, figures in of_order.items():
            rows = f"{figures['fewest_rows']} to {figures['most_rows']}"
            weights = f"{figures['weight_of_shortest']:.2f}, {figures['weight_of_longest']:.2f}"
            lines.append(f"  {name:<38} {figures['padding']:6.3f}  {rows:>14}  {weights:>20}")
    return "\n".join(lines), ratios


def interval(logs: Sequence[float]) -> dict[str, float]:
    """Ratio and its 95 % interval, of at least two logarithms."""
    mean = statistics.fmean(logs)
    half = student_t(0.975, len(logs) - 1) * statistics.stdev(logs) / math.sqrt(len(logs))
    return {"ratio": math.exp(mean), "low": math.exp(mean - half), "high": math.exp(mean + half), "pairs": len(logs)}


def _said(logs: Sequence[float]) -> str:
    """The interval in words; nothing below three pairs."""
    return "{ratio:.3f} ({low:.3f} to {high:.3f}), {pairs} pairs".format(**interval(logs)) if len(logs) > 2 else ""


def finished() -> list[dict[str, Any]]:
    """The trainings of earlier calls; a last line that a kill cut short is dropped."""
    runs = json.loads(RESULT.read_text())["runs"] if RESULT.exists() else []
    lines = PARTIAL.read_text().splitlines(keepends=True) if PARTIAL.exists() else []
    return runs + [json.loads(line) for line in lines if line.endswith("\n")]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=8)
    parser.add_argument("--sizes", type=int, nargs="+", default=[96, 192, 384])
    parser.add_argument("--conditions", nargs="+", default=["short"], choices=list(CONDITIONS))
    parser.add_argument("--arms", nargs="+", default=ARMS, choices=ARMS)
    parser.add_argument("--dtype", default="bfloat16", choices=("float32", "bfloat16"))
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    runs, study = finished(), Study(arguments.dtype)
    done = {tuple(run[key] for key in KEYS) for run in runs}
    asked = [(arm, condition, size, seed, arguments.dtype)
             for condition in arguments.conditions for size in arguments.sizes
             for seed in range(arguments.seeds) for arm in arguments.arms]  # fmt: skip
    for key in asked:
        if key not in done:
            runs.append(study.train(*key[:-1]))
            with PARTIAL.open("a") as file:
                file.write(json.dumps(runs[-1]) + "\n")
            print(runs[-1], flush=True)
    lengths = [len(row.tokens) for row in study.pool]
    counted = {size: counts(lengths, size) for size in sorted({run["size"] for run in runs})}
    text, ratios = table(runs, counted)
    runs.sort(key=lambda run: [run[key] for key in KEYS])
    versions = machine.versions() | {name: importlib.metadata.version(name) for name in ("peft", "accelerate")}
    measure.save("length_order", text, {"versions": versions, "ratios": ratios, "counts": counted, "runs": runs})
    PARTIAL.unlink(missing_ok=True)


if __name__ == "__main__":
    main()
