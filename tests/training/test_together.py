"""Several trainings on one base: each is the one that it would be alone."""

import json
import os
import signal
import warnings

import pytest
import torch
from helpers import build, quantize

import plopfast as pf
from plopfast.lora.layer import adapters
from plopfast.support.errors import ConfigError, Interrupted, TrainingError
from plopfast.training.census import census
from plopfast.training.together import SLACK, Together, _batches, job_of

# alike to 1e-4 after twelve steps: AdamW's first steps divide a gradient by its own size, so roundings of small ones show
LOSS, ADAPTER = 1e-4, 2e-3
JOBS = {
    "a": {"rank": 4, "alpha": 8.0, "config": {"lr": 2e-3, "seed": 3, "max_steps": 12, "batch_tokens": 300, "eval_every": 4}},
    "b": {
        "rank": 7, "alpha": 3.0, "types": ("q_proj", "down_proj"), "options": {"rslora": True, "seed": 5},
        "config": {"lr": 5e-4, "schedule": "linear", "max_steps": 9, "batch_tokens": 200, "accumulate": 2, "weight_decay": 0.1},
    },
    "c": {
        "rank": 2, "alpha": 2.0, "options": {"seed": 7}, "rows": slice(10, 30),
        "config": {"lr": 1e-3, "schedule": "constant", "seed": 9, "epochs": 2.0, "batch_rows": 3, "ema": 0.9, "lora_plus": 4.0},
    },
    "d": {
        "rank": 3, "alpha": 6.0, "types": ("up_proj", "o_proj"), "options": {"dora": True},
        "config": {"lr": 1e-3, "max_steps": 7, "batch_tokens": 250, "clip": 0.0, "warmup": 0.3},
    },
}  # fmt: skip
DROPPING = {**JOBS, "c": {**JOBS["c"], "options": {"dropout": 0.2, "seed": 7}}}


def placement(model, job):
    types = job.get("types")
    modules = {i.name: (job["rank"], job["alpha"]) for i in pf.linear_modules(model) if not types or i.type in types}
    return pf.Placement(modules, [], "some", 0)


def settings(job, **more):
    return pf.TrainConfig(**{"keep": 9, **job["config"], **more})


def rows_of(job, examples):
    return examples[:48][job.get("rows", slice(None))], examples[48:]


def alone(job, examples, model=None, **more):
    model = model or build("llama")
    pf.inject(model, placement(model, job), **job.get("options", {}))
    trainer = pf.Trainer(model, settings(job, **more), *rows_of(job, examples))
    return trainer, trainer.fit()


def together(jobs, examples, model=None, out=None, at_once=None, kind=Together, shared=None, **more):
    model = model or build("llama")
    for name, job in jobs.items():
        pf.inject(model, placement(build("llama"), job), name=name, **job.get("options", {}))
    made = [
        job_of(model, name, settings(job, **(shared or {})), *rows_of(job, examples), out=out and out / name)
        for name, job in jobs.items()
    ]
    return kind(model, made, at_once=at_once, **more)


def check_alike(job, trainer, within=(LOSS, ADAPTER)):
    """The losses of all steps and validations, and the adapters that were kept."""
    assert [h.get("step") for h in job.history] == [h.get("step") for h in trainer.history]
    for ours, theirs in zip(job.history, trainer.history, strict=True):
        assert ours.keys() == theirs.keys()
        for key in ours.keys() - {"seconds", "positions"}:  # a shared batch is padded to its longest row
            assert ours[key] == pytest.approx(theirs[key], rel=within[0] * (10 if key == "grad_norm" else 1)), key
    assert (job.state.best_step, job.plan.facts()) == (trainer.state.best_step, trainer.plan.facts())
    assert job.parameters.keys() == trainer.parameters.keys()
    for key, mine in job.parameters.items():
        other = trainer.parameters[key]
        assert (mine - other).norm() <= within[1] * other.norm(), key


@pytest.mark.parametrize(
    "shared", [{}, {"checkpointing": True}, {"packing": True}, {"packing": True, "checkpointing": True}]
)
def test_each_is_as_alone(examples, shared):
    """Of other rows, modules, ranks, rates, seeds, schedules, batches and ends, with DoRA, and, where no row is padded, with dropout:
    its masks know places in the batch."""
    jobs = DROPPING if "packing" in shared else JOBS
    several = together(jobs, examples, shared=shared)
    results = several.fit()
    for name, job in jobs.items():
        trainer, result = alone(job, examples, **shared)
        check_alike(several.jobs[name], trainer)
        assert several.jobs[name].identity == trainer.identity
        for key in ("steps", "best_step", "stopped", "tokens", "unmoved"):
            assert getattr(results[name], key) == getattr(result, key)
    assert {results[name].steps for name in JOBS} > {12, 9, 7}
    assert all(one.generator is None for name in JOBS for one in adapters(several.model, name).values())


def test_a_quantised_base(examples):
    several = together({key: JOBS[key] for key in "ab"}, examples, quantize(build("llama"), "nf4"))
    several.fit()
    for name in "ab":
        trainer, _ = alone(JOBS[name], examples, quantize(build("llama"), "nf4"))
        check_alike(several.jobs[name], trainer)


@pytest.mark.parametrize("packing", [False, True])
def test_adapters_of_the_output_head(examples, packing):
    """The head gets label tokens alone where it has no names, and then no row's own could be told."""
    config = {"lr": 1e-2, "max_steps": 3, "batch_tokens": 200, "packing": packing}

    def trained(names):
        model = build("llama")
        where = pf.Placement({"lm_head": (4, 8.0), "model.layers.1.mlp.down_proj": (4, 8.0)}, [], "some", 0)
        for name in names:
            pf.inject(model, where, name=name, seed=ord(name))
        rows = {"a": examples[:20], "b": examples[20:40]}
        jobs = [job_of(model, name, pf.TrainConfig(**config), rows[name], examples[48:]) for name in names]
        Together(model, jobs).fit()
        return jobs

    for job in trained("ab"):
        check_alike(job, *trained(job.name))


def test_no_training_beside_a_merged_adapter(examples):
    model = build("llama")
    for name in "ab":
        pf.inject(model, placement(build("llama"), JOBS[name]), name=name)
    pf.merge_adapter(model, "a")
    with pytest.raises(TrainingError, match="'a' is merged into the weights: unmerge_adapter"):
        job_of(model, "b", settings(JOBS["b"]), examples[:48])


def test_a_few_at_a_time(examples):
    """Whoever waits gives the same; at no time are there more."""
    seen = []

    class Counted(Together):
        def _step(self, meter):
            seen.append(list(self._running))
            super()._step(meter)

    whole, some = together(JOBS, examples), together(JOBS, examples, at_once=2, kind=Counted)
    whole.fit(), some.fit()
    assert max(map(len, seen)) == 2 and seen[0] == ["a", "b"] and {name for names in seen for name in names} == {*JOBS}
    for name in JOBS:
        check_alike(some.jobs[name], whole.jobs[name])


class Signalled(Together):
    at = 5

    def _step(self, meter):
        super()._step(meter)
        if max(job.step for job in self.jobs.values()) == self.at:
            os.kill(os.getpid(), signal.SIGTERM)


def test_interrupted_and_resumed(examples, tmp_path):
    whole = together(DROPPING, examples, out=tmp_path / "whole")
    whole.fit()
    stopped = together(DROPPING, examples, out=tmp_path / "parts", kind=Signalled)
    with pytest.raises(Interrupted, match="a after step 5 of 12, b after step 5 of 9"):
        stopped.fit()
    resumed = together(DROPPING, examples, out=tmp_path / "parts")
    results = resumed.fit(resume=[*JOBS])
    for name in JOBS:
        for key, value in whole.jobs[name].parameters.items():
            assert torch.equal(value, resumed.jobs[name].parameters[key]), (name, key)
        lines = [json.loads(line) for line in (tmp_path / "parts" / name / "metrics.jsonl").read_text().splitlines()]
        assert [line["step"] for line in lines if "lr" in line] == list(range(1, results[name].steps + 1))


def test_one_that_diverges_ends_alone(examples):
    """Its loss is no number from the first step on, and the others do not notice."""
    jobs = {key: JOBS[key] for key in "abc"} | {"bad": {**JOBS["a"], "config": {**JOBS["a"]["config"], "lr": 1e30}}}
    ended = []
    several = together(jobs, examples, on_end=lambda name, result: ended.append((name, type(result).__name__)))
    with torch.no_grad():
        next(iter(adapters(several.model, "bad").values())).lora_A.fill_(float("inf"))
    results = several.fit()
    assert isinstance(results["bad"], TrainingError) and "loss nan" in str(results["bad"])
    assert ended[0] == ("bad", "TrainingError") and {name for name, _ in ended[1:]} == {*"abc"}
    for name in "abc":
        trainer, _ = alone(JOBS[name], examples)
        check_alike(several.jobs[name], trainer)


def test_one_stops_early_and_the_others_go_on(examples):
    jobs = {
        "a": JOBS["a"],
        "e": {**JOBS["a"], "config": {**JOBS["a"]["config"], "lr": 0.3, "patience": 1, "eval_every": 1}},
    }
    several = together(jobs, examples)
    results = several.fit()
    _, result = alone(jobs["e"], examples)
    assert results["e"].stopped == result.stopped == "early: the validation loss stopped improving"
    assert results["e"].steps == result.steps < results["a"].steps == 12


def test_rows_of_like_length_share_a_batch(examples):
    class Row:
        def __init__(self, length):
            self.tokens = [0] * length

    due = {"long": [Row(100)], "short": [Row(8)] * 4, "other": [Row(9)] * 2, "near": [Row(90)] * 3}
    parts = _batches(due, in_one=False)
    assert [set(part) for part in parts] == [{"short", "other"}, {"near", "long"}]
    for part in parts:
        own = sum(len(rows) * max(len(row.tokens) for row in rows) for rows in part.values())
        longest = max(len(row.tokens) for rows in part.values() for row in rows)
        assert sum(map(len, part.values())) * longest <= (1 + SLACK) * own
    assert _batches(due, in_one=True) == [due]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"b": {"packing": True}}, "b: packing is True, and False in a: all jobs are computed in one pass"),
        ({"a": {"checkpointing": True}}, "b: checkpointing is False, and True in a"),
        ({"a": {"neftune": 5.0}, "b": {"neftune": 5.0}}, "neftune draws one noise"),
        ({"a": {"mlp_rows": 8}, "b": {"mlp_rows": 8}}, "mlp_rows computes some tokens"),
        ({"a": {"compile": True}, "b": {"compile": True}}, "compile would compile"),
    ],
)
def test_settings_that_cannot_be(examples, changes, message):
    jobs = {name: {**JOBS[name], "config": {**JOBS[name]["config"], **changes.get(name, {})}} for name in "ab"}
    with pytest.raises(ConfigError, match=message):
        together(jobs, examples)


def test_a_job_without_its_adapter(examples):
    several = together({"a": JOBS["a"]}, examples)
    job = several.jobs["a"]
    for jobs in ([], [job, job]):
        with pytest.raises(TrainingError):
            Together(several.model, jobs)
    with pytest.raises(TrainingError, match="no parameter requires a gradient"):
        job_of(several.model, "x", pf.TrainConfig(), examples)


def test_the_model_is_left_as_it_was(examples):
    several = together({key: JOBS[key] for key in "ab"}, examples)
    model = several.model
    before = {n: p.clone() for n, p in model.named_parameters() if "lora_" not in n}
    modes, state = [m.training for m in model.modules()], torch.get_rng_state()
    forwards = [vars(m).get("forward") for m in model.modules()]
    several.fit()
    assert modes == [m.training for m in model.modules()] and torch.equal(state, torch.get_rng_state())
    assert forwards == [vars(m).get("forward") for m in model.modules()]
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters() if n in before)
    assert all(p.grad is None for p in model.parameters())


def test_modules_that_do_not_move_have_their_own_types(examples):
    """Not those of the adapters' places in them."""
    several = together({"b": JOBS["b"]}, examples)
    job = several.jobs["b"]
    assert [(one.type, one.count, one.total) for one in census(several.model, job.parameters, job.optimizer)] == [
        ("q_proj", 3, 3),
        ("down_proj", 3, 3),
    ]


def test_dropout_of_the_base_is_said(examples):
    model = build("gpt2")
    assert any(m.p > 0 for m in model.modules() if isinstance(m, torch.nn.Dropout))
    jobs = {name: {"rank": 2, "alpha": 4.0, "config": {"max_steps": 2, "batch_tokens": 200}} for name in "ab"}
    for name, job in jobs.items():
        pf.inject(model, placement(build("gpt2"), job), name=name)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        several = Together(model, [job_of(model, name, settings(job), examples[:20]) for name, job in jobs.items()])
        several.fit()
    assert any("dropout of its own" in note for note in several.notes)
    assert "computed together: 2 adapters, at most 2 at a time" in several.paths()
