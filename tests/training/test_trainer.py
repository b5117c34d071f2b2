"""The trainer: what a step computes, what is kept, how it stops and goes on."""

import json
import os
import signal
from itertools import islice

import pytest
import torch
from helpers import adapted, build, everywhere, made, parameters, quantize, same

import plopfast as pf
from plopfast.data.example import Example
from plopfast.lora.layer import adapters
from plopfast.support.errors import ConfigError, FileError, Interrupted, TrainingError
from plopfast.training.evaluate import evaluate
from plopfast.training.neftune import neftune
from plopfast.training.optimizer import lr_factor
from plopfast.training.state import checkpoints


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


@pytest.mark.parametrize(("number", "codes"), [(signal.SIGINT, None), (signal.SIGTERM, None), (signal.SIGINT, "nf4")])
def test_interrupted_and_resumed_is_as_uninterrupted(examples, tmp_path, number, codes):
    def build_one(kind, out):
        model = build("llama") if codes is None else quantize(build("llama"), codes)
        for module in (pf.inject(model, everywhere(model), dropout=0.2), adapters(model).values())[1]:
            assert module.dropout == 0.2
        return kind(
            model, pf.TrainConfig(max_steps=12, batch_tokens=300, eval_every=4), examples[:48], examples[48:], out=out
        )

    whole = build_one(pf.Trainer, tmp_path / "whole")
    unbroken = whole.fit()
    stopped = build_one(Signalled, tmp_path / "parts")
    stopped.number = number
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(Interrupted, match="stopped after step 5 of 12") as caught:
        stopped.fit()
    assert caught.value.number == number and signal.getsignal(signal.SIGINT) == before
    resumed = build_one(pf.Trainer, tmp_path / "parts")
    result = resumed.fit(resume=True)
    assert result.steps == 12
    learned = sum(record["tokens"] for record in stopped.history if "tokens" in record)
    assert 0 < result.tokens == unbroken.tokens - learned, "those since it was resumed, as the seconds are"
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
    with pytest.raises(TrainingError, match=r"other inputs: lr was 0\.001, is 0\.5"):
        made(examples, tmp_path, lr=0.5).fit(resume=True)
    for change in ({"rank": 2}, {"alpha": 99.0}):
        other = build("llama")
        pf.inject(other, everywhere(other, **change))
        with pytest.raises(TrainingError, match="other inputs: .*placement"):
            made(examples, tmp_path, model=other).fit(resume=True)
    for other in (build("llama", seed=1), quantize(build("llama"), "nf4")):
        with pytest.raises(TrainingError, match="other inputs: base model"):
            made(examples, tmp_path, model=other).fit(resume=True)
    shuffled = [*examples[1:48], examples[0], *examples[48:]]
    with pytest.raises(TrainingError, match="other inputs: data"):
        made(shuffled, tmp_path).fit(resume=True)
    with pytest.raises(TrainingError, match="other inputs: validation data"):
        made([*examples[:48], *examples[49:]], tmp_path).fit(resume=True)
    trainer = made(examples)
    trainer.fit()
    with pytest.raises(TrainingError, match="fitted already"):
        trainer.fit()
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
    how = {"lr": 1.0, "clip": 0.0, "schedule": "constant", "warmup": 0.0, "eval_every": 1, "patience": 2}
    result = made(examples, max_steps=400, **how).fit()
    assert result.stopped != "max_steps" and result.steps == result.best_step + 2 < 400
    again = made(examples, max_steps=result.steps, **how).fit()
    assert (again.stopped, again.best_step) == ("max_steps", result.best_step), "all steps were done"


def test_one_epoch(examples):
    trainer = made(examples, max_steps=None, epochs=1)
    seen = trainer.fit()
    assert seen.tokens == sum(len(e.tokens) for e in examples[:48])


def test_every_row_comes_once_an_epoch(examples):
    for packing in (False, True):
        trainer = made(examples, max_steps=None, epochs=1, packing=packing, batch_tokens=100, accumulate=2)
        seen = []
        plain = trainer._train_step
        trainer._train_step = lambda groups: (seen.extend(i for g in groups for i in g), plain(groups))  # noqa: B023
        result = trainer.fit()
        assert sorted(seen[:48]) == list(range(48)) and len(seen) < 48 + 2 * 8
        assert result.padding == (0.0 if packing else pytest.approx(0.03, abs=0.03))


def test_packed_and_grouped_steps_agree(examples):
    """The same rows in a step give the same loss and gradients, packed or padded."""
    losses = []
    for packing in (False, True):
        trainer = made(examples, packing=packing)
        trainer._train_step([list(range(9))])
        losses.append(trainer.history[0])
    assert losses[1]["loss"] == pytest.approx(losses[0]["loss"], rel=1e-5)
    assert losses[1]["grad_norm"] == pytest.approx(losses[0]["grad_norm"], rel=1e-4)
    assert losses[1]["positions"] == losses[1]["tokens"] == losses[0]["tokens"] < losses[0]["positions"]


@pytest.mark.parametrize("share", [0.0, 0.25])
def test_unlabelled_text_comes_first_or_mixed_in(examples, share):
    text = [Example.after_prompt(e.tokens, 1) for e in examples[20:36]]
    config = pf.TrainConfig(batch_tokens=100, unlabeled_share=share, epochs=1, eval_every=100)
    trainer = pf.Trainer(adapted(), config, examples[:20], unlabeled=text)
    stream = list(islice(trainer.plan.groups(), trainer.max_steps))
    kinds = [group[0] >= 20 for group in stream]
    assert all((i >= 20) == kind for group, kind in zip(stream, kinds, strict=True) for i in group)
    labelled = [i for group in stream for i in group if i < 20]
    assert sorted(set(labelled)) == list(range(20))
    if share:
        assert kinds[:8] == [False, False, False, True] * 2
    else:
        assert kinds == sorted(kinds, reverse=True) and sorted(i for g in stream for i in g) == list(range(36))
    assert trainer.fit().steps == trainer.max_steps


def test_unlabelled_text_must_not_swallow_the_run(examples):
    """No early stopping before the labelled rows, and no end either."""
    text = [Example.after_prompt(e.tokens, 1) for e in examples[20:48]]
    how = {"batch_tokens": 100, "eval_every": 1, "patience": 1, "lr": 1e-9}
    trainer = pf.Trainer(adapted(), pf.TrainConfig(**how), examples[:20], examples[48:], unlabeled=text)
    assert trainer.plan.first_stage > 3 and trainer.fit().steps > trainer.plan.first_stage
    with pytest.raises(ConfigError, match=r"max_steps: the unlabelled text takes \d+ steps"):
        pf.Trainer(adapted(), pf.TrainConfig(max_steps=3, batch_tokens=100), examples[:20], unlabeled=text)
    with pytest.raises(ConfigError, match="no unlabelled examples"):
        pf.Trainer(adapted(), pf.TrainConfig(unlabeled_share=0.3), examples[:20])


def test_lora_plus_sets_two_rates(examples):
    """AdamW's first step moves every weight by the learning rate of its group."""
    trainer = made(examples, lora_plus=16.0, warmup=0.0, schedule="constant", lr=1e-4, clip=0.0)
    for module in adapters(trainer.model).values():
        module.lora_B.data.normal_(std=0.1)
    before = parameters(trainer)
    trainer._train_step([list(range(48))])
    moved = {n: (p - before[n]).abs().median().item() for n, p in parameters(trainer).items()}
    for name, step in moved.items():
        assert step == pytest.approx(16e-4 if name.endswith("lora_B") else 1e-4, rel=0.02), name


def test_the_moving_average_is_what_is_validated_and_kept(examples):
    trainer = made(examples, ema=0.9, max_steps=8, eval_every=8)
    want, plain = parameters(trainer), trainer._train_step

    def step(groups):
        plain(groups)
        for name, value in parameters(trainer).items():
            want[name] = 0.9 * want[name] + 0.1 * value

    trainer._train_step = step
    result = trainer.fit()
    for name, value in parameters(trainer).items():
        torch.testing.assert_close(value, want[name], rtol=1e-5, atol=1e-7)
    assert evaluate(trainer.model, examples[48:]).loss == pytest.approx(result.valid_loss, rel=1e-6)
    alone = pf.Trainer(trainer.model, pf.TrainConfig(max_steps=2, ema=0.5), examples[:48])
    start = parameters(alone)
    alone.fit()
    assert not same(start, parameters(alone)) and same(parameters(alone), alone.state.average), "without validation too"


def test_neftune_noise(llama, examples):
    """Uniform in +-alpha / sqrt(tokens x width), on the embeddings of training alone, and gone afterwards."""
    seen = []
    plain = llama.model.embed_tokens.weight.detach()

    def look(module, args, output):
        seen.append((module.training, (output - plain[args[0]]).abs().max().item() * (args[0].shape[1] * 32) ** 0.5))

    with neftune(llama, 5.0):
        llama.model.embed_tokens.register_forward_hook(look)
        for training in (True, False):
            llama.train(training)
            llama(input_ids=torch.arange(3, 23).view(2, 10))
    llama.train()
    llama(input_ids=torch.arange(3, 23).view(2, 10))
    assert [s[0] for s in seen] == [True, False, True] and 4.8 < seen[0][1] <= 5.001 and seen[1][1] == seen[2][1] == 0


def test_full_fine_tuning(examples):
    model = build("llama").requires_grad_(True)
    result = pf.Trainer(
        model, pf.TrainConfig(max_steps=30, batch_tokens=300, lr=3e-3), examples[:48], examples[48:]
    ).fit()
    assert result.valid_loss < evaluate(build("llama"), examples[48:]).loss - 0.5


def test_logs_reach_tensorboard(examples, tmp_path):
    made(examples, tmp_path, max_steps=3, log_to="tensorboard").fit()
    assert list((tmp_path / "tensorboard").glob("events*"))
    with pytest.raises(ConfigError, match="log_to: expected none or"):
        made(examples, tmp_path, log_to="paper").fit()


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
