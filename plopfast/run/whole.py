"""A whole run: every stage in order, and the short table that ends it."""

from collections.abc import Callable
from functools import partial

from ..lora.placement import Placement
from ..placing.by_settings import check_rule
from ..report import kinds
from ..scoring.report import NFNReport
from ..support import ranks
from ..support.tables import Column, Table
from .costs import fit_run, try_estimate
from .run import Run
from .stages import eval_lines, run_data, run_eval, run_place, run_report, run_score, run_train

ORDER: dict[str, Callable[[Run], object]] = {  # data comes first, and reads every split: a row that cannot be used stops the run there
    "data": run_data, "score": run_score, "place": run_place, "estimate": try_estimate, "train": run_train, "eval": run_eval,
    "report": run_report,
}  # fmt: skip


def run_all(run: Run) -> str:
    """Runs every stage in order, and returns the table of `summary`.

    With `full` only training and evaluation take place. With `resume`, stages whose result exists are left out.
    """
    from ..report import page  # noqa: F401  # a missing extra should stop the run before its work, not after

    run.ready("run")
    run.rows("train")
    if not (run.resume and ranks.on_main(partial(run.at.is_done, "data"))):
        run.ready("run", *run.splits, "unlabeled")
    fit_run(run)
    if not run.config.full:
        check_rule(run.config.placing, run.shapes)
    if not run.resume:
        ranks.on_main(run.at.refuse_results)
    with run.stage("run"):  # from here on an interrupted run can be resumed
        for stage, do in ORDER.items():
            if run.config.full and stage not in ("data", "train", "eval"):
                continue
            if run.resume and ranks.on_main(partial(run.at.is_done, stage)):
                run.say(f"{stage}: already done")
            else:
                do(run)
    return summary(run) if ranks.is_main() else ""


def summary(run: Run) -> str:
    """The result of a run in a few lines, from the files of its folder."""
    what = "all weights trained"
    if not run.config.full:
        scores, placement = NFNReport.load(run.file("score")), Placement.load(run.file("place"))
        chosen = ", ".join(f"{t} {scores.types[t]:.3f}" for t in placement.types if t in scores.types)
        what = f"{chosen} (NFN; {placement.rule}), {placement.parameters:,} parameters"
    metrics = kinds.read(run.file("eval"), "plopfast eval")
    stages = {name: stage for name, stage in run.at.ledger.done().items() if name not in ("run", "report")}
    rows = [("adapters", what), *eval_lines(metrics)]
    rows.append(("seconds", ", ".join(f"{name} {stage['seconds']:.1f}" for name, stage in stages.items())))
    rows.append(("written", str(run.folder)))
    return str(Table("", [Column(""), Column("")], rows))
