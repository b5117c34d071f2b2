"""--fit in a run folder: what it chooses is in force, is kept in config.json, and stays when the run is resumed."""

import dataclasses
import json

from plopfast.cli.options import parse, settings_of
from plopfast.lora.placement import Placement
from plopfast.run.costs import fit_run, fitted
from plopfast.run.run import Run


def test_a_training_takes_what_was_chosen(shop):
    folder = shop.folder("placed")
    words = [str(word) for word in (*shop.words("train"), "--out", folder)]
    config = settings_of(parse(["train", *words]))
    run = Run(folder, dataclasses.replace(config, fit="1GB"))
    placement = Placement.load(run.file("place"))
    found = fitted(run, placement)
    assert found.config == run.config and not run.is_loaded, "it fits as it is, and no weights are read for it"
    budget = f"{0.95 * found.estimate.total_mib:.6f}MiB"
    code, said = shop.quietly("train", *words, f"--fit={budget}")
    kept = json.loads((folder / "config.json").read_text())["settings"]
    changed = {name: kept[name] for name, value in dataclasses.asdict(run.config).items() if kept[name] != value}
    assert code == 0, said
    assert changed.pop("fit") == budget and changed, "something had to be chosen"
    assert set(changed) <= {"checkpointing", "quantize", "mlp_rows", "stream", "resident_share"}
    again = Run(folder, settings_of(parse(["train", "--resume", "--out", str(folder)])), resume=True)
    before = again.config
    fit_run(again, placement)
    assert again.config == before and all(getattr(before, name) == value for name, value in changed.items())
