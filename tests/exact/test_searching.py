"""Which trainings of a search are stopped: none at its last look, and none because of one that was killed."""

import json

import optuna
import pytest
import torch
from helpers import plopfast

from plopfast.studies.search import Study
from plopfast.training.trainer import Trainer


def test_trainings_end_alone_and_at_their_end(base, tmp_path, monkeypatch):
    """Where the only look is the last, every training is complete, however high its loss; one that runs out of memory
    ends for itself. The settings that are saved are the best one's, and score every row, as the search did."""
    out, options = tmp_path / "run", [*base, "--eval-every", "4", "--search-trials", "5"]
    fit, calls = Trainer.fit, []

    def fit_or_not(trainer, *arguments, **more):
        calls.append(trainer)
        if len(calls) == 3:
            raise torch.OutOfMemoryError("no memory")
        return fit(trainer, *arguments, **more)

    monkeypatch.setattr(Trainer, "fit", fit_or_not)
    assert plopfast("search", *options, "--out", out) == 0
    found = json.loads((out / "search.json").read_text())
    full = found["trials"].pop(2)
    assert (full["state"], full["why"], full["looks"]) == ("stopped early", "no memory", {})
    trials = found["trials"]
    assert [(t["state"], t["steps"], list(t["looks"])) for t in trials] == [("complete", 4, ["1"])] * 4
    assert all(t["valid_loss"] == t["looks"]["1"] for t in trials) and len({t["valid_loss"] for t in trials}) == 4
    best = min(trials, key=lambda t: t["valid_loss"])
    assert found["best"] == best["number"] and found["settings"]["confidence"] == 0
    assert {name: found["settings"][name] for name in best["params"]} == best["params"]


@pytest.mark.parametrize("killed", [0, 1, 3])
def test_killed_trainings_do_not_count_when_others_are_halved(killed):
    """Each of them had a lower loss: the first that is trained anew would be stopped by its own former half."""
    storage = optuna.storages.InMemoryStorage()
    optuna.create_study(storage=storage, study_name="s")
    study = Study("s", storage, pruner=optuna.pruners.SuccessiveHalvingPruner(min_resource=1, reduction_factor=3))
    for _ in range(killed):
        trial = study.ask()
        trial.report(0.1, 1)
        trial.should_prune()
        study.tell(trial, state=optuna.trial.TrialState.FAIL)
    stopped = []
    for loss in (0.5, 0.6, 0.4):
        trial = study.ask()
        trial.report(loss, 1)
        stopped.append(trial.should_prune())
        study.tell(trial, loss)
    assert stopped == [False, True, False] and [t.value for t in study.trials] == [0.5, 0.6, 0.4]
