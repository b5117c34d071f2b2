"""The trainer: what a step computes, what is kept, how it stops and goes on."""

import json
import os
import signal

import pytest
import torch
from conftest import build
from test_lora import everywhere

import plopfast as pf
from plopfast.checkpoint import checkpoints
from plopfast.errors import ConfigError, FileError, Interrupted, TrainingError
from plopfast.lora import adapters
from plopfast.train import lr_factor


def made(examples, out=None, model=None, **config):
    model = model or build("llama")
    if not adapters(model):
        pf.inject(model, everywhere(model))
    settings = {"max_steps": 12, "batch_tokens": 300, "eval_every": 4, **config}
    return pf.Trainer(model, pf.TrainConfig(**settings), examples[:48], examples[48:], out=out)


def parameters(trainer):
    return {n: p.detach().clone() for n, p in trainer.parameters.items()}


def same(one, two):
    return one.keys() == two.keys() and all(torch.equal(one[k], two[k]) for k in one)


def test_it_learns_and_keeps_the_best(examples):
    trainer = made(examples, max_steps=40, lr=1e-2)
    first = trainer.model.state_dict()["model.layers.0.mlp.up_proj.base.weight"].clone()
    result = trainer.fit()
    losses = [h["loss"] for h in trainer.history if "loss" in h]
    valid = {h["step"]: h["valid_loss"] for h in trainer.history if "valid_loss" in h}
    assert losses[-1] < losses[0] - 0.3
    assert result.valid_loss == min(valid.values()) == valid[result.best_step]
    assert torch.equal(trainer.model.state_dict()["model.layers.0.mlp.up_proj.base.weight"], first), (
        "the base is frozen"
    )
    from plopfast.evaluate import evaluate

    assert evaluate(trainer.model, examples[48:]).loss == pytest.approx(result.valid_loss, rel=1e-6)
    assert not trainer.model.training


def test_micro_batches_weigh_by_tokens(examples):
    """Two micro-batches in a step give the gradient of one batch that holds all their rows."""
    small, large = made(examples, accumulate=2), made(examples)
    groups = [list(range(3)), list(range(3, 11))]
    small._train_step(groups)
    large._train_step([[*groups[0], *groups[1]]])
    for name, value in parameters(small).items():
        torch.testing.assert_close(value, parameters(large)[name], rtol=1e-4, atol=1e-6)
    assert small.history[0]["loss"] == pytest.approx(large.history[0]["loss"], rel=1e-5)
    assert small.history[0]["grad_norm"] == pytest.approx(large.history[0]["grad_norm"], rel=1e-4)


def test_same_seed_same_run(examples):
    runs = []
    for seed in (1, 1, 2):
        trainer = made(examples, seed=seed, dropout=0.1)
        trainer.fit()
        runs.append(parameters(trainer))
    assert same(runs[0], runs[1]) and not same(runs[0], runs[2])


class Signalled(pf.Trainer):
    """Gets a signal in the middle of a step."""

    at, number = 5, signal.SIGINT

    def _train_step(self, groups):
        super()._train_step(groups)
        if self.step == self.at:
            os.kill(os.getpid(), self.number)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_and_resumed_is_as_uninterrupted(examples, tmp_path, number):
    def build_one(kind, out):
        model = build("llama")
        for module in (pf.inject(model, everywhere(model), dropout=0.2), adapters(model).values())[1]:
            assert module.dropout == 0.2
        return kind(
            model, pf.TrainConfig(max_steps=12, batch_tokens=300, eval_every=4), examples[:48], examples[48:], out=out
        )

    whole = build_one(pf.Trainer, tmp_path / "whole")
    whole.fit()
    stopped = build_one(Signalled, tmp_path / "parts")
    stopped.number = number
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(Interrupted, match="stopped after step 5 of 12") as caught:
        stopped.fit()
    assert caught.value.number == number and signal.getsignal(signal.SIGINT) == before
    resumed = build_one(pf.Trainer, tmp_path / "parts")
    result = resumed.fit(resume=True)
    assert result.steps == 12
    assert same(parameters(whole), parameters(resumed))
    strip = lambda trainer: [{k: v for k, v in h.items() if k != "seconds"} for h in trainer.history]  # noqa: E731
    assert strip(whole) == strip(resumed)
    lines = (tmp_path / "parts" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines if "lr" in line] == list(range(1, 13))


def test_a_signal_in_the_last_step_is_not_lost(examples, tmp_path):
    trainer = made(examples, tmp_path, max_steps=5)
    trainer.__class__ = Signalled
    with pytest.raises(Interrupted, match="stopped after step 5 of 5"):
        trainer.fit()
    assert made(examples, tmp_path, max_steps=5).fit(resume=True).steps == 5


def test_resume_refuses_another_run(examples, tmp_path):
    with pytest.raises(FileError, match="no training checkpoint; start anew"):
        made(examples, tmp_path).fit(resume=True)
    made(examples, tmp_path).fit()
    with pytest.raises(TrainingError, match=r"another run: lr was 0\.001, is 0\.5"):
        made(examples, tmp_path, lr=0.5).fit(resume=True)
    other = build("llama")
    pf.inject(other, everywhere(other, rank=2))
    with pytest.raises(TrainingError, match="another placement"):
        made(examples, tmp_path, model=other).fit(resume=True)
    for checkpoint in checkpoints(tmp_path / "checkpoints"):
        checkpoint.write_bytes(checkpoint.read_bytes()[:-10])
    with pytest.raises(FileError, match="not a readable training checkpoint"):
        made(examples, tmp_path).fit(resume=True)


def test_a_loss_that_is_not_finite_stops_with_the_last_good_state(examples, tmp_path):
    trainer = made(examples, tmp_path)
    kept = {}

    def break_it(module, args, output):
        if trainer.step == 4:
            kept.update(parameters(trainer))
        return output * float("nan") if trainer.step == 5 else output

    trainer.model.model.embed_tokens.register_forward_hook(break_it)
    with pytest.raises(TrainingError, match=r"step 6: loss nan.*adapters are those of step 4"):
        trainer.fit()
    assert same(parameters(trainer), kept) and all(v.isfinite().all() for v in kept.values())
    resumed = made(examples, tmp_path)
    assert resumed.fit(resume=True).steps == 12


def test_early_stopping(examples):
    trainer = made(examples, max_steps=400, lr=1.0, clip=0.0, schedule="constant", eval_every=1, patience=2)
    result = trainer.fit()
    assert result.stopped.startswith("early") and result.steps == result.best_step + 2 < 400


def test_default_is_one_epoch(examples):
    trainer = made(examples, max_steps=None)
    seen = trainer.fit()
    assert seen.tokens == sum(len(e.tokens) for e in examples[:48])


def test_schedules():
    for schedule in ("cosine", "linear", "constant"):
        factors = [lr_factor(step, 100, 0.1, schedule) for step in range(100)]
        assert factors[:11] == sorted(factors[:11]) and factors[10] == 1.0 and 0 < factors[0] < 0.2
        assert factors[-1] == (1.0 if schedule == "constant" else pytest.approx(0, abs=0.02))
        assert all(0 < f <= 1 for f in factors)
    assert lr_factor(0, 1, 0.0, "cosine") == 1.0


def test_nothing_to_train(llama, examples):
    with pytest.raises(TrainingError, match="training data is empty"):
        pf.Trainer(llama, pf.TrainConfig(), [])
    llama.requires_grad_(False)
    with pytest.raises(TrainingError, match="inject"):
        pf.Trainer(llama, pf.TrainConfig(), examples)


@pytest.mark.parametrize(
    "bad",
    [{"lr": 0}, {"warmup": 1.0}, {"dropout": -0.1}, {"clip": -1}, {"schedule": "step"}, {"max_steps": 0}],
    ids=str,
)
def test_impossible_settings(bad):
    with pytest.raises(ConfigError, match=f"{next(iter(bad))}: expected"):
        pf.TrainConfig(**bad)
