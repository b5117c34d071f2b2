"""Who differentiates twice is told that plopfast's operations have no second derivative."""

import pytest
import torch

import plopfast as pf
from plopfast.kernels import block_ops
from plopfast.kernels.codes import frozen_linear
from plopfast.models.cross_entropy import chunked_cross_entropy
from plopfast.models.quantized import quantized


def numbers(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


A, B, W, NORM, TARGETS = numbers(2, 8), numbers(6, 2), numbers(6, 8), numbers(8), torch.tensor([1, 0, 5])
CALLS = {
    "lora_linear": lambda x, a: pf.lora_linear(x, W, a, B, scaling=0.5),
    "lora_linear_grouped": lambda x, a: pf.lora_linear_grouped(x, W, [a, None], [B, None], [0, 2, 3], [0.5, 0.0]),
    "rms_norm": lambda x, a: block_ops.rms_norm(x, NORM, 1e-6) * a.sum(),
    "gate": lambda x, a: block_ops.gate(x, x, "silu") * a.sum(),
    "cross-entropy": lambda x, a: chunked_cross_entropy(x * a.sum(), W, TARGETS),
}


@pytest.mark.parametrize("name", CALLS)
def test_a_gradient_penalty_is_refused_and_not_taken_for_a_constant(name):
    x, a = numbers(3, 8).requires_grad_(), A.clone().requires_grad_()
    y = CALLS[name](x, a)
    (dx,) = torch.autograd.grad(y.sum(), x, create_graph=True)  # the incoming gradient, ones, requires none itself
    with pytest.raises(RuntimeError, match=r"no second derivative.*pf\.restore"):
        (y.sum() + dx.square().sum()).backward()


@pytest.mark.parametrize("name", CALLS)
def test_first_derivatives_are_the_same_with_create_graph(name):
    found = []
    for create_graph in (False, True):
        x, a = numbers(3, 8).requires_grad_(), A.clone().requires_grad_()
        found.append(torch.autograd.grad(CALLS[name](x, a).sum(), (x, a), create_graph=create_graph))
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


def test_a_frozen_product_of_codes_has_its_second_derivative():
    linear = quantized(torch.nn.Linear(8, 6, bias=False), "int8")
    x, scale = numbers(3, 8).requires_grad_(), torch.ones((), requires_grad=True)
    (dx,) = torch.autograd.grad((frozen_linear(x, linear.codes) * scale).sum(), x, create_graph=True)
    (by_hand,) = torch.autograd.grad(dx.square().sum(), scale)
    torch.testing.assert_close(by_hand, 2 * dx.detach().square().sum())
