"""The stages of a run, each reading and writing files of one run folder:

data -> score -> scores.json -> place -> placement.json -> train -> adapter/ -> evaluate -> eval.json -> report.html

and, between place and train, estimate -> estimate.json: what a step costs on this and other placements.
"""

import contextlib
import dataclasses
import random
import shutil
import sys
import time
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from . import distributed, eva, files, machine
from .checkpoint import checkpoints, load_adapter, save_adapter
from .config import FREE, RunConfig, load_settings
from .data import DEMO, Example, batches_of, read_jsonl, read_text, tokenize
from .errors import ConfigError, FileError, ModelError, PlacementError, TrainingError
from .estimate import as_rows, estimate, table
from .evaluate import Metrics, choices_of, evaluate
from .lora import adapters, disabled, inject, merge, unload
from .models import DEFAULT_HUB_ID, context_length, linear_modules, load_model
from .nfn import NFNReport, score
from .placement import BY_K, Placement, place, rule_of
from .scores import ModuleScore
from .train import BATCH_TOKENS, CHECKPOINTS, Trainer, TrainResult

DEMO_SETTINGS = {"max_steps": 60, "batch_tokens": 160}  # 8 rows a step: minutes on 2 cores
SCORE_ROWS = 8  # rows in a batch as it is handed to score(), which batches anew
NO_RESULT = ("config.json", "stages.json")  # a run that failed before its first result leaves these
STAGES = {  # what each stage leaves behind
    "score": "scores.json", "place": "placement.json", "estimate": "estimate.json", "train": "adapter",
    "eval": "eval.json", "report": "report.html", "audit": "audit.json", "trial": "trial.json", "search": "search.json",
}  # fmt: skip
EVA = "eva.safetensors"  # beside scores.json, where init is "eva"
OTHERS = (
    "scores.safetensors",
    EVA,
    "model",
    "metrics.jsonl",
    "training.json",
    CHECKPOINTS,
    "tensorboard",
    "adapter-before-failure",
    "merged",
    "report",
    "trial",
    "search.db",
)


class Run:
    """A run folder, its settings, and the model and data, loaded when a stage first needs them."""

    def __init__(self, folder: Path, config: RunConfig, *, overwrite=False, resume=False, progress=False) -> None:
        self.folder, self.config = folder, resolve(config)
        self.overwrite, self.resume, self.progress = overwrite, resume, progress
        self._rows: dict[str, list[tuple[str, dict[str, Any]]]] = {}
        self._examples: dict[str, list[Example]] = {}
        if config.threads:
            torch.set_num_threads(config.threads)
        if resume:
            self._check_same_settings()

    @cached_property
    def _loaded(self) -> tuple[Any, Any]:
        self.say(f"loading {self.config.model or DEFAULT_HUB_ID} (a GGUF file is converted once, half a minute or so)")
        device, sharded = device_for(self.config.device), self.config.parallel == "fsdp"
        if sharded and distributed.size() == 1:
            raise ConfigError("--parallel fsdp spreads the weights over several processes: start it with torchrun")
        with self.stage("load"), distributed.first_on_each_machine():
            model, tokenizer = load_model(
                self.config.model,
                dtype=dtype_for(self.config.dtype, device, self.config.full),
                device="cpu" if sharded else device,
            )
        if sharded:
            distributed.shard(model, device)
        size = sum(p.numel() for p in model.parameters()) / 1e6
        self.say(f"{model.name_or_path}: {size:.1f}M parameters, {model.dtype}, {device}")
        if self.config.dtype == "auto" and device.type == "cpu" and machine.has_bfloat16():
            self.say("this CPU multiplies bfloat16 faster than float32: try --dtype bfloat16")
        return model, tokenizer

    @property
    def model(self) -> Any:
        return self._loaded[0]

    @property
    def tokenizer(self) -> Any:
        return self._loaded[1]

    @property
    def paths(self) -> dict[str, Path]:
        given = {split: getattr(self.config, split) for split in (*DEMO, "unlabeled")}
        demo = DEMO if given["train"] is None else {}
        return demo | {split: Path(path) for split, path in given.items() if path}

    def rows(self, split: str) -> list[tuple[str, dict[str, Any]]]:
        """A split's rows as read. Without a file of its own, validation is every 20th training row (held out from
        training) and test is validation."""
        if not self._rows:
            self._rows = {name: read_jsonl(path) for name, path in self.paths.items() if name != "unlabeled"}
            if "valid" not in self._rows:
                whole = self._rows["train"]
                self._rows |= {"valid": whole[::20], "train": [row for i, row in enumerate(whole) if i % 20] or whole}
            self._rows.setdefault("test", self._rows["valid"])
        return self._rows[split]

    def examples(self, split: str) -> list[Example]:
        """A split's rows, tokenised; "unlabeled" is the text, if any, in rows as long as max_length or 512 tokens."""
        if split not in self._examples:
            limits = [n for n in (self.config.max_length, context_length(self.model)) if n]
            if split != "unlabeled":
                self._examples[split] = tokenize(self.rows(split), self.tokenizer, min(limits, default=None))
            elif self.config.unlabeled:
                room = min([self.config.max_length or 512, *limits, self.config.batch_tokens or 512])
                self._examples[split] = read_text(self.config.unlabeled, self.tokenizer, room)
            else:
                self._examples[split] = []
        return self._examples[split]

    def sample(self, seed: int | None = None) -> list[Example]:
        """Training rows to score, in random order, as many as the settings say (and with their seed by default); rows of
        messages know their tokens' roles."""
        rows, config = self.rows("train"), self.config
        self.examples("train")  # raises for a row that cannot be used
        rng = random.Random(config.seed if seed is None else seed)
        chosen = rng.sample(rows, min(config.score_prompts, len(rows)))
        return tokenize(chosen, self.tokenizer, roles=True)

    def file(self, stage: str) -> Path:
        return self.folder / ("model" if stage == "train" and self.config.full else STAGES[stage])

    def say(self, text: str) -> None:
        if self.progress:
            print(text, file=sys.stderr, flush=True)

    @contextlib.contextmanager
    def stage(self, name: str) -> Iterator[dict[str, Any]]:
        """Notes a stage's seconds and peak memory in stages.json once it has ended well, and what the stage puts into the
        yielded dict."""
        machine.reset_peak()
        began = time.perf_counter()
        noted: dict[str, Any] = {}
        yield noted
        if not distributed.is_main():
            return
        path = self.folder / "stages.json"
        stages = files.read_json(path, "plopfast") if path.exists() else {}
        stages[name] = {
            "seconds": round(time.perf_counter() - began, 3),
            "peak_mib": round(machine.peak_mib(), 1),
            "command": " ".join(["plopfast", *sys.argv[1:]]),
        } | noted
        files.write_json(path, stages)

    def begin(self, stage: str) -> None:
        """Refuses to overwrite what the stage left behind, unless asked to; then keeps the settings."""
        distributed.on_main(lambda: files.refuse_existing(self.file(stage), self.overwrite))
        self.write_config()

    def write_config(self) -> None:
        data = {s: {"file": str(p), "sha256": files.sha256(p)} for s, p in self.paths.items() if p.is_file()}
        value = {
            "plopfast": "config",
            "settings": dataclasses.asdict(self.config),
            "model": self.config.model or DEFAULT_HUB_ID,
            "device": str(device_for(self.config.device)),
            "data": data,
            "versions": machine.versions(),
            "machine": machine.describe(),
        }
        distributed.on_main(lambda: files.write_json(self.folder / "config.json", value))

    def _check_same_settings(self) -> None:
        kept = load_settings(self.folder / "config.json")
        changed = [
            f"{name} was {kept[name]}, is {value}"
            for name, value in dataclasses.asdict(self.config).items()
            if name not in FREE and name in kept and kept[name] != value
        ]
        if changed:
            raise ConfigError(f"--resume keeps a run's settings, but {'; '.join(changed)}: leave those options out")


def resolve(config: RunConfig) -> RunConfig:
    """The settings with the demo's own filled in and file names made absolute."""
    demo = {} if config.train else DEMO_SETTINGS
    known: dict[str, Any] = {name: value for name, value in demo.items() if getattr(config, name) is None}
    known |= {s: str(Path(value).resolve()) for s in (*DEMO, "unlabeled", "general") if (value := getattr(config, s))}
    return dataclasses.replace(config, **known)


def device_for(name: str) -> torch.device:
    """The device that a --device value names; a rank's own GPU under torchrun. Raises ConfigError where this machine has none such."""
    launch = machine.launch()
    if launch.size > 1 and name in ("auto", "cuda") and torch.cuda.is_available():
        if launch.local_rank >= (count := torch.cuda.device_count()):
            raise ConfigError(f"more processes than GPUs on this machine: --nproc-per-node {count}, or --device cpu")
        return torch.device("cuda", launch.local_rank)
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if launch.size > 1 and ":" in name:
        raise ConfigError(f"device {name!r} would put every rank on one GPU: --device cuda takes one each")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        first = str(error).splitlines()[0]
        raise ConfigError(f"device {name!r} cannot be used on this machine: {first}; leave --device out") from None
    return device


def dtype_for(name: str, device: torch.device, full: bool = False) -> torch.dtype:
    """The dtype that a --dtype value names on `device`. Raises ConfigError for half precision with --full."""
    if full and name not in ("auto", "float32"):
        raise ConfigError(f"--full trains the weights themselves, and small steps vanish in {name}: --dtype float32")
    if name != "auto":
        return getattr(torch, name)
    fast = not full and device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.bfloat16 if fast else torch.float32


def run_score(run: Run) -> NFNReport:
    config = run.config
    masks: dict[str, Any] = {"tokens": config.score_tokens, "skip_first": config.skip_first}
    if config.compat and masks != {"tokens": "all", "skip_first": False}:
        raise ConfigError(
            "--compat official scores every token: leave out --score-tokens and --skip-first, or --compat"
        )
    run.rows("train")  # broken data should stop the run before the model is loaded
    run.begin("score")
    how: dict[str, Any] = {"baseline": config.baseline, "compat": config.compat, "backend": config.backend}
    if config.init == "eva":
        how["eva_rank"] = config.rank
        run.say("every row is scored, as EVA's vectors need them")
    elif config.compat:
        run.say("every row is scored, as the authors' procedure keeps nothing of single prompts")
    elif config.confidence:
        k = config.k
        if config.rule not in BY_K:  # which do not ask how many types there are
            k = min(k, len({info.type for info in linear_modules(run.model)}))
        how |= {"confidence": config.confidence, "k": k, "inverse": config.rule == "plop-inverse"}
    with run.stage("score"):
        batches = batches_of(run.sample(), SCORE_ROWS, **masks)
        report = score(run.model, batches, seed=config.seed, progress=run.progress, **how)
    report.settings |= masks

    def save() -> None:
        if report.eva:
            eva.save(run.folder / EVA, report.eva, report.eva_ratios)
        else:  # an earlier scoring's vectors must not meet these scores
            (run.folder / EVA).unlink(missing_ok=True)
        report.save(run.file("score"))

    distributed.on_main(save)
    run.say(report.table())
    return report


def run_place(run: Run) -> Placement:
    report, config = NFNReport.load(run.file("score")), run.config
    placement = placed(config, report, config.rule, granularity=config.granularity, cap=config.cap or None)
    highest = max(rank for rank, _ in placement.modules.values())
    if config.init == "eva" and highest > config.rank:
        raise PlacementError(
            f"the budget gives ranks up to {highest}, but scoring keeps EVA's vectors for --rank {config.rank}: score "
            f"anew with --rank {highest}, or leave out --init eva"
        )
    run.begin("place")  # only now, as settings that cannot be must not stay in config.json
    with run.stage("place"):
        distributed.on_main(lambda: placement.save(run.file("place")))
    run.say(str(placement))
    return placement


def placed(config: RunConfig, report: NFNReport, rule: str, **how: Any) -> Placement:
    """The placement of a rule, or of types and names with commas, under the settings' budget or rank."""
    how |= {name: getattr(config, name) for name in ("k", "rank", "alpha", "seed", "ranks")}
    return place(report, rule_of(rule), budget=config.budget or None, **how)


def _check_rule(run: Run) -> None:
    """Raises PlacementError for a rule that cannot be placed whatever the scores; those that choose by them can fail only
    on k, which scoring checks itself."""
    if run.config.full or run.config.rule in BY_K:
        return
    unscored = {i.name: ModuleScore(1.0, 0.0, 1, i.type, i.layer, i.n_in, i.n_out) for i in linear_modules(run.model)}
    placed(run.config, NFNReport(unscored, 0, 0, 0.0), run.config.rule)


def run_estimate(run: Run) -> str:
    """What a step costs on the run's placement, on query, key and value, on the MLPs, on all modules, and with all
    weights, for micro-batches of the longest training rows: estimate.json, and its table."""
    own, report, config = Placement.load(run.file("place")), NFNReport.load(run.file("score")), run.config
    if config.parallel == "fsdp" and distributed.size() > 1:
        raise ConfigError("estimate: weights spread over several processes are not modelled; estimate without fsdp")
    run.begin("estimate")
    unload(run.model)
    choices: dict[str, Placement | None] = {own.rule: own}
    for rule in ("attn", "mlp", "all"):
        try:
            choices.setdefault(rule, placed(config, report, rule))
        except PlacementError as error:
            run.say(f"no estimate for {rule}: {error}")
    choices["full"] = None
    examples = run.examples("train") + run.examples("unlabeled")
    total = sum(len(e.tokens) for e in examples)
    longest = max(len(e.tokens) for e in examples)
    batch_tokens = config.batch_tokens or max(BATCH_TOKENS, longest)
    rows, tokens = max(1, batch_tokens // longest), longest
    if config.packing:
        rows, tokens = 1, batch_tokens
    labels = min(tokens - 1, max(1, round(tokens * sum(len(e.tokens) - e.start for e in examples) / total)))
    with run.stage("estimate"):
        found = estimate(run.model, choices, config, rows=rows, row_tokens=tokens, label_tokens=labels)
    value = {
        "plopfast": "estimate", "model": run.model.name_or_path, "batch_tokens": batch_tokens, "rows": rows,
        "row_tokens": tokens, "label_tokens": labels, "accumulate": config.accumulate, "device": str(run.model.device),
        "dtype": str(run.model.dtype).removeprefix("torch."), "choices": as_rows(found),
    }  # fmt: skip
    distributed.on_main(lambda: files.write_json(run.file("estimate"), value))
    return f"a step on {config.accumulate} x {rows} rows of {tokens} tokens, estimated\n{table(found)}"


def _try_estimate(run: Run) -> None:
    """Where no estimate is possible the run says so and goes on: nothing else needs it."""
    try:
        run.say(run_estimate(run))
    except (ConfigError, ModelError) as error:
        run.say(str(error))


def adapt(model: Any, placement: Placement, config: RunConfig, vectors: dict[str, torch.Tensor] | None) -> None:
    """Injects the placement's adapters as the settings say; `vectors` are EVA's, None for another init."""
    start: dict[str, Any] = {"seed": config.seed, "init": config.init, "eva": vectors}
    inject(model, placement, dropout=config.dropout, rslora=config.rslora, backend=config.backend, **start)


def run_train(run: Run) -> TrainResult:
    config = run.config
    placement = None if config.full else Placement.load(run.file("place"))
    vectors = eva.load(run.folder / EVA)[0] if config.init == "eva" else None
    unfinished = checkpoints(run.folder / CHECKPOINTS)
    if unfinished and not (run.resume or run.overwrite):
        raise FileError(
            f"{unfinished[0]}: an unfinished training; pass --resume to go on, or --overwrite to start anew"
        )
    run.begin("train")
    train, valid, unlabeled = (run.examples(split) for split in ("train", "valid", "unlabeled"))
    unload(run.model)
    if placement is None:
        run.model.requires_grad_(True)
    else:
        adapt(run.model, placement, config, vectors)
    trainer = Trainer(run.model, config, train, valid, unlabeled=unlabeled, out=run.folder, progress=run.progress)
    for line in (*trainer.paths(), *(machine.thread_advice() if run.model.device.type == "cpu" else ())):
        run.say(line)
    with run.stage("train"):
        try:
            result = trainer.fit(resume=run.resume and bool(unfinished))
        except TrainingError:
            if trainer.best_step and placement is not None:  # the last good adapters are of use to somebody
                save_adapter(run.model, run.folder / "adapter-before-failure", overwrite=True)
                distributed.barrier()
            raise
    if placement is not None:
        save_adapter(run.model, run.file("train"), overwrite=run.overwrite)

    def save() -> None:
        if placement is None:
            _save_model(run, run.file("train"))
        value = {**dataclasses.asdict(result), "tokens_per_s": result.tokens_per_s, "paths": trainer.paths()}
        files.write_json(run.folder / "training.json", value)
        shutil.rmtree(run.folder / CHECKPOINTS, ignore_errors=True)

    distributed.on_main(save)
    for line in trainer.notes:
        run.say(line)
    run.say(f"{result.tokens_per_s:.0f} tokens/s, {result.padding:.1%} of the positions were padding")
    return result


def _save_model(run: Run, target: Path) -> None:
    """The model as Hugging Face writes it."""
    with files.replacing(target) as scratch:
        run.model.save_pretrained(scratch)
        run.tokenizer.save_pretrained(scratch)


def run_eval(run: Run, adapter: Path | None = None, any_base: bool = False) -> dict[str, Metrics]:
    """Base and tuned on the test rows; the base is the same model with its adapters switched off, or loaded anew where
    all weights were trained."""
    run.rows("test")
    run.begin("eval")
    examples, config = run.examples("test"), run.config
    choices = choices_of(examples, run.tokenizer)

    def measure(model: Any, who: str) -> Metrics:
        return evaluate(model, examples, choices=choices, progress=who if run.progress else "")

    with run.stage("eval"):
        if config.full:
            device = device_for(config.device)
            how: dict[str, Any] = {"dtype": dtype_for(config.dtype, device, True), "device": device}
            base = measure(load_model(config.model, **how)[0], "base")
            tuned = measure(load_model(run.file("train"), **how)[0], "tuned")
        else:
            if not adapters(run.model):
                load_adapter(run.model, adapter or run.file("train"), check_base=not any_base, backend=config.backend)
            with disabled(run.model):
                base = measure(run.model, "base")
            tuned = measure(run.model, "tuned")
    value = {"base": dataclasses.asdict(base), "tuned": dataclasses.asdict(tuned)}
    distributed.on_main(lambda: files.write_json(run.file("eval"), value))
    return {"base": base, "tuned": tuned}


def run_report(run: Run) -> Path:
    if run.config.full:
        raise ConfigError("the report shows scores and placement, which --full has not; its figures are in eval.json")
    from .report import PICTURES, write_report  # needs the extra `report`

    resumed = run.overwrite or run.resume  # a run that was stopped here may have left its pictures
    distributed.on_main(lambda: files.refuse_existing(run.file("report"), run.overwrite))
    distributed.on_main(lambda: files.refuse_existing(run.folder / PICTURES, resumed))
    distributed.on_main(lambda: write_report(run.folder))
    return run.file("report")


def run_merge(run: Run, adapter: Path | None = None, any_base: bool = False) -> Path:
    """The model with its adapter merged in, in the config's dtype, as Hugging Face writes it: the folder's `merged`."""
    if run.config.full:
        raise ConfigError(f"--full has no adapter to merge: the trained model is in {run.file('train')}")
    target = run.folder / "merged"
    files.refuse_existing(target, run.overwrite)
    load_adapter(run.model, adapter or run.file("train"), check_base=not any_base)
    merge(run.model)
    _save_model(run, target)
    return target


def run_all(run: Run) -> str:
    """Every stage in order (with `full`, training and evaluation alone); with `resume`, those whose result lies in the
    folder already are left out."""
    from . import report  # noqa: F401  # a missing extra should stop the run before its work, not after

    def refuse_results() -> None:
        if not run.resume and run.folder.is_dir():
            left = [path for path in run.folder.iterdir() if path.name not in NO_RESULT]
            if left and not run.overwrite:
                files.refuse_existing(run.folder, False)

    def remove_results() -> None:  # those of two runs must not mix
        for path in (run.folder / name for name in (*STAGES.values(), *OTHERS)):
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)

    distributed.on_main(refuse_results)
    run.rows("train")
    _check_rule(run)  # before settings that cannot be are kept
    run.write_config()  # from here on an interrupted run can be resumed
    for split in (*DEMO, "unlabeled"):  # a row that cannot be used should stop the run now, not after the training
        run.examples(split)
    if run.overwrite and not run.resume:
        distributed.on_main(remove_results)
    for stage, do in (
        ("score", run_score), ("place", run_place), ("estimate", _try_estimate), ("train", run_train), ("eval", run_eval),
        ("report", run_report),
    ):  # fmt: skip
        if run.config.full and stage not in ("train", "eval"):
            continue
        if run.resume and distributed.on_main(run.file(stage).exists):
            run.say(f"{stage}: already done")
            continue
        do(run)
    return summary(run.folder) if distributed.is_main() else ""


def summary(folder: Path) -> str:
    """The short table that ends a run."""
    what = "all weights trained"
    if not (folder / "model").is_dir():
        scores, placement = NFNReport.load(folder / STAGES["score"]), Placement.load(folder / STAGES["place"])
        chosen = ", ".join(f"{t} {scores.types[t]:.3f}" for t in placement.types)
        what = f"{chosen} (NFN; {placement.rule}), {placement.parameters:,} parameters"
    metrics = files.read_json(folder / STAGES["eval"], "plopfast eval")
    stages = files.read_json(folder / "stages.json", "plopfast")
    rows = [
        ("adapters", what),
        *(
            (who, f"loss {m['loss']:.4f}, accuracy {m['accuracy']:.4f} ({m['metric']}, {m['examples']} rows)")
            for who, m in metrics.items()
        ),
        ("seconds", ", ".join(f"{name} {stage['seconds']:.1f}" for name, stage in stages.items())),
        ("written", str(folder)),
    ]
    return "\n".join(f"{label:<10}{text}" for label, text in rows)
