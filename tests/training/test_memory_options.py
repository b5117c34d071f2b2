"""Options that keep something elsewhere or smaller: the same results, what is where, resumed as if nothing had happened."""

import pytest
import torch
from helpers import made, parameters, same
from torch._subclasses.fake_tensor import FakeTensorMode

from plopfast.training.state import TrainState


def fitted(examples, out=None, resume=False, steps=6, **settings):
    trainer = made(examples, out, max_steps=steps, eval_every=2, schedule="constant", **settings)
    trainer.fit(resume=resume)
    return trainer


def interrupted(examples, out, at=4, **settings):
    """A training of six steps that was killed after the validation of step `at`, before its checkpoint."""

    def kill(step, loss):
        if step == at:
            raise KeyboardInterrupt

    trainer = made(examples, out, max_steps=6, eval_every=2, schedule="constant", **settings)
    trainer.on_valid = kill
    with pytest.raises(KeyboardInterrupt):
        trainer.fit()
    return trainer


def test_the_best_adapters_in_cpu_memory():
    """On a stand-in for a card; only values of the CPU can be compared, below."""
    with FakeTensorMode():
        parameter = torch.nn.Parameter(torch.empty(3, device="meta"))
        optimizer = torch.optim.AdamW([parameter])
        for on_cpu in (False, True):
            state = TrainState({"a": parameter}, optimizer, validated=True, averaged=True, best_on_cpu=on_cpu)
            place = "cpu" if on_cpu else "meta"
            assert (state.best["a"].device.type, state.average["a"].device.type) == (place, "meta")
            state.keep_best(0.5)
            state.take(state.best)
            assert (state.best["a"].device.type, parameter.device.type) == (place, "meta")


def test_best_values_come_and_go_between_devices():
    """Values in float64 stand for another place: what is kept stays there, and what is taken is the parameter's."""
    parameter = torch.nn.Parameter(torch.ones(3))
    state = TrainState(
        {"a": parameter}, torch.optim.AdamW([parameter]), validated=True, averaged=True, best_on_cpu=True
    )
    state.best["a"] = elsewhere = state.best["a"].double()
    with torch.no_grad():
        parameter.fill_(2)
    state.step = 3
    state.keep_best(0.5)
    assert state.best["a"] is elsewhere and elsewhere.tolist() == [2.0] * 3
    with torch.no_grad():
        parameter.fill_(5)
    kept = state.state_dict()
    elsewhere.zero_()
    state.load_state_dict(kept | {"best/a": torch.full((3,), 7.0)})
    assert state.best["a"] is elsewhere and elsewhere.tolist() == [7.0] * 3 and not elsewhere.requires_grad
    state.take(state.best)
    assert parameter.tolist() == [7.0] * 3 and parameter.dtype == torch.float32


def test_a_training_with_the_best_in_cpu_memory_is_the_same(examples, tmp_path):
    want = fitted(examples)
    got = fitted(examples, keep_best="cpu")
    assert same(parameters(want), parameters(got)) and got.state.best.keys() == got.parameters.keys()
    interrupted(examples, tmp_path, keep_best="cpu")
    again = fitted(examples, tmp_path, resume=True)  # it may change when a run is resumed
    assert same(parameters(want), parameters(again)) and same(want.state.best, again.state.best)
