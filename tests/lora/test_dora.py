"""DoRA: outputs, gradients, files and merges are PEFT's, and no [N, K] matrix is made for it."""

import copy
import json

import pytest
import torch
from helpers import build, logits, randomise
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import plopfast as pf
from plopfast.lora.dora import lengths, squares
from plopfast.lora.layer import LoRALinear, adapters
from plopfast.lora.shared import Prepared, find_shared_inputs
from plopfast.models.frozen import frozen_of
from plopfast.models.quantized import quantized
from plopfast.support.errors import AdapterError, ConfigError

IDS = torch.arange(3, 21).view(2, 9)


def trained(family="llama", rank=3, **options):
    """A model with adapters on every linear module, as a training leaves them."""
    model = build(family)
    names = [info.name for info in pf.linear_modules(model)]
    pf.inject(model, pf.Placement(dict.fromkeys(names, (rank, 6.0)), [], "all", 0), dora=True, **options)
    randomise(model)
    draw = torch.Generator().manual_seed(1)
    for module in adapters(model).values():
        module.lora_magnitude.data *= 1 + 0.3 * torch.rand(len(module.lora_magnitude), generator=draw)
    return model


def theirs(model, family, **options):
    """PEFT's model with the same values."""
    names = list(adapters(model))
    config = LoraConfig(
        r=3, lora_alpha=6, target_modules=names, use_dora=True, fan_in_fan_out=family == "gpt2", **options
    )
    peft = get_peft_model(build(family), config)
    for name, module in adapters(model).items():
        other = peft.get_submodule(f"base_model.model.{name}")
        other.lora_A.default.weight.data.copy_(module.lora_A)
        other.lora_B.default.weight.data.copy_(module.lora_B)
        other.lora_magnitude_vector["default"].weight.data.copy_(module.lora_magnitude)
    return peft


def gradients(model, wanted, context):
    dy = torch.randn(2, 9, model.config.vocab_size, generator=torch.Generator().manual_seed(2))
    with context:
        return torch.autograd.grad(model(input_ids=IDS).logits, wanted, dy)


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen2"])
def test_outputs_and_gradients_are_pefts(family, rslora):
    model = trained(family, rslora=rslora)
    peft = theirs(model, family, use_rslora=rslora)
    torch.testing.assert_close(logits(model), logits(peft), rtol=1e-5, atol=1e-5)
    ours = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert sum(name.endswith("lora_magnitude") for name in ours) == len(ours) / 3
    ends = {"lora_A": "lora_A.default", "lora_B": "lora_B.default", "lora_magnitude": "lora_magnitude_vector.default"}
    others = dict(peft.named_parameters())
    same = [
        others[f"base_model.model.{name.rpartition('.')[0]}.{ends[name.rpartition('.')[2]]}.weight"] for name in ours
    ]
    want = gradients(peft, same, torch.enable_grad())
    assert find_shared_inputs(model) or family == "gpt2"
    for context in (torch.enable_grad(), Prepared(model)):
        for name, got, expected in zip(ours, gradients(model, list(ours.values()), context), want, strict=True):
            assert (got - expected).norm() <= 1e-4 * expected.norm(), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", [None, "nf4", "int8"])
def test_lengths_are_those_of_the_whole_weight(kind, dtype):
    linear = nn.Linear(64, 33 if kind != "nf4" else 34, bias=False).to(dtype)
    linear = linear if kind is None else quantized(linear, kind)
    frozen, draw = frozen_of(linear), torch.Generator().manual_seed(0)
    a, b = torch.randn(5, 64, generator=draw), torch.randn(frozen.shape[0], 5, generator=draw)
    got = lengths(frozen.weight_NK, squares(frozen), a, b, 0.7)
    want = (frozen.dequantize().double() + 0.7 * b.double() @ a.double()).norm(dim=1)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.double(), want, rtol=1e-6 if dtype == torch.float32 else 1e-2, atol=0)


def test_before_training_it_changes_nothing_and_a_row_of_zeros_stays():
    linear = nn.Linear(6, 5)
    linear.weight.data[2] = 0.0
    module, x = LoRALinear(linear, 2, 4.0, dora=True), torch.randn(3, 6)
    torch.testing.assert_close(module(x), linear(x))
    assert module.delta_NK().isfinite().all() and not module.delta_NK()[2].any()
    module(x).sum().backward()
    assert all(p.grad.isfinite().all() for p in (module.lora_A, module.lora_B, module.lora_magnitude))


def test_no_whole_weight_is_made():
    model = trained()
    sizes = {tuple(m.frozen.shape) for m in adapters(model).values()}
    sizes |= {shape[::-1] for shape in sizes}

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, kinds, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor) and not function.is_view and tuple(out.shape) in sizes:
                made.append(function)
            return out

    made = []
    with Watch():
        model(input_ids=IDS).logits.sum().backward()
    assert not made


def test_peft_reads_our_files_and_we_read_pefts(tmp_path):
    model = trained()
    pf.save_adapter(model, tmp_path / "ours")
    assert json.loads((tmp_path / "ours" / "adapter_config.json").read_text())["use_dora"] is True
    peft = PeftModel.from_pretrained(build("llama"), tmp_path / "ours").eval()
    torch.testing.assert_close(logits(peft), logits(model), rtol=1e-5, atol=1e-5)
    peft.save_pretrained(tmp_path / "theirs")
    for folder in ("ours", "theirs"):
        fresh = build("llama")
        pf.load_adapter(fresh, tmp_path / folder)
        torch.testing.assert_close(logits(fresh), logits(model))


@pytest.mark.parametrize("kind", [None, "nf4"])
def test_merged_it_computes_the_same(kind):
    model = build("llama")
    if kind:
        for info in pf.linear_modules(model):
            parent, _, child = info.name.rpartition(".")
            setattr(model.get_submodule(parent), child, quantized(info.module, kind))
    names = [info.name for info in pf.linear_modules(model)]
    pf.inject(model, pf.Placement(dict.fromkeys(names, (3, 6.0)), [], "all", 0), dora=True)
    randomise(model)
    want = logits(model)
    pf.merge(model, into="dense" if kind else None)
    torch.testing.assert_close(logits(model), want, rtol=1e-5, atol=1e-5)


def test_dropout_drops_for_the_low_rank_part_alone():
    linear = nn.Linear(16, 8)
    module = LoRALinear(linear, 2, 4.0, dora=True, dropout=0.5)
    module.train()
    x = torch.randn(4, 16)
    torch.testing.assert_close(module(x), linear(x)), "B is zero"
    module.lora_B.data.normal_()
    torch.manual_seed(0)
    one = module(x)
    assert not torch.equal(one, module(x)) and torch.equal(module.eval()(x), module(x))


def test_files_that_contradict_themselves(tmp_path):
    pf.save_adapter(trained(), tmp_path / "whole")

    def changed(name, tensors=None, **config):
        folder = tmp_path / name
        folder.mkdir()
        kept = json.loads((tmp_path / "whole" / "adapter_config.json").read_text()) | config
        (folder / "adapter_config.json").write_text(json.dumps(kept))
        save_file(
            tensors or load_file(tmp_path / "whole" / "adapter_model.safetensors"), folder / "adapter_model.safetensors"
        )
        return folder

    held = load_file(tmp_path / "whole" / "adapter_model.safetensors")
    key = next(key for key in held if key.endswith("magnitude_vector"))
    for folder, said in (
        (changed("plain", use_dora=False), "has a lora_magnitude_vector, and adapter_config.json says use_dora false"),
        (
            changed("without", {k: t for k, t in held.items() if k != key}),
            "has no lora_magnitude_vector, and .* use_dora true",
        ),
        (changed("short", held | {key: held[key][:-1]}), "rows here, lora_magnitude_vector"),
        (changed("nan", held | {key: held[key] * float("nan")}), "lora_magnitude holds NaN or infinity"),
        (changed("matrix", held | {key.replace("_vector", "_matrix"): held[key].clone()}), "unexpected tensor"),
    ):
        model = build("llama")
        before = copy.deepcopy(model.state_dict())
        with pytest.raises(AdapterError, match=said):
            pf.load_adapter(model, folder)
        assert not adapters(model) and all(torch.equal(t, before[k]) for k, t in model.state_dict().items())


def test_all_weights_have_no_lengths():
    with pytest.raises(ConfigError, match="--full trains no adapters, so --dora cannot apply"):
        pf.RunConfig(full=True, dora=True)
