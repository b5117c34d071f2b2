"""Lean forwards: what they recognise, that they compute the same, and that a model with them can be copied and pickled."""

import copy
import pickle

import pytest
import torch
from helpers import build
from torch import nn

from plopfast.models.lean import LeanMLP, LeanNorm, lean_modules

BF16 = torch.bfloat16


class Norm(nn.Module):
    """An RMS norm; eps lies under a name that the test chooses."""

    def __init__(self, width=24, kind="narrow", eps_name="eps", eps=1e-3, center=False):
        super().__init__()
        self.weight = nn.Parameter(torch.linspace(0.5, 1.5, width) - int(kind == "offset"), requires_grad=False)
        self.kind, self.center, self.eps_name = kind, center, eps_name
        setattr(self, eps_name, eps)

    def forward(self, x):
        wide = x.float() - x.float().mean(-1, keepdim=True) * self.center
        x_hat = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + getattr(self, self.eps_name))
        if self.kind == "narrow":
            return self.weight * x_hat.to(x.dtype)
        return (x_hat * (self.weight.float() + (self.kind == "offset"))).to(x.dtype)


class Biased(Norm):
    def __init__(self):
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(24))

    def forward(self, x):
        return super().forward(x) + self.bias


class Wide(Norm):
    def forward(self, x):
        return super().forward(x).float()


class GatedNorm(Norm):
    def forward(self, x, gate=None):
        return super().forward(x) * nn.functional.silu(gate.float()).to(x.dtype)


class Transposed(Norm):
    """Of channels in the first dimension."""

    def forward(self, x):
        return super().forward(x.transpose(0, -1)).transpose(0, -1) + torch.zeros(24, 1, 1)


class MLP(nn.Module):
    def __init__(self, act, merged=False, width=24, inner=64, scale=1.0):
        super().__init__()
        if merged:
            self.gate_up_proj = nn.Linear(width, 2 * inner)
        else:
            self.gate_proj, self.up_proj = nn.Linear(width, inner), nn.Linear(width, inner)
        self.down_proj, self.act, self.scale = nn.Linear(inner, width), act, scale

    def forward(self, x):
        both = self.gate_up_proj(x).chunk(2, dim=-1) if hasattr(self, "gate_up_proj") else None
        gate, up = both or (self.gate_proj(x), self.up_proj(x))
        return self.down_proj(self.act(gate) * up) * self.scale


class Two(MLP):
    def forward(self, x, mask=None):
        return super().forward(x)


def gelu_tanh(x):
    return nn.functional.gelu(x, approximate="tanh")


ACTS = {"silu": nn.functional.silu, "gelu_tanh": gelu_tanh, "gelu": nn.functional.gelu}


def kinds(**modules):
    torch.manual_seed(0)
    found = lean_modules(nn.ModuleDict(modules))
    return {name: module.forward.kind for name, module in found.items()}


@pytest.mark.parametrize("dtype", [torch.float32, BF16, torch.float16])
@pytest.mark.parametrize("merged", [False, True])
def test_activations_are_told_apart(merged, dtype):
    """In bfloat16 too, whose rounding is ten times what sets GELU's two formulas apart."""
    torch.manual_seed(1)
    assert kinds(**{name: MLP(act, merged).to(dtype) for name, act in ACTS.items()}) == {name: name for name in ACTS}
    assert not kinds(relu=MLP(nn.functional.relu, merged).to(dtype), tanh=MLP(torch.tanh, merged).to(dtype))
    assert not kinds(scaled=MLP(nn.functional.silu, merged, scale=1.05).to(dtype))


@pytest.mark.parametrize("eps_name", ["variance_epsilon", "eps", "epsilon"])
def test_norms_are_told_apart(eps_name):
    norms = {kind: Norm(kind=kind, eps_name=eps_name) for kind in ("narrow", "wide", "offset")}
    assert kinds(**{k: copy.deepcopy(n).to(BF16) for k, n in norms.items()}) == {k: k for k in norms}
    assert kinds(**norms) == {"narrow": "narrow", "wide": "narrow", "offset": "offset"}  # float32 rounds only once
    assert kinds(torch=nn.RMSNorm(24, eps=1e-3).requires_grad_(False)) == {"torch": "narrow"}


def test_what_is_left_alone():
    trained, replaced, other = Norm(), Norm(), Norm()
    trained.weight.requires_grad_(True)
    replaced.forward = lambda x: x
    other.eps = torch.tensor(1e-3)
    mixed = MLP(nn.functional.silu)
    mixed.up_proj = None
    assert not kinds(
        trained=trained, replaced=replaced, other=other, centered=Norm(center=True), gated=GatedNorm(), two=Two(ACTS["silu"]),
        layer=nn.LayerNorm(24).requires_grad_(False), no_bias=nn.LayerNorm(24, bias=False).requires_grad_(False),
        batch=nn.BatchNorm1d(24).requires_grad_(False), first=Transposed(), unnamed=Norm(eps_name="tiny"), mixed=mixed,
        biased=Biased(), wide=Wide().to(BF16),
    )  # fmt: skip


def test_a_module_that_gives_zeros_agrees():
    mlp = MLP(ACTS["silu"])
    for parameter in mlp.down_proj.parameters():
        nn.init.zeros_(parameter)
    assert kinds(mlp=mlp) == {"mlp": "silu"}


def test_eps_matters():
    """Where eps isn't the one that the module takes, small tokens show it."""
    norm = Norm(eps=1e-5)
    norm.variance_epsilon = 1e-6  # looked at first
    assert not kinds(norm=norm)


def test_an_input_wider_than_the_weight_and_a_trained_weight_take_the_modules_own_forward():
    norm, x = Norm().to(BF16), torch.randn(3, 24)
    own = norm(x)
    assert kinds(norm=norm) and norm(x).dtype == torch.float32 and torch.equal(norm(x), own)
    norm.weight.requires_grad_(True)
    norm(x.to(BF16)).sum().backward()
    assert norm.weight.grad is not None


def test_known_kinds_are_not_compared():
    norm, mlp = Norm(), MLP(ACTS["silu"])
    model = nn.ModuleDict({"norm": norm, "mlp": mlp}).to("meta")
    assert list(lean_modules(model, {"norm": "offset"})) == ["norm"]
    assert isinstance(norm.forward, LeanNorm) and norm.forward.kind == "offset"
    assert norm(torch.empty(2, 24, device="meta")).shape == (2, 24)
    assert list(lean_modules(model, {"norm": "narrow", "mlp": "gelu"})) == ["mlp"]
    assert isinstance(mlp.forward, LeanMLP) and mlp(torch.empty(2, 24, device="meta")).shape == (2, 24)


@pytest.mark.parametrize("name", ["llama", "gemma3", "phi3"])
@pytest.mark.parametrize("way", ["copied", "pickled"])
def test_a_copys_forwards_use_the_copys_weights(name, way):
    model = build(name).requires_grad_(False)
    found = lean_modules(model)
    assert any(isinstance(m.forward, LeanMLP) for m in found.values()) and any("norm" in key for key in found)
    tokens = torch.arange(3, 20)[None]
    with torch.no_grad():
        before = model(tokens).logits
        other = copy.deepcopy(model) if way == "copied" else pickle.loads(pickle.dumps(model))
        for key in found:
            module = other.get_submodule(key)
            assert module.forward.module is module is not found[key]
        assert torch.equal(other(tokens).logits, before)
        for parameter in other.parameters():
            parameter.mul_(1.5)
        changed = other(tokens).logits
        assert torch.equal(model(tokens).logits, before) and not torch.equal(changed, before)
        for key in found:
            del other.get_submodule(key).forward
        torch.testing.assert_close(other(tokens).logits, changed)


def test_undone():
    model = build("gemma3").requires_grad_(False)
    state = [dict(vars(module)) for module in model.modules()]
    for module in lean_modules(model).values():
        del module.forward
    assert [vars(module).keys() for module in model.modules()] == [one.keys() for one in state]


def test_a_norm_that_takes_other_shapes_is_left_alone():
    """xLSTM's norm unpacks four sizes, so it raises ValueError for three."""

    class Heads(Norm):
        def forward(self, x):
            _rows, _tokens, _heads, _width = x.shape
            return super().forward(x)

    assert not kinds(norm=Heads())
