"""Evaluation of the default task with rows that branch, against rows that run each choice on its own.

    python bench/eval_speed.py [--repeats 3] [--rows 64] [--task-rows 770]

The cases: ROWS of the default task's test rows with category names of two tokens, and as messages with the chat template's
system prompt; TASK_ROWS as they are, with one thread and with as many as torch takes; and ROWS on two ranks that share the
rows, against ranks that each run all. Both ways alternate. "products" is the
share of frozen products in the plain way's time, which no way of evaluating can take away from a token that is run.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from functools import partial
from pathlib import Path
from unittest.mock import patch

from plopfast.support import threads

threads.set_waiting_policy()

import measure
import torch

import plopfast as pf
from plopfast.data.rows import DEMO
from plopfast.support import ranks
from plopfast.training import evaluate, likelihoods


def rows_of(kind: str, tokenizer, count: int):
    """The test rows: "as they are", with categories of "two tokens", or as "messages"."""
    rows = list(pf.read_jsonl(str(DEMO["test"])))[:count]
    if kind == "two tokens":
        rows = [(where, {**row, "completion": row["completion"] + " kind"}) for where, row in rows]
    if kind == "messages":
        turn = lambda role, text: {"role": role, "content": text.strip()}  # noqa: E731
        rows = [
            (where, {"messages": [turn("user", row["prompt"]), turn("assistant", row["completion"])]})
            for where, row in rows
        ]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pf.tokenize(rows, tokenizer)


def compared(model, examples, repeats: int) -> dict:
    """Both ways in turn: seconds, tokens, and whether the numbers agree."""
    choices = evaluate.choices_of(examples)
    ways = {"plain": partial(likelihoods.likelihoods, plain=True), "now": likelihoods.likelihoods}
    seconds, cpu, tokens, found = ({name: [] for name in ways} for _ in range(4))
    for _ in range(repeats):
        for name, way in ways.items():
            count = []
            hook = model.register_forward_pre_hook(
                lambda _m, _a, named, count=count: count.append(named["input_ids"].numel()), with_kwargs=True
            )
            began = time.perf_counter(), time.process_time()
            with patch.object(evaluate, "likelihoods", way):
                found[name] = evaluate.evaluate(model, examples, choices=choices)
            seconds[name].append(time.perf_counter() - began[0])
            cpu[name].append(time.process_time() - began[1])
            hook.remove()
            tokens[name] = sum(count)
    one, two = found["plain"], found["now"]
    return {
        "rows": len(examples), "tokens": tokens, "seconds": seconds, "cpu_seconds": cpu,
        "faster": measure.ratios(seconds, "plain", "now"), "cpu_faster": measure.ratios(cpu, "plain", "now"),
        "loss": [one.loss, two.loss], "accuracy": [one.accuracy, two.accuracy], "same_choices": one.right == two.right,
    }  # fmt: skip


def share_of_products(model, examples) -> float:
    """The share of matrix products in the time of plain rows."""
    plain = patch.object(evaluate, "likelihoods", partial(likelihoods.likelihoods, plain=True))
    with plain, torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        evaluate.evaluate(model, examples)
    times = {event.key: event.self_cpu_time_total for event in profile.key_averages()}
    return sum(times.get(name, 0.0) for name in ("aten::mm", "aten::addmm", "aten::bmm")) / sum(times.values())


def on_a_rank(out: Path, count: int, repeats: int) -> None:
    """What each of two ranks does: its share, and all rows."""
    ranks.init(torch.device("cpu"), 600)
    model, tokenizer = pf.load_model()
    examples = rows_of("as they are", tokenizer, count)
    seconds: dict[str, list[float]] = {"each all": [], "shared": []}
    found = {}
    for _ in range(repeats):
        for name in seconds:
            ranks.barrier()
            began = time.perf_counter()
            with patch.object(ranks, "size", (lambda: 1) if name == "each all" else ranks.size):
                found[name] = evaluate.evaluate(model, examples, choices=evaluate.choices_of(examples))
            ranks.barrier()
            seconds[name].append(time.perf_counter() - began)
    if ranks.is_main():
        same = found["each all"].right == found["shared"].right
        losses = [found[name].loss for name in seconds]
        faster = measure.ratios(seconds, "each all", "shared")
        out.write_text(
            json.dumps({"rows": count, "seconds": seconds, "loss": losses, "same_choices": same, "faster": faster})
        )
    ranks.close()


def two_ranks(count: int, repeats: int) -> dict:
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "ranks.json"
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", __file__]
        options = ["--rank-out", str(out), "--rows", str(count), "--repeats", str(repeats)]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        subprocess.run([sys.executable, *launcher, *options], check=True, env=environment)
        return json.loads(out.read_text())


def line(name: str, case: dict) -> str:
    plain, now = (statistics.median(times) for times in case["seconds"].values())
    tokens = " to ".join(f"{n:,}" for n in case["tokens"].values()) if "tokens" in case else ""
    apart = abs(case["loss"][0] - case["loss"][1])
    same = "same" if case["same_choices"] else "OTHER"
    median, low, high = case["faster"]
    return (
        f"{name:<34}{case['rows']:>5}{tokens:>20}{plain:>8.1f}{now:>8.1f}{median:>7.2f} ({low:.2f} to {high:.2f}) "
        f"{same:>8}{apart:>9.1g}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--task-rows", type=int, default=770)
    parser.add_argument("--rank-out", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.rank_out:
        return on_a_rank(given.rank_out, given.rows, given.repeats)
    model, tokenizer = pf.load_model()
    usual = torch.get_num_threads()
    evaluate.evaluate(model, rows_of("as they are", tokenizer, 16))  # warms up
    cases = {}
    for name, kind, count, using in (
        ("two-token categories, 1 thread", "two tokens", given.rows, 1),
        ("default task, 1 thread", "as they are", given.task_rows, 1),
        ("as messages, 1 thread", "messages", given.rows, 1),
        (f"default task, {usual} threads", "as they are", given.task_rows, usual),
    ):
        torch.set_num_threads(using)
        cases[name] = compared(model, rows_of(kind, tokenizer, count), given.repeats)
        save(cases, {})
    torch.set_num_threads(1)
    products = {"products": share_of_products(model, rows_of("as they are", tokenizer, given.rows))}
    save(cases, products)
    cases["default task, 2 ranks"] = two_ranks(given.rows, given.repeats)
    save(cases, products)


def save(cases: dict, products: dict) -> None:
    """Prints and keeps what has been measured so far."""
    head = f"{'case':<34}{'rows':>5}{'tokens run':>20}{'plain s':>8}{'now s':>8}  times faster        choices    loss"
    table = [head, *(line(name, case) for name, case in cases.items())]
    for share in products.values():
        table.append(f"products: {share:.0%} of the plain way's time (default task, 1 thread)")
    measure.save("eval_speed", "\n".join(table), {**products, "cases": cases})


if __name__ == "__main__":
    main()
