"""A training's state as a dict and back, the same-run check, and signals."""

import json
import math
import os
import signal
import threading
from pathlib import Path

import pytest
import torch
from helpers import made, parameters, same
from safetensors.torch import save_file

from plopfast.lora.layer import adapters
from plopfast.support.errors import FileError, TrainingError
from plopfast.training.evaluate import evaluate
from plopfast.training.identity import check_same_run
from plopfast.training.interrupt import interruptible
from plopfast.training.state import COUNTERS, load_state, save_state


@pytest.mark.parametrize("settings", [{}, {"ema": 0.9}], ids=str)
def test_a_state_comes_back_whole(examples, settings):
    """All that a step changes is in the dict: two trainings go on alike from it."""
    one, two = (made(examples, lora_plus=4.0, **settings) for _ in range(2))
    one.model.train(), two.model.train()
    for module in (*adapters(one.model).values(), *adapters(two.model).values()):
        module.dropout = 0.2  # so that the random generator matters
    for number in range(4):
        one._train_step([list(range(4 * number, 4 * number + 9))])
    one._validate(one.objective)
    kept = {k: v.clone() if isinstance(v, torch.Tensor) else v for k, v in one.state.state_dict().items()}
    assert kept["step"] == kept["best_step"] == 4 and kept["tokens"] > 0
    one._train_step([list(range(9))])
    two.state.load_state_dict(kept)
    two._train_step([list(range(9))])
    assert same(parameters(one), parameters(two))
    ours, theirs = one.state.state_dict(), two.state.state_dict()
    assert ours.keys() == theirs.keys() and {k.partition("/")[0] for k in ours} >= {
        "now",
        "best",
        "exp_avg",
        "rng",
        "step",
    }
    assert all(torch.equal(v, theirs[k]) if isinstance(v, torch.Tensor) else v == theirs[k] for k, v in ours.items())
    assert any(k.startswith("average/") for k in ours) == ("ema" in settings)


def test_another_models_state_changes_nothing(examples):
    trainer = made(examples)
    before, state = parameters(trainer), trainer.state.state_dict()
    name = list(trainer.parameters)[-1]
    state = {k: v + 1 if k.startswith("now/") else v for k, v in state.items()}
    for wrong in ({}, {f"now/{name}": torch.zeros(3)}):
        other = {k: v for k, v in state.items() if k != f"now/{name}"} | wrong
        with pytest.raises(TrainingError, match=rf"expected now/{name} of shape .*another placement"):
            trainer.state.load_state_dict(other)
        assert same(before, parameters(trainer))


@pytest.mark.parametrize("kind", ["exp_avg", "step", "best", "rng/0"])
def test_a_tensor_that_is_missing_or_of_another_shape_changes_nothing(examples, kind):
    trainer = made(examples)
    trainer._train_step([list(range(9))])
    before, state = parameters(trainer), trainer.state.state_dict()
    state = {k: v + 1 if k.startswith("now/") else v for k, v in state.items()}
    key = kind if kind == "rng/0" else f"{kind}/{list(trainer.parameters)[-1]}"
    for wrong in ({key: torch.zeros(7)},) + (({},) if kind != "best" else ()):
        with pytest.raises(TrainingError, match=rf"{key}.*(of shape|expected)"):
            trainer.state.load_state_dict({k: v for k, v in state.items() if k != key} | wrong)
        assert same(before, parameters(trainer))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"step": -1}, "step: expected a number greater than or equal to 0, got -1"), ({"step": "3"}, "step: expected a valid integer"),
        ({"worse": 1.5}, "worse"), ({"best_loss": "x"}, "best_loss"), ({"identity": []}, "identity"), ({"odd": 1}, "odd"),
        (None, "not valid JSON"), ({"nan": 1}, "now/a is NaN|'now/a' is NaN"),
    ],
)  # fmt: skip
def test_facts_of_a_checkpoint_that_cannot_be(tmp_path, change, message):
    facts = {"identity": {}, **dict.fromkeys(COUNTERS, 0), "best_loss": math.inf}
    state = {"now/a": torch.ones(2), **{name: facts[name] for name in COUNTERS}}
    save_state(tmp_path, {}, state, keep=2)
    (path,) = tmp_path.iterdir()
    assert load_state(tmp_path)[2]["best_loss"] == math.inf, "it is null in the file"
    if change == {"nan": 1}:
        state["now/a"], change = torch.full((2,), math.nan), {}
    text = "{" if change is None else json.dumps(facts | {"best_loss": None} | change)
    save_file({"now/a": state["now/a"]}, path, {"facts": text})
    with pytest.raises(FileError, match=rf"not a readable training checkpoint .*{message}.*start anew"):
        load_state(tmp_path)


def test_validation_may_begin_at_a_resumption(examples, tmp_path):
    """Its first look is the best one so far; there was none before."""
    plain = made(examples, tmp_path)
    plain.valid, plain.state.best = [], {}
    plain.fit()
    max((tmp_path / "checkpoints").iterdir()).unlink()
    result = made(examples, tmp_path).fit(resume=True)
    assert result.best_step == 12 and result.valid_loss == pytest.approx(evaluate(plain.model, examples[48:]).loss)


def test_the_counters_are_those_of_the_state(examples):
    state = made(examples).state
    assert set(COUNTERS) == {k for k, v in vars(state).items() if isinstance(v, int | float)}


def test_the_same_run_check():
    kept = {"ranks": 1, "lr": 0.1, "data": "a", "placement": {}}
    check_same_run(Path("x"), kept, dict(kept))
    check_same_run(Path("x"), kept | {"gone": 1}, dict(kept))
    for changed, text in (
        ({"lr": 0.5}, "other inputs: lr was 0.1, is 0.5"),
        ({"data": "0" * 64, "lr": 1}, "data.*; lr was 0.1, is 1"),
        ({"ranks": 2, "lr": 1}, "on 1 ranks, this one has 2"),
        ({"new": 3}, "new was None, is 3"),
    ):
        with pytest.raises(TrainingError, match=text):
            check_same_run(Path("x"), kept, kept | changed)


def test_signals_are_noted_and_a_second_one_acts_at_once():
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt), interruptible() as noted:
        assert noted.number == 0
        os.kill(os.getpid(), signal.SIGTERM)
        assert noted.number == signal.SIGTERM
        os.kill(os.getpid(), signal.SIGINT)
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before


def test_no_handlers_outside_the_main_thread():
    seen, before = [], signal.getsignal(signal.SIGINT)

    def work():
        with interruptible() as noted:
            seen.append((noted.number, signal.getsignal(signal.SIGINT)))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [(0, before)]
