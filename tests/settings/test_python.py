"""The same from Python: every option of the public functions changes what it says, or nothing at all."""

import dataclasses
import inspect

import pytest
import torch
from helpers import build, everywhere, random_batches

import plopfast as pf
from plopfast.lora.layer import adapters
from plopfast.models.linears import linear_modules

BUDGET = {"budget": 9500, "k": 7}
SINGLE = {"budget": 700, "granularity": "module", "rank": 2}
SURE = {"confidence": 0.5}
MONTE_CARLO = {"baseline": "monte-carlo", "mc_samples": 16}
OPTIONS = {  # function -> option -> (what goes with it, its other value, whether the result is another one)
    "score": {
        "tokens": ({}, "prompt", True), "skip_bos": ({}, False, True), "include_head": ({}, True, True),
        "baseline": ({}, "monte-carlo", True), "mc_samples": (MONTE_CARLO, 32, True), "seed": (MONTE_CARLO, 1, True),
        "compat": ({}, "official", True), "confidence": ({}, 0.5, True), "k": (SURE, 1, True), "inverse": (SURE, True, True),
        "eva_rank": ({}, 2, True), "batch_tokens": ({}, 4000, False), "backend": ({}, "torch", False), "progress": ({}, True, False),
    },
    "place": {
        "rule": ({}, "mlp", True), "k": ({}, 1, True), "rank": ({}, 3, True), "alpha": ({}, 5.25, True), "seed": ({}, 1, False),
        "budget": ({}, 2000, True), "ranks": (BUDGET, "proportional", True), "granularity": ({"budget": 700, "rank": 2}, "module", True),
        "cap": (SINGLE, 1, True), "criteria": ({}, {"other": {}}, False),
    },
    "inject": {
        "dropout": ({}, 0.5, True), "rslora": ({}, True, True), "dora": ({}, True, True), "seed": ({}, 1, True), "backend": ({}, "torch", False),
        "name": ({}, "x", True), "init": ({}, "gaussian", True), "eva": ({"init": "eva"}, "vectors", True),
    },
}  # fmt: skip


def scored(**options):
    report = pf.score(build("llama"), random_batches(count=8), **options)
    return report.scores, report.decision, report.eva, report.prompts


def injected(**options):
    model = build("llama")
    if options.get("init") == "eva":
        ones = options.get("eva") != "vectors"
        options["eva"] = {
            i.name: torch.ones(2, i.n_in) if ones else torch.eye(2, i.n_in) for i in linear_modules(model)
        }
    pf.inject(model, everywhere(model, rank=2), **options)
    return [(m.lora_A, m.scaling, m.dropout, m.lora_magnitude is not None) for m in adapters(model).values()]


@pytest.fixture(scope="module")
def functions():
    report = pf.score(build("llama"), random_batches(count=8))
    for number, (name, one) in enumerate(report.scores.items()):  # further apart than a random model's
        report.scores[name] = dataclasses.replace(one, nfn=0.5 + number % 7 + number / 100)

    def placed(**options):
        placement = pf.place(report, options.pop("rule", "plop"), **{"rank": 16, **options})
        return placement.modules, placement.types

    return {"score": scored, "place": placed, "inject": injected}


def alike(one, other) -> bool:
    """The same bits, but that scores may be rounded differently in other batches."""
    if isinstance(one, dict | list | tuple) and type(one) is type(other) and len(one) == len(other):
        keys = one.keys() if isinstance(one, dict) else range(len(one))
        return (not isinstance(one, dict) or one.keys() == other.keys()) and all(
            alike(one[key], other[key]) for key in keys
        )
    if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        return torch.equal(one, other)
    if hasattr(one, "nfn") and hasattr(other, "nfn"):
        return one.nfn == pytest.approx(other.nfn, rel=1e-6) and one.tokens == other.tokens
    return one == other


@pytest.mark.parametrize(("function", "option"), [(name, option) for name, of in OPTIONS.items() for option in of])
def test_an_option_of_a_function(functions, function, option):
    also, other, changes = OPTIONS[function][option]
    with torch.random.fork_rng(devices=[]):
        one, two = functions[function](**also), functions[function](**{**also, option: other})
    assert alike(one, two) != changes


def test_every_option_of_these_functions_is_here():
    for name, function in {"score": pf.score, "place": pf.place, "inject": pf.inject}.items():
        parameters = [p for p in inspect.signature(function).parameters.values() if p.default is not p.empty]
        assert {p.name for p in parameters} == {*OPTIONS[name]}, name
