"""One self-contained HTML page, and its pictures, from the files of a run folder alone."""

import base64
import io
from collections.abc import Sequence
from math import nan
from pathlib import Path
from statistics import fmean
from typing import Any

from . import files
from .errors import ConfigError
from .nfn import NFNReport
from .placement import Placement

try:
    import jinja2
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot as plt
except ImportError as error:
    raise ConfigError(f"the report needs matplotlib and jinja2 ({error}): pip install 'plopfast[report]'") from error

TEMPLATE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>plopfast: {{ model }}</title>
<style>
body{font:16px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem;color:#111;background:#fff}
h1{font-size:1.5rem}h2{font-size:1.15rem;margin-top:2rem}img{max-width:100%;height:auto}
.scroll{overflow-x:auto}table{border-collapse:collapse}td,th{padding:.25rem .75rem;border-bottom:1px solid #bbb;text-align:right}
td:first-child,th:first-child{text-align:left}.lead{font-size:1.15rem}code{overflow-wrap:anywhere}figcaption{color:#444}
figure{margin:1rem 0}
</style></head><body>
<h1>{{ model }}</h1>
<p class="lead">{{ lead }}</p>
{% for title, note, picture, alt in pictures %}
<h2>{{ title }}</h2><figure><img alt="{{ alt }}" src="data:image/png;base64,{{ picture }}">
<figcaption>{{ note }}</figcaption></figure>
{% endfor %}
{% for title, head, rows in tables %}
<h2>{{ title }}</h2><div class="scroll"><table><tr>{% for cell in head %}<th>{{ cell }}</th>{% endfor %}</tr>
{% for row in rows %}<tr>{% for cell in row %}<td>{{ cell }}</td>{% endfor %}</tr>{% endfor %}</table></div>
{% endfor %}
<h2>How this was made</h2>
<p>NFN: Hayou, Ghosh, Yu, "PLoP", arXiv 2506.20629. {{ machine }}.</p>
<div class="scroll"><table>{% for key, value in facts %}<tr><td>{{ key }}</td><td><code>{{ value }}</code></td></tr>{% endfor %}</table></div>
</body></html>
"""


def write_report(folder: str | Path) -> Path:
    """Writes report.html into a run folder from its scores, placement, metrics, eval and config files.

    Raises FileError naming the first file that is missing and the command that makes it.
    """
    folder = Path(folder)
    scores = NFNReport.load(folder / "scores.json")
    placement = Placement.load(folder / "placement.json")
    evaluation = files.read_json(folder / "eval.json", "plopfast eval")
    config = files.read_json(folder / "config.json", "plopfast score")
    stages = files.read_json(folder / "stages.json", "plopfast score")
    metrics = files.read_json_lines(folder / "metrics.jsonl", "plopfast train")
    base, tuned = evaluation["base"], evaluation["tuned"]
    pictures = [
        (
            "NFN by module type", "Lowest first; filled bars are the types that got adapters. 1.0 is a random input.",
            _by_type(scores, placement), f"Bar chart of the mean NFN of each module type: {_spoken(scores.types)}",
        ),
        (
            "NFN by layer and module type", "Each cell is one module.", _heat_map(scores),
            "Heat map of NFN, layers across and module types down",
        ),
        (
            "Accuracy and loss on the test rows", f"{base['examples']} held-out rows; accuracy: {base['metric']}.",
            _before_after(base, tuned),
            f"Accuracy went from {base['accuracy']:.3f} to {tuned['accuracy']:.3f}, "
            f"loss went from {base['loss']:.3f} to {tuned['loss']:.3f}",
        ),
    ]  # fmt: skip
    if metrics:
        pictures.insert(
            2, ("Loss while training", "Nats per label token.", _curve(metrics), "Training and validation loss by step")
        )
    tables: list[tuple[str, Sequence[str], list[Sequence[Any]]]] = [
        (
            "Before and after", ("model", "loss", "accuracy", "rows"),
            [(who, f"{m['loss']:.4f}", f"{m['accuracy']:.4f}", m["examples"]) for who, m in evaluation.items()],
        ),
        (
            "Time and memory", ("stage", "seconds", "peak MiB (host)", "command"),
            [(name, f"{s['seconds']:.1f}", f"{s['peak_mib']:.0f}", s["command"]) for name, s in stages.items()],
        ),
    ]  # fmt: skip
    facts = [
        *((f"data: {split}", f"{d['file']} sha256 {d['sha256'][:16]}") for split, d in config["data"].items()),
        ("versions", ", ".join(f"{name} {version}" for name, version in config["versions"].items())),
        ("settings", ", ".join(f"{key} {value}" for key, value in config["settings"].items() if value is not None)),
        ("scored", f"{scores.prompts} prompts, {scores.tokens} tokens, {scores.seconds:.1f} s"),
    ]
    page = jinja2.Environment(autoescape=True).from_string(TEMPLATE).render(
        model=scores.model or config["model"], lead=_lead(scores, placement, base, tuned), pictures=pictures,
        tables=tables, machine=config["machine"], facts=facts,
    )  # fmt: skip
    target = folder / "report.html"
    files.write_text(target, page)
    return target


def _lead(scores: NFNReport, placement: Placement, base: dict[str, Any], tuned: dict[str, Any]) -> str:
    margin = "" if placement.margin is None else f" (margin to the next type: {placement.margin:.3f} NFN)"
    return (
        f"Adapters on {', '.join(placement.types)}{margin}, {placement.parameters:,} trainable parameters: accuracy on "
        f"{base['examples']} held-out rows went from {base['accuracy']:.1%} to {tuned['accuracy']:.1%}, loss from "
        f"{base['loss']:.3f} to {tuned['loss']:.3f}."
    )


def _spoken(types: dict[str, float]) -> str:
    return ", ".join(f"{name} {value:.2f}" for name, value in types.items())


def _png(figure: Any) -> str:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120, bbox_inches="tight")
    plt.close(figure)
    return base64.b64encode(buffer.getvalue()).decode()


def _by_type(scores: NFNReport, placement: Placement) -> str:
    types = scores.types
    figure, axes = plt.subplots(figsize=(7, 0.4 * len(types) + 0.9))
    bars = axes.barh(list(types), list(types.values()), color="white", edgecolor="#222")
    for patch, name in zip(bars, types, strict=True):
        patch.set_facecolor("#222" if name in placement.types else "white")
    axes.bar_label(bars, fmt="%.2f", padding=3)
    axes.axvline(1.0, color="#888", linestyle=":")
    axes.invert_yaxis()
    axes.set_xlabel("NFN, mean over layers")
    return _png(figure)


def _heat_map(scores: NFNReport) -> str:
    types = list(scores.types)
    layers = sorted({s.layer for s in scores.scores.values() if s.layer is not None})
    cells: dict[tuple[str, int], list[float]] = {}
    for score in scores.scores.values():
        if score.layer is not None:
            cells.setdefault((score.type, score.layer), []).append(score.nfn)
    grid = [[fmean(cells.get((type_, layer), [nan])) for layer in layers] for type_ in types]
    figure, axes = plt.subplots(figsize=(8, 0.4 * len(types) + 1.2))
    picture = axes.imshow(grid, aspect="auto", cmap="cividis")
    axes.set_yticks(range(len(types)), types)
    every = max(1, len(layers) // 10)
    axes.set_xticks(range(0, len(layers), every), [str(layer) for layer in layers[::every]])
    axes.set_xlabel("layer")
    figure.colorbar(picture, label="NFN")
    return _png(figure)


def _curve(metrics: list[dict[str, Any]]) -> str:
    figure, axes = plt.subplots(figsize=(7, 3))
    for key, style, label in (("loss", "-", "training"), ("valid_loss", "o--", "validation")):
        points = [(m["step"], m[key]) for m in metrics if key in m]
        if points:
            axes.plot(*zip(*points, strict=True), style, color="#222" if key == "loss" else "#777", label=label)
    axes.set_xlabel("step")
    axes.set_ylabel("loss")
    axes.legend()
    return _png(figure)


def _before_after(base: dict[str, Any], tuned: dict[str, Any]) -> str:
    figure, panels = plt.subplots(1, 2, figsize=(7, 2.6))
    for axes, key in zip(panels, ("accuracy", "loss"), strict=True):
        bars = axes.bar(["base", "tuned"], [base[key], tuned[key]], color=["white", "#222"], edgecolor="#222")
        axes.bar_label(bars, fmt="%.3f")
        axes.set_title(key)
        axes.margins(y=0.15)
    return _png(figure)
