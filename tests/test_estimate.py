"""Estimates against the same counters over real training steps."""

import pytest
from conftest import CONFIGS, build
from torch.utils.flop_counter import FlopCounterMode

from plopfast.blocks import prepared_blocks
from plopfast.config import RunConfig
from plopfast.data import Example
from plopfast.estimate import FORMULAS, MIB, Meter, estimate
from plopfast.lora import inject, prepared
from plopfast.models import linear_modules
from plopfast.placement import Placement
from plopfast.train import Trainer

ROWS, TOKENS, LABELS = 4, 24, 10


def placement_on(model, *types, rank=4):
    chosen = [info for info in linear_modules(model) if not types or info.type in types]
    return Placement(
        {i.name: (rank, 8.0) for i in chosen}, [*types], "explicit", sum(rank * (i.n_in + i.n_out) for i in chosen)
    )


def trainer_of(model, placement, config):
    if placement is None:
        model.requires_grad_(True)
    else:
        inject(model, placement, dropout=config.dropout)
    start = TOKENS - LABELS
    rows = [Example(list(range(5 + i, 5 + i + TOKENS)), start, {}, f"row {i}") for i in range(3 * ROWS)]
    return Trainer(model, config, rows, rows[:1])


def measured(model, placement, config):
    """(peak MiB over two optimizer steps, TFLOPs of one) of a real training"""
    with Meter() as live:
        for tensor in (*model.parameters(), *model.buffers()):
            live.add(tensor)
        trainer = trainer_of(model, placement, config)
        trainer.fit()
    batch = trainer._collate(trainer.rows[:ROWS])
    model.train()
    flops = FlopCounterMode(display=False, custom_mapping=FORMULAS)
    with prepared_blocks(model, config), prepared(model), flops:
        trainer.objective(batch).backward()
    return live.peak / MIB, flops.get_total_flops() * config.accumulate / 1e12


@pytest.mark.parametrize("kind", ["attn", "all", "full"])
@pytest.mark.parametrize("architecture", sorted(CONFIGS))
def test_within_a_tenth_of_real_steps(architecture, kind):
    config = RunConfig(batch_tokens=ROWS * TOKENS, max_steps=2)
    types = [
        t
        for t in ("q_proj", "v_proj", "qkv_proj", "c_attn")
        if any(i.type == t for i in linear_modules(build(architecture)))
    ]
    model = build(architecture)
    choice = None if kind == "full" else placement_on(model, *(types if kind == "attn" else ()))
    (got,) = estimate(model, {kind: choice}, config, rows=ROWS, row_tokens=TOKENS, label_tokens=LABELS)
    mib, tflops = measured(model, choice, config)
    print(architecture, kind, got.total_mib / mib, got.tflops_per_step / tflops, got)
    assert got.total_mib == pytest.approx(mib, rel=0.1)
    assert got.tflops_per_step == pytest.approx(tflops, rel=0.1)
    assert got.parameters == sum(p.numel() for p in model.parameters() if p.requires_grad)
