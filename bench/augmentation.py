"""What helps when there are 50 training rows: regularisation, unlabelled text, or changed copies of the rows?

    python bench/augmentation.py [--steps 40] [--arms none,dropout,...] [--dtype bfloat16]

Each seed draws 50 training rows and 50 validation rows of the WordNet demo, and scores and places by them. Every arm then
trains the default model on the same rows; the lowest validation loss chooses the step. All arms and seeds are tested on
the same rows, so that they are compared in pairs (plopfast/studies/paired.py). Each arm has one strength, chosen before
any of its results was seen, and the learning rate is the default one.

Finished trainings are kept in results/augmentation.jsonl, one a line, until the table is made: after a kill the same
command goes on, and loses one training at most.
"""

import argparse
import json
import random
import re
import statistics
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from plopfast.support import threads

threads.set_waiting_policy()

import measure
import torch

import plopfast as pf
from plopfast.data.batches import batches_of, groups_in_epoch
from plopfast.data.rows import DEMO, Example
from plopfast.data.text import read_text
from plopfast.studies.paired import accuracies, compare
from plopfast.support import files
from plopfast.support.progress import Work
from plopfast.support.tables import Column, Table
from plopfast.training.evaluate import Metrics, choices_of, evaluate

Row = tuple[str, dict[str, Any]]  # as read_jsonl returns them

ROWS, UNLABELED, SEEDS, BATCH_TOKENS, LOOKS = 50, 400, 5, 160, 5
COPIES = 3  # changed copies of each row, beside the row itself
DROPPED = 0.2  # share of a definition's words
PROMPT = re.compile(r"Definition: (.*)\nCategory:", re.DOTALL)
WORDINGS = ("Meaning: {}\nClass:", "What it means: {}\nWhat it is:", "Dictionary entry: {}\nKind:")
PARTIAL = measure.RESULTS / "augmentation.jsonl"


@dataclass(frozen=True)
class Arm:
    """One way to make more of few rows: settings of the trainer, a change of the rows, or text without labels."""

    what: str
    settings: dict[str, Any] = field(default_factory=dict)
    copies: Callable[[str, random.Random], list[str]] | None = None
    unlabeled: bool = False


def definition(prompt: str) -> str:
    """Returns the gloss within a prompt of the demo."""
    match = PROMPT.fullmatch(prompt)
    if match is None:
        sys.exit(f"expected a prompt like 'Definition: ...\\nCategory:', got {prompt!r}: are these the demo's rows?")
    return match[1]


def fewer_words(prompt: str, rng: random.Random) -> list[str]:
    """Returns copies of the prompt that lack some of the definition's words. One word at least is left."""
    words, texts = definition(prompt).split(" "), []
    for _ in range(COPIES):
        kept = [word for word in words if rng.random() >= DROPPED] or [rng.choice(words)]
        texts.append(f"Definition: {' '.join(kept)}\nCategory:")
    return texts


def other_wordings(prompt: str, rng: random.Random) -> list[str]:
    """Returns the prompt in each of the other wordings."""
    return [wording.format(definition(prompt)) for wording in WORDINGS]


ARMS = {
    "none": Arm("the rows as they are"),
    "unlabeled": Arm(f"the glosses of {UNLABELED} other rows first, once", unlabeled=True),
    "mixed in": Arm("the same glosses in every second step", {"unlabeled_share": 0.5}, unlabeled=True),
    "dropout": Arm("LoRA dropout 0.1", {"dropout": 0.1}),
    # 10, as the usual 0.1 would shrink an adapter by 0.2 % in 40 steps
    "weight decay": Arm("weight decay 10", {"weight_decay": 10.0}),
    "neftune": Arm("NEFTune 5", {"neftune": 5.0}),
    "ema": Arm("moving average 0.9", {"ema": 0.9}),
    "fewer words": Arm(f"{COPIES} copies of each prompt without {DROPPED:.0%} of its words", copies=fewer_words),
    "wordings": Arm(f"{COPIES} copies of each prompt in other wordings", copies=other_wordings),
}


class Study:
    """The model and the rows that all arms share."""

    def __init__(self, steps: int, test_rows: int, dtype: str) -> None:
        self.steps = steps
        self.model, self.tokenizer = pf.load_model(dtype=getattr(torch, dtype))
        self.rows = {split: pf.read_jsonl(path) for split, path in DEMO.items()}
        chosen = random.Random(0).sample(self.rows["test"], test_rows)
        self.test = pf.tokenize(chosen, self.tokenizer)
        self.choices = choices_of(self.test, self.tokenizer)
        assert self.choices, "the demo is a choice"

    def begin(self, seed: int) -> None:
        """Draws a seed's rows, and places adapters by its training rows."""
        rng = random.Random(seed)
        drawn = rng.sample(self.rows["train"], ROWS + UNLABELED)
        self.train, self.other = drawn[:ROWS], drawn[ROWS:]
        self.valid = pf.tokenize(rng.sample(self.rows["valid"], ROWS), self.tokenizer)
        batches = batches_of(pf.tokenize(self.train, self.tokenizer), 8)
        self.placement = pf.place(pf.score(self.model, batches, confidence=0.95, k=3), "plop", k=3, rank=16)

    def look(self) -> Metrics:
        """Evaluates the model as it is on the test rows."""
        return evaluate(self.model, self.test, choices=self.choices)

    def run(self, arm: Arm, seed: int) -> dict[str, Any]:
        """Trains an arm on the rows of `begin`, and looks at the test rows."""
        unlabeled = self._text() if arm.unlabeled else []
        # steps with text come on top of those with labels, as many as one pass over the text takes
        more = groups_in_epoch([len(e.tokens) for e in unlabeled], BATCH_TOKENS, seed, False) if unlabeled else 0
        config = pf.TrainConfig(
            batch_tokens=BATCH_TOKENS, max_steps=self.steps + more, eval_every=max(1, self.steps // LOOKS),
            patience=self.steps + more, seed=seed, **arm.settings,
        )  # fmt: skip
        train = pf.tokenize(self._rows_of(arm, seed), self.tokenizer)
        pf.inject(self.model, self.placement, dropout=config.dropout, seed=seed)
        result = pf.Trainer(self.model, config, train, self.valid, unlabeled=unlabeled).fit()
        tested = self.look()
        pf.unload(self.model)
        return {
            "accuracy": tested.accuracy, "loss": tested.loss, "valid_loss": result.valid_loss,
            "best_step": result.best_step, "steps": result.steps, "types": self.placement.types,
            "train_s": round(result.seconds, 1), "test_s": round(tested.seconds, 1), "right": as_text(tested.right),
        }  # fmt: skip

    def _rows_of(self, arm: Arm, seed: int) -> list[Row]:
        """Returns the training rows and, if the arm has any, their changed copies."""
        if arm.copies is None:
            return self.train
        rng, rows = random.Random(seed), list(self.train)
        for where, row in self.train:
            rows += [(where, row | {"prompt": prompt}) for prompt in arm.copies(row["prompt"], rng)]
        return rows

    def _text(self) -> list[Example]:
        """Returns the glosses of the other rows as plain text, a paragraph each."""
        with tempfile.TemporaryDirectory() as scratch:
            path = Path(scratch) / "glosses.txt"
            path.write_text("\n\n".join(definition(row["prompt"]) for _, row in self.other) + "\n", encoding="utf-8")
            return read_text(path, self.tokenizer, BATCH_TOKENS)


def as_text(right: Sequence[float]) -> str:
    """Returns a digit a test row, 1 where it was right: lists would make the results unreadable."""
    return "".join(str(int(value)) for value in right)


def kept(settings: dict[str, Any]) -> list[dict[str, Any]]:
    """Returns the finished trainings of an earlier call; a last line that a kill cut short is dropped.

    Exits where the file was made with other settings.
    """
    found: list[dict[str, Any]] = []
    for line in PARTIAL.read_text().splitlines(keepends=True) if PARTIAL.exists() else ():
        if line.endswith("\n"):
            found.append(json.loads(line))
    if other := [one["settings"] for one in found if one["settings"] != settings]:
        sys.exit(f"{PARTIAL} was made with {other[0]}, expected {settings}: give the same options, or delete the file")
    files.write_text(PARTIAL, "".join(json.dumps(one) + "\n" for one in found))
    return found


def trained(study: Study, names: Sequence[str], settings: dict[str, Any]) -> list[dict[str, Any]]:
    """Trains what is not finished yet, seed by seed, and returns the records of all arms and seeds."""
    found = kept(settings)
    done = {(one["arm"], one["seed"]) for one in found}
    with Work("trainings", len(names) * SEEDS, show=True) as work:
        for seed in range(SEEDS):
            left = [name for name in names if (name, seed) not in done]
            for _ in range(len(names) - len(left)):
                work.skip()
            if left:
                study.begin(seed)
            for name in left:
                with work.piece(f"{name}, seed {seed}"):
                    record = {"arm": name, "seed": seed, **study.run(ARMS[name], seed), "settings": settings}
                    found.append(record)
                    with PARTIAL.open("a") as file:
                        file.write(json.dumps(record) + "\n")
    return found


def compared(names: Sequence[str], found: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Returns what the results hold of each arm: its means, its difference from the first arm, and its runs."""
    of = {(one["arm"], one["seed"]): one for one in found}
    runs = [[of[name, seed] for seed in range(SEEDS)] for name in names]
    right = torch.tensor([[[int(c) for c in run["right"]] for run in arm] for arm in runs], dtype=torch.float64)
    arms = []
    for name, arm, (mean, low, high), versus in zip(
        names, runs, accuracies(right), [None, *compare(right)], strict=True
    ):
        loss, seconds = (statistics.fmean(run[key] for run in arm) for key in ("loss", "train_s"))
        kept_runs = [{key: value for key, value in run.items() if key not in ("arm", "settings")} for run in arm]
        arms.append({
            "name": name, "what": ARMS[name].what, "accuracy": mean, "accuracy_low": low, "accuracy_high": high,
            "loss": loss, "train_s": seconds, "versus": versus and vars(versus), "runs": kept_runs,
        })  # fmt: skip
    return arms


def table(arms: Sequence[dict[str, Any]], base: Metrics) -> Table:
    """Returns the table of all arms, under the untrained model."""
    columns = [
        Column("arm"), Column("accuracy", ".4f"), Column("95% interval"), Column("loss", ".4f"),
        Column("difference", "+.4f"), Column("95% interval"), Column("corrected p", ".4f"), Column("verdict"),
        Column("train s", ".0f"), Column("best steps"), Column("what"),
    ]  # fmt: skip
    rows: list[Sequence[Any]] = [("untrained", base.accuracy, "", base.loss, *[""] * 7)]
    for arm in arms:
        versus = arm["versus"]
        against = (
            (
                versus["difference"],
                f"{versus['low']:+.4f} to {versus['high']:+.4f}",
                versus["p_corrected"],
                versus["verdict"],
            )
            if versus
            else ("", "", "", "reference")
        )
        best = " ".join(str(run["best_step"]) for run in arm["runs"])
        interval = f"{arm['accuracy_low']:.4f} to {arm['accuracy_high']:.4f}"
        rows.append((arm["name"], arm["accuracy"], interval, arm["loss"], *against, arm["train_s"], best, arm["what"]))
    note = (
        f"{ROWS} training and {ROWS} validation rows, {SEEDS} seeds, {base.examples} test rows; accuracy: {base.metric}; "
        f"paired bootstrap over rows, Student's t over seeds, Holm over {len(arms) - 1} comparisons"
    )
    return Table("Little data", columns, rows, note)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=40, help="labelled steps of a training")
    parser.add_argument("--test-rows", type=int, default=400)
    parser.add_argument("--arms", default=",".join(ARMS), help="the first one is what the others are compared with")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    arguments = parser.parse_args()
    names = arguments.arms.split(",")
    if unknown := [name for name in names if name not in ARMS]:
        parser.error(f"--arms: expected some of {', '.join(ARMS)}, got {unknown[0]!r}")
    settings = {"steps": arguments.steps, "test_rows": arguments.test_rows, "dtype": arguments.dtype}
    study = Study(arguments.steps, arguments.test_rows, arguments.dtype)
    base = study.look()
    found = trained(study, names, settings)
    arms = compared(names, found)
    figures = {"settings": settings | {"rows": ROWS, "unlabeled": UNLABELED}, "base": base.summary(), "arms": arms}
    measure.save("augmentation", str(table(arms, base)), figures)
    PARTIAL.unlink()


if __name__ == "__main__":
    main()
