"""A lean norm before linears that read it makes their S too, in the model's place: the same numbers, and one read fewer."""

import pytest
import torch
from cases import DEVICE, FP32, normal
from test_groups import group_of
from torch import nn

from plopfast.kernels import triton_blocks
from plopfast.kernels.launch import forget_plans
from plopfast.lora.shared import Prepared, SharedInput
from plopfast.models.lean import LeanNorm

M, K = 40, 40


@pytest.fixture(autouse=True)
def few_are_enough(monkeypatch):
    """rms_norm_shrink is taken for these few tokens, too, whatever number of SMs a GPU has."""
    monkeypatch.setattr(triton_blocks, "SHARE", 0)


class Norm(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(1 + normal(K, scale=0.3, seed=3), requires_grad=False)

    def forward(self, x):
        return self.weight * x * (x.square().mean(-1, keepdim=True) + 1e-5).rsqrt()


def block(ranks=(4, 4, 4), backend="lora-first", p=0.0):
    """A lean norm, and three linears that read it as one group."""
    norm, members = Norm(), group_of(ranks, backend, p)
    norm.forward = LeanNorm(norm, "narrow", 1e-5, "triton")
    shared = SharedInput(list(members), norm)
    for module in members:
        module.shared = shared
    return nn.ModuleDict({"norm": norm, "members": members}).to(DEVICE)


def step(model, x, dy):
    torch.manual_seed(5)
    h = model["norm"](x)
    y = [module(h) for module in model["members"]]
    wanted = [x, *(p for p in model.parameters() if p.requires_grad)]
    return [*y, *torch.autograd.grad(y, wanted, dy)]


@pytest.mark.parametrize("backend", ["lora-first", "fused"])
@pytest.mark.parametrize("ranks", [(4, 4, 4), (4, 8, 3)])
@pytest.mark.parametrize("p", [0.0, 0.3])
def test_the_step_is_the_same(backend, ranks, p, watched, launched):
    model, x = block(ranks, backend, p), normal(2, M // 2, K, seed=7).requires_grad_()
    dy = [normal(2, M // 2, len(m.lora_B), seed=40 + i) for i, m in enumerate(model["members"])]
    outputs = ("y", "y0", "y1", "y2", "g", "out", "other_out", "dx")
    with watched(*outputs):
        apart = step(model, x, dy)
    assert "rms_norm" in launched and "rms_norm_shrink" not in launched
    launched.clear()
    forget_plans()  # on a GPU, later launches of a plan aren't seen
    with Prepared(model), watched(*outputs):
        together = step(model, x, dy)
    for one, other in zip(apart, together, strict=True):
        torch.testing.assert_close(other, one, rtol=2e-5, atol=2e-5)
    alike = len(set(ranks)) == 1
    assert ("rms_norm_shrink" in launched, "rms_norm" in launched) == (alike, not alike)
    assert not alike or "lora_shrink" not in launched


def test_it_is_left_to_the_members_elsewhere(launched):
    """In plain torch, outside a training step, and for an input that somebody changed after the norm."""
    x = normal(M, K, seed=7)
    for model in (block(backend="torch"), block()):
        with Prepared(model) if model["members"][0].backend == "torch" else torch.no_grad():
            model["members"][0](model["norm"](x))
    assert "rms_norm_shrink" not in launched
    model = block()
    with Prepared(model):
        h = model["norm"](x)
        h.mul_(2.0)
        got = model["members"][0](h)
    assert "rms_norm_shrink" in launched
    torch.testing.assert_close(got, model["members"][0](2.0 * model["norm"](x)), rtol=1e-5, atol=1e-5)


def test_no_seed_is_drawn_in_vain():
    """Where the members take plain torch, the norm leaves torch's generator alone."""
    model, x = block(backend="torch", p=0.5), normal(M, K, seed=7)
    torch.manual_seed(5)
    before = torch.get_rng_state()
    with Prepared(model):
        model["norm"](x)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_step_without_a_fetch_leaves_nothing(watched):
    """Seeds that were drawn for S hold for one call: a second call of the same y draws others."""
    model, x = block(p=0.5), normal(M, K, seed=7)
    with Prepared(model):
        h = model["norm"](x)
        one, other = model["members"][0](h), model["members"][0](h)
        assert not torch.equal(one, other)
        forward = model["norm"].forward
        assert forward.reader is model["members"][0].shared
    assert forward.reader is None and model["members"][0].shared._made is None


def test_it_may_be_computed_again(watched):
    """With activation checkpointing the masks come back."""
    model, x = block(p=0.5), normal(M, K, dtype=FP32, seed=7).requires_grad_()

    def run(x):
        h = model["norm"](x)
        return torch.cat([module(h) for module in model["members"]], dim=1)

    found = []
    for again in (False, True):
        torch.manual_seed(3)
        with Prepared(model):
            y = torch.utils.checkpoint.checkpoint(run, x, use_reentrant=False) if again else run(x)
            found.append((y, *torch.autograd.grad(y.square().sum(), x)))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)
