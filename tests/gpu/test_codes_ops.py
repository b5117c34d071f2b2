"""Products with quantised frozen weights, with Triton's kernels under them: as products with the decoded weight.

M tokens, N out, K in, R rank.
"""

import pytest
import torch
from cases import BF16, DEVICE, FP32, name_of, normal

import plopfast as pf
from plopfast.kernels import codes, dispatch, torch_codes
from plopfast.kernels.accuracy import assert_no_worse

KINDS = [("nf4", False), ("nf4", True), ("int8", False), ("fp8", False)]
OUTPUTS = ("decode_nf4.w", "decode_scaled.w", "y", "lora_shrink.s", "g", "lora_grads.ds", "out", "other_out")
SEED = 0xFEED_5EED


def made(kind, nested, n, k, dtype):
    weight = normal(n, k, dtype=dtype, scale=0.1, seed=1)
    if kind == "nf4":
        packed, absmax = torch_codes.encode_nf4(weight)
        if not nested:
            return codes.NF4(packed, absmax, (n, k), dtype)
        inner, code, outer, offset = torch_codes.nest(absmax)
        return codes.NF4(packed, inner, (n, k), dtype, (code, outer, offset))
    if kind == "int8":
        return codes.Scaled(*torch_codes.encode_int8(weight), (1, k), (n, k), dtype)
    return codes.Scaled(*torch_codes.encode_fp8(weight), (128, 128), (n, k), dtype)


def by_torch(weight):
    """W [N, K], decoded by torch's operations."""
    out = torch.empty(weight.shape, dtype=weight.dtype, device=DEVICE)
    if isinstance(weight, codes.NF4):
        return torch_codes.decode_nf4(weight.packed, weight.scales(), out)
    return torch_codes.decode_scaled(weight.codes, weight.scale, weight.block, out)


@pytest.fixture(autouse=True)
def kernels(monkeypatch):
    """As on a GPU, where "auto" takes kernels."""
    monkeypatch.setattr(dispatch, "runs_kernels", lambda *a: True)
    codes.free_workspaces()


@pytest.mark.parametrize("dtype", [FP32, BF16], ids=name_of)
@pytest.mark.parametrize(("kind", "nested"), KINDS)
def test_decoded_into_the_workspace_to_the_bit(kind, nested, dtype, watched):
    weight = made(kind, nested, 70, 100, dtype)
    with watched("w") as check:
        found = codes.dense(weight).clone()
    assert torch.equal(found, by_torch(weight))
    assert not check or [launch.kernel for launch in check.launches] == [
        "decode_nf4" if kind == "nf4" else "decode_scaled"
    ]


PATHS = [("fused", "nf4", True), *(("lora-first", *kind) for kind in KINDS), ("torch", "fp8", False)]


@pytest.mark.parametrize(("backend", "kind", "nested"), PATHS)
def test_a_lora_linear_is_that_of_the_decoded_weight(backend, kind, nested, watched):
    """Forward and backward decode once each, where x has a gradient."""
    m, n, k, r = 80, 40, 64, 4
    weight = made(kind, nested, n, k, BF16)
    x, dy = normal(m, k, dtype=BF16, seed=2), normal(m, n, dtype=BF16, seed=3)
    a, b = normal(r, k, seed=4), normal(n, r, seed=5)
    results = []
    for frozen, need_x in ((weight, True), (by_torch(weight), True), (weight, False)):
        leaves = [x.clone().requires_grad_(need_x), a.clone().requires_grad_(), b.clone().requires_grad_()]
        with watched(*OUTPUTS) as check:
            y = pf.lora_linear(leaves[0], frozen, *leaves[1:], scaling=1.5, dropout_p=0.2, seed=SEED, backend=backend)
            y.backward(dy)
        results.append([y.detach(), *(leaf.grad for leaf in leaves)])
        if check:
            decoded = sum(launch.kernel.startswith("decode_") for launch in check.launches)
            assert decoded == (0 if isinstance(frozen, torch.Tensor) else 1 + need_x)
    quantised, dense, without = results
    assert all(torch.equal(one, two) for one, two in zip(quantised, dense, strict=True))
    assert without[1] is None and all(torch.equal(without[i], dense[i]) for i in (0, 2, 3))


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("m", [1, 64])
def test_few_tokens_decode_inside_the_product(m, nested, watched):
    n, k, r = 40, 128, 4
    weight, bias = made("nf4", nested, n, k, BF16), normal(n, dtype=BF16, seed=6)
    whole = by_torch(weight)
    x, a, b = normal(m, k, dtype=BF16, seed=2), normal(r, k, seed=4), normal(n, r, seed=5)
    with watched("y") as check:
        plain = codes.frozen_linear(x, weight, bias)
        lora = pf.lora_linear(x, weight, a, b, scaling=1.5, bias=bias)
    if check:
        assert [launch.kernel for launch in check.launches] == ["lora_gemm_nf4"] * 2
    exact = x.double() @ whole.double().T + bias.double()
    assert_no_worse(plain, torch.nn.functional.linear(x, whole, bias), exact)
    s = (1.5 * x @ a.to(BF16).T).double()
    low = exact + s @ b.double().T
    assert_no_worse(lora, (torch.nn.functional.linear(x, whole, bias).double() + s @ b.double().T).to(BF16), low)


def test_many_tokens_and_odd_columns_decode_first(watched):
    for m, k in ((65, 64), (4, 96)):
        weight, x = made("nf4", False, 40, k, FP32), normal(m, k)
        with watched("w") as check:
            y = codes.frozen_linear(x, weight)
        assert not check or [launch.kernel for launch in check.launches] == ["decode_nf4"]
        torch.testing.assert_close(y, x @ by_torch(weight).T)


def test_a_gradient_of_few_tokens_decodes_too(watched):
    weight, x = made("nf4", True, 40, 64, FP32), normal(3, 64).requires_grad_()
    with watched("w", "y"):
        codes.frozen_linear(x, weight).sum().backward()
    torch.testing.assert_close(x.grad, torch.ones(3, 40, device=DEVICE) @ by_torch(weight))
