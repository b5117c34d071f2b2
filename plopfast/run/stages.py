"""The stages of a run, each reading and writing files of one run folder:

data -> score -> scores.json -> place -> placement.json -> train -> adapter/ -> evaluate -> eval.json -> report.html

and, between place and train, estimate -> estimate.json: what a step costs on this and other placements.
"""

import dataclasses
import shutil
from pathlib import Path
from typing import Any

import torch

from ..data.batches import batches_of
from ..data.rows import DEMO
from ..lora.layer import adapters, disabled, inject, merge, unload
from ..lora.peft_files import load_adapter, save_adapter
from ..lora.placement import Placement
from ..models.linears import linear_modules
from ..models.loading import load_model
from ..placing.place import place
from ..placing.rules import FULL, RULES, nfn_rule, rule_of
from ..report.tables import estimate_table
from ..scoring import eva
from ..scoring.nfn import score
from ..scoring.report import ModuleScore, NFNReport
from ..support import files, ranks, threads
from ..support.config import RunConfig
from ..support.devices import device_for, dtype_for
from ..support.errors import ConfigError, FileError, ModelError, PlacementError, TrainingError
from ..support.tables import Column, Table
from ..training.estimate import as_rows, estimate
from ..training.evaluate import Metrics, choices_of, evaluate
from ..training.plan import batch_tokens_for
from ..training.state import CHECKPOINTS, checkpoints
from ..training.trainer import Trainer, TrainResult
from .folder import EVA, NO_RESULT, OTHERS, SCORE_ROWS, STAGES, Run


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
        k, rule, by_nfn = config.k, RULES.get(config.rule), nfn_rule(config.rule)
        if not (rule and rule.needs_k):  # then k is not checked against the number of types
            k = min(k, len({info.type for info in linear_modules(run.model)}))
        how |= {"confidence": config.confidence, "k": k, "inverse": bool(by_nfn and by_nfn.highest)}
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

    ranks.on_main(save)
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
        ranks.on_main(lambda: placement.save(run.file("place")))
    run.say(str(placement))
    return placement


def placed(config: RunConfig, report: NFNReport, rule: str, **how: Any) -> Placement:
    """The placement of a rule, or of types and names with commas, under the settings' budget or rank."""
    how |= {name: getattr(config, name) for name in ("k", "rank", "alpha", "seed", "ranks")}
    return place(report, rule_of(rule), budget=config.budget or None, **how)


def _check_rule(run: Run) -> None:
    """Raises PlacementError for a rule that cannot be placed whatever the scores are. A rule that chooses k types by
    them can fail only on k, which scoring checks itself."""
    rule = RULES.get(run.config.rule)
    if run.config.full or (rule and rule.needs_k and rule.from_report):
        return
    unscored = {i.name: ModuleScore(1.0, 0.0, 1, i.type, i.layer, i.n_in, i.n_out) for i in linear_modules(run.model)}
    placed(run.config, NFNReport(unscored, 0, 0, 0.0), run.config.rule)


def run_estimate(run: Run) -> str:
    """What a step costs on the run's placement, on query, key and value, on the MLPs, on all modules, and with all
    weights, for micro-batches of the longest training rows: estimate.json, and its table."""
    own, report, config = Placement.load(run.file("place")), NFNReport.load(run.file("score")), run.config
    if config.parallel == "fsdp" and ranks.size() > 1:
        raise ConfigError("estimate: weights spread over several processes are not modelled; estimate without fsdp")
    run.begin("estimate")
    unload(run.model)
    choices: dict[str, Placement | None] = {own.rule: own}
    for rule in [name for name, entry in RULES.items() if not entry.needs_k]:  # those that need no scores
        try:
            choices.setdefault(rule, placed(config, report, rule))
        except PlacementError as error:
            run.say(f"no estimate for {rule}: {error}")
    choices[FULL] = None
    examples = run.examples("train") + run.examples("unlabeled")
    total = sum(len(e.tokens) for e in examples)
    longest = max(len(e.tokens) for e in examples)
    batch_tokens = batch_tokens_for(config, longest)
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
    ranks.on_main(lambda: files.write_json(run.file("estimate"), value))
    return str(estimate_table(value))


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
    for line in (*trainer.paths(), *(threads.thread_advice() if run.model.device.type == "cpu" else ())):
        run.say(line)
    with run.stage("train"):
        try:
            result = trainer.fit(resume=run.resume and bool(unfinished))
        except TrainingError:
            if trainer.best_step and placement is not None:  # the last good adapters are of use to somebody
                save_adapter(run.model, run.folder / "adapter-before-failure", overwrite=True)
                ranks.barrier()
            raise
    if placement is not None:
        save_adapter(run.model, run.file("train"), overwrite=run.overwrite)

    def save() -> None:
        if placement is None:
            _save_model(run, run.file("train"))
        value = {**dataclasses.asdict(result), "tokens_per_s": result.tokens_per_s, "paths": trainer.paths()}
        files.write_json(run.folder / "training.json", value)
        shutil.rmtree(run.folder / CHECKPOINTS, ignore_errors=True)

    ranks.on_main(save)
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
    ranks.on_main(lambda: files.write_json(run.file("eval"), value))
    return {"base": base, "tuned": tuned}


def run_report(run: Run) -> Path:
    if run.config.full:
        raise ConfigError("the report shows scores and placement, which --full has not; its figures are in eval.json")
    from ..report.page import PICTURES, write_report

    resumed = run.overwrite or run.resume  # a run that was stopped here may have left its pictures
    ranks.on_main(lambda: files.refuse_existing(run.file("report"), run.overwrite))
    ranks.on_main(lambda: files.refuse_existing(run.folder / PICTURES, resumed))
    ranks.on_main(lambda: write_report(run.folder))
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
    from ..report import page  # noqa: F401  # a missing extra should stop the run before its work, not after

    def refuse_results() -> None:
        if not run.resume and run.folder.is_dir():
            left = [path for path in run.folder.iterdir() if path.name not in NO_RESULT]
            if left and not run.overwrite:
                files.refuse_existing(run.folder, False)

    def remove_results() -> None:  # those of two runs must not mix
        for path in (run.folder / name for name in (*STAGES.values(), *OTHERS)):
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)

    ranks.on_main(refuse_results)
    run.rows("train")
    _check_rule(run)  # before settings that cannot be are kept
    run.write_config()  # from here on an interrupted run can be resumed
    for split in (*DEMO, "unlabeled"):  # a row that cannot be used should stop the run now, not after the training
        run.examples(split)
    if run.overwrite and not run.resume:
        ranks.on_main(remove_results)
    for stage, do in (
        ("score", run_score), ("place", run_place), ("estimate", _try_estimate), ("train", run_train), ("eval", run_eval),
        ("report", run_report),
    ):  # fmt: skip
        if run.config.full and stage not in ("train", "eval"):
            continue
        if run.resume and ranks.on_main(run.file(stage).exists):
            run.say(f"{stage}: already done")
            continue
        do(run)
    return summary(run.folder) if ranks.is_main() else ""


def summary(folder: Path) -> str:
    """Return the short table that ends a run."""
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
    return str(Table("", [Column(""), Column("")], rows))
