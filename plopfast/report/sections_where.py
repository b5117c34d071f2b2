"""Section 1: which modules got adapters, how sure that is, and what it does not prove."""

import math
from statistics import fmean, median

from ..placing.rules import nfn_rule
from ..scoring.report import OUTLIER, NFNReport
from .caveats import OtherPick
from .facts import by_type, picks_that_differ
from .figures import Bar, Cell, Chart, Csv, Figure, Fold, Heat, Layer, Notes, Section, Tables
from .folder import RunFolder
from .recommend import how_sure, placed, shown_by_trial
from .scales import classes, linear
from .words import capital, listed, number, range_of, rich, several, ties_of

KNOWN = (
    "What the authors found (Hayou, Ghosh and Yu, arXiv 2506.20629): adapters where NFN is lowest did about as well as "
    "adapters on all MLP modules or on all modules, with fewer parameters. They did better than adapters on query, key and "
    "value alone, but not significantly better than adapters on the MLP modules."
)
ROWS = 20  # types in the open chart; the others are folded
SHADES = 7  # of the heat map
COLUMNS = 60  # of the heat map; more layers are grouped
BLOCKS = 4  # a layer with more blocks, or more modules in one, is not drawn
MODULES = 12
ROLES = {
    "q_proj": "attention, query", "k_proj": "attention, key", "v_proj": "attention, value", "o_proj": "attention, output",
    "gate_proj": "MLP, gate", "up_proj": "MLP, up", "down_proj": "MLP, down",
}  # fmt: skip


def where(run: RunFolder) -> Section:
    """scores.json and placement.json: the choice, the scores by type, and layer by layer."""
    section = Section(
        id="where",
        title="Where the adapters went, and how sure" if run.training else "Where adapters belong, and how sure",
    )
    section.nav = "Where the adapters went" if run.training else "Where adapters belong"
    if not run.scores and not run.placement:
        section.lacks = ("No module has been scored.", run.command("score"))
        return section
    section.answer, section.command = _answer(run), run.noted("score")
    section.warnings = [pick_warning(run)] if picks_that_differ(run) else []
    section.caveats = [
        rich(
            "<b>What NFN is.</b> The normalised feature norm compares how strongly a module responds to your data with how "
            "strongly it responds to random input of the same length. It is 1 for a random input."
        ),
        rich(
            "<b>What it doesn’t prove.</b> A low score does not show that adapters train better there. Only {} does.",
            rich('<a href="#trial">a trial</a>'),
        ),
    ]
    if run.scores:
        section.body += [*_layer(run), *_by_type(run, run.scores), _by_layer(run, run.scores)]
    else:
        section.body.append(
            Notes(
                ["The scores are not in this folder.", rich("They are made by <code>{}</code>.", run.command("score"))]
            )
        )
    notes = about_the_choice(run)
    section.body.append(Fold("How the choice was made, and what is known", [Notes([*notes, KNOWN]), *_table(run)]))
    return section


def _answer(run: RunFolder) -> list[str]:
    """The recommendation; where the head of the page has it, how sure it is alone."""
    trained = run.training or run.eval
    return [placed(run)] if trained or not run.types or shown_by_trial(run) else [how_sure(run)]


def pick_warning(run: RunFolder, brief: bool = False) -> str:
    """Say which types another summary of the layers would pick; the interval over prompts does not cover that."""
    swaps: dict[tuple[str, str], list[OtherPick]] = {}
    for pick in picks_that_differ(run):
        swaps.setdefault((listed(pick.instead[:4]), listed(pick.gone[:4])), []).append(pick)
    said = []
    for (instead, gone), picks in swaps.items():
        how = " and by ".join(pick.how for pick in picks)
        values = "; ".join(
            ", ".join(f"{type_} {pick.values[type_]:.2f}" for type_ in (*pick.instead, *pick.gone)[:6])
            for pick in picks
        )
        said.append(rich("By {}, <b>{}</b> would replace {}{}.", how, instead, gone, "" if brief else f" ({values})"))
    covered = [] if brief else ["The interval over prompts does not cover that."]
    return rich(" ").join([rich("<b>The pick hangs on a few layers.</b>"), *said, *covered])


def about_the_choice(run: RunFolder) -> list[str]:
    """The sentences on the placement, how sure it is, and what has no score."""
    placement, decision = run.placement, run.decision
    if placement:
        ranks, count = range_of([rank for rank, _ in placement.modules.values()]), len(placement.modules)
        texts = [f"The rule {run.rule!r} chose {count} modules: rank {ranks}, {placement.parameters:,} parameters."]
    else:
        would = f" Filled marks are what the rule {run.rule!r} chooses." if run.rule else ""
        texts = [f"No placement is kept here.{would} {run.command('place')} makes one."]
    if run.scores and run.no_intervals:
        texts.append(f"No interval is possible: {run.no_intervals}.")
    if decision:
        settled = decision.note.startswith(("decided", "not decided"))
        texts.append(f"The choice is {decision.note}." if settled else f"On the choice: {decision.note}.")
        if decision.near_ties:
            level = f"{100 * decision.confidence:g}% confidence"
            texts.append(f"Near-ties: at {level}, these prompts do not tell {ties_of(decision, 99)}.")
    elif nfn_rule(run.rule):
        texts.append("The scores do not say how sure the choice is.")
    if placement:
        texts += [capital(note) for note in placement.notes if not decision or decision.note not in note]
    for note in run.scores.notes if run.scores else ():
        texts.append(f"Not scored, and {note}." if note.startswith("left out") else capital(note))
    return texts


def _layer(run: RunFolder) -> list[Figure]:
    """A layer of the model, where all layers have the same modules and there are few of them."""
    assert run.scores
    layers: dict[int, dict[str, list[str]]] = {}
    for name, score in run.scores.scores.items():
        if score.layer is not None:
            above = name.removesuffix(score.type).rstrip(".").split(".")[-1]
            block = "" if above.isdigit() else above
            layers.setdefault(score.layer, {}).setdefault(block, []).append(score.type)
    shapes = {tuple((block, *types) for block, types in blocks.items()) for blocks in layers.values()}
    if len(shapes) != 1:
        return []
    blocks = next(iter(layers.values()))
    if len(blocks) > BLOCKS or max(map(len, blocks.values())) > MODULES or len(run.types) == 0:
        return []
    chosen, count = set(run.types), len(run.scores.types)
    drawn = [
        (
            _block(block),
            [(type_.removesuffix("_proj"), type_ in chosen) for type_ in sorted(types, key=_in_order(types))],
        )
        for block, types in blocks.items()
    ]
    verb = "got" if run.training else "get"
    some = "" if run.whole_types else " in some layers"
    on = [type_ for type_ in run.types if type_ in run.scores.types]
    return [
        Layer(
            title=f"{number(len(on)).capitalize()} of {number(count)} module types {verb} adapters{some}",
            sub="One layer of the model; filled: adapted",
            times=several(len(layers), "layer"),
            blocks=drawn,
            alt=f"One of {len(layers)} layers. Adapted: {listed(on)}. Not adapted: {', '.join(t for t in run.scores.types if t not in chosen) or 'none'}.",
        )
    ]


def _in_order(types: list[str]):
    known = list(ROLES)
    return lambda type_: (known.index(type_) if type_ in known else len(known), types.index(type_))


def _block(name: str) -> str:
    return {
        "self_attn": "Attention",
        "attn": "Attention",
        "attention": "Attention",
        "mlp": "MLP",
        "feed_forward": "MLP",
    }.get(name, name)


def _by_type(run: RunFolder, report: NFNReport) -> list[Figure | Fold]:
    known, chosen = run.intervals.types if run.intervals else {}, set(run.types)
    layers = {type_: [*values.values()] for type_, values in by_type(run).items()}
    rows = [
        (name, nfn, *known.get(name, (None, None)), median(layers[name]), name in chosen)
        for name, nfn in report.types.items()
    ]
    what = f"{100 * run.intervals.confidence:g}% interval over prompts" if run.intervals else ""
    spoken = ", ".join(
        f"{name} {nfn:.2f}" + ("" if low is None else f" ({low:.2f} to {high:.2f})") + (" chosen" if yes else "")
        for name, nfn, low, high, _, yes in rows
    )
    ends = (
        [bound for bounds in known.values() for bound in bounds]
        + [nfn for _, nfn, *_ in rows]
        + [row[4] for row in rows]
    )
    top = max([value for value in ends if math.isfinite(value)] or [1.0])
    inside = [value for values in layers.values() for value in values if value <= 1.25 * top]
    scale = linear([*inside, *ends, 1.0], most=8)
    bars = [_bar(row, layers[row[0]]) for row in rows]
    _cut(run, bars)
    over = any(scale.beyond(value) for values in layers.values() for value in values)
    note = (
        f"Bar: {what} (bootstrap) of the mean over layers. "
        if what
        else "No intervals are known. Dot: the mean over layers. "
    ) + ("Faint dots: single layers. Tick below: their median." + (" “+2 ›”: layers beyond the scale." if over else ""))
    figures = []
    for at, part in enumerate((bars[:ROWS], bars[ROWS:])):
        if part:
            figures.append(Chart(
                title=_title_of_types(run) if not at else "The other module types", sub="NFN, lowest first", note=note if not at else "", rows=part, scale=scale,
                alt=f"NFN of each module type, lowest first, {what or 'without intervals'}: {spoken}." if not at else "NFN of the other module types",
                axis="1 = random input", reference=(1.0, "1"), look="nfn", height=42,
                csv=Csv("nfn_by_type", ("type", "nfn", "low", "high", "median", "chosen"), rows) if not at else None,
            ))  # fmt: skip
    return [figures[0], *(Fold(f"{len(bars) - ROWS} more module types", [figure]) for figure in figures[1:])]


def _bar(row: tuple, values: list[float]) -> Bar:
    name, nfn, low, high, middle, chosen = row
    return Bar(
        name=name, small=ROLES.get(name, ""), text=f"{nfn:.2f}", more="" if low is None else f"{low:.2f} to {high:.2f}",
        on=chosen, mark=True, strip=values, tick=middle, box=None if low is None else (low, high), dots=[(nfn, chosen)] if low is None else [],
    )  # fmt: skip


def _cut(run: RunFolder, bars: list[Bar]) -> None:
    """Write the line between the chosen types and the others, where the chosen ones come first."""
    count = sum(bar.on for bar in bars)
    if (
        not 0 < count < len(bars)
        or not all(bar.on for bar in bars[:count])
        or not run.whole_types
        or not nfn_rule(run.rule)
    ):
        return
    decision, verb = run.decision, "are adapted" if run.placement else "are chosen"
    gap = ""
    if decision and decision.margin is not None:
        ends = "" if decision.margin_low is None else f" ({decision.margin_low:.3f} to {decision.margin_high:.3f})"
        gap = f" · gap to the next: {decision.margin:.3f}{ends}"
    bars[
        count - 1
    ].cut = f"{number(count)} lowest {'mean' if count == 1 else 'means'} {'is' + verb[3:] if count == 1 else verb}{gap}"


def _title_of_types(run: RunFolder) -> str:
    """The finding of the chart of types."""
    for pick in picks_that_differ(run):
        by = "the median" if "median" in pick.how else "the mean without outliers"
        return f"By the mean, {listed(pick.gone[:2])} {'is' if len(pick.gone) == 1 else 'are'} ahead of {listed(pick.instead[:2])}; by {by}, behind"
    decision, rule = run.decision, nfn_rule(run.rule)
    if decision and decision.near_ties:
        return f"{number(len(decision.near_ties)).capitalize()} near-{'tie' if len(decision.near_ties) == 1 else 'ties'} between chosen types and others"
    if decision and decision.decided and rule:
        return f"The chosen types score {'higher' if rule.highest else 'lower'} than every other"
    return "NFN by module type"


def _by_layer(run: RunFolder, report: NFNReport) -> Heat:
    z, outliers, order = report.z_scores(), set(report.outliers()), list(report.types)
    rows = [
        (name, s.type, s.layer, s.nfn, z[name], name in outliers)
        for name, s in report.scores.items()
        if s.layer is not None
    ]
    rows.sort(key=lambda row: (order.index(row[1]), row[2]))
    low, high = min(rows, key=lambda row: row[3]), max(rows, key=lambda row: row[3])
    odd = {type_: [str(row[2]) for row in rows if row[1] == type_ and row[5]] for type_ in order}
    spoken = "; ".join(f"{type_} in layer {', '.join(found)}" for type_, found in odd.items() if found) or "none"
    layers = sorted({row[2] for row in rows})
    size = -(-len(layers) // COLUMNS)
    groups = [layers[at : at + size] for at in range(0, len(layers), size)]
    borders = classes([row[3] for row in rows], SHADES)
    cells: dict[tuple[str, int], list[tuple]] = {}
    for row in rows:
        cells.setdefault((row[1], layers.index(row[2]) // size), []).append(row)
    lines = [
        (type_, type_ in run.types, [_cell(cells.get((type_, at), []), borders) for at in range(len(groups))])
        for type_ in order
    ]
    count = len(outliers)
    every = max(1, -(-len(groups) // 7) // 5 * 5) if len(groups) > 12 else 1
    labels = [
        str(group[0]) if at % every == 0 or (at == len(groups) - 1 and at % every > every / 2) else ""
        for at, group in enumerate(groups)
    ]
    grouped = f" Columns: {size} layers each." if size > 1 else ""
    return Heat(
        title=f"{several(count, 'outlier')} among {several(len(rows), 'module')}" if count else "No module stands out within its type",
        sub=rich('NFN by layer, first to last. <span class="lt">Darker</span><span class="dk">Lighter</span>: lower.{}', grouped),
        alt=(
            f"Heat map of NFN, {len(layers)} layers and {len(order)} module types, from {low[3]:.2f} ({low[1]}, layer {low[2]}) to "
            f"{high[3]:.2f} ({high[1]}, layer {high[2]}). Outliers: {spoken}."
        ),
        note=f"Lowest: {low[3]:.2f} ({low[1]}, layer {low[2]}). Highest: {high[3]:.2f} ({high[1]}, layer {high[2]}). Outliers: {spoken}. "
        f"They are more than {OUTLIER:g} robust standard deviations from their type’s median.",
        rows=lines, columns=labels, legend=_legend(borders),
        csv=Csv("nfn_by_layer", ("module", "type", "layer", "nfn", "z", "outlier"), rows),
    )  # fmt: skip


def _cell(rows: list[tuple], borders: list[float]) -> Cell:
    if not rows:
        return Cell(None, "")
    value, odd = fmean(row[3] for row in rows), any(row[5] for row in rows)
    where = range_of([row[2] for row in rows])
    return Cell(
        _shade(value, borders),
        f"{rows[0][1]}, layer{'s' * (' ' in where)} {where}: {value:.2f}{', outlier' * odd}",
        odd,
    )


def _shade(value: float, borders: list[float]) -> int:
    """The class of a value; few classes are spread over all shades."""
    at = sum(value >= border for border in borders)
    return round(at * (SHADES - 1) / len(borders)) if borders else SHADES // 2


def _legend(borders: list[float]) -> list[tuple[int, str]]:
    if not borders:
        return []
    words = [f"below {borders[0]:g}", *(f"to {border:g}" for border in borders[1:]), "above"]
    return [(round(at * (SHADES - 1) / len(borders)), text) for at, text in enumerate(words)]


def _table(run: RunFolder) -> list[Tables]:
    if not run.scores:
        return []
    table = run.scores.types_table(run.intervals, run.types)
    return [
        Tables(
            title=table.caption,
            sub=f"{several(run.scores.prompts, 'prompt')}, {several(run.scores.tokens, 'token')}",
            table=table,
        )
    ]
