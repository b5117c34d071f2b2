"""The tables of a study: what each criterion's order and its pick are worth."""

from typing import Any

from ..support.tables import Column, Table


def study_tables(study: dict[str, Any]) -> list[Table]:
    """study.json: regret and tau of each criterion over all pairs and of each model, and the trials."""
    made = [_regret(study), _above_plop(study), _tau(study), _by_model(study), _trials(study)]
    return [table for table in made if table.rows]


def span(row: dict[str, Any], form: str) -> str:
    """Return the interval of a row, "-0.1 to +0.2"; nothing where one pair does not tell it."""
    return "" if row["low"] is None else f"{row['low']:{form}} to {row['high']:{form}}"


def _regret(study: dict[str, Any]) -> Table:
    level = f"{100 * study['confidence']:g}% interval"
    columns = [
        Column("placement"), Column("regret", "+.4f"), Column(level), Column("accuracy lost", "+.4f"), Column("forgetting", "+.3f"),
        Column("pairs", "d"), Column("regret minus plop's", "+.4f"), Column(level), Column("corrected p", ".4f"),
    ]  # fmt: skip
    rows = [
        (
            row["name"], row["mean"], span(row, "+.4f"), row["accuracy"], row["forgetting"], row["pairs"],
            *((v["mean"], span(v, "+.4f"), v["p_corrected"]) if (v := row["versus"]) else ("", "", "")),
        )
        for row in study["regret"]
    ]  # fmt: skip
    return Table("What each pick costs", columns, rows, _said(study["default"], level))


def _above_plop(study: dict[str, Any]) -> Table:
    columns = [
        Column("model"), Column("placement"), Column("regret minus plop's", "+.4f"),
        Column(f"{100 * study['confidence']:g}% interval"), Column("p", ".4f"), Column("tasks", "d"),
    ]  # fmt: skip
    rows = [
        (row["model"], row["name"], row["mean"], span(row, "+.4f"), row["p"], row["pairs"])
        for row in study["above_plop_by_model"]
    ]
    return Table("Against PLoP's pick, of each model", columns, rows, "p: over all changes of sign, not corrected.")


def _said(default: dict[str, Any] | None, level: str) -> str:
    regret = (
        "Regret: test loss, in nats a token, above the placement of lowest validation loss. Forgetting: rise of the loss on general "
        "text."
    )
    if not default:
        return regret
    if not (versus := default["versus"]):
        return f"{regret} On half of the pairs no placement has a lower mean regret than {default['chosen']}."
    verdict = "holds" if default["confirmed"] else "does not hold"
    return (
        f"{regret} {default['chosen']} has the lowest mean regret on half of the pairs. On the other half its regret minus plop's is "
        f"{versus['mean']:+.4f} ({level} {span(versus, '+.4f')}): that it is better {verdict} there."
    )


def _tau(study: dict[str, Any]) -> Table:
    columns = [
        Column("criterion"), Column("tau", "+.2f"), Column(f"{100 * study['confidence']:g}% interval"), Column("pairs", "d"),
    ]  # fmt: skip
    rows = [(row["criterion"], row["mean"], span(row, "+.2f"), row["pairs"]) for row in study["tau"]]
    note = (
        "Kendall's tau of the criterion's order and the test loss of each module type trained alone; 1: the same order."
    )
    return Table("Does the order predict results?", columns, sorted(rows, key=lambda row: -row[1]), note)


def _by_model(study: dict[str, Any]) -> Table:
    columns = [
        Column("model"), Column("criterion"), Column("tau", "+.2f"), Column("exact p", ".4f"), Column("trials", "d"),
        Column("types", "d"),
    ]  # fmt: skip
    rows = [
        tuple(row[key] for key in ("model", "criterion", "mean", "p", "trials", "types"))
        for row in study["tau_by_model"]
    ]
    return Table(
        "The order, of each model", columns, rows, "p: over all orders of the types, one order for all trials."
    )


def _trials(study: dict[str, Any]) -> Table:
    columns = [
        Column("trial"), Column("placement"), Column("valid loss", ".4f"), Column("test loss", ".4f"), Column("accuracy", ".4f"),
        Column("forgetting", "+.3f"), Column("rate", "g"), Column("seeds", "d"), Column("parameters", ",d"), Column("same as"),
    ]  # fmt: skip
    rows = []
    for trial in study["trials"]:
        same = {arm: [name for name, of in trial["same"].items() if of == arm] for arm in trial["same"].values()}
        keys = ("name", "valid_loss", "loss", "accuracy", "forgetting", "lr", "seeds", "parameters")
        for arm in sorted(trial["arms"], key=lambda arm: arm["valid_loss"]):
            rows.append((trial["name"], *(arm[key] for key in keys), ", ".join(same.get(arm["name"], ()))))
    return Table("All trials, lowest validation loss first", columns, rows)
