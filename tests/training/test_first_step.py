"""Before the first step, what a step launches has run once, and nothing shows of it."""

import pytest
import torch
from helpers import build

import plopfast as pf
from plopfast.lora.shared import Prepared, find_shared_inputs
from plopfast.models.linears import linear_modules
from plopfast.training import first_step
from plopfast.training.loss import Objective


@pytest.fixture
def objective():
    model = build("llama")
    pf.inject(model, pf.Placement({i.name: (4, 8.0) for i in linear_modules(model)}, [], "explicit", 0), dropout=0.1)
    find_shared_inputs(model)
    return Objective(model.train())


@pytest.mark.parametrize("runs", [True, False])
def test_blocks_and_loss_run_once_where_triton_does(runs, objective, monkeypatch):
    batches, model = [], objective.model
    objective.register_forward_pre_hook(lambda module, args: batches.append(args[0]["input_ids"].shape))
    monkeypatch.setattr(first_step, "path", lambda device, backend: "triton" if runs else "torch")
    state, values = torch.get_rng_state(), {name: p.clone() for name, p in model.named_parameters()}
    lines = first_step.make_ready(objective, Prepared(model), 64)
    assert [tuple(shape) for shape in batches] == [(2, 17)] * runs
    assert len(lines) == runs and all("blocks and loss" in line for line in lines)
    assert torch.equal(torch.get_rng_state(), state), "dropout's seeds are drawn in a fork"
    for name, parameter in model.named_parameters():
        assert parameter.grad is None and torch.equal(parameter, values[name])


def test_the_trainer_makes_ready_within_its_choices(objective, monkeypatch):
    """The blocks' own operations are in force, and the model is in training mode."""
    model, seen = objective.model, []

    def look(objective, prepared, tokens, progress):
        seen.append(("forward" in vars(model.model.norm), model.training, tokens))
        return ["ready"]

    monkeypatch.setattr("plopfast.training.trainer.make_ready", look)
    from plopfast.data.example import Example

    rows = [Example.after_prompt((1, 5, 6, 7), 2, None, "row")]
    trainer = pf.Trainer(model, pf.TrainConfig(max_steps=1), rows)
    trainer.fit()
    assert seen == [(True, True, trainer.plan.batch_tokens)] and "ready" in trainer.paths()
