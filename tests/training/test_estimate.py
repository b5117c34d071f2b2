"""Estimates against the same meter, and torch's counter of FLOPs, over real training steps."""

import dataclasses

import pytest
import torch
from helpers import CONFIGS, SMALL, build, quantize
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode, flop_registry, sdpa_backward_flop_count, sdpa_flop_count
from transformers import MixtralConfig, MixtralForCausalLM

from plopfast.data.batches import collate
from plopfast.data.example import Example
from plopfast.lora.injection import inject
from plopfast.lora.layer import adapters
from plopfast.lora.placement import Placement
from plopfast.lora.shared import Prepared
from plopfast.models.experts import weights_of
from plopfast.models.linears import linear_modules
from plopfast.support.config import RunConfig
from plopfast.support.errors import ConfigError, ModelError
from plopfast.training.blocks import prepared_blocks
from plopfast.training.estimate import MIB, as_rows, estimate
from plopfast.training.meter import FORMULAS, Meter, attention_flops
from plopfast.training.trainer import Trainer

ROWS, TOKENS, LABELS = 4, 24, 20  # so many that the peak lies in the loss, and not in the masks of dropout
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
    rows = [
        Example.after_prompt(tuple(range(5 + i, 5 + i + TOKENS)), TOKENS - LABELS, None, f"row {i}")
        for i in range(4 * ROWS)
    ]
    with Meter() as meter:
        for tensor in (*model.parameters(), *model.buffers()):
            meter.add(tensor)
        if placement is None:
            model.requires_grad_(True)
        else:
            inject(model, placement, dropout=config.dropout, dora=config.dora)
        trainer = Trainer(model, config, rows, rows[:1])
        trainer.fit()
    batch = collate(rows[:ROWS])
    model.train()
    flops = FlopCounterMode(display=False, custom_mapping=FORMULAS)
    with prepared_blocks(model, config), Prepared(model), flops:
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


@pytest.mark.parametrize("kind", ["attn", "experts", "all", "full"])
def test_agrees_with_real_steps_of_a_mixture(kind):
    """Memory with transformers' grouped products; their FLOPs torch does not know, so these come from its plain way."""
    found = {}
    for way in ("grouped_mm", "eager"):
        torch.manual_seed(0)
        model = MixtralForCausalLM(MixtralConfig(**SMALL, num_local_experts=4)).eval()
        model.set_experts_implementation(way)
        infos = [
            i for i in weights_of(model) if kind in ("all", "full") or hasattr(i, "experts") == (kind == "experts")
        ]
        chosen = Placement({info.name: (4, 8.0) for info in infos}, [], "explicit", 0)
        choice = None if kind == "full" else chosen
        found[way] = estimated(model, choice), *measured(model, choice, config_of())
    got, mib, _ = found["grouped_mm"]
    assert got.total_mib == pytest.approx(mib, rel=0.03)
    got, _, tflops = found["eager"]
    assert got.tflops_per_step == pytest.approx(tflops, rel=1e-6)


SETTINGS = [{"checkpointing": True}, {"accumulate": 2}, {"dropout": 0.1}, {"ema": 0.9}, {"dora": True}]


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
    if "dora" in settings:
        lengths = sum(module.lora_magnitude.numel() for module in adapters(model).values())
        assert got.parameters == plain.parameters + lengths > plain.parameters
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


@pytest.mark.parametrize("kind", ["nf4", "int8", "fp8"])
def test_quantised_weights_are_counted_as_codes(kind):
    """All weights, though, are trained dense."""
    dense, model = build("llama"), quantize(build("llama"), kind)
    want, got = estimated(dense, placement_on(dense)), estimated(model, placement_on(model))
    saved = sum(p.nbytes for p in dense.parameters()) - sum(p.nbytes for p in model.parameters())
    assert want.weights_mib - got.weights_mib == pytest.approx(saved / MIB) and saved > 0
    assert got.activations_mib == want.activations_mib and got.tflops_per_step == want.tflops_per_step
    assert dataclasses.astuple(estimated(model, None)) == dataclasses.astuple(estimated(dense, None))


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
    assert twice.tflops_per_step == pytest.approx(2 * with_best.tflops_per_step, rel=1e-4)
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


B, H, G, T, S, D, E = (
    2,
    9,
    3,
    20,
    24,
    64,
    48,
)  # rows, heads of queries and of keys, tokens, widths of queries and values
ATTENTION = [op for op in FORMULAS if "scaled_dot_product" in str(op)]


@pytest.mark.parametrize("op", ATTENTION, ids=str)
def test_grouped_heads_count_as_if_each_had_its_own(op):
    """And heads that are not grouped as torch counts them."""
    q, y, (k, v), (all_k, all_v) = (
        (B, H, T, D), (B, H, T, E), ((B, G, S, D), (B, G, S, E)), ((B, H, S, D), (B, H, S, E)),
    )  # fmt: skip
    formula, backward = FORMULAS[op], str(op).endswith("backward")
    first = (y, q) if backward else (q,)
    grouped = formula(*first, k, v, 0.0, True, out_shape=(y,))
    assert grouped == formula(*first, all_k, all_v) == 2 * B * H * T * S * ((3 * D + 2 * E) if backward else (D + E))
    assert grouped == (sdpa_backward_flop_count if backward else sdpa_flop_count)(*first, all_k, all_v)


def test_every_attention_of_torch_has_its_formula():
    known = {str(op) for op in flop_registry if "scaled_dot_product" in str(op)}
    assert known <= set(map(str, ATTENTION)) and len(ATTENTION) == 10


@pytest.mark.parametrize("kind", ["flash", "efficient", "cudnn"])
def test_grouped_heads_on_a_gpu_without_one(kind, monkeypatch):
    """The operations of a GPU, on tensors without values, where torch's own formulas refuse grouped heads (torch 2.11)."""

    def refuse(*_, **__):
        raise AssertionError("query/key/value shapes are incompatible")

    op = getattr(torch.ops.aten, f"_scaled_dot_product_{kind}_attention")
    monkeypatch.setitem(flop_registry, op, refuse)
    more = () if kind == "flash" else (None, True)
    with FakeTensorMode(), Meter() as meter:
        q, k = (torch.empty(B, heads, T, D, device="cuda", dtype=torch.bfloat16) for heads in (H, G))
        op(q, k, k, *more)
    assert meter.flops == attention_flops(q.shape, k.shape, k.shape) == 4 * B * H * T * T * D


@pytest.mark.parametrize("error", [AssertionError("shapes are incompatible"), TypeError("got an array"), KeyError("x")])
def test_whatever_is_raised_is_a_model_error(error, monkeypatch):
    """So that a run goes on without its estimate."""

    def refuse(*_, **__):
        raise error

    monkeypatch.setitem(FORMULAS, torch.ops.plopfast.lora_forward, refuse)
    with pytest.raises(ModelError, match=f"LlamaForCausalLM: no estimate is possible.*{type(error).__name__}"):
        estimated(model := build("llama"), placement_on(model))


def test_progress_is_shown(capsys):
    model = build("llama")
    choices = {"this": placement_on(model), "full": None}
    estimate(model, choices, config_of(), rows=2, row_tokens=8, progress=True)
    assert "2/2" in capsys.readouterr().err
    estimate(model, choices, config_of(), rows=2, row_tokens=8)
    assert not capsys.readouterr().err


def test_rows():
    model = build("llama")
    small, full = estimated(model, placement_on(model)), estimated(model, None)
    rows = as_rows([small, dataclasses.replace(full, name="full")])
    assert rows[0]["memory_of_full"] == pytest.approx(small.total_mib / full.total_mib)
    assert rows[0]["flops_of_full"] < 1 == rows[1]["memory_of_full"] == rows[1]["flops_of_full"]


def test_dropout_keeps_a_seed_for_each_module():
    model = build("llama")
    choice = placement_on(model)
    got, plain = (estimated(model, choice, config_of(dropout=p)) for p in (0.5, 0.0))
    assert (got.activations_mib - plain.activations_mib) * 2**20 == pytest.approx(8 * len(choice.modules))
