"""Which rows a step takes: epochs, rows in a micro-batch, and the steps of little data."""

import json
from itertools import islice

import pytest
from helpers import adapted

import plopfast as pf
from plopfast.data.batches import group_by_length, micro_batches, pack
from plopfast.data.example import Example
from plopfast.run.run import resolve
from plopfast.support import ranks
from plopfast.support.config import RunConfig, TrainConfig
from plopfast.support.errors import ConfigError
from plopfast.support.settings_file import load_settings
from plopfast.training.plan import Plan


def rows(count, length=60, learned=3):
    return [
        Example.after_prompt(range(3, 3 + length - i % 7), length - i % 7 - learned, "x", f"rows:{i}")
        for i in range(count)
    ]


def plan_of(count, length=60, **settings):
    return Plan(rows(count, length), [], TrainConfig(**settings))


@pytest.mark.parametrize("fill", [group_by_length, pack])
@pytest.mark.parametrize("most", [1, 3, 1000])
def test_groups_hold_at_most_so_many_rows(fill, most):
    lengths = [5 + i * 7 % 11 for i in range(100)]
    groups = fill(lengths, 64, seed=1, rows=most)
    assert sorted(i for group in groups for i in group) == list(range(100))
    assert max(map(len, groups)) == min(most, max(map(len, fill(lengths, 64, seed=1))))
    size = sum if fill is pack else lambda of: len(of) * max(of)
    assert all(size([lengths[i] for i in group]) <= 64 for group in groups)


@pytest.mark.parametrize("packing", [False, True])
def test_the_trainer_keeps_to_them_for_each_epoch(examples, packing):
    config = TrainConfig(batch_rows=4, epochs=2, packing=packing, batch_tokens=500, accumulate=2)
    trainer, seen = pf.Trainer(adapted(), config, examples[:48]), []
    plain = trainer._train_step
    trainer._train_step = lambda groups: (seen.extend(groups), plain(groups))
    trainer.fit()
    assert max(map(len, seen)) == 4
    assert sorted(i for group in seen for i in group) == sorted([*range(48)] * 2)


def test_epochs():
    one = plan_of(600, epochs=1)
    assert one.max_steps > 30 and plan_of(600, epochs=3).max_steps == 3 * one.max_steps
    half = plan_of(600, epochs=0.5)
    assert half.max_steps == -(-one.max_steps // 2) and half.epochs == 0.5
    assert plan_of(600, max_steps=one.max_steps).epochs == 1


def test_epochs_and_steps_exclude_each_other(tmp_path):
    with pytest.raises(ConfigError, match="max_steps 9 and epochs 2 both say how long to train: leave one of them out"):
        TrainConfig(max_steps=9, epochs=2)
    file = tmp_path / "settings.json"
    file.write_text(json.dumps({"epochs": 2}))
    assert load_settings(file) == {"epochs": 2}, "a whole number is a number"
    for bad in (0, -1, float("nan")):
        with pytest.raises(ConfigError, match="epochs: expected a number above 0"):
            TrainConfig(epochs=bad)


def test_the_demos_steps_give_way_to_epochs():
    demo, own = resolve(RunConfig()), resolve(RunConfig(epochs=2))
    assert (demo.max_steps, demo.epochs, demo.batch_tokens) == (60, None, 160)
    assert (own.max_steps, own.epochs, own.batch_tokens) == (None, 2, 160)


@pytest.mark.parametrize(
    ("count", "in_step", "epochs", "steps"),
    [(57, 8, 8, 64), (60, 8, 8, 64), (3, 8, 10, 10), (240, 8, 2, 60), (480, 8, 1, 60), (900, 15, 1, 60)],
)
def test_little_data_takes_about_60_steps(count, in_step, epochs, steps):
    plan = plan_of(count)
    assert plan.little and (plan.batch_rows, plan.epochs, plan.max_steps) == (in_step, epochs, steps)
    assert plan.eval_every == min(30, -(-count // in_step)), "validated once an epoch at least"


def test_no_jump_between_little_data_and_more():
    assert all(40 <= plan_of(count).max_steps <= 90 for count in range(48, 1100, 7))


def test_more_data_is_one_epoch_as_ever():
    plan, plain = plan_of(3000), plan_of(3000, batch_tokens=1024, epochs=1)
    assert not plan.little and plan.batch_rows is None and plan.eval_every == 30
    assert plan.max_steps == plain.max_steps > 60
    assert list(islice(plan.groups(), 500)) == list(islice(plain.groups(), 500))


def test_the_demos_default_steps_stay():
    train = rows(400, 20)
    plan = Plan(train, [], resolve(RunConfig()).training)
    assert not plan.little and (plan.max_steps, plan.batch_rows, plan.eval_every) == (60, None, 30)
    stream = micro_batches([len(row.tokens) for row in train], 400, 160, 0)
    assert list(islice(plan.groups(), 200)) == list(islice(stream, 200))


def test_what_is_given_counts():
    assert plan_of(57, max_steps=5).max_steps == 5 and plan_of(57, max_steps=5).eval_every == 30
    assert (plan_of(57, epochs=1).max_steps, plan_of(57, epochs=1).batch_rows) == (4, None)
    tokens = plan_of(57, batch_tokens=2000)
    assert (tokens.batch_rows, tokens.max_steps) == (None, 20), "two steps an epoch, ten epochs"
    assert (plan_of(57, batch_rows=2).max_steps, plan_of(57, batch_rows=2).epochs) == (58, 2)
    assert plan_of(57, eval_every=3).eval_every == 3


@pytest.mark.parametrize(("accumulate", "size"), [(4, 1), (2, 2), (1, 4)])
def test_a_step_of_little_data_is_the_same_however_it_is_shared_out(accumulate, size, monkeypatch):
    monkeypatch.setattr(ranks, "size", lambda: size)
    plan = plan_of(57, accumulate=accumulate)
    assert (plan.batch_rows, plan.groups_in_step) == (2, 4)
    assert plan.max_steps == pytest.approx(60, abs=5) and plan.eval_every == pytest.approx(8, abs=1)
    assert plan_of(57, accumulate=8).batch_rows == 1


def test_unlabelled_text_is_no_part_of_the_epochs():
    text = [Example.after_prompt(range(3, 103), 1) for _ in range(16)]
    alone, first = plan_of(57), Plan(rows(57), text, TrainConfig())
    assert first.max_steps == alone.max_steps + 2 and first.first_stage == 2 and first.epochs == alone.epochs
    mixed = Plan(rows(57), text, TrainConfig(unlabeled_share=0.5))
    assert mixed.max_steps == 2 * alone.max_steps and mixed.epochs == alone.epochs


def test_the_plan_in_a_line():
    few = plan_of(57)
    tokens = sum(len(row.tokens) for row in few.rows)
    assert str(few) == (
        f"57 rows, {tokens:,} tokens (5% learned): 64 steps, 8 epochs, 7.12 rows and 406 tokens a step; chosen for little "
        "data, --epochs and --batch-rows choose otherwise"
    )
    assert str(plan_of(1, max_steps=1)) == "1 row, 60 tokens (5% learned): 1 step, 1 epoch, 1 rows and 60 tokens a step"
    facts = few.facts()
    assert (facts["rows"], facts["row_tokens"], facts["steps"], facts["epochs"]) == (57, tokens, 64, 8)
    assert facts["learned_share"] == pytest.approx(3 * 57 / tokens) and facts["eval_every"] == 8
    text = [Example.after_prompt(range(3, 103), 1) for _ in range(16)]
    assert "; 16 rows of text, 1,600 tokens, first, in 2 steps" in str(Plan(rows(57), text, TrainConfig()))
    assert "; 1 row of text, 100 tokens, first, in 1 step" in str(Plan(rows(57), text[:1], TrainConfig()))
    assert "1,600 tokens, mixed in" in str(Plan(rows(57), text, TrainConfig(unlabeled_share=0.5)))


@pytest.mark.parametrize("size", [1, 2])
def test_a_step_is_not_more_than_an_epoch(size, monkeypatch):
    monkeypatch.setattr(ranks, "size", lambda: size)
    most = 12 // size
    assert plan_of(24, batch_rows=2, accumulate=most).max_steps >= 1
    with pytest.raises(ConfigError, match=f"accumulate: a step of {most + 1} .* give {most} at most"):
        plan_of(24, batch_rows=2, accumulate=most + 1)
    monkeypatch.setattr(ranks, "size", lambda: 64)
    assert plan_of(24, batch_rows=2).groups_in_step == 64, "more ranks than micro-batches are no matter of --accumulate"
