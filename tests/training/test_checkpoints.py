"""What is kept of a training: which checkpoints, the best, the average; and what makes it another run."""

import pytest
import torch
from helpers import build, everywhere, made
from plain_training import rows_of
from torch import nn

import plopfast as pf
from plopfast.data.example import Example
from plopfast.support.errors import TrainingError
from plopfast.training.state import CHECKPOINTS, TrainState


def test_rows_that_are_learned_otherwise_are_another_run(tmp_path):
    rows = rows_of(9)
    made(rows, out=tmp_path, max_steps=1).fit()
    other = [Example.after_prompt(row.tokens, max(1, row.start - 1), row.completion, row.where) for row in rows]
    assert [row.tokens for row in rows] == [row.tokens for row in other] and rows != other
    with pytest.raises(TrainingError):
        made(other, out=tmp_path, max_steps=1).fit(resume=True)


@pytest.mark.parametrize("dropout", [0.0, 0.2])
@pytest.mark.parametrize("alpha", [8.0, 6.0])
def test_other_adapters_are_another_run(dropout, alpha, tmp_path):
    def trainer(dropout, alpha):
        model = build("llama")
        pf.inject(model, everywhere(model, alpha=alpha), dropout=dropout)
        return made(rows_of(9), out=tmp_path, max_steps=1, model=model)

    trainer(0.2, 8.0).fit()
    if (dropout, alpha) == (0.2, 8.0):
        trainer(dropout, alpha).fit(resume=True)
        return
    with pytest.raises(TrainingError):
        trainer(dropout, alpha).fit(resume=True)


@pytest.mark.parametrize("raising", [False, True])
def test_the_average_is_in_place_for_a_while(raising):
    parameters = {"a": nn.Parameter(torch.zeros(3))}
    state = TrainState(parameters, torch.optim.AdamW(parameters.values()), validated=False, averaged=True)
    with torch.no_grad():
        parameters["a"].add_(1)
    state.update_average(0.75)
    try:
        with state.averaged():
            assert parameters["a"].tolist() == [0.25] * 3
            if raising:
                raise KeyboardInterrupt
    except KeyboardInterrupt:
        pass
    assert parameters["a"].tolist() == [1.0] * 3 and state.average["a"].tolist() == [0.25] * 3


@pytest.mark.parametrize(
    "settings, steps",
    [
        ({"max_steps": 7, "eval_every": 3, "keep": 2}, [6, 7]),
        ({"max_steps": 7, "eval_every": 3, "keep": 9}, [3, 6, 7]),
        ({"max_steps": 6, "eval_every": 9, "save_every": 2, "keep": 2}, [4, 6]),
        ({"max_steps": 5, "eval_every": 1, "save_every": 4, "keep": 9}, [4, 5]),
    ],
    ids=str,
)
def test_which_checkpoints_there_are(settings, steps, tmp_path):
    rows = rows_of(9)
    model = build("llama")
    pf.inject(model, everywhere(model, rank=1))
    pf.Trainer(model, pf.TrainConfig(batch_rows=3, patience=9, **settings), rows[:7], rows[7:], out=tmp_path).fit()
    assert sorted(path.name for path in (tmp_path / CHECKPOINTS).iterdir()) == [
        f"step-{n:08d}.safetensors" for n in steps
    ]


def test_the_best_so_far_ends_the_waiting():
    parameters = {"a": nn.Parameter(torch.zeros(3))}
    state = TrainState(parameters, torch.optim.AdamW(parameters.values()), validated=True, averaged=False)
    state.step, state.worse = 7, 2
    with torch.no_grad():
        parameters["a"].add_(1)
    state.keep_best(0.5)
    assert (state.best_loss, state.best_step, state.worse) == (0.5, 7, 0) and state.best["a"].tolist() == [1.0] * 3
    with torch.no_grad():
        parameters["a"].add_(1)
    assert state.best["a"].tolist() == [1.0] * 3
