"""Steps whose loss is not finite: skipped ones change nothing, too many end the training, a stop leaves the best."""

import math

import pytest
import torch
from helpers import build, everywhere, parameters, randomise
from plain_training import DEFAULT, rows_of

import plopfast as pf
from plopfast.support.errors import TrainingError


def spoiled(bad, **settings):
    """A trainer whose loss is NaN in some steps, and a list of the parameters as each step finds them."""
    model = build("llama")
    pf.inject(model, everywhere(model, rank=2))
    randomise(model)
    trainer = pf.Trainer(model, pf.TrainConfig(**{**DEFAULT, "max_steps": 30, **settings}), rows_of(18), rows_of(4, 1))
    seen = []

    def spoil(module, _args, output):
        if not module.training:
            return output
        seen.append(parameters(trainer))
        return output * math.nan if len(seen) in bad else output

    model.get_input_embeddings().register_forward_hook(spoil)  # a step has one micro-batch, so one call
    return trainer, seen


def test_a_skipped_step_changes_nothing():
    bad = {2, 5, 6}
    trainer, seen = spoiled(bad, nonfinite="skip", max_steps=8)
    trainer.fit()
    records = {r["step"]: r for r in trainer.history if "lr" in r}
    for step in range(1, 8):
        one, two = seen[step - 1 : step + 1]
        same = all(torch.equal(one[name], two[name]) for name in one)
        assert same == (step in bad) == bool(records[step].get("skipped")) == (records[step]["loss"] is None)


def test_ten_skipped_in_a_row_end_it():
    trainer, _ = spoiled({*range(3, 12), *range(13, 30)}, nonfinite="skip", patience=99)
    with pytest.raises(TrainingError):
        trainer.fit()
    assert trainer.step == 21  # the nine before step 12 did not
    assert all(torch.equal(p, trainer.state.best[name]) for name, p in parameters(trainer).items())


def test_a_stop_leaves_the_best():
    trainer, seen = spoiled({6}, eval_every=2)
    with pytest.raises(TrainingError):
        trainer.fit()
    best, latest = (seen[step] for step in (trainer.state.best_step, 5))
    found = parameters(trainer)
    assert all(torch.equal(p, best[name]) for name, p in found.items())
    assert not all(torch.equal(p, latest[name]) for name, p in found.items())
