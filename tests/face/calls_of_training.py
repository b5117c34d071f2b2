"""Calls of scoring, placing, data, settings and training, returning and raising, each with what it is there to change."""

import math

import torch
from face_world import DOWN, LEARNED, PLACEMENT, World, case, learned

import plopfast as pf
from plopfast.support.errors import (
    ConfigError,
    DataError,
    FileError,
    ModelError,
    PlacementError,
    TrainingError,
)
from plopfast.training.estimate import estimate
from plopfast.training.evaluate import evaluate
from plopfast.training.state import CHECKPOINTS

# scoring and placing


@case("score")
def _scores(w):
    return lambda: pf.score(w.model, w.batches, confidence=0.9, k=1, eva_rank=2, include_head=True), (w.batches,)


@case("score", "as the authors do")
def _officially(w):
    return lambda: pf.score(w.model, w.batches, compat="official"), (w.batches,)


@case("score", "by a Monte Carlo baseline")
def _monte_carlo(w):
    return lambda: pf.score(w.model, w.batches, baseline="monte-carlo", mc_samples=32), (w.batches,)


@case("score", raises=ModelError)
def _a_model_that_is_not_finite(w):
    with torch.no_grad():
        w.model.get_submodule(DOWN).weight[0, 0] = math.nan
    return lambda: pf.score(w.model, w.batches), (w.batches,)


@case("score", raises=ModelError)
def _an_adapted_model(w):
    w.adapted()
    return lambda: pf.score(w.model, w.batches), (w.batches,)


@case("NFNReport", changes=[r"^folder scores\.(json|safetensors)$"], halfway=[r"^folder scores\.safetensors$"])
def _report_is_kept(w):
    report = w.report()
    return lambda: report.save(w.folder / "scores.json"), (report,)


@case("NFNReport", changes=[r"^folder scores\.(json|safetensors)$"], halfway=[r"^folder scores\.safetensors$"])
def _report_replaces_another(w):
    report, path = w.report(), w.folder / "scores.json"
    pf.score(w.model, w.batches[:2]).save(path)
    return lambda: report.save(path), (report,)


@case("NFNReport")
def _report_is_read(w):
    path = w.folder / "scores.json"
    w.report().save(path)
    return lambda: pf.NFNReport.load(path), ()


@case("NFNReport")
def _report_is_asked(w):
    report = w.report()
    return lambda: (report.table(), report.intervals(), report.decide(1), report.outliers(), report.types), (report,)


@case("NFNReport", raises=FileError)
def _of_a_damaged_report(w):
    path = w.folder / "scores.json"
    w.report().save(path)
    path.with_suffix(".safetensors").write_bytes(b"no")
    return lambda: pf.NFNReport.load(path), ()


@case("place")
def _places(w):
    report = w.report()
    return lambda: pf.place(report, k=2, budget=2000, ranks="proportional"), (report,)


@case("place", raises=PlacementError)
def _too_little(w):
    report = w.report()
    return lambda: pf.place(report, budget=3), (report,)


SUGGESTED = [{"prompt": f"a word {i}", "completion": f" kind {i % 3}"} for i in range(20)]


@case("suggest")
def _places_in_one_call(w):
    return lambda: pf.suggest(w.model, SUGGESTED, w.tokenizer, k=2, rank=3), (SUGGESTED,)


@case("suggest", raises=DataError)
def _of_rows_of_no_kind(w):
    rows = [*SUGGESTED, {"other": 1}]
    return lambda: pf.suggest(w.model, rows, w.tokenizer), (rows,)


# data


@case("read_jsonl")
def _reads(w):
    path = w.rows()
    return lambda: pf.read_jsonl(path), ()


@case("read_jsonl", raises=DataError)
def _a_row_of_no_kind(w):
    path = w.rows({"other": 1})
    return lambda: pf.read_jsonl(path), ()


@case("read_rows")
def _reads_several(w):
    sources = [w.rows({"other": 1})]
    return lambda: pf.read_rows(sources, bad_rows="skip"), (sources,)


@case("read_rows", raises=DataError)
def _twice_the_same(w):
    sources = [w.rows()] * 2
    return lambda: pf.read_rows(sources), (sources,)


@case("tokenize")
def _tokenises(w):
    rows = pf.read_jsonl(w.rows())
    return lambda: pf.tokenize(rows, w.tokenizer, 12, long="cut"), (rows, w.tokenizer)


@case("tokenize", raises=DataError)
def _a_row_is_too_long(w):
    rows = pf.read_jsonl(w.rows())
    return lambda: pf.tokenize(rows, w.tokenizer, 5), (rows, w.tokenizer)


@case("describe_data")
def _describes(w):
    rows = {"train": pf.read_rows(w.rows())}
    return lambda: str(pf.describe_data(rows, w.tokenizer)), (rows, w.tokenizer)


@case("describe_data", raises=ConfigError)
def _of_no_split(w):
    return lambda: pf.describe_data({}, w.tokenizer), (w.tokenizer,)


# settings and errors


@case("TrainConfig")
def _settings(w):
    return lambda: pf.TrainConfig(lr=0.1), ()


@case("TrainConfig", raises=ConfigError)
def _contradicting(w):
    return lambda: pf.TrainConfig(max_steps=1, epochs=1.0), ()


@case("RunConfig")
def _all_settings(w):
    return lambda: (pf.RunConfig(rank=3), pf.RunConfig(rank=3).training, pf.RunConfig().placing), ()


@case("RunConfig", raises=ConfigError)
def _contradicting_ones(w):
    return lambda: pf.RunConfig(full=True, dropout=0.1), ()


@case("PlopfastError")
def _error(w):
    return lambda: str(pf.PlopfastError("said")), ()


@case("BackendError")
def _backend_error(w):
    return lambda: isinstance(pf.BackendError("said"), pf.PlopfastError), ()


# training

ALL = [r"^model .* values$", r"^model .* gradient$"]
FIT = [LEARNED, r"^model .*\.shared$"]


@case("Trainer", "is made", changes=[r"^model .*\.shared$"], halfway=[r"^model .*\.shared$"])
def _trainer(w):
    w.adapted()
    return lambda: w.trainer().plan.facts(), ()


@case("Trainer", "has nothing to train", raises=TrainingError)
def _nothing(w):
    w.model.requires_grad_(False)
    return lambda: w.trainer(), ()


@case("Trainer", "has too long a row", raises=ConfigError)
def _too_long(w):
    w.adapted()
    return lambda: w.trainer(batch_tokens=4), ()


@case(
    "Trainer",
    "fits",
    changes=[*FIT, r"^folder out"],
    halfway=[*FIT, r"^folder out"],
    anew=True,
    dear=True,
    look=learned,
)
def _fits(w):
    w.adapted()
    rows, config = (
        w.examples(),
        pf.TrainConfig(max_steps=3, batch_rows=3, eval_every=2, neftune=1.0, ema=0.5, accumulate=2),
    )

    def fit():
        trainer = pf.Trainer(w.model, config, rows[:9], rows[9:], out=w.out)
        result = trainer.fit()
        return result, [{k: v for k, v in r.items() if k != "seconds"} for r in trainer.history]

    return fit, (rows, config)


@case(
    "Trainer",
    "fits with recomputed blocks and packed rows",
    changes=FIT,
    halfway=FIT,
    anew=True,
    dear=True,
    look=learned,
)
def _fits_recomputed(w):
    w.adapted()
    return lambda: w.trainer(packing=True, checkpointing=True).fit(), ()


@case("Trainer", "fits all weights", changes=ALL, halfway=ALL, anew=True, dear=True, look=learned)
def _fits_all(w):
    w.model.requires_grad_(True)
    return lambda: w.trainer(weight_decay=0.1).fit(), ()


@case("Trainer", "goes on", changes=[*FIT, r"^folder out"], halfway=[*FIT, r"^folder out"], dear=True, look=learned)
def _goes_on(w):
    """From the checkpoint before the last one. After a failure half way, another call goes on too."""
    world = World(w.folder, w.tokenizer)
    world.adapted()
    world.trainer(w.out).fit()
    max((w.out / CHECKPOINTS).iterdir()).unlink()
    w.adapted()

    def fit():
        trainer = w.trainer(w.out)
        result = trainer.fit(resume=True)
        return result.steps, result.best_step, result.valid_loss, [r.get("loss") for r in trainer.history]

    return fit, ()


class HadEnoughError(Exception):
    """The caller's own."""


@case("Trainer", "is ended by the caller", changes=[*FIT, r"^folder out"], raises=HadEnoughError)
def _is_ended(w):
    def on_valid(step, loss):
        raise HadEnoughError

    w.adapted()
    return lambda: w.trainer(w.out, on_valid).fit(), ()


@case("Trainer", "has a loss that is not finite", changes=FIT, raises=TrainingError)
def _diverges(w):
    w.adapted()
    with torch.no_grad():
        w.model.lm_head.weight[:] = math.nan
    return lambda: w.trainer().fit(), ()


@case("TrainResult")
def _result(w):
    return lambda: pf.TrainResult(2, 1, 0.5, "max_steps", 10, 0.0, 0.5).tokens_per_s, ()


@case("evaluate")
def _evaluates(w):
    rows = w.examples()
    return lambda: evaluate(w.model, rows), (rows,)


@case("evaluate", raises=TrainingError)
def _evaluates_nan(w):
    with torch.no_grad():
        w.model.lm_head.weight[:] = math.nan
    return lambda: evaluate(w.model, w.examples()), ()


@case("estimate", dear=True)
def _estimates(w):
    del w.model.model.norm.forward  # a copy of it would compute with the weights of the original
    placements, config = {"mine": PLACEMENT, "full": None}, pf.TrainConfig(checkpointing=True)
    return lambda: estimate(w.model, placements, config, rows=2, row_tokens=7), (placements, config)
