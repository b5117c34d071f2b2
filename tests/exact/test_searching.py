"""Which trainings of a search are stopped: none at its last look, and none because of one that was killed."""

import json

import optuna
import pytest
from helpers import plopfast

from plopfast.studies.search import Study


def test_no_training_is_stopped_at_its_last_look(base, tmp_path):
    """Where the only look is the last, every training is complete, however high its loss."""
    out, options = tmp_path / "run", [*base, "--eval-every", "4", "--search-trials", "5"]
    assert plopfast("search", *options, "--out", out) == 0
    trials = json.loads((out / "search.json").read_text())["trials"]
    assert [(t["state"], t["steps"], list(t["looks"])) for t in trials] == [("complete", 4, ["1"])] * 5
    assert all(t["valid_loss"] == t["looks"]["1"] for t in trials) and len({t["valid_loss"] for t in trials}) == 5


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
