"""Writes the tables of docs/study.md anew from what plopfast study wrote.

    python bench/study_page.py bench/results/study.json docs/study.md

Each stands between a line `<!-- table: NAME -->` and a line `<!-- end -->`. tests/studies/test_study_page.py compares them.
"""

import argparse
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from plopfast.report.tables_study import span
from plopfast.support import files
from plopfast.support.tables import Column, Table


def page(text: str, study: dict[str, Any]) -> str:
    """The text with its tables made of `study`. Raises KeyError for a table that is not known."""

    def made(found: re.Match[str]) -> str:
        return f"{found[1]}\n{TABLES[found[2]](study)}\n{found[3]}"

    return re.sub(r"^(<!-- table: ([\w-]+) -->\n).*?^(<!-- end -->)$", made, text, flags=re.MULTILINE | re.DOTALL)


def costs(study: dict[str, Any]) -> str:
    """What following a rule costs, of those that are in all pairs."""
    pairs = max(row["pairs"] for row in study["regret"])
    rows = [
        (
            f"`{row['name']}`", row["mean"], span(row, "+.3f"), 100 * row["accuracy"], row["forgetting"],
            *((v["mean"], span(v, "+.3f"), v["p_corrected"]) if (v := row["versus"]) else ("", "", "")),
        )
        for row in study["regret"] if row["pairs"] == pairs
    ]  # fmt: skip
    level = f"{100 * study['confidence']:g}% interval"
    columns = [
        Column("placement"), Column("regret", "+.3f"), Column(level), Column("accuracy lost, points", "+.1f"),
        Column("forgetting", "+.2f"), Column("regret minus `plop`'s", "+.3f"), Column(level), Column("corrected p", ".2f"),
    ]  # fmt: skip
    return _markdown(columns, rows)


def orders(study: dict[str, Any]) -> str:
    """Tau of each criterion, over all pairs and of each model with its p; the highest first."""
    models = list(dict.fromkeys(row["model"] for row in study["tau_by_model"]))
    of = {(row["model"], row["criterion"]): row for row in study["tau_by_model"]}
    rows = []
    for row in sorted(study["tau"], key=lambda row: -row["mean"]):
        each = [of.get((model, row["criterion"])) for model in models]
        rows.append((
            f"`{row['criterion']}`", row["mean"], span(row, "+.2f"), str(row["pairs"]),
            *(f"{one['mean']:+.2f} ({one['p']:.2g})" if one else "" for one in each),
        ))  # fmt: skip
    level = f"{100 * study['confidence']:g}% interval"
    columns = [Column("criterion"), Column("tau", "+.2f"), Column(level), Column("pairs", "d")]
    return _markdown(columns + [Column(f"{model}: tau (p)") for model in models], rows)


def alone(study: dict[str, Any]) -> str:
    """The test loss of each type trained alone in each trial, the lowest NFN first."""
    rows = []
    for trial in study["trials"]:
        losses = {arm["name"]: arm["loss"] for arm in trial["arms"] if arm["types"] == [arm["name"]]}
        best = min(losses.values(), default=None)
        shown = [
            f"{type_.removesuffix('_proj')} {'**' * (losses[type_] == best)}{losses[type_]:.3f}{'**' * (losses[type_] == best)}"
            for type_ in trial["nfn_order"]
            if type_ in losses
        ]
        rows.append((f"`{trial['name']}`", ", ".join(shown)))
    return _markdown([Column("trial"), Column("test loss of each type alone, lowest NFN first")], rows)


def _markdown(columns: list[Column], rows: list[Any]) -> str:
    lines = [[column.heading for column in columns], ["---"] * len(columns), *Table("", columns, rows).cells()]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


TABLES: dict[str, Callable[[dict[str, Any]], str]] = {"costs": costs, "orders": orders, "alone": alone}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", type=Path)
    parser.add_argument("page", type=Path)
    given = parser.parse_args()
    given.page.write_text(page(given.page.read_text(), files.read_json(given.study, "plopfast study")))
