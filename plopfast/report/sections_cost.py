"""Section 4: what the run took, and why the estimate differs from what was measured."""

from typing import Any

from ..support.tables import Column, Table
from .figures import Bar, Chart, Csv, Figure, Fold, Notes, Section, Stack, Tables
from .folder import RunFolder
from .scales import linear
from .tables import PARTS, estimate_table
from .words import digits, duration, large, mib, number, rich, share

SHADES = {"data": "t5", "load": "t2", "score": "t3", "estimate": "s1", "train": "t4", "eval": "s3", "grpo": "t4"}
BRIEF = 0.001  # of the time; briefer stages are not drawn
BEFORE = ("place", "score", "load")  # stages just before training, whose peak says what the process held
FULL = "full"


def cost(run: RunFolder) -> Section:
    """estimate.json and history.jsonl: memory and time, estimated and measured."""
    section = Section(id="cost", title="Cost", command=run.noted("estimate"))
    if not run.stages and not run.estimate and not run.trial:
        section.lacks = ("No time or memory was noted here.", run.command("estimate"))
        return section
    section.answer = _answer(run)
    figures = [_memory(run), _time(run), _against_full(run)]
    section.body = [figure for figure in figures if figure]
    if not run.estimate:
        section.body.append(
            Notes(
                [
                    rich(
                        "Memory and work were not estimated. <code>{}</code> compares placements with full fine-tuning.",
                        run.command("estimate"),
                    )
                ]
            )
        )
    folded: list[Figure] = [_stages(run)] if run.stages or run.trial else []
    if run.estimate:
        table = estimate_table(run.estimate)
        folded.append(Tables(title=table.caption, note=table.note, table=table))
    if folded:
        section.body.append(Fold("Every stage and every placement in numbers", folded))
    if not run.stages:
        section.caveats = ["history.jsonl is missing: no time was noted."]
    return section


def own_choice(run: RunFolder) -> dict[str, Any]:
    """Return the estimate for what this folder trained: its placement, or all weights; empty where there is none."""
    name = FULL if run.config.get("settings", {}).get("full") else run.rule
    return next((choice for choice in run.estimate.get("choices", []) if choice["name"] == name), {})


def full_choice(run: RunFolder) -> dict[str, Any]:
    """Return the estimate for training all weights; empty where there is none."""
    return next((choice for choice in run.estimate.get("choices", []) if choice["name"] == FULL), {})


def on_gpu(run: RunFolder) -> bool:
    """Whether the model was on a GPU. A stage's peak is the process's memory on the CPU, and says nothing of that."""
    return str(run.config.get("device") or run.estimate.get("device") or "cpu").startswith("cuda")


def _answer(run: RunFolder) -> list[str]:
    said, choice, measured = [], own_choice(run), run.stages.get("train")
    if measured:
        said.append(
            rich(
                "Training took <b>{}</b> and <b>{}</b>{} at its peak.",
                duration(measured["seconds"]),
                mib(measured["peak_mib"]),
                " of CPU memory" * on_gpu(run),
            )
        )
    if choice:
        of = (
            f", {share(choice['memory_of_full'])} of full fine-tuning’s"
            if choice["name"] != FULL and full_choice(run)
            else ""
        )
        said.append(
            f"The estimate was {mib(choice['total_mib'])}{of}"
            + (", as it counts tensors alone." if measured and not on_gpu(run) else ".")
        )
    elif run.estimate:
        said.append(
            f"Estimated before training, for batches of {run.estimate['batch_tokens']} tokens in {run.estimate['dtype']} on {run.estimate['device']}."
        )
    if total := sum(stage["seconds"] for stage in run.stages.values()):
        said.append(f"All stages together took {duration(total)}.")
    if "score" in run.stages and total:
        said.append(f"Choosing the placement took {duration(run.stages['score']['seconds'])} of it.")
    return said


def memory_parts(run: RunFolder) -> dict[str, float]:
    """Part the measured peak of training: weights, what training added, and the rest of the process before it.

    Empty where the peak or the estimate is missing, and where the model was on a GPU.
    """
    measured, choice = run.stages.get("train"), own_choice(run)
    if not measured or not choice or on_gpu(run):
        return {}
    peak, weights = measured["peak_mib"], min(choice["weights_mib"], measured["peak_mib"])
    before = next((run.stages[stage]["peak_mib"] for stage in BEFORE if stage in run.stages), None)
    if before is None:
        return {"weights": weights, "training": peak - weights, "rest": 0.0}
    held = min(max(before, weights), peak)
    return {"weights": weights, "training": peak - held, "rest": held - weights}


def _memory(run: RunFolder) -> Figure | None:
    choice, full, parts = own_choice(run), full_choice(run), memory_parts(run)
    choices = run.estimate.get("choices", [])
    if not choices:
        return None
    shown = (
        [c for c in (choice, full) if c]
        if choice and (parts or full) and choice is not full
        else ([choice] if parts else choices)
    )
    bars: list[tuple[str, str, list[tuple[str, float, str]]]] = []
    for one in shown:
        rest = max(0.0, one["total_mib"] - one["weights_mib"])
        name = "All weights" if one["name"] == FULL else "This placement" if one is choice else one["name"]
        bars.append(
            (
                f"{name}, estimated",
                mib(one["total_mib"]),
                [("s1", one["weights_mib"], digits(one["weights_mib"])), ("s2", rest, digits(rest))],
            )
        )
        if one is choice and parts:
            drawn = [
                (shade, parts[key], digits(parts[key]))
                for shade, key in (("s1", "weights"), ("s2", "training"), ("s3", "rest"))
                if parts[key] > 0
            ]
            bars.append(("This placement, measured", mib(run.stages["train"]["peak_mib"]), drawn))
    key = [("s1", "weights", ""), ("s2", "training: adapters, gradients, optimiser state, activations, logits", "")]
    key += [("s3", "rest of the process", "")] if parts.get("rest") else []
    spoken = ", ".join(f"{c['name']} {c['total_mib']:,.0f} MiB" for c in choices)
    rows = [(c["name"], c["total_mib"], *(c[key] for key in PARTS)) for c in choices]
    return Stack(
        title=_title_of_memory(choice, full, parts), sub="MiB at the peak of training", bars=bars, key=key, note=_difference(run, choice, parts),
        alt=f"Estimated training memory of each placement: {spoken}." + (f" Measured: {run.stages['train']['peak_mib']:,.0f} MiB." if parts else ""),
        csv=Csv("memory", ("placement", "total_mib", *PARTS), rows),
    )  # fmt: skip


def _title_of_memory(choice: dict[str, Any], full: dict[str, Any], parts: dict[str, float]) -> str:
    total = sum(parts.values())
    if parts and parts["rest"] > 0.25 * total:
        return f"{share(parts['rest'] / total)} of the measured memory is the process itself"
    if choice and full and choice is not full:
        return f"Training needs {share(choice['memory_of_full'])} of the memory of full fine-tuning"
    return "Memory of training"


def _difference(run: RunFolder, choice: dict[str, Any], parts: dict[str, float]) -> str:
    """Explain the difference between the estimate and the measurement."""
    if not parts:
        measured = run.stages.get("train")
        on_cpu = (
            f" {mib(measured['peak_mib'])} of CPU memory were measured; the GPU’s were not."
            if measured and on_gpu(run)
            else ""
        )
        return f"Estimated peaks of the tensors of one step, not measurements.{on_cpu}"
    estimated = choice["total_mib"] - choice["weights_mib"]
    held = parts["weights"] + parts["rest"]
    text = "Estimate: tensors of one step. Measurement: resident memory of the whole process. "
    if parts["rest"]:
        text += f"Before training it held {digits(held)} MiB: {digits(parts['weights'])} of weights, and {digits(parts['rest'])} of Python, libraries and freed memory that the allocator kept. "
    text += f"Training added {digits(parts['training'])}, where {digits(estimated)} were estimated"
    if parts["training"] > 1.1 * estimated:
        return text + ": the estimate leaves out freed blocks that the allocator keeps."
    return text + (
        ": part of them fitted into memory that was kept from before." if parts["training"] < 0.9 * estimated else "."
    )


def _time(run: RunFolder) -> Figure | None:
    total = sum(stage["seconds"] for stage in run.stages.values())
    if not total:
        return None
    names = {
        "data": "read the data",
        "load": "load the model",
        "eval": "test, before and after",
        "place": "place",
        "score": "score",
        "estimate": "estimate",
        "train": "train",
    }
    stages = sorted(run.stages.items(), key=lambda item: item[1].get("time", ""))
    parts = [
        (SHADES.get(name, "t3"), stage["seconds"], name) for name, stage in stages if stage["seconds"] >= BRIEF * total
    ]
    key = [
        (shade, names.get(name, name), f"{duration(seconds)} · {share(seconds / total)}")
        for shade, seconds, name in parts
    ]
    return Stack(
        title=_title_of_time(stages, total),
        sub="Time by stage, in order", bars=[("", "", parts)], key=key, tall=True,
        alt="Seconds by stage: " + ", ".join(f"{name} {seconds:.1f}" for _, seconds, name in parts) + ".",
        csv=Csv("time", ("stage", "seconds", "peak_mib"), [(name, stage["seconds"], stage["peak_mib"]) for name, stage in stages]),
    )  # fmt: skip


def _title_of_time(stages: list[tuple[str, dict[str, Any]]], total: float) -> str:
    name, stage = max(stages, key=lambda item: item[1]["seconds"])
    if stage["seconds"] < 0.4 * total:
        return f"{duration(total)} in {number(len(stages))} stages"
    return f"{share(stage['seconds'] / total)} of {duration(total)} went into {GERUND.get(name, name)}"


GERUND = {"train": "training", "eval": "testing", "load": "loading the model", "score": "scoring", "data": "reading the data", "estimate": "estimating",
          "search": "the search", "trial": "the trial", "audit": "the audit", "grpo": "reinforcement learning"}  # fmt: skip


def _against_full(run: RunFolder) -> Figure | None:
    ours, full = own_choice(run), full_choice(run)
    if not ours or not full or ours is full:
        return None
    rows = [
        (
            "Trained parameters",
            ours["parameters"] / max(full["parameters"], 1),
            large(ours["parameters"]),
            large(full["parameters"]),
        ),
        ("Memory", ours["memory_of_full"], mib(ours["total_mib"]), mib(full["total_mib"])),
        (
            "Work of a step",
            ours["flops_of_full"],
            f"{digits(ours['tflops_per_step'])} TFLOP",
            f"{digits(full['tflops_per_step'])} TFLOP",
        ),
    ]
    bars = [Bar(name=name, small=f"{a} of {b}", text=share(of), bar=100 * of, on=True) for name, of, a, b in rows]
    top = max([100.0, *(100 * of for _, of, *_ in rows)])
    return Chart(
        title=f"This placement trains {share(rows[0][1])} of the weights" if rows[0][1] < 1 else "Against full fine-tuning",
        sub=f"Share of full fine-tuning, estimated for the same {run.estimate['batch_tokens']} tokens a step in {run.estimate['dtype']}", rows=bars,
        scale=linear([0, top], zero=True, most=4, unit="%"), reference=(100.0, "full"), look="cmp", height=40,
        alt="Share of full fine-tuning: " + ", ".join(f"{name} {share(of)}" for name, of, *_ in rows) + ".",
        note="Dashed: full fine-tuning. Its accuracy was not measured here.",
    )  # fmt: skip


def _stages(run: RunFolder) -> Tables:
    tokens = {
        "score": run.scores and run.scores.tokens,
        "train": run.training.get("tokens"),
        "audit": run.audit.get("scored_tokens"),
        "eval": sum(run.eval[who]["tokens"] for who in ("base", "tuned")) if run.eval else None,
    }
    rows = [(name, s["seconds"], tokens.get(name), s["peak_mib"], s["command"]) for name, s in run.stages.items()]
    if run.trial and "trial" not in run.stages:
        peak = max(arm["peak_mib"] for arm in run.trial["arms"])
        rows.append(("trial", run.trial["seconds"], None, peak, run.noted("trial")))
    columns = [
        Column("stage"),
        Column("seconds", ".1f"),
        Column("tokens", ",d"),
        Column("peak MiB", ".0f"),
        Column("command"),
    ]
    return Tables(title="Measured time and memory", table=Table("Measured time and memory", columns, rows), wide=True)
