"""What adapter/ holds besides the adapter itself: the tokenizer with its chat template, as trainers save it, and a model card."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..lora.peft_files import save_with
from ..lora.placement import Placement
from ..models.license import license_of
from ..models.loading import DEFAULT_HUB_ID, path_of
from ..support import files, machine, ranks
from ..support.ledger import inside
from ..training.job import TrainResult
from .folder import CARD
from .model_card import Base, Source, card, results_of, with_results
from .run import Run
from .splits import sources_of

SHOWN = ("plopfast", "torch", "transformers", "peft")


def keep_adapter(run: Run, result: TrainResult, name: str | None = None) -> None:
    """Writes adapter/ after a training; of several adapters, that of `name`."""
    ledger, target = run.at.ledger, run.file("train")
    mine: set[str] = ledger.claims().get(target.name, set()) if ranks.is_main() else set()

    def beside(folder: Path) -> None:
        splits = {
            split: rows for split, rows in run.splits.items() if split != "test" or rows is not run.splits.get("valid")
        }
        add_to(run, folder, settings_of(run, result), {split: len(rows.rows) for split, rows in splits.items()})
        ledger.add("claim", claims={target.name: sorted(inside(folder))})

    save_with(run.model, target, beside, overwrite=True, name=name, mine=mine.__contains__)


def add_to(
    run: Run, folder: Path, settings: Sequence[tuple[str, object]], counts: Mapping[str, int], more: str = ""
) -> None:
    """Writes the tokenizer and the card into an adapter's folder. `counts`: split -> its rows; others as for `card`."""
    run.tokenizer.save_pretrained(folder)
    versions = {name: version for name, version in machine.versions().items() if name in SHOWN}
    placement = Placement.load(run.file("place"))
    files.write_text(folder / CARD, card(base_of(run), placement, settings, rows_of(run, counts), versions, more))


def settings_of(run: Run, result: TrainResult) -> list[tuple[str, object]]:
    """What the card says of a training."""
    config = run.config
    odd = [word for word in ("rslora", "dora") if getattr(config, word)]
    said: list[tuple[str, object]] = [
        ("steps", f"{result.steps}, of which step {result.best_step} was kept ({result.stopped})"),
        ("learning rate", f"{config.lr:g}"),
        ("init", config.init),
        ("dropout", f"{config.dropout:g}"),
        ("seed", config.seed),
    ]
    if odd:
        said.append(("variant", ", ".join(odd)))
    if result.valid_loss is not None:
        said.append(("validation loss", f"{result.valid_loss:.4f}"))
    return said


def base_of(run: Run) -> Base:
    """The base of a run's model, with its license where its own files say it."""
    given, path = run.config.model, path_of(run.config.model)
    if path is None:
        place = "hub"
    elif given in (None, DEFAULT_HUB_ID) and path.is_file():
        place = "wheel"
    else:
        place = "folder" if path.is_dir() else "gguf"
    revision = getattr(run.model.config, "_commit_hash", None) if place == "hub" else None
    return Base(run.model.name_or_path, place, revision, run.config.quantize, license_of(given))


def rows_of(run: Run, counts: Mapping[str, int]) -> list[Source]:
    """Where a run's rows come from. Rows that were held out from the training have no file of their own."""
    given, found = sources_of(run.config), []
    for split in ("train", "valid", "test", "unlabeled"):
        names, rows = given.get(split, []), counts.get(split)
        hashes = {one["file"]: one["sha256"] for one in run.hashes(split)} if names else {}
        found += [Source(split, name, hashes.get(name), rows if name is names[0] else None) for name in names]
        if not names and rows:
            found.append(Source(split, "", None, rows))
    return found


def update_card(run: Run, value: Mapping[str, Any]) -> None:
    """Puts what eval.json holds into the card of the run's own adapter, between its marks. A card that is not plopfast's, or has
    lost its marks, stays as it is, which the run says."""
    path = run.file("train") / CARD
    if run.config.full or not (path.exists() or path.is_symlink()):
        return
    name = path.parent.name
    if path in run.at.ledger.foreign(name) or path.parent.is_symlink():
        run.say(f"{path}: not written by plopfast, so it stays without the figures")
        return
    text = with_results(files.read_text(path, "gone"), results_of(value))
    if text is None:
        run.say(f"{path}: it has lost the marks around its results, so it stays without the figures")
        return
    files.write_text(path, text)
    run.at.rewritten.append(f"{name}/{CARD}")
