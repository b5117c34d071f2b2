"""What is damaged: a model folder, rows of every kind, and run folders of every command. Made once, copied for each case."""

import contextlib
import io
import json
import os
import shutil
import signal
from pathlib import Path

import torch
import transformers
from full_folder import trial
from helpers import SMALL
from small_tokenizers import MADE

from plopfast.cli import main
from plopfast.lora import tuning
from plopfast.support.ledger import Ledger
from plopfast.training.trainer import Trainer

ROWS = {"train": 16, "valid": 4, "test": 4}
SPLITS = [text for split in ROWS for text in (f"--{split}", f"rows/{split}.jsonl")]
BASE = ["--model", "model", *SPLITS]
QUICK = ["--score-prompts", "6", "--rank", "2", "--max-steps", "2", "--batch-rows", "2", "--eval-rows", "2", "--eval-every", "1"]  # fmt: skip
STUDY = ["--arms", "plop,full", "--lrs", "1e-3", "--rank", "4", "--score-prompts", "6", "--max-steps", "1"]


def make(folder: Path) -> Path:
    """Makes everything in `folder`, which commands then take relative to it."""
    folder.mkdir(parents=True, exist_ok=True)
    model(folder / "model")
    rows(folder / "rows")
    here = Path.cwd()
    os.chdir(folder)
    try:
        _runs()
    finally:
        os.chdir(here)
    return folder


def copy(corpus: Path, folder: Path, argv: list[str], *more: str) -> None:
    """Copies what a command's arguments name: the run folders among them, and `more`; always model, rows and settings."""
    named = {
        word.split("/")[0] for word in (*argv, *more, "model", "rows", "settings.json", "settings.yaml", "tune.json")
    }
    folder.mkdir(parents=True)
    for path in corpus.iterdir():
        if path.is_dir() and path.name in named:
            shutil.copytree(path, folder / path.name, symlinks=True)
        elif path.name in named:
            shutil.copyfile(path, folder / path.name)


def model(folder: Path) -> None:
    """A Llama of two small layers, and its tokenizer."""
    torch.manual_seed(0)
    small = SMALL | {"vocab_size": 420, "num_hidden_layers": 2, "hidden_size": 16, "intermediate_size": 24}
    made = transformers.AutoModelForCausalLM.from_config(transformers.LlamaConfig(**small))
    made.save_pretrained(folder)
    MADE["bytes"]().save_pretrained(folder)


def rows(folder: Path) -> None:
    """The same rows in each format, and rows of messages."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    folder.mkdir()
    for split, count in ROWS.items():
        made = [{"prompt": f"{split} question {i} is", "completion": f" answer {i % 3}"} for i in range(count)]
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in made))
        if split == "train":
            (folder / "rows.json").write_text(json.dumps(made))
            for name, mark in ("rows.csv", ","), ("rows.tsv", "\t"):
                lines = [mark.join(made[0]), *(mark.join(f'"{text}"' for text in row.values()) for row in made)]
                (folder / name).write_text("\n".join(lines) + "\n")
            pq.write_table(pa.Table.from_pylist(made), folder / "rows.parquet")
    talk = [[{"role": who, "content": f"{who} says {i}"} for who in ("system", "user", "assistant")] for i in range(8)]
    (folder / "talk.jsonl").write_text("".join(json.dumps({"messages": turns}) + "\n" for turns in talk))
    (folder / "text.txt").write_text("a plain text of the domain\n\n" * 20)


def plopfast(*argv: str) -> int:
    """Runs a command in silence; returns its exit code."""
    said = io.StringIO()
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(said):
        code = main.main(list(argv))
    assert code in (0, 143), said.getvalue()
    return code


def _runs() -> None:
    """run: every stage and study; merged: it, and merged; placed, eva: scored (with EVA) and placed; stopped: a training that a signal stopped; search, trial."""
    assert plopfast("run", *BASE, *QUICK, "--out", "run") == 0
    assert plopfast("audit", *BASE, "--score-prompts", "6", "--out", "run") == 0
    Ledger(Path("run")).claim({"trial.json": ()}, "claim")
    Path("run/trial.json").write_text(json.dumps(trial({}, {})))
    for name, init in ("eva", "eva"), ("placed", "kaiming"):
        assert plopfast("score", *BASE, *QUICK[:4], "--init", init, "--out", name) == 0
        assert plopfast("place", "--out", name) == 0
    shutil.copytree("placed", "stopped")
    shutil.copytree("run", "merged")
    assert plopfast("merge", "--out", "merged") == 0
    plain = Trainer._train_step

    def stop(self, groups):
        plain(self, groups)
        if self.step == 2:
            os.kill(os.getpid(), signal.SIGTERM)

    Trainer._train_step = stop
    try:
        code = plopfast("train", *QUICK[6:8], "--max-steps", "4", "--save-every", "1", "--out", "stopped")
        assert code == 143
    finally:
        Trainer._train_step = plain
    assert plopfast("search", *BASE, "--rank", "2", "--search-trials", "2", "--max-steps", "1", "--out", "search") == 0
    assert plopfast("trial", *BASE, *STUDY, "--out", "trial") == 0
    Path("settings.json").write_text(
        json.dumps({"rank": 2, "k": 2, "alpha": 4.0, "lr": 1e-3, "train": "rows/train.jsonl"})
    )
    Path("settings.yaml").write_text("rank: 2\nk: 2\nalpha: 4\nlr: 1e-3  # of AdamW\ntrain: [rows/train.jsonl]\n")
    tiles = {"bm": 64, "bn": 64, "bk": 32, "warps": 4, "stages": 2, "group": 8, "descriptor": False}
    names = {field.name for field in tuning.fields(tuning.Tiles)}
    tiles = {name: tiles.get(name, 1) for name in names} | {"descriptor": False}
    table = {"plopfast": "tuning", "version": tuning.version(), "rows": {"a card float32 1 2 3 4": {"strategy": "fused", "tiles": tiles, "measured": {}, "date": "2025-01-01"}}}  # fmt: skip
    Path("tune.json").write_text(json.dumps(table))
