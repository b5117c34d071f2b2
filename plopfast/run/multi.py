"""Several trainings on one base: multi.json, and a run folder for each job in jobs/NAME, as if it had been run alone."""

import contextlib
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from ..lora.injection import unload
from ..lora.peft_files import save_adapter
from ..lora.placement import Placement
from ..placing.by_settings import check_rule
from ..report import kinds
from ..scoring import eva
from ..support import files, machine, ranks
from ..support.config import RunConfig
from ..support.errors import ConfigError, DataError, PlacementError, TrainingError
from ..support.tables import Column, Table
from ..training.job import Job, TrainResult
from ..training.state import CHECKPOINTS, checkpoints
from ..training.together import Together
from .adapter_folder import keep_adapter
from .apply import job_for
from .evaluating import run_eval
from .folder import EVA
from .run import Run
from .stages import about_validation, keep_training, run_data, run_place, run_report, run_score

MADE_BY = "plopfast multi"
JOBS = "jobs"  # their folder
BEFORE: dict[str, Callable[[Run], object]] = {"data": run_data, "score": run_score, "place": run_place}
AFTER: dict[str, Callable[[Run], object]] = {"eval": run_eval, "report": run_report}


def run_multi(
    run: Run, jobs_file: Path, configs: Mapping[str, RunConfig], at_once: int | None = None
) -> tuple[str, bool]:
    """Scores, places, trains (`at_once` jobs at a time, or all), evaluates and reports every job of the file. Returns a table,
    and whether all of them trained to their end: a job that fails in training ends alone.

    `run` has the settings of all jobs, `configs` those of each, as `read_jobs` gives them. With `resume`, what is done is left
    out, and jobs go on from their checkpoints. Raises ConfigError for other jobs or settings than these began with, and what the
    stages raise before anything is trained.
    """
    from ..report import page  # noqa: F401  # a missing extra should stop the jobs before the work, not after

    if run.resume and run.at.is_done("multi"):
        value = kinds.read(run.file("multi"), MADE_BY)
        if value["jobs"].keys() != configs.keys():
            raise ConfigError(
                f"--resume: {run.file('multi')} is of the jobs {', '.join(value['jobs'])}, and {jobs_file} has {', '.join(configs)}: give "
                "these another --out, or --overwrite"
            )
        for name, config in configs.items():
            _opened(run, name, config)  # raises for other settings than the job's
        run.say("multi: already done")
        return _table(value)
    run.ready("multi")
    made = {name: _opened(run, name, config) for name, config in configs.items()}
    for name, one in made.items():
        if not (one.resume and ranks.on_main(partial(one.at.is_done, "data"))):
            with _of_job(name):  # a row that cannot be used stops all before anything is written
                one.ready("data", *one.splits, "unlabeled")
                check_rule(one.config.placing, run.shapes)
    with contextlib.ExitStack() as stack, run.stage("multi", inputs=[jobs_file]):
        for one in made.values():
            stack.callback(one.at.close)
        _each(made, "data", run_data)
        for stage in ("score", "place"):
            _each(made, stage, BEFORE[stage])
        failed = _train(run, made, at_once)
        good = {name: one for name, one in made.items() if name not in failed}
        for one in good.values():
            for stage, do in AFTER.items():
                _unless_done(one, stage, do)
            unload(run.model)
        value = {"plopfast": "multi", "command": machine.command(), "jobs": {
            name: {"folder": f"{JOBS}/{name}", "error": failed[name]} if name in failed else _facts(one) for name, one in made.items()
        }}  # fmt: skip
        ranks.on_main(lambda: files.write_json(run.file("multi"), value))
    return _table(value)


def _opened(run: Run, name: str, config: RunConfig) -> Run:
    """The run of a job. It goes on with what it has, where the whole does."""
    folder = run.folder / JOBS / name
    one = Run(
        folder,
        config,
        overwrite=run.at.overwrite,
        resume=run.resume and folder.exists(),
        progress=run.progress,
        like=run,
    )
    ranks.on_main(one.at.check)
    return one


def _each(made: dict[str, Run], stage: str, do: Callable[[Run], object]) -> None:
    for name, one in made.items():
        one.say(f"{name}: {stage}")
        with _of_job(name):
            _unless_done(one, stage, do)


@contextlib.contextmanager
def _of_job(name: str) -> Iterator[None]:
    """Says of which job an error is."""
    try:
        yield
    except (ConfigError, DataError, PlacementError) as error:
        raise type(error)(f"job {name!r}: {error}") from error


def _unless_done(one: Run, stage: str, do: Callable[[Run], object]) -> None:
    if not (one.resume and ranks.on_main(partial(one.at.is_done, stage))):
        do(one)


def _train(run: Run, made: dict[str, Run], at_once: int | None) -> dict[str, str]:
    """Trains the jobs that are not trained yet: adapter/ and training.json of each. Returns the errors of those that failed."""
    left = {
        name: one for name, one in made.items() if not (one.resume and ranks.on_main(partial(one.at.is_done, "train")))
    }
    if not left:
        return {}
    unload(run.model)
    jobs, opened, failed = [], {}, {}
    resumed = {name for name, one in left.items() if one.resume and checkpoints(one.folder / CHECKPOINTS)}
    with contextlib.ExitStack() as stack:
        stack.callback(unload, run.model)
        for name, one in left.items():
            with _of_job(name):
                jobs.append(_job(one, name))
            opened[name] = contextlib.ExitStack()
            opened[name].enter_context(one.stage("train"))
            stack.push(opened[name])  # an exception ends all of them
            for line in (str(jobs[-1].plan), about_validation(one, jobs[-1])):
                one.say(f"{name}: {line}")
        by_name = {str(job.name): job for job in jobs}

        def ended(name: str, result: TrainResult | TrainingError) -> None:
            one, job = left[name], by_name[name]
            if isinstance(result, TrainingError):
                failed[name] = str(result)
                if job.state.best_step:  # the last good adapters may be of use
                    save_adapter(run.model, one.folder / "adapter-before-failure", overwrite=True, name=name)
                    ranks.barrier()
                with contextlib.suppress(TrainingError):
                    opened[name].__exit__(TrainingError, result, result.__traceback__)
                run.say(f"{name}: {result}")
                return
            keep_adapter(one, result, name)
            keep_training(one, job, result, together.paths())
            opened[name].close()
            ranks.on_main(lambda: one.at.ledger.clear(CHECKPOINTS))
            run.say(f"{name}: {result.steps} steps ({result.stopped}), kept step {result.best_step}")

        together = Together(run.model, jobs, at_once=at_once, progress=run.progress, on_end=ended)
        for line in together.paths():
            run.say(line)
        together.fit(resume=resumed)
        for line in together.notes:
            run.say(line)
    return failed


def _job(one: Run, name: str) -> Job:
    """Puts a job's adapters in, and makes its training."""
    vectors = eva.load(one.folder / EVA)[0] if one.config.init == "eva" else None
    return job_for(one, Placement.load(one.file("place")), vectors, name, out=one.folder)


def _facts(one: Run) -> dict[str, Any]:
    """What multi.json holds of a job that was trained."""
    placement = Placement.load(one.file("place"))
    training = kinds.read(one.folder / "training.json", "plopfast train")
    tested = kinds.read(one.file("eval"), "plopfast eval")
    return {
        "folder": f"{JOBS}/{one.folder.name}", "types": placement.types, "parameters": placement.parameters, "lr": one.config.lr,
        "before": tested["base"], "after": tested["tuned"],
        **{key: training.get(key) for key in ("steps", "best_step", "valid_loss", "tokens", "seconds")},
    }  # fmt: skip


def _table(value: dict[str, Any]) -> tuple[str, bool]:
    rows = []
    for name, one in value["jobs"].items():
        said = one.get("error") or f"{', '.join(one['types'])}; {one['parameters']:,} parameters"
        tested = [one[key]["accuracy"] if key in one else None for key in ("before", "after")]
        rows.append((name, one.get("steps"), one.get("valid_loss"), *tested, one["folder"], said))
    columns = [
        Column("job"), Column("steps", "d"), Column("valid loss", ".3f"), Column("before", ".3f"), Column("after", ".3f"),
        Column("folder"), Column("adapters"),
    ]  # fmt: skip
    return str(Table("", columns, rows)), not any("error" in one for one in value["jobs"].values())
