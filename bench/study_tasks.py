"""The six tasks of the study "does NFN predict where adapters work?", written as files that every command takes.

    python bench/study_tasks.py --out DIR [--seed 0] [--only rule,arithmetic] [--sources FOLDER]

Writes DIR/TASK/{train,valid,test}.jsonl, and DIR/TASK/about.json: the task's kind, source, licence, seed, rows, the sha256
of each file. All tasks but `python-docs` have the same bytes from the same seed on every machine; that one is read from the
running Python's docstrings, and about.json says which. As its rows are akin to the default general text, DIR/python-docs
also holds general.txt, a story by Conan Doyle, for --general. No prompt is in two splits.

`sentiment` needs the source archive of vaderSentiment 3.3.2, whose wheel lacks the ratings. pip fetches it once into
--sources (default: a folder of plopfast's cache); nothing is installed.
"""

import argparse
import itertools
import platform
import random
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import study_made
import study_texts

from plopfast.support import files

GENERAL = Path(__file__).parent / "study_general.txt"
SIZES = {"train": 2000, "valid": 256, "test": 400}
TESTED = {"extraction": 200, "python-docs": 150}  # fewer test rows, as each has many labels
ROWS = sum(SIZES.values())
OURS = "Apache-2.0, as plopfast"
Row = dict[str, str]
Splits = dict[str, list[Row]]


@dataclass(frozen=True)
class Task:
    """How a task is made, and what about.json tells of it. `make` takes the task's random.Random and the sources' folder."""

    kind: str
    source: str
    licence: str
    make: Callable[[random.Random, Path], Splits]


def plain(row: Row) -> str:
    """What two rows must not have in common: the letters and digits of the prompt, or of a plain text."""
    return study_texts.letters(row.get("prompt", row.get("text", "")))


def dealt(rows: Sequence[Row]) -> Splits:
    """The rows dealt to the splits, in their order."""
    if len(rows) < ROWS:
        raise ValueError(f"expected {ROWS} different rows, got {len(rows)}: draw from more")
    left = iter(rows)
    return {split: list(itertools.islice(left, size)) for split, size in SIZES.items()}


def distinct(rows: Iterator[Row], count: int) -> list[Row]:
    """The first `count` rows whose prompts differ by more than case and punctuation."""
    seen: dict[str, Row] = {}
    for row in rows:
        seen.setdefault(plain(row), row)
        if len(seen) == count:
            break
    return list(seen.values())


def made(pairs: Callable[[random.Random], Iterator[study_made.Pair]]) -> Callable[[random.Random, Path], Splits]:
    """A task from a generator of pairs. Rows are shuffled, as kinds with few different rows come first."""

    def make(draw: random.Random, _: Path) -> Splits:
        rows = distinct(({"prompt": prompt, "completion": answer} for prompt, answer in pairs(draw)), ROWS)
        draw.shuffle(rows)
        return dealt(rows)

    return make


def categories(draw: random.Random, _: Path) -> Splits:
    """A share of each split of the demo, in random order."""
    return {split: draw.sample(study_texts.demo_rows(split), size) for split, size in SIZES.items()}


def sentiment(draw: random.Random, sources: Path) -> Splits:
    return dealt(study_texts.sentiment(study_texts.archive(sources), draw, ROWS))


def python_docs(draw: random.Random, _: Path) -> Splits:
    """Whole modules to each split, so that no text is split from its like."""
    splits: Splits = {"test": [], "valid": [], "train": []}
    for rows in study_texts.python_docs(draw):
        split = next((name for name, found in splits.items() if len(found) < SIZES[name]), None)
        if split is None:
            break
        splits[split] += rows
    short = [name for name, found in splits.items() if len(found) < SIZES[name]]
    if short:
        raise ValueError(f"python-docs: too few docstrings in this Python for {', '.join(short)}: use another one")
    for name, found in splits.items():
        del found[SIZES[name] :]
        draw.shuffle(found)
    return splits


TASKS = {
    "categories": Task(
        "choice among 8 labels", "plopfast's demo: glosses of WordNet 3.0", "WordNet 3.0: plopfast/demo/README.md", categories
    ),
    "arithmetic": Task("puzzles with short answers", "made by study_made.py", OURS, made(study_made.arithmetic)),
    "sentiment": Task(
        "choice among 3 labels, rated by people",
        f"film review snippets in {study_texts.ARCHIVE}, sha256 {study_texts.ARCHIVE_SHA256}; Hutto and Gilbert 2014",
        "MIT, copyright (c) 2016 C.J. Hutto",
        sentiment,
    ),
    "extraction": Task("a sentence to JSON", "made by study_made.py", OURS, made(study_made.extraction)),
    "python-docs": Task(
        "plain text of a domain", f"docstrings of the standard library of Python {platform.python_version()}",
        "PSF-2.0, Python Software Foundation", python_docs,
    ),
    "rule": Task("translation by a rule", "made by study_made.py", OURS, made(study_made.rule)),
}  # fmt: skip


def write(name: str, out: Path, seed: int, sources: Path) -> dict[str, Any]:
    """Writes a task's folder; returns what about.json says."""
    task, folder = TASKS[name], out / name
    splits = task.make(random.Random(f"{name} {seed}"), sources)
    splits["test"] = splits["test"][: TESTED.get(name)]
    folder.mkdir(parents=True, exist_ok=True)
    written = [folder / f"{split}.jsonl" for split in splits]
    for path, rows in zip(written, splits.values(), strict=True):
        files.write_json_lines(path, rows)
    about: dict[str, Any] = {
        "task": name, "kind": task.kind, "source": task.source, "licence": task.licence, "seed": seed,
        "rows": {split: len(splits[split]) for split in SIZES},
    }  # fmt: skip
    if name == "python-docs":
        written.append(shutil.copyfile(GENERAL, folder / "general.txt"))
        about["general"] = "The Engineer's Thumb, Arthur Conan Doyle, 1892, its first part; in the public domain"
    about["sha256"] = {path.name: files.sha256(path) for path in written}
    files.write_json(folder / "about.json", about)
    return about


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default=",".join(TASKS), help="tasks, with commas between (default: all)")
    parser.add_argument("--sources", type=Path, default=files.cache_dir() / "study", help="where fetched archives are")
    given = parser.parse_args()
    names = given.only.split(",")
    if unknown := [name for name in names if name not in TASKS]:
        parser.error(f"--only: expected some of {', '.join(TASKS)}, got {unknown[0]!r}")
    for name in names:
        about = write(name, given.out, given.seed, given.sources)
        print(f"{name:<12} {about['rows']}  train {about['sha256']['train.jsonl'][:12]}", flush=True)


if __name__ == "__main__":
    main()
