"""Adapters of experts: PEFT's files both ways, merging, switching off, options that they cannot have, training and estimates."""

import copy
import json
import warnings

import pytest
import torch
from helpers import prompted
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from zoo import families, reference

import plopfast as pf
from plopfast.lora.experts import ExpertLoRA, LoRAExperts
from plopfast.lora.injection import unload
from plopfast.lora.layer import adapters, disabled
from plopfast.models.experts import expert_weights
from plopfast.support.errors import AdapterError, ConfigError, PlacementError
from plopfast.training.estimate import estimate

FAMILIES = ["mixtral", "qwen2_moe", "gpt_oss", "llama4_text", "nemotron_h"]
BATCH = reference.batches_of(families.VOCABULARY)[0]
ALPHA = 6.0


def logits(model):
    return reference.real_logits(model, BATCH)


def adapted(family="mixtral", only="", ranks=(2,), **options):
    """A model with random adapters on its experts."""
    model = families.build(family)
    names = [info.name for info in expert_weights(model) if info.name.endswith(only)]
    chosen = {name: (ranks[i % len(ranks)], ALPHA) for i, name in enumerate(names)}
    pf.inject(model, pf.Placement(chosen, [], "explicit", 0), **options)
    draw = torch.Generator().manual_seed(1)
    for module in adapters(model).values():
        module.lora_B.data = 0.1 * torch.randn(module.lora_B.shape, generator=draw)
    return model


@pytest.mark.parametrize("only", ["", "down_proj", "up_proj"])
@pytest.mark.parametrize("family", FAMILIES)
def test_peft_computes_the_same(family, only, tmp_path):
    """PEFT wraps both weights of a module, one in the other; each alone has other keys."""
    model = adapted(family, only, ranks=(2, 3))
    assert not torch.allclose(logits(model), logits(families.build(family)), atol=1e-3)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # of keys that PEFT misses, or a warning of ours
        pf.save_adapter(model, tmp_path / "ours")
    theirs = PeftModel.from_pretrained(families.build(family), tmp_path / "ours").eval()
    torch.testing.assert_close(logits(theirs.get_base_model()), logits(model), rtol=1e-5, atol=1e-5)
    theirs.save_pretrained(tmp_path / "theirs")
    for folder in ("ours", "theirs"):
        fresh = families.build(family)
        names = pf.load_adapter(fresh, tmp_path / folder)
        assert sorted(names) == sorted(adapters(model))
        assert torch.equal(logits(fresh), logits(model))


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss", "llama4_text"])
def test_what_peft_trained_is_read(family, tmp_path):
    config = LoraConfig(
        r=3, lora_alpha=5, target_modules=["q_proj"], target_parameters=["experts.down_proj", "experts.gate_up_proj"],
        rank_pattern={r".*\.1\..*experts.down_proj": 2}, task_type="CAUSAL_LM", use_rslora=True,
    )  # fmt: skip
    theirs = get_peft_model(families.build(family), config).eval()
    for name, parameter in theirs.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    theirs.save_pretrained(tmp_path / "theirs")
    ours = families.build(family)
    pf.load_adapter(ours, tmp_path / "theirs")
    torch.testing.assert_close(logits(ours), logits(theirs.get_base_model()), rtol=1e-5, atol=1e-5)
    ranks = {name: m.rank for name, m in adapters(ours).items() if isinstance(m, ExpertLoRA)}
    assert {2, 3} == set(ranks.values())


@pytest.mark.parametrize("version", ["0.18.1", None])
@pytest.mark.parametrize("family", ["mixtral", "gpt_oss", "llama4_text"])
def test_files_of_early_versions_of_peft_are_read(family, version, tmp_path):
    """They take every weight for [E, in, out], which shapes do not tell where it is square: so the version counts."""
    model = adapted(family)
    folder = pf.save_adapter(model, tmp_path / "early")
    held = load_file(folder / "adapter_model.safetensors")
    if family == "mixtral":  # stored [E, out, in]: A has the outputs, and B the inputs
        for name, module in adapters(model).items():
            wrapper = "base_layer." * name.endswith("gate_up_proj")
            key = f"base_model.model.{name.rpartition('.')[0]}.{wrapper}"
            held[key + "lora_A.weight"] = module.lora_B.detach().mT.flatten(0, 1).contiguous()
            held[key + "lora_B.weight"] = module.lora_A.detach().permute(2, 1, 0).flatten(1).contiguous()
    elif family == "llama4_text":
        for name, module in adapters(model).items():
            wrapper = "base_layer." * name.endswith("gate_up_proj")
            key = f"base_model.model.{name.rpartition('.')[0]}.{wrapper}"
            held[key + "lora_A.weight"] = module.lora_A.detach().flatten(0, 1).contiguous()
            held[key + "lora_B.weight"] = module.lora_B.detach().permute(1, 2, 0).flatten(1).contiguous()
    save_file(held, folder / "adapter_model.safetensors")  # without what plopfast says of itself
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config | {"peft_version": version}))
    fresh = families.build(family)
    pf.load_adapter(fresh, folder)
    assert torch.equal(logits(fresh), logits(model))


@pytest.mark.parametrize("family", FAMILIES)
def test_merged_switched_off_and_taken_out(family):
    plain = families.build(family)
    model = adapted(family)
    want, base = logits(model), logits(plain)
    other = copy.deepcopy(model)
    with disabled(model):
        assert torch.equal(logits(model), base)
    for one in (model, other):
        torch.testing.assert_close(logits(one), want)
    unload(other)
    assert torch.equal(logits(other), base) and other.state_dict().keys() == plain.state_dict().keys()
    torch.testing.assert_close(logits(model), want), "a copy has weights of its own"
    pf.merge(model)
    torch.testing.assert_close(logits(model), want, rtol=1e-5, atol=1e-5)
    assert model.state_dict().keys() == plain.state_dict().keys()
    assert not any(isinstance(m, LoRAExperts | ExpertLoRA) for m in model.modules())


def test_one_of_two_adapters_can_be_off():
    model, alone = adapted(), adapted(only="down_proj")
    for name, module in adapters(model).items():
        if name in adapters(alone):
            adapters(alone)[name].lora_A.data, adapters(alone)[name].lora_B.data = module.lora_A, module.lora_B
        else:
            module.enabled = False
    torch.testing.assert_close(logits(model), logits(alone))


def test_every_expert_begins_with_an_a_of_its_own():
    one, two, other = (adapters(adapted(seed=seed)) for seed in (0, 0, 1))
    for name, module in one.items():
        assert len({tuple(a.flatten().tolist()) for a in module.lora_A}) == families.HEADS
        assert torch.equal(module.lora_A, two[name].lora_A) and not torch.equal(module.lora_A, other[name].lora_A)


def test_a_merge_that_breaks_off_leaves_the_same_model(monkeypatch):
    model, calls = adapted(), []
    want = logits(model)

    def broken(self, expert):
        calls.append(expert)
        if len(calls) == 6:
            raise KeyboardInterrupt
        return whole(self, expert)

    whole = ExpertLoRA.delta_NK
    monkeypatch.setattr(ExpertLoRA, "delta_NK", broken)
    with pytest.raises(KeyboardInterrupt):
        pf.merge(model)
    assert 0 < len(adapters(model)) < 8
    torch.testing.assert_close(logits(model), want, rtol=1e-5, atol=1e-5)
    pf.merge(model)
    torch.testing.assert_close(logits(model), want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "said"),
    [({"dropout": 0.1}, "no --dropout"), ({"dora": True}, "no --dora"), ({"dora": True, "dropout": 0.2}, "--dropout or --dora")],
)  # fmt: skip
def test_what_files_of_experts_cannot_hold_is_refused(options, said):
    model = families.build("mixtral")
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ConfigError, match=f"experts.gate_up_proj: adapters of experts have .*{said}"):
        adapted(**options)
    assert model.state_dict().keys() == before.keys()


def test_eva_has_no_vectors_of_experts():
    """Linear modules get theirs, and a line says how the experts begin."""
    batches = reference.batches_of(families.VOCABULARY)
    report = pf.score(families.build("mixtral"), batches, eva_rank=2)
    placement, model = pf.place(report, rule="all", rank=2), families.build("mixtral")
    with pytest.warns(UserWarning, match=r"experts.down_proj and 7 more: EVA has no vectors of experts"):
        pf.inject(model, placement, init="eva", eva=report.eva)
    again = families.build("mixtral")
    pf.inject(again, placement)
    for name, module in adapters(model).items():
        same = torch.equal(module.lora_A, adapters(again)[name].lora_A)
        assert same == isinstance(module, ExpertLoRA), name


def test_a_rank_above_the_smaller_side():
    with pytest.raises(PlacementError, match=r"experts.gate_up_proj: rank 40 does not fit a 96 x 32 weight"):
        adapted(ranks=(40,))
    with pytest.raises(PlacementError, match="the placement names 'model.layers.0.mlp.experts.up_proj'"):
        name = "model.layers.0.mlp.experts.up_proj"
        pf.inject(families.build("mixtral"), pf.Placement({name: (2, 2.0)}, [], "explicit", 0))


def test_files_that_do_not_fit(tmp_path):
    pf.save_adapter(adapted(), tmp_path / "whole")
    held = load_file(tmp_path / "whole" / "adapter_model.safetensors")
    key = "base_model.model.model.layers.0.mlp.experts.lora_A.weight"
    assert key in held

    def changed(name, tensors, **config):
        folder = tmp_path / name
        folder.mkdir()
        kept = json.loads((tmp_path / "whole" / "adapter_config.json").read_text())
        kept |= {"peft_version": "0.21.2"} | config
        (folder / "adapter_config.json").write_text(json.dumps(kept))
        save_file(tensors, folder / "adapter_model.safetensors")
        return folder

    for folder, said in (
        (changed("without", {k: t for k, t in held.items() if k != key}), "no lora_A and lora_B of .*mlp.experts, which are those"),
        (changed("rows", held | {key: held[key][:-1].clone()}), "has 4 experts of 48 -> 32 here"),
        (changed("wide", held | {key: torch.zeros(8, 50)}), "has 4 experts of 48 -> 32 here"),
        (changed("router", held, target_parameters=["mlp.gate.weight"]), "target_parameters = .*mlp.gate.weight"),
        (changed("rank", held, r=5), "say rank 5 for .* its tensors have rank 2"),
        (changed("one", held, target_parameters=["experts.down_proj"]), "unexpected|no linear module"),
    ):  # fmt: skip
        model = families.build("mixtral")
        before = copy.deepcopy(model.state_dict())
        with pytest.raises(AdapterError, match=said):
            pf.load_adapter(model, folder)
        assert not adapters(model) and all(torch.equal(t, before[k]) for k, t in model.state_dict().items())
    other = families.build("mixtral", seed=5)
    with pytest.raises(AdapterError, match="other base weights"):
        pf.load_adapter(other, tmp_path / "whole")
    with pytest.raises(AdapterError, match="made for another base model|target_parameters"):
        pf.load_adapter(families.build("llama"), tmp_path / "whole")


def rows():
    return prompted([[1, *range(3 + i, 23 + i)] for i in range(6)], [5] * 6)


def test_training_says_which_experts_learned_nothing(recwarn):
    """Those of one layer's experts that get no token; the others of their adapters learn."""
    model = families.build("mixtral")
    model.model.layers[1].mlp.gate.forward = to_two
    names = [info.name for info in expert_weights(model)]
    pf.inject(model, pf.Placement(dict.fromkeys(names, (2, 4.0)), [], "explicit", 0))
    result = pf.Trainer(model, pf.TrainConfig(max_steps=3, lr=1e-2), rows()).fit()
    assert result.unmoved == {"experts.gate_up_proj expert": 2, "experts.down_proj expert": 2}
    said = [str(one.message) for one in recwarn if "no gradient reached" in str(one.message)]
    (line,) = said  # at the end, and not after the first step
    assert "2 of 16 experts.down_proj expert adapters (layer 1)" in line and "routed experts that get no token" in line
    learned = adapters(model)["model.layers.1.mlp.experts.down_proj"].lora_B.flatten(1).norm(dim=1)
    assert (learned > 0).tolist() == [True, False, True, False]


def to_two(x):
    """A router that sends every token to experts 0 and 2."""
    count = x.reshape(-1, x.shape[-1]).shape[0]
    return None, torch.full((count, 2), 0.5), torch.tensor([[0, 2]]).expand(count, 2)


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
@pytest.mark.parametrize("settings", [{}, {"checkpointing": True}])
def test_an_estimate_counts_them(family, settings):
    model = families.build(family)
    names = [info.name for info in expert_weights(model)]
    placement = pf.Placement(dict.fromkeys(names, (2, 4.0)), [], "explicit", 0)
    config = pf.TrainConfig(**settings)
    (found,) = estimate(model, {"mine": placement}, config, rows=2, row_tokens=16)
    pf.inject(model, placement)
    assert found.parameters == sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert found.tflops_per_step > 0 and found.total_mib > 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype):
    model, plain = adapted().to(dtype), adapted()
    for module in adapters(model).values():
        assert module.lora_A.dtype == dtype  # as `to` makes them; `inject` alone keeps them in float32
    off = (logits(model) - logits(plain)).norm() / logits(plain).norm()
    assert off < 0.05
    wide = families.build("mixtral").to(dtype)
    pf.inject(wide, pf.Placement({expert_weights(wide)[0].name: (2, 2.0)}, [], "explicit", 0))
    assert {m.lora_A.dtype for m in adapters(wide).values()} == {torch.float32}
    wide(input_ids=BATCH["input_ids"]).logits.float().sum().backward()
    assert all(m.lora_B.grad.isfinite().all() for m in adapters(wide).values())
