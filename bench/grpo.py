"""GRPO on the default model, on the CPU: does it teach a task, does it need the right reward, and do placements differ?

    python bench/grpo.py            # every piece that bench/results/grpo.jsonl lacks (an hour or so of one core), and the table
    python bench/grpo.py --table    # the table of the pieces that there are

The task is addition without carrying, shown by one example: "20 + 31 = 51\\n42 + 7 =". The reward is plopfast's `number`:
1 where the last number of the completion is right. Test prompts are disjoint from those of training. The placements have
the same number of parameters; each takes the better of two learning rates, by the reward of its last eight steps with seed
0. The control is the placement "plop" with a reward of 0 or 1 by chance. Each finished training is a line of grpo.jsonl.
"""

import argparse
import json
import random
import statistics
import time
from pathlib import Path
from typing import Any

from plopfast.support import threads

threads.set_waiting_policy()

import measure
import torch

import plopfast as pf
from plopfast.data.tasks import prompts_of
from plopfast.integrations.judging import Judge, measure as completions_of
from plopfast.integrations.rewards import Number
from plopfast.studies.paired import compare

LINES = Path(__file__).parent / "results" / "grpo.jsonl"
ARMS = ("plop", "all", "plop-inverse")
RATES, SEEDS, CONTROL = (5e-4, 1.5e-3), (0, 1, 2), "chance reward"
RANK, TEST_PROMPTS, LENGTH = 8, 100, 4
STEP = {
    "generations": 4,
    "prompts": 4,
    "max_steps": 16,
    "completion_length": LENGTH,
    "schedule": "constant",
    "warmup": 0.0,
}


def task() -> tuple[list[dict[str, str]], list[dict[str, str]]]:
    """Rows to train and to test on: a two-digit number and a multiple of ten, or a digit, whose sum needs no carrying."""
    pairs = [(a, b) for a in range(11, 99) for b in (*range(1, 10 - a % 10), *range(10, 100 - a, 10))]
    random.Random(0).shuffle(pairs)
    rows = [{"prompt": f"20 + 31 = 51\n{a} + {b} =", "answer": str(a + b)} for a, b in pairs]
    return rows[TEST_PROMPTS:], rows[:TEST_PROMPTS]


def chance(seed: int) -> Any:
    """A reward that knows nothing: 0 or 1 by chance."""
    drawn = random.Random(seed)

    def reward(completions: list[Any], **_: Any) -> list[float]:
        return [float(drawn.random() < 0.5) for _ in completions]

    return reward


def placements(model: Any, tokenizer: Any, train: list[dict[str, str]]) -> dict[str, pf.Placement]:
    """The placements to compare, of equal size, by the NFN of 32 training prompts."""
    texts = [row["prompt"] for row in train]
    report = pf.score(model, [tokenizer(texts[i : i + 8], padding=True, return_tensors="pt") for i in range(0, 32, 8)])
    made = {"plop": pf.place(report, "plop", k=3, rank=RANK)}
    return made | {arm: pf.place(report, arm, k=3, budget=f"match:plop:r{RANK}") for arm in ARMS[1:]}


def kept() -> list[dict[str, Any]]:
    return [json.loads(line) for line in LINES.read_text().splitlines()] if LINES.exists() else []


def best_rate(lines: list[dict[str, Any]], arm: str) -> float | None:
    """The rate of the higher reward over the last eight steps with seed 0; None before both are known."""
    found = {
        line["lr"]: statistics.fmean(line["rewards"][-8:]) for line in lines if (line["arm"], line["seed"]) == (arm, 0)
    }
    return max(found, key=lambda lr: found[lr]) if len(found) == len(RATES) else None


def wanted(lines: list[dict[str, Any]]) -> tuple[str, float, int] | None:
    """The next training that is missing: (arm, rate, seed)."""
    there = {(line["arm"], line["lr"], line["seed"]) for line in lines}
    pieces = [(arm, lr, 0) for arm in ARMS for lr in RATES]
    for name in (ARMS[0], CONTROL, *ARMS[1:]):
        if lr := best_rate(lines, ARMS[0] if name == CONTROL else name):
            pieces += [(name, lr, seed) for seed in SEEDS]
    return next((piece for piece in pieces if piece not in there), None)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--table", action="store_true", help="train nothing")
    given = parser.parse_args()
    if not given.table:
        fill()
    lines = kept()
    text, figures = table(lines)
    measure.save("grpo", text, figures)


def fill() -> None:
    train, test = task()
    model, tokenizer = pf.load_model()
    made = placements(model, tokenizer, train)
    held, judge = prompts_of(test, tokenizer), Judge(Number())

    def right(of: Any) -> list[int]:
        return [int(one.reward) for one in completions_of(of, tokenizer, held, judge, LENGTH)]

    if not any(line["arm"] == "before" for line in kept()):
        note({"arm": "before", "lr": None, "seed": None, "rewards": [], "right": right(model)})
    while piece := wanted(kept()):
        arm, lr, seed = piece
        began, used = time.perf_counter(), time.process_time()
        result = pf.grpo(
            model, tokenizer, train, chance(seed) if arm == CONTROL else "number",
            placement=made["plop" if arm == CONTROL else arm], lr=lr, seed=seed, **STEP,
        )  # fmt: skip
        line = {"arm": arm, "lr": lr, "seed": seed, "rewards": [record["reward"] for record in result.history]}
        line |= {"entropy": [record["entropy"] for record in result.history], "right": right(result.model)}
        line |= {
            "accelerated": bool(result.paths),
            "parameters": made["plop" if arm == CONTROL else arm].parameters,
            "seconds": time.perf_counter() - began,
        }
        note(line | {"cpu_seconds": time.process_time() - used})
        model = result.model.unload()


def note(line: dict[str, Any]) -> None:
    with LINES.open("a") as file:
        file.write(json.dumps(line) + "\n")
    print(line["arm"], line["lr"], line["seed"], sum(line["right"]) / len(line["right"]), flush=True)


def table(lines: list[dict[str, Any]]) -> tuple[str, dict[str, Any]]:
    """What is known so far, in text and figures: only arms with every seed are compared."""
    base = next(line["right"] for line in lines if line["arm"] == "before")
    rates = {name: best_rate(lines, ARMS[0] if name == CONTROL else name) for name in (*ARMS, CONTROL)}
    runs = {
        name: [line for seed in SEEDS for line in lines if (line["arm"], line["lr"], line["seed"]) == (name, lr, seed)]
        for name, lr in rates.items()
    }
    whole = {name: of for name, of in runs.items() if len(of) == len(SEEDS)}
    versus: dict[str, Any] = {}
    if ARMS[0] in whole:
        order = [ARMS[0], *(name for name in whole if name != ARMS[0])]
        right = [[run["right"] for run in whole[name]] for name in order] + [[base] * len(SEEDS)]
        found = compare(torch.tensor(right, dtype=torch.float64))
        versus = dict(zip([*order[1:], "before"], map(vars, found), strict=True))
    rows = [
        f"{'':<15}{'rate':>8}{'parameters':>12}{'reward, steps 1-4':>19}{'13-16':>8}{'test accuracy':>15}   seeds             against plop"
    ]
    rows.append(
        f"{'before':<15}{'':>8}{'':>12}{'':>19}{'':>8}{statistics.fmean(base):>15.3f}   {'':<18}{said(versus.get('before'))}"
    )
    figures: dict[str, Any] = {
        "before": statistics.fmean(base),
        "versus": versus,
        "arms": {},
        "test_prompts": len(base),
    }
    for name, of in runs.items():
        if not of:
            continue
        first, last = (
            statistics.fmean(v for run in of for v in run["rewards"][part]) for part in (slice(4), slice(-4, None))
        )
        each = [statistics.fmean(run["right"]) for run in of]
        spoken = " ".join(f"{one:.2f}" for one in each)
        rows.append(
            f"{name:<15}{rates[name]:>8g}{of[0]['parameters']:>12,}{first:>19.3f}{last:>8.3f}{statistics.fmean(each):>15.3f}   "
            f"{spoken:<18}{said(versus.get(name)) if name != ARMS[0] else ''}"
        )
        figures["arms"][name] = {"lr": rates[name], "first": first, "last": last, "accuracies": each, "seeds": len(of)}
    seconds = [line["cpu_seconds"] for line in lines if "cpu_seconds" in line]
    figures["cpu_seconds"] = sum(seconds)
    rows.append(f"{len(seconds)} trainings of {STEP['max_steps']} steps, {sum(seconds) / 60:.0f} minutes of one core")
    return "\n".join(rows), figures


def said(versus: dict[str, Any] | None) -> str:
    if not versus:
        return ""
    return f"{versus['verdict']} ({versus['difference']:+.3f}, {versus['low']:+.3f} to {versus['high']:+.3f})"


if __name__ == "__main__":
    main()
