"""What in-place acceleration could break: copies, later changes, hooks, transforms, other people's forwards."""

import copy
import gc
import sys
import weakref

import peft
import pytest
import torch
from helpers import build, random_batches
from peft_twins import BATCH, LORA, assert_equal, filled, logits, results, twins, wrapped
from torch import nn

import plopfast as pf
from plopfast.integrations import peft_layers
from plopfast.integrations.peft_layers import FROZEN, READS_WITH, Fast
from plopfast.lora import ops
from plopfast.support.errors import AdapterError, ConfigError

Q = "base_model.model.model.layers.1.self_attn.q_proj"


def fast_layers(model):
    return [module for module in model.modules() if isinstance(module, Fast)]


@pytest.fixture
def calls(monkeypatch):
    """How often each path computed."""
    counts = {"alone": 0, "together": 0}
    alone, together = peft_layers.Member.y_of, peft_layers.SharedInput.together

    def count(name, function):
        def counted(*args):
            counts[name] += 1
            return function(*args)

        return counted

    monkeypatch.setattr(peft_layers.Member, "y_of", count("alone", alone))
    monkeypatch.setattr(peft_layers.SharedInput, "together", count("together", together))
    return counts


def test_the_usual_case_takes_plopfasts_operations(calls):
    model = wrapped()
    report = pf.accelerate(model)
    assert (len(report.linears), len(report.shared), len(report.norms), report.loss) == (21, 6, 10, True)
    assert not report.left
    calls.update(alone=0, together=0)  # accelerate has run the model
    results(model)
    assert calls == {"together": 6, "alone": 6}, "query, key, value; gate, up; and o and down alone, in three layers"


def test_restored_is_as_before():
    plain, fast = twins()
    before = [(name, type(module), sorted(vars(module))) for name, module in plain.named_modules()]
    assert len(pf.restore(fast)) == 21 + 10 + 1
    assert [(name, type(module), sorted(vars(module))) for name, module in fast.named_modules()] == before
    ours, theirs = results(fast), results(plain)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert pf.restore(fast) == []


def test_names_values_and_files_are_pefts(tmp_path):
    plain, fast = twins()
    ours, theirs = fast.state_dict(), plain.state_dict()
    assert list(ours) == list(theirs)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    fast.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(build("llama"), tmp_path)
    assert_equal(logits(loaded), logits(plain))
    assert isinstance(fast_layers(fast)[0], peft.tuners.lora.Linear)


def test_what_each_option_leaves_alone():
    for option, kept in (("linears", "linears shared"), ("norms", "norms"), ("shared", "shared"), ("loss", "loss")):
        report = pf.accelerate(wrapped(), **{option: False})
        empty = {name for name in ("linears", "shared", "norms", "loss") if not getattr(report, name)}
        assert empty == set(kept.split())


def test_twice_is_once(calls):
    model = wrapped()
    first, again = pf.accelerate(model), pf.accelerate(model)
    assert first == again
    calls.update(alone=0, together=0)
    results(model)
    assert calls == {"together": 6, "alone": 6}


def test_the_last_calls_options_hold():
    model = wrapped()
    pf.accelerate(model)
    report = pf.accelerate(model, norms=False, shared=False, loss=False)
    assert report.linears and not (report.norms or report.shared or report.loss)
    assert len(pf.restore(model)) == 21


def test_a_copy_is_bound_to_itself(calls):
    model = wrapped()
    pf.accelerate(model)
    other = copy.deepcopy(model)
    own = set(other.modules())
    for layer in fast_layers(other):
        assert vars(layer)[FROZEN].module in own
        group = vars(layer).get(READS_WITH)
        assert group is None or {ref() for ref in group.layers} <= own
    for module in other.modules():
        assert getattr(vars(module).get("forward"), "module", module) in own
    calls.update(alone=0, together=0)
    results(other)
    assert calls == {"together": 6, "alone": 6}


def test_a_deleted_model_is_gone_at_once():
    model = wrapped()
    pf.accelerate(model)
    layer = weakref.ref(fast_layers(model)[0])
    results(model)
    gc.disable()
    try:
        groups = [vars(one).get(READS_WITH) for one in fast_layers(model)]
        assert all(not group._found for group in groups if group), "nothing is kept after a step"
        forwards = [module for module in model.modules() if "forward" in vars(module)]
        for module in forwards:  # these hold their module
            del module.forward
        del model, groups, forwards, module
        assert layer() is None
    finally:
        gc.enable()


def test_modules_that_are_wrapped_later_stay_plain_until_the_next_call():
    plain, fast = wrapped(target_modules=["q_proj"]), wrapped(target_modules=["q_proj"])
    pf.accelerate(fast)
    for model in (plain, fast):
        model.add_adapter("more", peft.LoraConfig(**LORA | {"target_modules": ["q_proj", "o_proj"]}))
        model.set_adapter("more")
        filled(model, 3)
    assert type(fast.get_submodule(Q.replace("q_proj", "o_proj"))) is peft.tuners.lora.Linear
    assert_equal(results(fast), results(plain))
    assert len(pf.accelerate(fast).linears) == 6
    assert_equal(results(fast), results(plain))


@pytest.mark.parametrize("where", ["base_layer", "lora_A.default", "lora_B.default", "lora_dropout.default", ""])
@pytest.mark.parametrize("kind", ["register_forward_hook", "register_forward_pre_hook", "register_full_backward_hook"])
def test_hooks_still_fire(where, kind):
    counts = []
    for model in twins():
        seen = []
        module = model.get_submodule(f"{Q}.{where}".rstrip("."))
        getattr(module, kind)(lambda *args, seen=seen: seen.append(args[1][0].detach().clone()))
        results(model)
        counts.append(seen)
    assert len(counts[0]) == len(counts[1]) == 1
    torch.testing.assert_close(counts[1][0], counts[0][0])


def test_a_hook_may_change_what_the_base_gives():
    found = []
    for model in twins():
        model.get_submodule(f"{Q}.base_layer").register_forward_hook(lambda module, args, output: output * 2)
        found.append(results(model))
    assert_equal(found[1], found[0])


def test_values_that_are_changed_through_data_are_seen():
    """Hot swapping copies through `.data`, which no version counts; A is stacked anew in every call."""
    plain, fast = twins()
    for model in (plain, fast):
        results(model)
        generator = torch.Generator().manual_seed(4)
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    assert_equal(results(fast), results(plain))


def test_what_changes_between_the_layers_of_a_group_is_seen():
    found = []
    for model in twins():
        q, k = (model.get_submodule(Q.replace("q_proj", name)) for name in ("q_proj", "k_proj"))
        x = torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(0))
        before = q(x)
        with torch.no_grad():
            k.lora_B["default"].weight.add_(1.0)
        k.scaling["default"] = 3.0
        found.append({"q": before, "k": k(x), "again": k(x)})
    assert_equal(found[1], found[0])


def test_in_inference_mode():
    """Tensors that are made there have no version."""
    plain, fast = twins()
    with torch.inference_mode():
        made_there = build("llama")
        assert_equal(logits(fast), logits(plain))
    wrapped_there = filled(peft.get_peft_model(made_there, peft.LoraConfig(**LORA)))
    before = logits(wrapped_there)
    with torch.inference_mode():
        pf.accelerate(wrapped_there, loss=False)
        assert_equal(logits(wrapped_there), before)


def test_what_is_changed_in_place_in_x_is_seen():
    found = []
    for model in twins():
        q, k = (model.get_submodule(Q.replace("q_proj", name)) for name in ("q_proj", "k_proj"))
        x = torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            found.append({"q": q(x), "k": k(x.mul_(2))})
    assert_equal(found[1], found[0])


def test_a_member_that_is_off_leaves_the_others_to_themselves():
    found = []
    for model in twins():
        model.get_submodule(Q.replace("q_proj", "k_proj")).enable_adapters(False)
        found.append(results(model))
    assert_equal(found[1], found[0])


def test_dropout_has_the_rate_and_follows_torchs_seed():
    model = wrapped(lora_dropout=0.4)
    pf.accelerate(model)
    layer = model.get_submodule(Q).train()
    vars(layer).pop(READS_WITH)
    with torch.no_grad():
        layer.base_layer.weight.zero_()
        layer.lora_A["default"].weight.copy_(torch.eye(4, 32))
        layer.lora_B["default"].weight.copy_(torch.eye(32, 4))
    ones = torch.ones(4000, 32)
    torch.manual_seed(1)
    first = layer(ones)[:, :4] / layer.scaling["default"]
    torch.manual_seed(1)
    assert torch.equal(layer(ones)[:, :4] / layer.scaling["default"], first)
    kept = (first != 0).float().mean().item()
    assert abs(kept - 0.6) < 0.02
    torch.testing.assert_close(first[first != 0], torch.full_like(first[first != 0], 1 / 0.6), rtol=1e-4, atol=0)
    layer.eval()
    torch.testing.assert_close(layer(ones)[:, :4] / layer.scaling["default"], torch.ones(4000, 4), rtol=1e-4, atol=0)


def test_dropout_masks_differ_from_layer_to_layer_of_a_group():
    model = wrapped(lora_dropout=0.5)
    pf.accelerate(model)
    layers = [model.get_submodule(Q.replace("q_proj", name)).train() for name in ("k_proj", "v_proj")]
    with torch.no_grad():
        for layer in layers:
            layer.base_layer.weight.zero_()
            layer.lora_A["default"].weight.copy_(torch.eye(4, 32))
            layer.lora_B["default"].weight.copy_(torch.eye(16, 4))
    x = torch.ones(200, 32)
    k, v = (layer(x)[:, :4] != 0 for layer in layers)
    assert 0.3 < (k == v).float().mean() < 0.7


def test_a_second_derivative_is_refused_by_name():
    plain, fast = twins()
    for model in (plain, fast):
        layer = model.get_submodule(Q)
        x = torch.randn(3, 32, generator=torch.Generator().manual_seed(0)).requires_grad_()
        (dx,) = torch.autograd.grad(layer(x).sum(), x, create_graph=True)
        if model is plain:
            dx.square().sum().backward()
            continue
        with pytest.raises(RuntimeError, match=r"no second derivative.*pf\.restore\(model\)"):
            dx.square().sum().backward()


@pytest.mark.parametrize("transform", ["vmap", "grad", "jvp"])
def test_function_transforms_are_pefts(transform):
    found = []
    for model in twins():
        layer = model.get_submodule(Q).eval()
        x = torch.randn(3, 32, generator=torch.Generator().manual_seed(0))
        call = {
            "vmap": lambda layer=layer, x=x: torch.func.vmap(layer)(x),
            "grad": lambda layer=layer, x=x: torch.func.grad(lambda x: layer(x).square().sum())(x),
            "jvp": lambda layer=layer, x=x: torch.func.jvp(layer, (x,), (x,))[1],
        }[transform]
        found.append({"y": call().detach()})
    assert_equal(found[1], found[0])


@pytest.mark.parametrize("shape", [(0, 32), (2, 0, 32), (32,), (2, 3, 4, 32)])
def test_odd_shapes(shape):
    plain, fast = (model.get_submodule(Q) for model in twins())
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    assert_equal({"y": fast(x).detach()}, {"y": plain(x).detach()})
    assert_equal({"y": fast(x.mT.mT if x.dim() > 1 else x).detach()}, {"y": plain(x).detach()})


@pytest.mark.parametrize("x", [torch.ones(2, 31), torch.ones(2, 32, dtype=torch.float64), torch.ones(2, 32).int()])
def test_wrong_inputs_have_pefts_own_error(x):
    plain, fast = (model.get_submodule(Q) for model in twins())
    with pytest.raises(Exception) as theirs:  # whatever PEFT raises
        plain(x)
    with pytest.raises(type(theirs.value)) as ours:
        fast(x)
    assert str(ours.value) == str(theirs.value)


def test_compiled_without_a_break():
    """One layer, as the compiler takes its time."""
    found = []
    for fast in (False, True):
        model = build("llama")
        model.model.layers = model.model.layers[:1]
        model = filled(peft.get_peft_model(model, peft.LoraConfig(**LORA)))
        run = model.base_model.model
        if fast:
            assert pf.accelerate(model).loss
            run = torch.compile(run, backend="aot_eager", fullgraph=True)
        model.train()
        output = run(**BATCH, use_cache=False)
        output.loss.backward()
        grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        found.append({"loss": output.loss.detach()} | grads)
    assert_equal(found[1], found[0])


def test_what_is_left_is_named_with_its_reason():
    report = pf.accelerate(wrapped(use_dora=True))
    assert len(report.left) == 21
    assert set(report.left.values()) == {"default: Dora"}
    model = wrapped("gpt2", target_modules=["wte", "c_attn"], modules_to_save=["ln_f"])
    report = pf.accelerate(model)
    assert report.left == {"base_model.model.transformer.wte": "PEFT's Embedding"}
    assert "left as it was: base_model.model.transformer.wte: PEFT's Embedding" in str(report)
    trained = wrapped("qwen2", bias="lora_only")
    assert "the base weight is trained" in pf.accelerate(trained).left.values()
    hooked = wrapped()
    layer = hooked.get_submodule(Q)
    layer.base_layer.forward = layer.base_layer.forward
    assert "forward was replaced" in pf.accelerate(hooked).left[Q]


def test_a_forward_of_somebody_else_is_left():
    model = wrapped()
    inner = model.get_base_model()
    inner.forward = inner.forward
    report = pf.accelerate(model)
    assert not report.loss and "its forward was replaced" in report.left["loss"]
    pf.restore(model)
    with pytest.raises(AdapterError, match="the loss cannot be computed by chunks.*leave out loss=True"):
        pf.accelerate(model, loss=True)
    assert not fast_layers(model), "nothing is left half done"
    assert "forward" in vars(inner), "and theirs stays"


def test_bad_input(monkeypatch):
    with pytest.raises(AdapterError, match=r"expected a model with LoRA layers of PEFT's.*got a LlamaForCausalLM"):
        pf.accelerate(build("llama"))
    with pytest.raises(AdapterError, match="LoRA layers"):
        pf.restore(nn.Linear(2, 2))
    with pytest.raises(ConfigError, match='loss="auto", True or False, got'):
        pf.accelerate(wrapped(), loss="chunks")
    monkeypatch.setitem(sys.modules, "peft.tuners.lora", None)
    with pytest.raises(ConfigError, match="pip install peft"):
        pf.accelerate(build("llama"))


def test_layers_that_peft_puts_into_a_model_without_wrapping_it():
    found = []
    for fast in (False, True):
        model = build("llama")
        model.add_adapter(peft.LoraConfig(**LORA))
        filled(model)
        if fast:
            assert len(pf.accelerate(model).linears) == 21
        found.append(results(model))
    assert_equal(found[1], found[0])


def test_padding_on_the_left_and_inputs_as_embeddings():
    plain, fast = twins()
    batch = random_batches(1, side="left")[0]
    assert_equal(results(fast, batch), results(plain, batch))
    found = []
    for model in (plain, fast):
        embedded = model.get_input_embeddings()(BATCH["input_ids"]).detach()
        batch = {"inputs_embeds": embedded, "attention_mask": BATCH["attention_mask"], "labels": BATCH["labels"]}
        found.append(results(model, batch))
    assert_equal(found[1], found[0])


def test_the_operation_is_lora_linear(monkeypatch):
    """With a fault in plopfast's operation the equality tests fail: they don't compare PEFT with itself."""
    model = wrapped()
    theirs = results(model)
    pf.accelerate(model, shared=False)
    plain = ops.lora_linear
    monkeypatch.setattr(peft_layers, "lora_linear", lambda *args, **kw: plain(*args, **kw) * 1.001)
    with pytest.raises(AssertionError):
        assert_equal(results(model), theirs)
