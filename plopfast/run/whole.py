"""A whole run: every stage in order."""

from collections.abc import Callable
from functools import partial

from ..placing.by_settings import check_rule
from ..report import kinds
from ..support import ranks
from .costs import fit_run, try_estimate
from .evaluating import check, lost, run_eval
from .run import Run
from .stages import run_data, run_place, run_report, run_score, run_train
from .summary import summary

ORDER: dict[str, Callable[[Run], object]] = {  # data comes first, and reads every split: a row that cannot be used stops the run there
    "data": run_data, "score": run_score, "place": run_place, "estimate": try_estimate, "train": run_train, "eval": run_eval,
    "report": run_report,
}  # fmt: skip


def run_all(run: Run) -> tuple[str, bool]:
    """Runs every stage in order, and returns the text of `summary`, and whether every answer of --must-keep was kept.

    With `full` only training and evaluation take place. With `resume`, stages whose result exists are left out.
    """
    from ..report import page  # noqa: F401  # a missing extra should stop the run before its work, not after

    run.ready("run")
    run.rows("train")
    if not (run.resume and ranks.on_main(partial(run.at.is_done, "data"))):
        run.ready("run", *run.splits, "unlabeled")
    check(run)
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
    kept = not (run.config.must_keep and lost(kinds.read(run.file("eval"), "plopfast eval")))
    return summary(run) if ranks.is_main() else "", kept
