"""Recomputed, compiled, offloaded and leaner blocks: the same numbers, and what they are for."""

import sys
import types

import pytest
import torch
from helpers import CONFIGS, ROWS, STARTS, build, gradients, made, prompted, trained

import plopfast as pf
from plopfast.data.batches import collate
from plopfast.data.example import Example
from plopfast.kernels import library_rows
from plopfast.lora.layer import adapters
from plopfast.models import rotary
from plopfast.models.linears import blocks
from plopfast.support.errors import ConfigError, TrainingError
from plopfast.training.blocks import lean_modules, prepared_blocks
from plopfast.training.loss import Objective, inputs_of
from plopfast.training.offload import OFFLOADED_BYTES, offloaded

BATCH = collate(prompted(ROWS, STARTS))


def saved_bytes(model, call):
    """Bytes that the forward pass keeps for the backward pass, weights aside."""
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        held = call()
    del held
    return sum(kept.values())


def loss_and_gradients(model, objective, config, dropout_seed=3):
    model.zero_grad()
    model.train()
    torch.manual_seed(dropout_seed)
    with prepared_blocks(model, config) as notes:
        loss = objective(BATCH)
        loss.backward()
    return loss.detach(), gradients(model), notes


@pytest.mark.parametrize("name", sorted(CONFIGS))
def test_recomputed_blocks_give_the_same_bits_with_less_kept(name):
    """With dropout, whose masks must come again in the second forward pass."""
    model = trained(build(name))
    for module in adapters(model).values():
        module.dropout = 0.2
    objective = Objective(model, recomputed=True)
    plain = loss_and_gradients(model, objective, pf.TrainConfig())
    again = loss_and_gradients(model, objective, pf.TrainConfig(checkpointing=True))
    assert torch.equal(plain[0], again[0]) and "computed again" in again[2][0]
    assert all(torch.equal(plain[1][key], again[1][key]) for key in plain[1])
    model.train()
    kept = {}
    for on in (False, True):
        with prepared_blocks(model, pf.TrainConfig(checkpointing=on)):
            kept[on] = saved_bytes(model, lambda: objective(BATCH))
    assert kept[True] < 0.3 * kept[False]
    assert loss_and_gradients(model, objective, pf.TrainConfig())[2] == plain[2], "nothing is left in force"


@pytest.mark.parametrize("checkpointing", [False, True])
def test_half_precision_trains_on_the_cpu(checkpointing, examples):
    """Short rows take plain attention there, unless blocks are recomputed: then both passes must choose alike."""
    model = build("llama").to(torch.bfloat16)
    trained(model)
    config = pf.TrainConfig(max_steps=20, batch_tokens=300, lr=1e-2, checkpointing=checkpointing)
    trainer = pf.Trainer(model, config, examples)
    trainer.fit()
    assert trainer.history[-1]["loss"] < trainer.history[0]["loss"] - 0.2
    assert all(p.dtype == torch.float32 for p in trainer.parameters.values())


def test_a_model_without_recomputation_says_so(llama):
    trained(llama)
    llama.supports_gradient_checkpointing = False
    with (
        pytest.raises(ConfigError, match="no gradient checkpointing"),
        prepared_blocks(llama, pf.TrainConfig(checkpointing=True)),
    ):
        pass


def test_blocks_by_name():
    assert list(blocks(build("llama"))) == [f"model.layers.{i}" for i in range(3)]
    assert list(blocks(build("gpt2"))) == [f"transformer.h.{i}" for i in range(3)]


@pytest.mark.parametrize("name", sorted(CONFIGS))
def test_lean_modules(name):
    model = trained(build(name))
    objective = Objective(model)
    want = objective(BATCH)
    want.backward()
    expected = gradients(model)
    before = saved_bytes(model, lambda: objective(BATCH))
    model.zero_grad()
    found = lean_modules(model).values()
    norms = {"gemma3": 19, "gpt2": 0, "qwen3": 13}.get(name, 7)  # gpt2 has layer norms
    mlps = 3 * (name != "gpt2")
    assert sum("Norm" in type(m).__name__ for m in found) == norms and len(found) == norms + mlps
    loss = objective(BATCH)
    loss.backward()
    assert loss.item() == pytest.approx(want.item(), rel=1e-6)
    for key, gradient in gradients(model).items():
        torch.testing.assert_close(gradient, expected[key], rtol=1e-4, atol=1e-5)
    if mlps:
        assert (
            saved_bytes(model, lambda: objective(BATCH)) <= before - 3 * 4 * inputs_of(BATCH)["input_ids"].numel() * 48
        )
        for module in found:
            del module.forward
        assert saved_bytes(model, lambda: objective(BATCH)) == before


def test_offloaded_tensors_come_back(monkeypatch):
    """On the CPU as on a GPU: what is large and no weight is copied away, and the gradients are the same."""
    model = trained(build("llama"))
    objective = Objective(model)
    want = objective(BATCH)
    want.backward()
    expected = gradients(model)
    model.zero_grad()
    monkeypatch.setattr("plopfast.training.offload.OFFLOADED_BYTES", 1000)
    moved, plain = [], torch.empty_like
    monkeypatch.setattr(
        torch, "empty_like", lambda t, **how: (moved.append(t.nbytes) if how else None, plain(t, **how))[1]
    )
    with offloaded(model):
        loss = objective(BATCH)
        assert len(moved) > 30 and min(moved) >= 1000
    loss.backward()
    assert all(torch.equal(gradient, expected[key]) for key, gradient in gradients(model).items())
    assert OFFLOADED_BYTES == 1 << 20


def test_offload_needs_a_gpu(examples):
    model = trained(build("llama"))
    with pytest.raises(ConfigError, match="the model is on the CPU"):
        pf.Trainer(model, pf.TrainConfig(offload=True, max_steps=1), examples).fit()


def test_compiled_blocks_train_alike(monkeypatch):
    """Traced and differentiated by torch.compile, then run op by op: its C++ code generation would take a minute here."""
    plain = torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, **how: plain(self, backend="aot_eager", **how))
    rows = [Example.after_prompt(tokens, start, None, "here") for tokens, start in zip(ROWS, STARTS, strict=True)]
    losses = {}
    for on in (False, True):
        model = build("llama")
        del model.model.layers[2:]  # each block is traced anew
        model = trained(model)
        trainer = pf.Trainer(model, pf.TrainConfig(max_steps=3, compile=on, schedule="constant", warmup=0.0), rows)
        trainer.fit()
        losses[on] = [h["loss"] for h in trainer.history]
        assert all(block._compiled_call_impl is None for block in blocks(model).values())
        assert ("blocks compiled by torch.compile" in trainer.notes) == on
    assert losses[True] == pytest.approx(losses[False], rel=1e-5)


def test_a_model_that_cannot_be_compiled(examples, monkeypatch):
    def fails(self, **options):
        self._compiled_call_impl = torch.compile(self._call_impl, backend=broken)

    def broken(graph, inputs):
        raise ValueError("no compiler here")

    monkeypatch.setattr(torch.nn.Module, "compile", fails)
    with pytest.raises(TrainingError, match="torch.compile failed on this model or machine.*leave out --compile"):
        made(examples, compile=True).fit()


def test_liger_is_asked_for_its_operations_alone_and_undone(monkeypatch):
    """A stand-in for liger-kernel and for the GPU, which replaces what liger does: names in the model's source file, and
    forwards of its modules."""
    asked, model = {}, trained(build("llama"))
    source = sys.modules[type(model).__module__]
    norm, rope = source.LlamaRMSNorm, source.apply_rotary_pos_emb

    def apply(model, **how):
        asked.update(how)
        source.LlamaRMSNorm = source.apply_rotary_pos_emb = None
        model.model.norm.forward = lambda x: x

    stand_in = types.ModuleType("liger_kernel.transformers")
    stand_in._apply_liger_kernel_to_instance = apply
    monkeypatch.setitem(sys.modules, "liger_kernel", types.ModuleType("liger_kernel"))
    monkeypatch.setitem(sys.modules, "liger_kernel.transformers", stand_in)
    monkeypatch.setattr("plopfast.training.blocks.importlib.util.find_spec", lambda name: name == "liger_kernel")
    monkeypatch.setattr("plopfast.training.blocks.device_of", lambda model: torch.device("cuda"))
    with prepared_blocks(model, pf.TrainConfig(liger=True)) as notes:
        assert len(notes) == 1 and "liger-kernel" in notes[0] and source.LlamaRMSNorm is None
    assert asked == {"cross_entropy": False, "fused_linear_cross_entropy": False}
    assert (source.LlamaRMSNorm, source.apply_rotary_pos_emb) == (norm, rope) and "forward" not in vars(
        model.model.norm
    )
    asked.clear()
    with prepared_blocks(model, pf.TrainConfig()):
        assert not asked


def test_liger_is_not_left_out_in_silence(monkeypatch):
    model = trained(build("llama"))
    with (
        pytest.raises(ConfigError, match="runs on GPUs.*leave out --liger"),
        prepared_blocks(model, pf.TrainConfig(liger=True)),
    ):
        pass
    monkeypatch.setattr("plopfast.training.blocks.device_of", lambda model: torch.device("cuda"))
    monkeypatch.setattr("plopfast.training.blocks.importlib.util.find_spec", lambda name: None)
    with (
        pytest.raises(ConfigError, match="not installed: pip install liger-kernel"),
        prepared_blocks(model, pf.TrainConfig(liger=True)),
    ):
        pass


def test_a_tensor_that_changes_between_two_uses_is_kept_twice():
    weight = torch.randn(600, 600, dtype=torch.float64, requires_grad=True)
    assert weight.nbytes > OFFLOADED_BYTES
    with offloaded(build("llama")):
        x = weight * 2
        one = x.sin()
        x.mul_(3)
        (one.sum() + x.cos().sum()).backward()
    torch.testing.assert_close(weight.grad, 2 * (2 * weight).cos().detach() - 6 * (6 * weight).sin().detach())


@pytest.mark.parametrize("compiled", [False, True])
def test_rotary_embedding_is_one_operation(compiled, monkeypatch):
    """With the loss and the gradients of the model's own, but for rounding. torch.compile fuses the model's own."""
    monkeypatch.setattr(rotary, "SMALL", {})
    monkeypatch.setattr(torch.nn.Module, "compile", lambda *a, **k: None)
    model, calls, plain = trained(build("llama")), [], library_rows.rotary
    objective = Objective(model)
    want = objective(BATCH)
    want.backward()
    expected = gradients(model)
    monkeypatch.setattr(library_rows, "rotary", lambda *a: calls.append(a[5]) or plain(*a))
    loss, found, notes = loss_and_gradients(model, objective, pf.TrainConfig(compile=compiled))
    assert any("rotary embedding" in note for note in notes) != compiled
    assert calls[-6:] == ([] if compiled else [False] * 3 + [True] * 3), "backward or not; the first calls compare"
    torch.testing.assert_close(loss, want.detach())
    for key, gradient in found.items():
        torch.testing.assert_close(gradient, expected[key], rtol=1e-4, atol=1e-6)
