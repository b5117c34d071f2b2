"""Estimates of shapes alone: against plain arithmetic, against the same step of a model with values, and on a stand-in for a GPU."""

import json

import pytest
import torch
from helpers import SMALL, build, quantize
from test_estimate import LABELS, ROWS, TOKENS, config_of, estimated, measured, placement_on
from transformers import MixtralConfig, MixtralForCausalLM
from zoo import families

from plopfast.lora.placement import Placement
from plopfast.models.experts import weights_of
from plopfast.models.linears import linear_modules
from plopfast.models.shapes import miniature, model_of
from plopfast.support.errors import ModelError
from plopfast.training.dry import MIB
from plopfast.training.estimate import estimate, estimate_shapes

HIDDEN, INNER, LAYERS, HEADS, GROUPS, VOCABULARY = 128, 352, 3, 4, 2, 640
T, RANK = 256, 8
SHAPE = {"rows": ROWS, "row_tokens": TOKENS, "label_tokens": LABELS}


@pytest.fixture
def llama(tmp_path):
    sizes = {
        "model_type": "llama", "hidden_size": HIDDEN, "intermediate_size": INNER, "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS, "num_key_value_heads": GROUPS, "vocab_size": VOCABULARY,
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(sizes))
    return str(tmp_path)


def counted(model, *types, settings=None, shape=None, **of):
    placement = placement_on(model, *types, rank=RANK)
    shape = shape or {"rows": 1, "row_tokens": T + 1}
    return placement, estimate_shapes(model, {"this": placement}, config_of(**(settings or {})), **shape, **of)[0]


def test_the_parts_are_those_of_plain_arithmetic(llama):
    """Bytes by hand, for bfloat16 weights as NF4 codes, recomputed blocks and two micro-batches."""
    model = model_of(llama, quantize="nf4", quantize_head=True)
    settings = {"checkpointing": True, "accumulate": 2}
    placement, got = counted(model, "v_proj", "o_proj", "down_proj", settings=settings)
    kv = HIDDEN * GROUPS // HEADS
    weights = 2 * HIDDEN * HIDDEN + 2 * HIDDEN * kv + 3 * HIDDEN * INNER
    adapter = RANK * ((HIDDEN + kv) + (HIDDEN + HIDDEN) + (INNER + HIDDEN)) * LAYERS
    assert placement.parameters == got.parameters == adapter
    by_hand = {
        "linear weights": LAYERS * weights * (0.5 + 4 / 64),  # half a byte, and float32 for 64 of them
        "output head": VOCABULARY * HIDDEN * (0.5 + 4 / 64),
        "embedding": VOCABULARY * HIDDEN * 2,
        "workspace of a decoded weight": HIDDEN * VOCABULARY * 2,
        "adapters": 4 * adapter, "adapters in the weights' dtype": 2 * adapter, "gradients": 4 * adapter,
        "AdamW's moments": 8 * adapter, "best values so far": 4 * adapter,
    }  # fmt: skip
    for part, size in by_hand.items():
        assert got.parts[part] == pytest.approx(size / MIB), part
    assert sum(got.parts.values()) == pytest.approx(got.total_mib)
    block_inputs = LAYERS * T * HIDDEN * 2
    assert block_inputs <= got.parts["kept for the backward pass"] * MIB <= block_inputs + 4 * T * HIDDEN * 2
    assert got.host_mib < 0.01 and got.crossed_mib == 0


def test_flops_are_those_of_plain_arithmetic(llama):
    """Products of a multiplication and an addition; nothing below the lowest adapter has a gradient."""
    _, got = counted(model_of(llama), "q_proj")
    kv, block = HIDDEN * GROUPS // HEADS, 0
    block = 2 * HIDDEN * HIDDEN + 2 * HIDDEN * kv + 3 * HIDDEN * INNER
    forward = 2 * T * (LAYERS * (block + RANK * 2 * HIDDEN) + VOCABULARY * HIDDEN)
    attention = 4 * T * T * HIDDEN * LAYERS
    into_x = 2 * T * ((LAYERS - 1) * block + HIDDEN * HIDDEN + 3 * HIDDEN * INNER + VOCABULARY * HIDDEN)
    of_adapters = 2 * T * RANK * HIDDEN * (4 * LAYERS - 1)  # dS, dA, dB, and dX but in the first block
    assert got.tflops_per_step * 1e12 == pytest.approx(forward + 3.5 * attention + into_x + of_adapters, rel=1e-6)


@pytest.mark.parametrize("kind", [None, "nf4"])
def test_a_model_without_values_counts_as_one_with_them(tmp_path, kind):
    """As the estimate of the model itself, and as the meter of a real training on the CPU."""
    model = build("llama")
    model.config.save_pretrained(tmp_path)
    if kind:
        quantize(model, kind)
    choice, settings = placement_on(model), config_of(checkpointing=kind is not None)
    of = {"dtype": torch.float32, "quantize": kind}
    got = estimate_shapes(model_of(str(tmp_path), **of), {"this": choice}, settings, device="cpu", **SHAPE)[0]
    assert got == estimated(model, choice, settings)
    if kind is None:
        assert got.total_mib == pytest.approx(measured(model, choice, settings)[0], rel=0.03)


@pytest.mark.parametrize("architecture", ["llama", "qwen3"])
def test_the_stand_in_for_a_gpu_counts_what_the_cpu_takes(tmp_path, architecture):
    model = build(architecture)
    model.config.save_pretrained(tmp_path)
    choice = placement_on(model)
    settings = config_of(checkpointing=True)
    card = estimate_shapes(model_of(str(tmp_path), dtype=torch.float32), {"this": choice}, settings, **SHAPE)[0]
    mib, tflops = measured(model, choice, settings)
    assert card.total_mib == pytest.approx(mib, rel=0.03)
    assert card.tflops_per_step == pytest.approx(tflops, rel=1e-6)


def test_what_takes_values_is_learned_from_a_small_model_of_the_family(llama):
    """Without it norms and MLPs would count as transformers computes them."""
    from plopfast.training import dry

    _, lean = counted(model_of(llama))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dry, "miniature", lambda model: None)
        _, plain = counted(model_of(llama))
    assert lean.parts["kept for the backward pass"] < 0.9 * plain.parts["kept for the backward pass"]
    small = miniature(model_of(llama, dtype=torch.float16))
    assert small.dtype == torch.float16 and not any(p.is_meta for p in small.parameters())
    assert len(small.model.layers) == 2 and sum(p.numel() for p in small.parameters()) < 200_000


def test_a_streamed_model_holds_two_blocks(llama):
    model = model_of(llama, quantize="nf4")
    settings = {"checkpointing": True}
    _, resident = counted(model, "v_proj", settings=settings)
    _, got = counted(model, "v_proj", settings=settings, resident_share=0.0)
    block = resident.parts["linear weights"] / LAYERS
    assert got.parts["slots of streamed blocks"] == pytest.approx(2 * block, rel=0.01)
    assert "linear weights" not in got.parts and got.host_mib == pytest.approx(LAYERS * block, rel=0.01)
    assert got.crossed_mib == pytest.approx((2 * LAYERS - 2) * block, rel=0.01)  # two stay in the slots at the turn
    assert got.tflops_per_step == resident.tflops_per_step


def test_what_mixes_the_devices_is_an_error(llama):
    """A weight that was left on the host shows as an error, not as a smaller count."""
    from plopfast.training import dry

    def left_behind(model, device):
        model.model.norm.weight = torch.nn.Parameter(torch.ones(HIDDEN, dtype=torch.bfloat16), requires_grad=False)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(ModelError, match="FakeTensorDeviceMismatch|devices"):
        patch.setattr(dry, "put_on", left_behind)
        counted(model_of(llama))


def test_a_mixture_that_needs_values_has_no_estimate(tmp_path):
    families.config_of("jetmoe").save_pretrained(tmp_path)
    model = model_of(str(tmp_path))
    first = linear_modules(model)[0].name
    with pytest.raises(ModelError, match="no estimate is possible"):
        estimate_shapes(model, {"this": Placement({first: (2, 4.0)}, [], "explicit", 0)}, config_of(), **SHAPE)


@pytest.mark.parametrize("way", ["eager", "grouped_mm"])
@pytest.mark.parametrize("adapted", ["experts", "attention", "full"])
def test_a_mixture_is_counted_as_with_values(tmp_path, adapted, way):
    """On the CPU, however transformers would compute its experts."""
    sizes = {**SMALL, "model_type": "mixtral", "num_local_experts": 4, "experts_implementation": way}
    (tmp_path / "config.json").write_text(json.dumps(sizes))
    empty, real = model_of(str(tmp_path)), MixtralForCausalLM(MixtralConfig(**SMALL, num_local_experts=4)).eval()
    real = real.to(torch.bfloat16)  # as it would be on a card
    names = [info.name for info in weights_of(real) if hasattr(info, "experts") == (adapted == "experts")]
    choice = {"this": None if adapted == "full" else Placement(dict.fromkeys(names, (2, 4.0)), [], "explicit", 0)}
    (got,) = estimate_shapes(empty, choice, config_of(), device="cpu", **SHAPE)
    (want,) = estimate(real, choice, config_of(), **SHAPE)
    assert got.total_mib == pytest.approx(want.total_mib, rel=0.01)
    assert got.tflops_per_step == pytest.approx(want.tflops_per_step) and got.parameters == want.parameters


def test_modules_are_those_of_the_loaded_model(llama):
    names = {info.name for info in linear_modules(model_of(llama, quantize="int8"))}
    assert len(names) == 7 * LAYERS
