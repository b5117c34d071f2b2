"""Estimates against the same meter, and torch's counter of FLOPs, over real training steps."""

import dataclasses

import pytest
import torch
from helpers import CONFIGS, build
from torch.utils.flop_counter import FlopCounterMode

from plopfast.data.rows import Example
from plopfast.lora.layer import adapters, inject
from plopfast.lora.placement import Placement
from plopfast.lora.shared import prepared
from plopfast.models.linears import linear_modules
from plopfast.support.config import RunConfig
from plopfast.support.errors import ConfigError, ModelError
from plopfast.training.blocks import prepared_blocks
from plopfast.training.estimate import FORMULAS, MIB, Meter, as_rows, estimate
from plopfast.training.trainer import Trainer

ROWS, TOKENS, LABELS = 4, 24, 10
INPUTS = ("q_proj", "v_proj", "qkv_proj", "c_attn")


def placement_on(model, *types, rank=4):
    chosen = [info for info in linear_modules(model) if not types or info.type in types]
    size = sum(rank * (i.n_in + i.n_out) for i in chosen)
    return Placement({i.name: (rank, 8.0) for i in chosen}, sorted({i.type for i in chosen}), "explicit", size)


def config_of(**settings):
    return RunConfig(batch_tokens=ROWS * TOKENS, max_steps=2, **settings)


def estimated(model, choice, config=None):
    shape = {"rows": ROWS, "row_tokens": TOKENS, "label_tokens": LABELS}
    return estimate(model, {"this": choice}, config or config_of(), **shape)[0]


def measured(model, placement, config):
    """(peak MiB over two optimizer steps, TFLOPs of one) of a real training"""
    rows = [Example(tuple(range(5 + i, 5 + i + TOKENS)), TOKENS - LABELS, None, f"row {i}") for i in range(4 * ROWS)]
    with Meter() as meter:
        for tensor in (*model.parameters(), *model.buffers()):
            meter.add(tensor)
        if placement is None:
            model.requires_grad_(True)
        else:
            inject(model, placement, dropout=config.dropout)
        trainer = Trainer(model, config, rows, rows[:1])
        trainer.fit()
    batch = trainer._collate(rows[:ROWS])
    model.train()
    flops = FlopCounterMode(display=False, custom_mapping=FORMULAS)
    with prepared_blocks(model, config), prepared(model), flops:
        trainer.objective(batch).backward()
    return meter.peak / MIB, flops.get_total_flops() * config.accumulate / 1e12


@pytest.mark.parametrize("kind", ["attn", "all", "full"])
@pytest.mark.parametrize("architecture", sorted(CONFIGS))
def test_agrees_with_real_steps(architecture, kind):
    model = build(architecture)
    choice = None if kind == "full" else placement_on(model, *(INPUTS if kind == "attn" else ()))
    got = estimated(model, choice)
    mib, tflops = measured(model, choice, config_of())
    assert got.total_mib == pytest.approx(mib, rel=0.03)
    assert got.tflops_per_step == pytest.approx(tflops, rel=1e-6)
    assert got.parameters == sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert choice is None or got.parameters == choice.parameters


SETTINGS = [{"checkpointing": True}, {"accumulate": 2}, {"dropout": 0.1}, {"ema": 0.9}]


@pytest.mark.parametrize("settings", SETTINGS, ids=lambda s: next(iter(s)))
def test_settings_count(settings):
    model = build("llama")
    choice, config = placement_on(model), config_of(**settings)
    got, plain = estimated(model, choice, config), estimated(model, choice)
    mib, tflops = measured(model, choice, config)
    assert got.total_mib == pytest.approx(mib, rel=0.03)
    assert got.tflops_per_step == pytest.approx(tflops, rel=1e-6)
    if "checkpointing" in settings:
        assert got.activations_mib < 0.5 * plain.activations_mib and got.tflops_per_step > plain.tflops_per_step
    if "accumulate" in settings:
        assert got.tflops_per_step == pytest.approx(2 * plain.tflops_per_step)
    if "ema" in settings:
        assert got.total_mib - plain.total_mib == pytest.approx(choice.parameters * 4 / MIB)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype):
    model = build("llama").to(dtype)
    choice = placement_on(model)
    got = estimated(model, choice)
    assert got.weights_mib == pytest.approx(estimated(build("llama"), choice).weights_mib / 2, rel=0.01)
    mib, tflops = measured(model, choice, config_of())
    assert got.total_mib == pytest.approx(mib, rel=0.1)
    assert got.tflops_per_step == pytest.approx(tflops, rel=1e-6)


def test_full_fine_tuning_is_in_float32():
    want, got = (estimated(model, None) for model in (build("llama"), build("llama").to(torch.bfloat16)))
    assert got.total_mib == pytest.approx(want.total_mib, rel=0.001) and got.parameters == want.parameters
    assert got.tflops_per_step == want.tflops_per_step
    size = sum(p.nbytes for p in build("llama").parameters()) / MIB
    assert got.adapters_mib == pytest.approx(4 * size), "gradient, two moments, best values"
    assert got.total_mib > 5 * size


def test_the_model_stays_as_it_is():
    model = build("llama")
    before = {name: p.clone() for name, p in model.state_dict().items()}
    flags = [p.requires_grad for p in model.parameters()]
    forwards = [m for m in model.modules() if "forward" in vars(m)]
    for choice in (placement_on(model), None):
        estimated(model, choice)
    assert not adapters(model) and not model.training and model.config._attn_implementation == "sdpa"
    assert [p.requires_grad for p in model.parameters()] == flags
    assert [m for m in model.modules() if "forward" in vars(m)] == forwards
    assert all(torch.equal(p, before[name]) for name, p in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())


def test_the_best_copy_and_the_batch_count():
    model = build("llama")
    choice = placement_on(model)
    shape = {"rows": ROWS, "row_tokens": TOKENS}
    with_best, without = (estimate(model, {"a": choice}, config_of(), best=b, **shape)[0] for b in (True, False))
    assert with_best.total_mib - without.total_mib == pytest.approx(choice.parameters * 4 / MIB)
    (twice,) = estimate(model, {"a": choice}, config_of(), rows=2 * ROWS, row_tokens=TOKENS)
    assert twice.activations_mib == pytest.approx(2 * with_best.activations_mib, rel=0.02)
    assert twice.tflops_per_step == pytest.approx(2 * with_best.tflops_per_step)
    assert with_best.logits_mib > estimated(model, choice).logits_mib, "all tokens have labels"


def test_what_cannot_be_estimated():
    class Choosy(torch.nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, x):
            return self.inner(x) if x.abs().sum() >= 0 else x  # as a router does

    class Foreign(Choosy):
        def forward(self, x):
            return self.inner(x) + float(x.detach().numpy().sum())  # as a kernel that torch does not know

    for kind in (Choosy, Foreign):
        model = build("llama")
        model.model.layers[1].mlp = kind(model.model.layers[1].mlp)
        with pytest.raises(ModelError, match="depends on its values"):
            estimated(model, placement_on(model))
    model = build("llama")
    model.supports_gradient_checkpointing = False
    with pytest.raises(ConfigError, match="no gradient checkpointing"):
        estimated(model, placement_on(model), config_of(checkpointing=True))


def test_the_meter_counts_each_storage_once_while_it_lives():
    with Meter() as meter:
        x = torch.ones(256)
        view = x[:10]
        y = x.view(16, 16) @ x.view(16, 16)
        assert meter.now == meter.peak == 2048 and meter.flops == 2 * 16**3
        del x
        assert meter.now == 2048, "the view keeps it"
        del view, y
    assert meter.now == 0 and meter.peak == 2048


def test_rows():
    model = build("llama")
    small, full = estimated(model, placement_on(model)), estimated(model, None)
    rows = as_rows([small, dataclasses.replace(full, name="full")])
    assert rows[0]["memory_of_full"] == pytest.approx(small.total_mib / full.total_mib)
    assert rows[0]["flops_of_full"] < 1 == rows[1]["memory_of_full"] == rows[1]["flops_of_full"]
