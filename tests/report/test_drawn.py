"""Every figure shows the files' numbers, and is drawn where its scale says."""

import json
import re
from statistics import median

import pytest
from reading import change, figures, put, report

import plopfast as pf
from plopfast.report.figures import Bar, Cell, Chart, Heat, Matrix, Plot, Stack, Tables
from plopfast.report.folder import RunFolder
from plopfast.report.head import head_of
from plopfast.report.page import rendered
from plopfast.report.scales import Scale, smoothed
from plopfast.scoring.report import ModuleScore
from plopfast.support.tables import Column, Table


def read(folder, name):
    return json.loads((folder / f"{name}.json").read_text())


def test_types_of_modules(full):
    chart, kept = figures(full)["nfn_by_type"], read(full, "scores")
    modules = {}
    for score in kept["scores"].values():
        modules.setdefault(score["type"], []).append(score["nfn"])
    assert [row.name for row in chart.rows] == list(kept["types"])
    for row in chart.rows:
        assert row.box == tuple(kept["intervals"]["types"][row.name]) and row.tick == median(modules[row.name])
        assert row.strip == modules[row.name] and row.on == (row.name in ("v_proj", "o_proj", "down_proj"))
        assert row.text == f"{kept['types'][row.name]:.2f}" and row.more == "{:.2f} to {:.2f}".format(*row.box)
    assert chart.reference == (1.0, "1") and [row.name for row in chart.rows if row.cut] == ["down_proj"]
    assert "three lowest means are adapted · gap to the next: 0.068 (0.059 to 0.077)" in chart.rows[2].cut
    assert sum(chart.over(row) for row in chart.rows) == sum(
        v > chart.scale.high for values in modules.values() for v in values
    )


def test_types_without_intervals_have_dots(full):
    report_ = pf.NFNReport.load(full / "scores.json")
    report_.prompt_stats = None
    report_.save(full / "scores.json")
    chart = figures(full)["nfn_by_type"]
    assert all(row.box is None and row.dots == [(report_.types[row.name], row.on)] for row in chart.rows)


def test_layers(full):
    heat, scored = figures(full)["nfn_by_layer"], pf.NFNReport.load(full / "scores.json")
    borders = [float(re.search(r"[\d.]+", text)[0]) for _, text in heat.legend[:-1]]
    assert borders == sorted(borders) and [shade for shade, _ in heat.legend] == sorted(
        {shade for shade, _ in heat.legend}
    )
    odd = set(scored.outliers())
    for type_, chosen, cells in heat.rows:
        assert chosen == (type_ in ("v_proj", "o_proj", "down_proj")) and len(cells) == 12
        for layer, cell in enumerate(cells):
            name = f"model.layers.{layer}.{type_}"
            value = scored.scores[name].nfn
            assert (
                cell.title == f"{type_}, layer {layer}: {value:.2f}{', outlier' * (name in odd)}"
                and cell.outlier == (name in odd)
            )
            assert cell.shade == heat.legend[sum(value >= border for border in borders)][0], "the legend's class"
    assert f"{len(odd)} outliers among 84 modules" == heat.title


def test_many_layers_are_grouped_by_their_mean(tmp_path):
    made = {
        f"model.layers.{layer}.{type_}": ModuleScore(0.5 + layer % 3 + (type_ == "b"), 0.1, 9, type_, layer, 8, 8)
        for layer in range(121)
        for type_ in "ab"
    }
    pf.NFNReport(made, 9, 1, 1.0).save(tmp_path / "scores.json")
    heat = figures(tmp_path)["nfn_by_layer"]
    assert "Columns: 3 layers each." in heat.sub and len(heat.columns) == 41
    assert [cells[0].title for _, _, cells in heat.rows] == ["a, layers 0 to 2: 1.50", "b, layers 0 to 2: 2.50"]
    assert heat.rows[0][2][-1].title == "a, layer 120: 0.50" and heat.columns[0] == "0" and heat.columns[-1] == "120"


def test_losses_and_their_smoothing(full):
    plot, losses = figures(full)["training"], [12 / step for step in range(1, 61)]
    assert plot.dots == [(step, 12 / step) for step in range(1, 61)]
    assert plot.line == list(zip(range(1, 61), smoothed(losses), strict=True))
    assert plot.marks == [(30, 11 / 30, "0.367"), (60, 11 / 60, "0.183")] and plot.y.log
    assert plot.title == "Loss fell from 12 to about 0.21 in 60 steps"
    assert [label for _, label in plot.x.ticks][-1] == "60"
    found = figures(full)
    for title, values in (("Learning rate", [1e3 * 1e-3 * (1 - k / 61) for k in range(1, 61)]), ("Gradient norm", [60 / k for k in range(1, 61)]),
                          ("Speed", [150 / (0.5 + 0.01 * k) for k in range(1, 61)])):  # fmt: skip
        assert [y for _, y in found[title].line] == pytest.approx(values), title
    assert (
        found["Learning rate"].sub == "× 0.001"
        and found["Gradient norm"].sub == "before clipping; 56 of 60 steps clipped"
    )


def test_many_steps_are_binned(full):
    lines = [json.dumps({"step": step, "loss": 2.0}) for step in range(1, 3001)]
    (full / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    plot = figures(full)["training"]
    assert (
        len(plot.dots) == 300 and plot.dots[0] == (5.5, pytest.approx(2.0)) and ("dot", "mean of 10 steps") in plot.key
    )


def test_before_and_after(full):
    hero = head_of(RunFolder(full)).hero
    assert [(row.dots, row.span) for row in hero.rows] == [
        ([(51.949999999999996, False)], (48.42, 55.46)), ([(88.05, True)], (85.57000000000001, 90.16)),
    ]  # fmt: skip
    assert hero.reference == (pytest.approx(20.0), "guess") and hero.scale.ticks[-1] == (100, "100%")


def test_rows_that_changed(full):
    found = figures(full)
    ((_, _, parts),) = found["changes"].bars
    assert [(shade, value) for shade, value, _ in parts] == [("t4", 370), ("s1", 308), ("s3", 0), ("t2", 92)]
    assert found["changes"].title == "370 rows became right, 92 rows became wrong"
    chart, rows = found["by_answer"], [json.loads(line) for line in (full / "eval_rows.jsonl").read_text().splitlines()]
    assert chart.rows[0].dots == [(51.949999999999996, False), (88.05, True)] and chart.rows[0].name == "all rows"
    for row in chart.rows[1:]:
        mine = [one for one in rows if one["expected"].strip() == row.name]
        before, after = (100 * sum(one[when]["right"] for one in mine) / len(mine) for when in ("before", "after"))
        assert (
            row.dots == [(pytest.approx(before), False), (pytest.approx(after), True)] and row.more == f"of {len(mine)}"
        )
        assert row.span == (pytest.approx(before), pytest.approx(after)) and row.joined
    matrix = found["confusion"]
    assert (
        matrix.names == ["animal", "artifact", "food", "plant", "substance"]
        and matrix.title == "Food is taken for substance most"
    )
    assert sum(map(sum, matrix.counts)) == 770 and sum(matrix.counts[k][k] for k in range(5)) == 678
    food, substance = (matrix.names.index(name) for name in ("food", "substance"))
    assert matrix.counts[food][substance] == sum(
        one["expected"] == " food" and one["after"]["answered"] == " substance" for one in rows
    )
    assert [row[-1] for row in found["most_wrong"].table.rows][:2] == ["0.1%", "0.2%"]


def test_many_answers_have_a_table_of_mistakes(full):
    path = full / "eval_rows.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    for at, line in enumerate(lines):
        line["expected"] = f" answer {at % 20}"
        line["after"]["answered"] = line["expected"] if at % 4 else f" answer {(at + 1) % 20}"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    table = figures(full)["confusion"]
    assert isinstance(table, Tables) and [len(row) for row in table.table.rows] == [3] * 5
    assert all(count == 39 or count == 38 for *_, count in table.table.rows)


def test_memory_and_time(full):
    found, choices = figures(full), {c["name"]: c for c in read(full, "estimate")["choices"]}
    bars = {name: parts for name, _, parts in found["memory"].bars}
    assert bars.keys() == {"This placement, estimated", "This placement, measured", "All weights, estimated"}
    for name, choice in (("This placement, estimated", choices["plop"]), ("All weights, estimated", choices["full"])):
        assert [value for _, value, _ in bars[name]] == [
            choice["weights_mib"],
            choice["total_mib"] - choice["weights_mib"],
        ]
    assert sum(value for _, value, _ in bars["This placement, measured"]) == 812.5
    ((_, _, parts),) = found["time"].bars
    assert [(value, name) for _, value, name in parts] == [
        (3.25, name) for name in ("score", "train", "eval", "audit", "estimate")
    ]
    chart = next(figure for figure in found.values() if getattr(figure, "look", "") == "cmp")
    assert [row.bar for row in chart.rows] == pytest.approx(
        [100 * 1_400_000 / 134_515_008, 100 * choices["plop"]["memory_of_full"], 68.0]
    )


def test_lengths(full):
    found, splits = figures(full), read(full, "data")["splits"]
    for title, split in (("Train: 8 to 39 tokens", splits[0]), ("Test: 8 to 39 tokens", splits[1])):
        assert found[title].bars == [(begin, begin + 2, count) for begin, count in split["histogram"]]


def test_a_trial_and_forgetting(full):
    found, trial = figures(full), read(full, "trial")
    first, *rows = found["trial"].rows
    assert (first.name, first.dots, first.text) == ("plop", [(0.0, True)], "88.0%")
    for row, arm in zip(rows, trial["arms"][1:], strict=True):
        versus = {key: 100 * arm["versus"][key] for key in ("difference", "low", "high")}
        assert row.name == arm["name"] and row.span == (versus["low"], versus["high"])
        assert row.dots == [(versus["difference"], arm["versus"]["verdict"] != "no difference shown")]
    assert (
        found["trial"].title == "attn did worse"
        and "+0.4" in [row.text for row in rows]
        and "−9.0" in [row.text for row in rows]
    )
    for row, arm in zip(found["forgetting"].rows, trial["arms"], strict=True):
        seeds = [run["general_loss"] - 3.1 for run in arm["runs"]]
        assert row.bar == arm["forgetting"] and row.span == (min(seeds), max(seeds))
    put(
        full,
        "trial.json",
        lambda value: [
            arm["versus"].update(low=-0.1, high=0.1, verdict="no difference shown")
            for arm in value["arms"]
            if arm["versus"]
        ],
    )
    assert figures(full)["trial"].title == "All four intervals contain zero"


def drawn(figure, folder) -> str:
    """What the page holds of a figure alone."""
    from plopfast.report.figures import Section

    text = rendered(RunFolder(folder), [Section(id="one", title="One", body=[figure])])
    return text[text.index("<figure>") : text.rindex("</figure>")]


def test_a_chart_is_drawn_in_per_cent_of_its_axis(full):
    rows = [
        Bar(name="a<b", small="low", text="1.5", more="1 to 2", on=True, mark=True, dots=[(1.5, True)], span=(1.0, 2.0), tick=0.5, strip=[1.0, 9.0], cut="a cut"),
        Bar(name="c", text="3", dots=[(3.0, False)], bar=3.0, box=(1.0, 3.0)),
    ]  # fmt: skip
    chart = Chart(
        title="T", alt="1", rows=rows, scale=Scale(0, 4, [(0, "0"), (2, "2"), (4, "4")]), reference=(1.0, "one")
    )
    text = drawn(chart, full)
    first, second = text.split("a cut")
    assert "a&lt;b<small>low</small>" in first and 'cx="37.5%"' in first and 'class="dot on"' in first
    assert 'class="iv on" x1="25%" x2="50%"' in first and 'class="tick" x1="12.5%" x2="12.5%"' in first
    assert 'd="M250 38h.01"' in first and "+1 ›" in first, "what lies beyond is counted"
    assert (
        'class="dot" cx="75%"' in second
        and 'class="bar" x="0%" width="75%"' in second
        and 'class="box" x="25%" width="50%"' in second
    )
    assert [float(at) for at in re.findall(r'class="gl" x1="([\d.]+)%"', second)] == [0, 50, 100]
    assert 'class="ref" x1="25%"' in second and '<span style="left:25%"><em>one</em></span>' in second


def test_bars_below_zero_end_at_zero(full):
    chart = Chart(title="T", alt="1", rows=[Bar(name="a", text="-1", bar=-1.0)], scale=Scale(-2, 2, [(0, "0")]))
    assert 'class="bar" x="25%" width="25%"' in drawn(chart, full)


def test_a_plot_is_drawn_in_thousandths(full):
    ticks = [(0, "0"), (10, "10")]
    plot = Plot(
        title="T",
        alt="1",
        x=Scale(0, 10, ticks),
        y=Scale(0, 2, [(0, "0"), (2, "2")]),
        dots=[(5, 1)],
        line=[(0, 0), (10, 2)],
        marks=[(10, 2, "two")],
        bars=[(0, 5, 1), (5, 10, 0)],
        axis="step",
    )
    text = drawn(plot, full)
    assert 'class="raw" d="M500 500h.01"' in text and 'class="sm" d="M0 1000L1000 0"' in text
    assert 'class="hb" d="M1 1000V500H499V1000Z"' in text, "an empty bin has no bar"
    assert (
        'class="vd" d="M1000 0h.01"' in text and '<span class="lab end low" style="left:100%;top:0%">two</span>' in text
    )
    assert '<span class="y" style="top:100%">0</span>' in text and '<span class="x" style="left:100%">10</span>' in text


def test_a_stack_is_drawn_to_its_longest_bar(full):
    stack = Stack(
        title="T", alt="1", bars=[("a", "3", [("s1", 1.0, "1"), ("s3", 2.0, "2")]), ("b", "6", [("s2", 6.0, "6")])]
    )
    text = drawn(stack, full)
    assert re.findall(r'class="sg (s\d)" x="([\d.]+)%" width="([\d.]+)%"', text) == [
        ("s1", "0", "16.67"),
        ("s3", "16.67", "33.33"),
        ("s2", "0", "100"),
    ]
    assert text.count("url(#hatch)") == 1, "what is no tensor is hatched"
    tiny = Stack(title="T", alt="1", bars=[("a", "", [("s1", 99.0, "99"), ("s2", 1.0, "1")])])
    assert [label for *_, label in tiny.parts(0)] == ["99", ""], "a label that does not fit is left out"
    assert Stack(title="T", alt="1", bars=[("a", "", [("s1", 0.0, "0")])]).parts(0) == [("s1", 0.0, 0.0, "")]


def test_a_heat_map_and_a_matrix(full):
    heat = Heat(
        title="T",
        alt="1",
        rows=[("a", True, [Cell(0, "a, 0", True), Cell(None, "")])],
        columns=["0", "1"],
        legend=[(0, "below 1")],
    )
    text = drawn(heat, full)
    assert (
        '<i class="h0 o" title="a, 0"></i><i class="hx" title=""></i>' in text
        and "--n:2;--t:1" in text
        and '<b class="ty on">a</b>' in text
    )
    matrix = Matrix(title="T", alt="1", names=["a", "b"], counts=[[5, 2], [0, 7]])
    text = drawn(matrix, full)
    assert re.findall(r'<td class="(\w+)">([^<]*)</td>', text) == [("d", "5"), ("e3", "2"), ("e0", "·"), ("d", "7")]


def test_a_wide_table_is_shown_in_parts(full):
    columns = [Column("name"), *(Column(f"a heading {k}", ".3f") for k in range(20))]
    table = Tables(title="T", table=Table("", columns, [("row", *range(20))]))
    parts = table.parts()
    assert len(parts) > 1 and all(part.columns[0].heading == "name" for part in parts)
    assert [column.heading for part in parts for column in part.columns[1:]] == [
        column.heading for column in columns[1:]
    ]
    assert [cell for part in parts for row in part.cells() for cell in row[1:]] == [f"{k:.3f}" for k in range(20)]


def test_single_modules_are_said(full):
    placement = pf.Placement.load(full / "placement.json")
    del placement.modules["model.layers.0.v_proj"]
    placement.save(full / "placement.json")
    chart = figures(full)["nfn_by_type"]
    assert not any(row.cut for row in chart.rows), "no line parts whole types"
    assert "on 35 single modules of" in report(full).text
    change(full, "config.json", model="m")
