"""Every number of a table is shown where it belongs, cell by cell; no two are alike. Drawn figures: test_drawn.py."""

import itertools

import pytest
from full_folder import audit, estimate, scores, trial

from plopfast.report.tables import audit_tables, estimate_table, trial_table
from plopfast.report.words import (
    capital,
    digits,
    duration,
    harmless,
    interval_of,
    large,
    listed,
    mib,
    name_of,
    place_of,
    points_of,
    range_of,
    rich,
    several,
    share,
    short,
    short_end,
    signed,
    ties_of,
)


def distinct(value, numbers=None):
    """The value with another number in each place, so that none can stand for another."""
    numbers = numbers or itertools.count(3)
    if isinstance(value, dict):
        return {key: distinct(item, numbers) for key, item in value.items()}
    if isinstance(value, list):
        return [distinct(item, numbers) for item in value]
    if isinstance(value, bool) or not isinstance(value, int | float):
        return value
    return next(numbers) if isinstance(value, int) else next(numbers) / 7


def cells(table):
    """Row by row: heading -> cell; headings that come twice are numbered."""
    headings: list[str] = []
    for column in table.columns:
        headings.append(column.heading + " again" * (column.heading in headings))
    return [dict(zip(headings, row, strict=True)) for row in table.cells()]


def test_the_table_of_an_estimate():
    found = distinct(estimate())
    found["choices"][1]["types"] = []
    rows = cells(estimate_table(found))
    for row, c in zip(rows, found["choices"], strict=True):
        assert row == {
            "placement": c["name"], "trained parameters": f"{c['parameters']:,}", "peak MiB": f"{c['total_mib']:,.0f}",
            "of full": f"{c['memory_of_full']:.1%}", "weights MiB": f"{c['weights_mib']:,.1f}",
            "adapters MiB": f"{c['adapters_mib']:,.1f}", "activations MiB": f"{c['activations_mib']:,.1f}",
            "logits MiB": f"{c['logits_mib']:,.1f}", "TFLOPs a step": f"{c['tflops_per_step']:.4g}",
            "of full again": f"{c['flops_of_full']:.1%}", "module types": ", ".join(c["types"]) or "all weights",
        }  # fmt: skip
    caption = estimate_table(found).caption
    assert f"{found['accumulate']} x {found['rows']} rows of {found['row_tokens']} tokens" in caption


def test_the_table_of_a_trial():
    found = distinct(trial({}, {}))
    found["arms"][2] |= {"rank_low": None, "rank_high": None, "types": []}
    base, *rows = cells(trial_table(found))
    assert base["accuracy"] == f"{found['base']['accuracy']:.4f}" and base["loss"] == f"{found['base']['loss']:.4f}"
    level, reference = f"{100 * found['confidence']:g}% interval", f"accuracy minus {found['reference']}'s"
    for row, arm in zip(rows, found["arms"], strict=True):
        versus = arm["versus"]
        assert row == {
            "placement": arm["name"], "accuracy": f"{arm['accuracy']:.4f}",
            level: f"{arm['accuracy_low']:.4f} to {arm['accuracy_high']:.4f}", "loss": f"{arm['loss']:.4f}",
            reference: f"{versus['difference']:+.4f}" if versus else "",
            f"{level} again": f"{versus['low']:+.4f} to {versus['high']:+.4f}" if versus else "",
            "corrected p": f"{versus['p_corrected']:.4f}" if versus else "", "verdict": versus["verdict"] if versus else "reference",
            "forgetting": f"{arm['forgetting']:+.4f}", "parameters": f"{arm['parameters']:,}",
            "ranks": "unmatched" if arm["rank_low"] is None else f"{arm['rank_low']} to {arm['rank_high']}",
            "learning rate": f"{arm['lr']:g}", "seconds": f"{arm['seconds']:.0f}", "peak MiB": f"{arm['peak_mib']:.0f}",
            "module types": ", ".join(arm["types"]) or "all weights",
        }  # fmt: skip


def test_the_tables_of_an_audit():
    found = distinct(audit(scores()))
    criteria, controls, stability, tokens = map(cells, audit_tables(found))
    for row, c in zip(criteria, found["criteria"], strict=True):
        assert row.pop("picks").removeprefix("* ") == ", ".join(c["pick"])
        assert row == {
            "criterion": c["name"], "chooses the": c["chooses"], "tau": f"{c['tau']:.2f}", "seconds": f"{c['seconds']:.2f}",
            "time (NFN = 1)": f"{c['cost']:.1f}", "extra MiB": f"{c['extra_mib']:.0f}", "needs": c["needs"], "source": c["source"],
        }  # fmt: skip
    for shown, part in ((controls, "controls"), (tokens, "tokens")):
        for row, c in zip(shown, found[part], strict=True):
            assert row["scored"] == c["what"] and row["tau"] == f"{c['tau']:.2f}"
            assert all(row[name] == f"{c['types'][name]:.3f}" for name in found["types"])
    for row, s in zip(stability, found["stability"], strict=True):
        assert (row["scored"], row["repeats"]) == (s["what"], str(s["repeats"]))
        assert (row["mean tau"], row["lowest tau"]) == (f"{s['tau']:.2f}", f"{s['tau_low']:.2f}")
    assert len(audit_tables(found | {"controls": [], "tokens": []})) == 2, "tables without a row are left out"


@pytest.mark.parametrize(
    ("change", "marked"),
    [
        ({"pick": ["down_proj", "v_proj", "o_proj"]}, False),  # the same in another order
        ({"pick": ["down_proj", "v_proj", "up_proj"]}, True),
        ({"pick": ["up_proj"], "what": "random weights"}, False),  # chance
        ({"pick": ["up_proj"], "what": "shuffled words"}, True),
    ],
)
def test_rows_that_disagree_are_marked(change, marked):
    found = audit(scores())
    found |= {"controls": [found["controls"][1] | change]}
    assert cells(audit_tables(found)[1])[0]["picks"].startswith("* ") == marked


@pytest.mark.parametrize(("share", "marked"), [(0.949, True), (0.95, False), (1.0, False)])
def test_unstable_rows_are_marked(share, marked):
    found = audit(scores())
    found["stability"][0]["same_pick"] = share
    assert cells(audit_tables(found)[2])[0]["same pick"].startswith("* ") == marked


def test_long_texts():
    assert [short(text, 4) for text in (" abcd ", "abcde", "  ", "ab  cd")] == ["abcd", "abcd …", "(nothing)", "ab …"]
    assert [short_end(text, 4) for text in (" abcd ", "abcde", "ab cde")] == ["abcd", "… bcde", "… cde"]


@pytest.mark.parametrize(
    ("made", "said"),
    [
        ([share(value) for value in (0, 0.0004, 0.034, 0.0996, 0.52, 0.996, 1, 1.2)], ["0%", "under 0.1%", "3.4%", "10%", "52%", "99.6%", "100%", "120%"]),
        ([digits(value) for value in (0, 0.0002, 0.0105, 0.187, 12.87, 1593.4)], ["0", "0.0002", "0.0105", "0.187", "12.9", "1,593"]),
        ([signed(value) for value in (1.25, -1.25, 0.01, -0.01)], ["+1.2", "−1.2", "0.0", "0.0"]),
        ([duration(value) for value in (0.04, 1.56, 45, 99.6, 3600, 9000)], ["0.0 s", "1.6 s", "45 s", "2 min", "60 min", "2.5 h"]),
        ([mib(value) for value in (640.4, 1023, 1593)], ["640 MiB", "1,023 MiB", "1.6 GiB"]),
        ([large(value) for value in (4321, 2_396_160, 134_515_008, 8.03e9)], ["4,321", "2.4 M", "134.5 M", "8.0 B"]),
        ([name_of(path) for path in ("/a/b.txt", "b.txt", "C:\\a\\b.txt", "a/b/")], ["b.txt", "b.txt", "b.txt", "b"]),
        ([place_of(where) for where in ("/a/b.jsonl:12", "b.jsonl, line 12", "b:c")], ["b.jsonl, line 12", "b.jsonl, line 12", "b:c"]),
        ([capital(text) for text in ("a note", "A note.", "", "why?")], ["A note.", "A note.", "", "Why?"]),
        ([several(count, "row") for count in (0, 1, 2000)], ["0 rows", "1 row", "2,000 rows"]),
        ([rich("<b>{}</b>", "<i>")], ["<b>&lt;i&gt;</b>"]),
        ([harmless("a\x1b[1m\u202eb\n\t\x00")], ["a\\x1b[1m\\u202eb\n\t\\x00"]),
    ],
)  # fmt: skip
def test_numbers_and_names_in_words(made, said):
    assert made == said


def test_words():
    assert [listed(words) for words in ([], ["a"], ["a", "b"], ["a", "b", "c"])] == [
        "all weights",
        "a",
        "a and b",
        "a, b and c",
    ]
    assert [range_of(values) for values in ([], [4], [4, 4], [8, 4, 6])] == ["-", "4", "4", "4 to 8"]
    assert points_of({"difference": 0.012, "low": -0.005, "high": 0.03}) == "+1.2 (-0.5 to +3.0)"
    bounds = {"accuracy_low": 0.25, "accuracy_high": 0.75}
    assert interval_of(bounds, ".2f") == "0.25 to 0.75"
    assert [interval_of({key: value}, ".2f") for key, value in bounds.items()] == ["", ""], "half an interval is none"
    decision = scores().decide(3)
    for count, end in ((2, "b from y"), (3, "c from y"), (4, "(and 1 more pairs)")):
        decision.near_ties[:] = [[name, "y"] for name in "abcd"[:count]]
        assert ties_of(decision).endswith(end)
