"""The stages of a run. Each reads and writes files of one run folder, and can be run alone:

data -> score -> scores.json -> place -> placement.json -> train -> adapter/ -> evaluate -> eval.json -> report.html
"""

import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path

from ..data.describe import DataFacts
from ..data.example import Example
from ..lora.merging import merge_checked
from ..lora.peft_files import check_files, load_adapter, save_adapter
from ..lora.placement import Placement
from ..lora.replaced import replaced_values
from ..models.linears import words_of_codes
from ..models.loading import codes_of
from ..models.running import device_of
from ..models.saved import kept_kind, save_model
from ..models.weights import check_finite
from ..placing.by_settings import placed, scored, why_every_row
from ..scoring import eva
from ..scoring.report import NFNReport
from ..support import files, ranks, threads
from ..support.errors import AdapterError, ConfigError, FileError, PlacementError, TrainingError
from ..support.progress import shows_color
from ..training.job import Job, TrainResult
from ..training.state import CHECKPOINTS, checkpoints
from .adapter_folder import keep_adapter
from .apply import trainer_for
from .costs import fit_run
from .folder import EVA
from .merged import Merged
from .run import Run
from .splits import sources_of


def run_data(run: Run) -> DataFacts:
    """Describes the rows, before anything is scored or trained: data.json."""
    run.ready("data")
    facts = run.described()
    with run.stage("data"):
        run.say(f"{facts.table()}\n{facts.shown_row(shows_color(sys.stderr))}")
        ranks.on_main(lambda: files.write_json(run.file("data"), {"plopfast": "data", **facts.as_dict()}))
    return facts


def run_score(run: Run, examples: Sequence[Example] | None = None) -> NFNReport:
    """Scores the training rows, or `examples`: scores.json, and eva.safetensors where adapters begin with EVA's vectors."""
    run.ready("score")
    given = run.sample() if examples is None else examples  # broken data should stop the run before the model is loaded
    settings = run.config.scoring
    if why := why_every_row(settings):
        run.say(f"every row is scored, as {why}")
    with run.stage("score"):
        report = scored(run.model, given, settings, run.progress)

        def save() -> None:
            if report.eva:
                eva.save(run.folder / EVA, report.eva, report.eva_ratios)
            else:  # the vectors of an earlier scoring must not meet these scores
                run.at.ledger.remove([EVA])
            report.save(run.file("score"))

        ranks.on_main(save)
    run.say(report.table())
    return report


def run_place(run: Run) -> Placement:
    """Places adapters by the scores: placement.json."""
    ranks.on_main(lambda: run.at.look("place"))
    settings = run.config.placing
    placement = placed(NFNReport.load(run.file("score")), settings)
    highest = max(rank for rank, _ in placement.modules.values())
    if settings.init == "eva" and highest > settings.rank:
        raise PlacementError(
            f"the budget gives ranks up to {highest}, but scoring keeps EVA's vectors for --rank {settings.rank}: score "
            f"anew with --rank {highest}, or leave out --init eva"
        )
    with run.stage("place"):  # not before: invalid settings are not kept
        ranks.on_main(lambda: placement.save(run.file("place")))
    run.say(str(placement))
    return placement


def run_train(run: Run) -> TrainResult:
    """Trains adapters on the placement (adapter/), or with --full all weights (model/)."""
    ranks.on_main(lambda: run.at.look("train"))
    placement = None if run.config.full else Placement.load(run.file("place"))
    vectors = eva.load(run.folder / EVA)[0] if run.config.init == "eva" else None
    run.ready("train", "train", "valid", "unlabeled")
    fit_run(run, placement)
    config = run.config
    with run.stage("train"):
        unfinished = checkpoints(run.folder / CHECKPOINTS)
        trainer = trainer_for(run, placement, vectors, out=run.folder)
        advice = threads.thread_advice() if device_of(run.model).type == "cpu" else []
        for line in (str(trainer.plan), about_validation(run, trainer), *trainer.paths(), *advice):
            run.say(line)
        if placement and placement.model not in ("", name := run.model.name_or_path):
            run.say(f"the placement was made for {placement.model}, whose modules are alike; it is trained on {name}")
        try:
            result = trainer.fit(resume=run.resume and bool(unfinished))
        except TrainingError:
            if trainer.state.best_step and placement is not None:  # the last good adapters may be of use
                save_adapter(run.model, run.folder / "adapter-before-failure", overwrite=True)
                ranks.barrier()
            raise
        if config.full:
            ranks.on_main(lambda: _save_model(run, run.file("train")))
        else:
            keep_adapter(run, result)
        keep_training(run, trainer, result, trainer.paths())
    ranks.on_main(lambda: run.at.ledger.clear(CHECKPOINTS))
    for line in trainer.notes:
        run.say(line)
    run.say(f"{result.tokens_per_s:.0f} tokens/s, {result.padding:.1%} of the positions were padding")
    return result


def keep_training(run: Run, job: Job, result: TrainResult, paths: list[str]) -> None:
    """Writes how a training ended: training.json."""
    value = {
        **dataclasses.asdict(result), "tokens_per_s": result.tokens_per_s, "plan": job.plan.facts(),
        "validation": about_validation(run, job), "paths": paths, **_of_the_steps(job),
    }  # fmt: skip
    ranks.on_main(lambda: files.write_json(run.folder / "training.json", value))


def _of_the_steps(job: Job) -> dict[str, int]:
    """How many rows the steps took, one that comes again counted again, and how many steps' gradients were clipped."""
    steps = [record for record in job.history if "grad_norm" in record]
    clipped = sum(bool(job.config.clip) and (record["grad_norm"] or 0) > job.config.clip for record in steps)
    return {"rows_seen": sum(record.get("rows", 0) for record in steps), "clipped": clipped}


def about_validation(run: Run, trainer: Job) -> str:
    """Says where the validation rows come from, and how often they are looked at."""
    where = "" if "valid" in sources_of(run.config) else " held out from the training file"
    if where and run.rows("valid")[0] is run.rows("train")[0]:
        where = " from the training file, which has no other row"
    seen, whole, every = len(trainer.valid), len(run.examples("valid")), trainer.plan.eval_every
    rows = f"{seen} {f'of {whole:,} ' if seen < whole else ''}validation row{'s' * (whole != 1)}"
    return f"{rows}{where}, looked at every {f'{every} steps' if every > 1 else 'step'}"


def _save_model(run: Run, target: Path) -> None:
    """Writes the model as Hugging Face does. Raises ModelError for weights that are not finite."""
    check_finite(run.model, f"{target}: not written")
    with run.at.ledger.replacing(target.name) as scratch:
        save_model(run.model, scratch)
        run.tokenizer.save_pretrained(scratch)


def check_trained(run: Run, stage: str, adapter: Path | None) -> None:
    """Raises what is wrong with the results that a stage is to write, and with the adapter that it is to take, by default the run's
    own, or with all weights that were trained."""
    ranks.on_main(lambda: run.at.look(stage))
    made = run.file("train")
    if adapter is None and not made.exists():
        raise AdapterError(
            f"{made}: no such folder; it is written by plopfast train. To take another adapter: --adapter DIR"
        )
    if adapter or not run.config.full:
        check_files(adapter or made)


def adapt(run: Run, adapter: Path | None, any_base: bool, backend: str = "auto") -> None:
    """Puts the adapter of a folder, by default the run's own, into the run's model; says what it replaces whole."""
    load_adapter(run.model, adapter or run.file("train"), check_base=not any_base, backend=backend)
    if whole := replaced_values(run.model):
        run.say(
            f"the adapter replaces whole: {', '.join(list(whole)[:4])}{f' and {len(whole) - 4} more' * (len(whole) > 4)}"
        )


def run_report(run: Run) -> Path:
    """Writes what the folder holds as one page: report.html, and its pictures in report/."""
    if run.config.full:
        raise ConfigError("no report for --full: it has no scores and no placement. Its figures are in eval.json")
    ranks.on_main(lambda: run.at.look("report"))
    if not run.at.holds_results():
        raise FileError(
            f"{run.folder}: no results in it, so there is nothing to show; plopfast run or score writes them"
        )
    from ..report.page import write_report

    with run.stage("report"):
        ranks.on_main(lambda: write_report(run.folder))
    return run.file("report")


def run_merge(run: Run, adapter: Path | None = None, any_base: bool = False, requantize: bool = False) -> Merged:
    """Writes the model with its adapter merged in, as Hugging Face does: merged/. Weights that are codes become dense, or
    with `requantize` codes again. Other arguments as in `run_eval`."""
    if run.config.full:
        raise ConfigError(f"--full has no adapter to merge: the trained model is in {run.file('train')}")
    check_trained(run, "merge", adapter)
    run.ready("merge")
    if requantize and not codes_of(run.config.model, run.config.quantize):
        raise ConfigError("--requantize is for a quantised model, and this one's weights are dense: leave it out")
    run.config = dataclasses.replace(run.config, stream=False, resident_share=0.0)  # the sum needs memory of its own
    target = run.file("merge")
    with run.stage("merge", inputs=[adapter] if adapter else []):
        adapt(run, adapter, any_base)
        codes = words_of_codes(run.model)
        drift = merge_checked(run.model, into=("quantized" if requantize else "dense") if codes else None)
        _save_model(run, target)
    return Merged(target, drift, codes, kept_kind(run.model) if requantize else None)
