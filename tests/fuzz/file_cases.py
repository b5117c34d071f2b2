"""Cases of damaged files: which files there are, which commands read them, and what no command may accept."""

import os
import random
import shutil
from dataclasses import dataclass, field
from pathlib import Path

import odd_files
from calling import Outcome, call
from corpus import BASE, STUDY, copy

WHOLE_NUMBER = ("0", "-1", "4.7", '"4"', "true", "false", "null", "[]", "{}", "1e400", "-1e400", "NaN", "Infinity", "-Infinity", "9" * 5000, '"x"', '""')  # fmt: skip
FINITE = tuple(raw for raw in WHOLE_NUMBER if raw not in ("0", "4.7"))  # neither negative nor infinite
POSITIVE = (*FINITE, "0", "-0.0")
COUNT = tuple(raw for raw in WHOLE_NUMBER if raw != "0")


@dataclass
class Kind:
    """A file of the corpus, and the commands that read it. `needed`: it must be sound. `refused`: the last names of places
    in its JSON (* for any) -> raw texts that are out of range there."""

    file: str
    commands: list[str]
    needed: bool = True
    refused: dict[str, tuple[str, ...]] = field(default_factory=dict)
    weight: int = 2
    tensors: tuple[str, ...] = ()  # changes of tensors that are refused


SETTINGS = {
    "rank": (*COUNT, "0"), "k": (*COUNT, "0"), "alpha": POSITIVE, "lr": POSITIVE, "warmup": FINITE, "dropout": FINITE,
    "max_steps": tuple(raw for raw in WHOLE_NUMBER if raw != "null"), "full": ("0", "null", '"x"', "[]"),
    "rslora": ("0", "null", '"x"', "{}"), "init": ('"x"', "0", "null", "[]"), "seed": COUNT, "keep": WHOLE_NUMBER,
}  # fmt: skip
ADAPTER = [
    "merge --out run --overwrite",
    "eval --out run --overwrite",
    "eval --out new --adapter run/adapter " + " ".join(BASE),
]
REPORT = ["report --out run --overwrite"]
MODEL = ["info --model model", "score --out new " + " ".join(BASE), "data " + " ".join(BASE)]
SCORES = ["place --out run --overwrite", *REPORT]
KINDS = [
    Kind("run/config.json", ["place --out run --overwrite", "eval --out run --overwrite", "run --resume --out run", *REPORT],
         refused=SETTINGS, weight=6),
    Kind("settings.json", ["place --out run --overwrite --config settings.json", "data --model model --config settings.json"],
         refused=SETTINGS, weight=4),
    Kind("settings.yaml", ["place --out run --overwrite --config settings.yaml", "data --model model --config settings.yaml"],
         needed=False),
    Kind("run/scores.json", SCORES, weight=6, refused={
        "scores/*/nfn": FINITE, "scores/*/n_in": WHOLE_NUMBER, "scores/*/n_out": WHOLE_NUMBER, "scores/*/tokens": COUNT, "scores/*/std": FINITE}),
    Kind("run/scores.safetensors", SCORES, weight=3),
    Kind("eva/eva.safetensors", ["train --out eva --max-steps 1 --eval-rows 2 --batch-rows 2"], weight=4),
    Kind("run/placement.json", ["train --out run --overwrite", "estimate --out run --overwrite", *REPORT], weight=6,
         refused={"modules/*/0": WHOLE_NUMBER, "modules/*/1": POSITIVE}),
    Kind("run/adapter/adapter_config.json", ADAPTER, weight=8, refused={
        "r": WHOLE_NUMBER, "lora_alpha": FINITE, "use_rslora": ("4.7", '"x"', "[]", '"4"'), "bias": ('"x"', "4.7"),
        "peft_type": ('"x"', "4.7", "null"), "target_modules": ("4.7", "true", "-1")}),
    Kind("run/adapter/adapter_model.safetensors", ADAPTER, weight=6, tensors=("nan", "inf", "rename")),
    Kind("stopped/checkpoints/step-00000002.safetensors", ["train --resume --out stopped"], needed=False, weight=6),
    Kind("stopped/metrics.jsonl", ["train --resume --out stopped"], needed=False),
    Kind("run/metrics.jsonl", REPORT, needed=False),
    *(Kind(f"run/{name}.json", REPORT, needed=False) for name in ("training", "eval", "data", "estimate", "audit", "trial")),
    Kind("run/training.json", ["run --resume --out run"], needed=False),
    Kind("run/eval.json", ["run --resume --out run"], weight=1),
    Kind("run/history.jsonl", ["place --out run --overwrite", *REPORT], needed=False),
    Kind("run/history.jsonl", ["place --out run --overwrite", "run --resume --out run", *REPORT], needed=False, weight=4),
    Kind("search/search.json", ["search --resume --out search --search-trials 2"], needed=False, weight=1),
    Kind("search/search.db", ["search --resume --out search --search-trials 2"], needed=False, weight=1),
    Kind("trial/trial.json", ["trial --resume --out trial", "report --out trial --overwrite"], needed=False),
    Kind("trial/trial/*.json", ["trial --resume --out trial"], needed=False),
    Kind("trial/trial/*/result.json", ["trial --resume --out trial"], needed=False),
    Kind("trial/trial/*/test.json", ["trial --resume --out trial"], needed=False),
    Kind("tune.json", ["info --model model"], needed=False),
    Kind("model/config.json", MODEL, weight=5),
    Kind("model/generation_config.json", MODEL, needed=False, weight=2),
    Kind("model/tokenizer.json", MODEL[1:], weight=4),
    Kind("model/tokenizer_config.json", MODEL[1:], needed=False, weight=3),
    Kind("model/model.safetensors", MODEL[:2], weight=5, tensors=("rename",)),
    *(Kind(f"rows/{name}", [f"data --model model --train rows/{name}", f"score --out new --model model --train rows/{name}"],
           needed=False, weight=3) for name in ("train.jsonl", "talk.jsonl", "rows.json", "rows.csv", "rows.tsv", "rows.parquet")),
    Kind("rows/text.txt", ["data --unlabeled rows/text.txt " + " ".join(BASE)], needed=False),
    Kind("rows/text.txt", ["trial --out new --general rows/text.txt " + " ".join([*BASE, *STUDY])], needed=False, weight=1),
]  # fmt: skip


def run(seed: int, corpus: Path, folder: Path) -> Outcome:
    """Runs the case `seed` in `folder`, which is made and deleted."""
    rng = random.Random(f"files {seed}")
    kind, path = None, None
    while path is None:
        kind = rng.choices(KINDS, [kind.weight for kind in KINDS])[0]
        found = sorted(corpus.glob(kind.file))
        trials = sorted(corpus.glob(kind.file.replace("/*/", "/*/*/"))) if "*" in kind.file else []
        path = rng.choice(found + trials) if found or trials else None
    argv = rng.choice(kind.commands).split()
    copy(corpus, folder, argv, str(path.relative_to(corpus)))
    os.environ["PLOPFAST_CACHE"] = str(folder)  # tune.json is there
    try:
        here = folder / path.relative_to(corpus)
        swaps = [corpus / one for one in ("run/placement.json", "run/scores.json", "run/eval.json", "rows/train.jsonl", "run/adapter/adapter_model.safetensors", "rows/rows.parquet")]  # fmt: skip
        done = odd_files.change(rng, here, [one for one in swaps if one != path])
        outcome = call(argv, folder, _must_refuse(kind, done, argv[0]))
        outcome.detail = f"{path.relative_to(corpus)}: {done.what}\n{outcome.detail}"
        return outcome
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _must_refuse(kind: Kind, done: odd_files.Change, command: str) -> str:
    """Says why a command may not accept the change; nothing where it may."""
    if kind.needed and done.broken:
        return f"{kind.file}: {done.what.split(' of ')[0] if done.where else 'not a file of its kind'}"
    if kind.needed and done.raw in kind.tensors and command != "info":
        return f"{kind.file}: {done.raw}"
    where = [str(name) for name in done.where]
    for place, raws in kind.refused.items():
        names = place.split("/")
        fits = len(where) >= len(names) and all(a in ("*", b) for a, b in zip(names, where[-len(names) :], strict=True))
        if fits and done.raw in raws:
            return f"{kind.file}: {place} is {done.raw[:30]}"
    return ""
