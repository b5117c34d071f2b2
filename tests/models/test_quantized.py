"""Quantised modules, plopfast's own and other libraries': scored, adapted, trained, merged, copied, cast."""

import copy
import pickle
import warnings

import pytest
import torch
import transformers
from helpers import OF_BITSANDBYTES, build, model_for_bitsandbytes, of_bitsandbytes, quantize
from torch import nn
from transformers import AutoModelForCausalLM

import plopfast as pf
from plopfast.lora.layer import adapters
from plopfast.lora.merging import merge, merge_checked
from plopfast.lora.shared import Prepared, find_shared_inputs
from plopfast.models.frozen import find_frozen, frozen_of, is_linear
from plopfast.models.lean import lean_modules
from plopfast.models.quantized import QuantizedLinear, encoded, quantized
from plopfast.models.quantized_experts import make_dense
from plopfast.support.errors import AdapterError, ModelError

KINDS = [("nf4", False), ("nf4", True), ("int8", False), ("fp8", False)]
IDS = torch.arange(24).view(2, 12)


def pair(kind, nested=False, name="llama", dtype=torch.float32):
    """A quantised model, and the dense one with the same values."""
    model = quantize(build(name).to(dtype), kind, nested)
    dense = copy.deepcopy(model)
    assert len(make_dense(dense)) == len(pf.linear_modules(model))
    return model, dense


def adapt(model, ends=("v_proj", "down_proj", "c_attn"), value=0.1):
    names = [info.name for info in pf.linear_modules(model) if info.name.endswith(ends)]
    pf.inject(model, pf.Placement(dict.fromkeys(names, (4, 8.0)), [], "", 0))
    for name, module in adapters(model).items():
        draw = torch.Generator().manual_seed(len(name))
        module.lora_B.data = torch.randn(module.lora_B.shape, generator=draw) * value
    return model


def gradients(model):
    model.zero_grad()
    loss = model(IDS, labels=IDS).loss
    loss.backward()
    return [loss.detach(), *(p.grad.clone() for p in model.parameters() if p.requires_grad)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("kind", "nested"), KINDS)
def test_it_computes_what_its_decoded_weights_do(kind, nested, dtype):
    """Logits, scores, loss and gradients: alone, by groups that share an input, and with dropout."""
    model, dense = pair(kind, nested, dtype=dtype)
    assert torch.equal(model(IDS).logits, dense(IDS).logits)
    rows = [{"input_ids": IDS, "attention_mask": torch.ones_like(IDS)}]
    scores, expected = pf.score(model, rows).modules, pf.score(dense, rows).modules
    tolerance = 1e-5 if dtype == torch.float32 else 4e-3  # the dense denominator is of rounded values
    assert scores == pytest.approx(expected, rel=tolerance)
    for each in (model, dense):
        adapt(each, ends=("q_proj", "k_proj", "v_proj", "down_proj"))
        each.train()
    assert all(torch.equal(*both) for both in zip(gradients(model), gradients(dense), strict=True))
    found = []
    for each in (model, dense):
        for module in adapters(each).values():
            module.dropout = 0.2
        assert any(len(group) == 3 for group in find_shared_inputs(each))
        torch.manual_seed(1)
        with Prepared(each):
            found.append(gradients(each))
    assert all(torch.equal(*both) for both in zip(*found, strict=True))


def test_the_lean_mlp_takes_codes_too():
    model, _ = pair("nf4")
    assert "model.layers.0.mlp" in lean_modules(model)


@pytest.mark.parametrize(("kind", "nested"), KINDS)
def test_copies_pickles_and_casts(kind, nested):
    model = adapt(pair(kind, nested)[0])
    logits = model(IDS).logits
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other(IDS).logits, logits)
        name = "model.layers.0.self_attn.v_proj"
        ours, theirs = model.get_submodule(name), other.get_submodule(name)
        assert theirs.frozen.module is theirs.base and theirs.base is not ours.base
    ends = ("weight", "absmax", "scale", "code")
    before = {key: value.clone() for key, value in model.state_dict().items() if "proj" in key and key.endswith(ends)}
    model.bfloat16().float()
    after = model.state_dict()
    assert len(before) >= 14 * 2 and all(torch.equal(value, after[key]) for key, value in before.items())
    half = copy.deepcopy(model).bfloat16()
    assert half(IDS).logits.dtype == torch.bfloat16 and half.get_submodule(name).frozen.dtype == torch.bfloat16
    torch.testing.assert_close(half(IDS).logits.float(), logits, rtol=0.05, atol=0.05)


@pytest.mark.parametrize(("kind", "nested"), KINDS)
def test_merged_into_dense_and_into_quantised_weights(kind, nested):
    model = adapt(pair(kind, nested)[0], value=0.02)
    logits, names = model(IDS).logits, list(adapters(model))
    with pytest.raises(AdapterError, match=f"{kind} weights, which take no update in place: merge"):
        merge(model)
    assert list(adapters(model)) == names and torch.equal(model(IDS).logits, logits)
    with pytest.raises(ModelError, match="take no update in place"):
        adapters(model)[names[0]].frozen.add_(torch.zeros(1))
    with pytest.raises(AdapterError, match="expected into="):
        merge(model, into="bf16")
    dense, again = copy.deepcopy(model), copy.deepcopy(model)
    assert merge_checked(dense, into="dense") < 1e-5
    assert not any(isinstance(module, QuantizedLinear) for module in dense.modules())
    drift = merge_checked(again, into="quantized")
    module = again.get_submodule(names[0])
    assert 1e-5 < drift < 0.3 and isinstance(module, QuantizedLinear) and module.codes.kind == kind
    assert hasattr(module, "nested_code") == nested


def test_an_adapter_of_quantised_weights_on_dense_ones(tmp_path):
    """With a warning, and the other way round; not on another model's."""
    nf4 = adapt(pair("nf4")[0])
    saved, logits = pf.save_adapter(nf4, tmp_path / "nf4"), nf4(IDS).logits
    again = pair("nf4")[0]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pf.load_adapter(again, saved)
    assert torch.equal(again(IDS).logits, logits)
    dense = build("llama")
    with pytest.warns(UserWarning, match="trained on nf4 weights, and this model's are dense"):
        pf.load_adapter(dense, saved)
    pf.unload(dense)
    back = pf.save_adapter(adapt(dense), tmp_path / "dense")
    with pytest.warns(UserWarning, match="trained on dense weights, and this model's are int8"):
        pf.load_adapter(pair("int8")[0], back)
    other = quantize(transformers.LlamaForCausalLM(build("llama").config), "nf4")
    with pytest.raises(AdapterError, match="trained on other base weights"):
        pf.load_adapter(other, back)


def test_weights_that_cannot_be_quantised():
    with pytest.raises(ModelError, match="odd number: take int8"):
        encoded(torch.ones(3, 5), "nf4")
    with pytest.raises(ModelError, match="expected a matrix in float32"):
        encoded(torch.ones(3, 4, dtype=torch.int8), "int8")
    assert (
        is_linear(quantized(nn.Linear(4, 2), "fp8")) and find_frozen(quantized(nn.Linear(4, 2), "int8")).kind == "int8"
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return model_for_bitsandbytes(tmp_path_factory.mktemp("model"))


@pytest.mark.parametrize("kind", OF_BITSANDBYTES)
def test_a_model_that_bitsandbytes_has_quantised(folder, kind, tmp_path):
    """It is scored and adapted by the same values, PEFT finds the adapter right, and it merges into a dense model."""
    from peft import PeftModel

    close = 1e-5 if "nf4" in kind else 0.02  # Linear8bitLt rounds its inputs to 8 bits
    model, plain = of_bitsandbytes(folder, kind), of_bitsandbytes(folder, kind)
    name = "model.layers.1.mlp.down_proj"
    weight = plain.get_submodule(name).weight
    eye = torch.eye(128)
    assert frozen_of(plain.get_submodule(name)).kind == kind.split()[-1]
    theirs = plain.get_submodule(name)(eye).detach().T
    torch.testing.assert_close(
        frozen_of(plain.get_submodule(name)).dequantize().float(), theirs, rtol=close, atol=close / 20
    )
    rows = [{"input_ids": IDS, "attention_mask": torch.ones_like(IDS)}]
    dense = of_bitsandbytes(folder, kind)
    make_dense(dense)
    assert pf.score(model, rows).modules == pytest.approx(pf.score(dense, rows).modules, rel=max(close, 1e-4))
    adapt(model)
    assert all(module.frozen.dtype == torch.float32 for module in adapters(model).values())
    find_shared_inputs(model)
    with Prepared(model):
        assert all(gradient.isfinite().all() for gradient in gradients(model))
    logits = model(IDS).logits
    theirs = PeftModel.from_pretrained(plain, pf.save_adapter(model, tmp_path / "adapter"))(IDS).logits
    assert (theirs - logits).norm() <= close * logits.norm() and weight is not None
    assert merge_checked(model, into="dense") < max(close, 1e-4)
    model.save_pretrained(tmp_path / "merged")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    assert torch.equal(again(IDS).logits, model(IDS).logits)


def test_the_offset_of_doubly_quantised_codes_is_read_once(folder):
    """On a GPU, each reading would wait for all work before it. A copy has its own."""
    module = of_bitsandbytes(folder, "nested nf4").model.layers[0].mlp.up_proj
    before = frozen_of(module).dequantize()
    module.weight.quant_state.offset.data.fill_(float("nan"))
    assert torch.equal(frozen_of(module).dequantize(), before)
    other = of_bitsandbytes(folder, "nested nf4").model.layers[0].mlp.up_proj
    other.weight.quant_state.offset += 1.0
    assert not torch.equal(frozen_of(other).dequantize(), before)


def test_codes_that_bitsandbytes_has_reordered_for_a_cpu(folder):
    """Its own function, which its products call on CPUs with AVX-512 bfloat16."""
    from bitsandbytes import functional

    module = of_bitsandbytes(folder, "nf4").model.layers[0].mlp.up_proj
    before = frozen_of(module).dequantize()
    module.weight.data, module.weight.quant_state = functional._convert_weight_packed_for_cpu(
        module.weight.data, module.weight.quant_state
    )
    assert module.weight.quant_state.packing_format_for_cpu
    torch.testing.assert_close(frozen_of(module).dequantize(), before, rtol=0.005, atol=0)  # absmax are bfloat16 now


@pytest.mark.parametrize("scale_rows, block", [(2, (32, 64)), (64, None), (1, None)])
def test_an_fp8_module_of_transformers(scale_rows, block):
    from transformers.integrations.finegrained_fp8 import FP8Linear

    module = FP8Linear(64, 64, block_size=block)
    values = torch.randn(64, 64).to(torch.float8_e4m3fn)
    scales = torch.rand(scale_rows, 1) if block is None else torch.rand(2, 1)
    module.weight, module.weight_scale_inv = nn.Parameter(values, requires_grad=False), nn.Parameter(scales)
    frozen = frozen_of(module)
    want = values.float() * scales.repeat_interleave(64 // len(scales), 0)
    assert frozen.kind == "fp8" and torch.equal(frozen.dequantize(), want.bfloat16())
