"""Tables of estimate.json, trial.json and audit.json: the command that writes a file prints them, the report shows them."""

from collections.abc import Sequence
from typing import Any

from ..support.tables import DIFFERS, Column, Table
from .words import range_of

PARTS = ("weights_mib", "adapters_mib", "activations_mib", "logits_mib")
UNSTABLE = 0.95  # below this share of equal picks, a row of the stability table is marked


def estimate_table(found: dict[str, Any]) -> Table:
    """estimate.json: a placement a row."""
    columns = [
        Column("placement"), Column("trained parameters", ",d"), Column("peak MiB", ",.0f"), Column("of full", ".1%"),
        *(Column(f"{part.removesuffix('_mib')} MiB", ",.1f") for part in PARTS), Column("TFLOPs a step", ".4g"),
        Column("of full", ".1%"), Column("module types"),
    ]  # fmt: skip
    rows = [
        (c["name"], c["parameters"], c["total_mib"], c["memory_of_full"], *(c[part] for part in PARTS),
         c["tflops_per_step"], c["flops_of_full"], _types(c["types"]))
        for c in found["choices"]
    ]  # fmt: skip
    step = f"{found['accumulate']} x {found['rows']} rows of {found['row_tokens']} tokens"
    note = "Of full: compared with full fine-tuning. The parts can sum to more than the peak, as they need not be in memory at one time."
    return Table(f"Estimated memory and work of a training step on {step}", columns, rows, note)


def shapes_table(found: dict[str, Any]) -> Table:
    """An estimate by shapes alone: a part of the peak a row."""
    peak = found["total_mib"]
    columns = [Column("at the peak"), Column("GiB", ",.3f"), Column("share", ".1%")]
    rows: list[Sequence[Any]] = [(part, mib / 1024, mib / peak) for part, mib in found["parts"].items()]
    rows.append(("peak on the device", peak / 1024, 1.0))
    more = [
        f"{found['host_mib'] / 1024:.2f} GiB in CPU memory" if found["host_mib"] >= 1 else "",
        f"{found['crossed_mib'] / 1024:.2f} GiB a step between CPU and GPU" if found["crossed_mib"] >= 1 else "",
        f"{found['tflops_per_step']:.4g} TFLOPs a step",
    ]
    on = [
        f"--{name.replace('_', '-')}{'' if value is True else f' {value}'}"
        for name, value in found["settings"].items()
        if value
    ]
    caption = (
        f"{found['model']} in {found['dtype']} on a {found['device']}: {found['accumulate']} x {found['rows']} rows of "
        f"{found['row_tokens']} tokens, {found['parameters']:,} trained parameters ({_types(found['types'])}), "
        f"{' '.join(on) or 'no options'}"
    )
    return Table(caption, columns, rows, f"{', '.join(filter(None, more))}.\n{found['note']}")


def trial_table(trial: dict[str, Any]) -> Table:
    """trial.json: the base model, then a placement a row, each with its difference from the first."""
    interval = f"{100 * trial['confidence']:g}% interval"
    columns = [
        Column("placement"), Column("accuracy", ".4f"), Column(interval), Column("loss", ".4f"),
        Column(f"accuracy minus {trial['reference']}'s", "+.4f"), Column(interval), Column("corrected p", ".4f"),
        Column("verdict"), Column("forgetting", "+.4f"), Column("parameters", ",d"), Column("ranks"),
        Column("learning rate", "g"), Column("seconds", ".0f"), Column("peak MiB", ".0f"), Column("module types"),
    ]  # fmt: skip
    base = trial["base"]
    rows: list[Sequence[Any]] = [("base model", base["accuracy"], "", base["loss"], *[""] * 11)]
    for arm in trial["arms"]:
        against, low, high = arm["versus"], arm["rank_low"], arm["rank_high"]
        rows.append((
            arm["name"], arm["accuracy"], f"{arm['accuracy_low']:.4f} to {arm['accuracy_high']:.4f}", arm["loss"],
            against["difference"] if against else "", f"{against['low']:+.4f} to {against['high']:+.4f}" if against else "",
            against["p_corrected"] if against else "", against["verdict"] if against else "reference", arm["forgetting"],
            arm["parameters"], "unmatched" if low is None else range_of([low, high]), arm["lr"],
            arm["seconds"], arm["peak_mib"], _types(arm["types"]),
        ))  # fmt: skip
    note = (
        f"Test: {trial['test']}. Accuracy: {trial['metric']}, on {trial['test_rows']} test rows, mean of seeds "
        f"{', '.join(map(str, trial['seeds']))}. Forgetting: rise of the loss on general text.{_not_compared(trial)}"
    )
    return Table("Placements, trained and tested", columns, rows, note)


def _not_compared(trial: dict[str, Any]) -> str:
    """What to say of arms that did not get all seeds, and of those that share a placement."""
    dropped = [
        f"{arm['name']} (loss {arm['loss']:.4f}, accuracy {arm['accuracy']:.4f}, seeds {len(arm['runs'])})"
        for arm in trial.get("dropped", ())
    ]
    same = [f"{name} is {arm}" for name, arm in trial.get("same", {}).items()]
    said = f" Not all seeds, and so not compared: {', '.join(dropped)}." if dropped else ""
    return said + (f" One placement: {', '.join(same)}." if same else "")


def audit_tables(audit: dict[str, Any]) -> list[Table]:
    """audit.json: criteria, controls, stability and other tokens, of which empty ones are left out. A row that picks other
    module types than NFN does is marked."""
    chance = "With random weights, all scores should be near 1, and the pick is chance."
    made = [
        _criteria(audit), _rankings(audit, "controls", "Controls", chance), _stability(audit),
        _rankings(audit, "tokens", "NFN of other tokens"),
    ]  # fmt: skip
    return [table for table in made if table.rows]


def _criteria(audit: dict[str, Any]) -> Table:
    columns = [
        Column("criterion"), Column("picks"), Column("chooses the"), Column("tau", ".2f"), Column("seconds", ".2f"),
        Column("time (NFN = 1)", ".1f"), Column("extra MiB", ".0f"), Column("needs"), Column("source"),
    ]  # fmt: skip
    rows = [
        (r["name"], _picked(audit, r), r["chooses"], r["tau"], r["seconds"], r["cost"], r["extra_mib"], r["needs"], r["source"])
        for r in audit["criteria"]
    ]  # fmt: skip
    note = "Tau is Kendall's: 1 for the same order of the module types as NFN's, -1 for the opposite order."
    return Table("NFN and other criteria (*: another pick than NFN's)", columns, rows, note)


def _rankings(audit: dict[str, Any], part: str, caption: str, note: str = "") -> Table:
    types = audit["types"]
    columns = [Column("scored"), Column("picks"), Column("tau", ".2f"), *(Column(type_, ".3f") for type_ in types)]
    rows = [(r["what"], _picked(audit, r), r["tau"], *(r["types"][t] for t in types)) for r in audit[part]]
    return Table(f"{caption} (*: another pick)", columns, rows, note)


def _stability(audit: dict[str, Any]) -> Table:
    columns = [
        Column("scored"), Column("repeats", "d"), Column("mean tau", ".2f"), Column("lowest tau", ".2f"),
        Column("same pick", ".0%"),
    ]  # fmt: skip
    rows = [
        (r["what"], r["repeats"], r["tau"], r["tau_low"],
         f"{DIFFERS}{r['same_pick']:.0%}" if r["same_pick"] < UNSTABLE else r["same_pick"])
        for r in audit["stability"]
    ]  # fmt: skip
    note = (
        "Subsets are drawn from the scored prompts, and other samples can share some with them: part of the agreement is "
        "built in."
    )
    return Table(f"Stability (*: fewer than {UNSTABLE:.0%} pick the same)", columns, rows, note)


def _picked(audit: dict[str, Any], row: dict[str, Any]) -> str:
    """The types that a row picks, marked where they are not NFN's; those of random weights are chance."""
    same = set(row["pick"]) == set(audit["pick"]) or row.get("what") == "random weights"
    return ("" if same else DIFFERS) + ", ".join(row["pick"])


def _types(types: Sequence[str]) -> str:
    return ", ".join(types) or "all weights"
