"""Linears that read one X: their low-rank terms in one launch, the sum of their dX, and the whole group in a model's place."""

import itertools

import pytest
import torch
from cases import BF16, DEVICE, FAR, FP16, FP32, far, keep_of, name_of, normal, product
from torch import nn

from plopfast.kernels import reference, triton_groups
from plopfast.kernels.accuracy import assert_no_worse
from plopfast.lora.layer import LoRALinear
from plopfast.lora.shared import Prepared, SharedInput

SEEDS = (3, (1 << 40) + 5, -7)
# M, columns of each member, K (of dX), R, dtype, of adapters, which have a bias; p
CASES = [
    (1, (1, 1), 1, 1, FP32, FP32, (True, False), 0.0),
    (63, (30, 70, 24), 50, 5, FP32, FP32, (False, True, False), 0.3),
    (40, (130, 64, 64), 72, 16, BF16, FP32, (True, True, True), 0.2),
    (33, (64, 200), 130, 64, FP16, FP16, (False, False), 0.5),
    (20, (16, 16, 140), 48, 40, BF16, BF16, (False, False, True), 0.0),
]


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("case", CASES, ids=name_of)
def test_every_low_rank_term_in_one_launch(case, seed, watched, launched):
    m, columns, _, r, dtype, wide, biased, _ = case
    whole = normal(m, r * len(columns), dtype=dtype, seed=1, layout="odd")
    s = whole.split(r, dim=1)
    b = [normal(n, r, dtype=wide, scale=r**-0.5, seed=2 + i) for i, n in enumerate(columns)]
    biases = [
        normal(n, dtype=dtype, seed=9, layout="odd") if there else None
        for n, there in zip(columns, biased, strict=True)
    ]
    assert triton_groups.fits(s, b)
    with watched("y0", "y1", "y2", seed=seed):
        found = triton_groups.low_ranks(s, b, biases)
    assert launched == ["lora_expands"]
    for y, one, other, bias in zip(found, s, b, biases, strict=True):
        same, exact = product(one, other.to(dtype).T), one.double() @ other.double().T
        if bias is not None:
            same, exact = same + bias, exact + bias.double()
        assert y.dtype == dtype and y.is_contiguous()
        assert_no_worse(y, same, exact)


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("case", CASES, ids=name_of)
def test_the_sum_of_masked_terms(case, seed, watched, launched):
    """Each member's mask is its own, and lies on its own term."""
    m, columns, k, r, dtype, wide, _, p = case
    ds = [normal(m, r, dtype=dtype, seed=1 + i) for i in range(len(columns))]
    a = [normal(r, k, dtype=wide, scale=r**-0.5, seed=5 + i) for i in range(len(columns))]
    transposed = [one.T for one in a]
    assert triton_groups.fits(ds, transposed)
    with watched("y", seed=seed):
        got = triton_groups.low_rank_sum(ds, transposed, p, SEEDS[: len(columns)])
    assert launched == ["lora_expand_sum"]
    same, exact = 0, 0
    for one, other, number in zip(ds, a, SEEDS, strict=False):
        keep = keep_of(p, number, m, k)[0]
        term, fine = product(one, other.to(dtype)), one.double() @ other.double()
        same, exact = same + (term if keep is None else term * keep), exact + (fine if keep is None else fine * keep)
    assert_no_worse(got, same, exact)


def test_addresses_beyond_2_31_elements(watched):
    s = [far(normal(5, 4, dtype=BF16, seed=1 + i), FAR) for i in range(2)]
    b = [normal(6, 4, dtype=BF16, seed=5 + i) for i in range(2)]
    with watched("y0", "y1", "y"):
        found = [*triton_groups.low_ranks(s, b, [None, None]), triton_groups.low_rank_sum(s, b, 0.0, (0, 0))]
    terms = [(product(one, other.T), one.double() @ other.double().T) for one, other in zip(s, b, strict=True)]
    for got, (same, exact) in zip(found, [*terms, tuple(x + y for x, y in zip(*terms, strict=True))], strict=True):
        assert_no_worse(got, same, exact)


def test_what_the_kernels_do_not_take():
    s, b = [normal(5, 4), normal(5, 4)], [normal(6, 4), normal(7, 4)]
    assert triton_groups.fits(s, b)
    assert not triton_groups.fits(s[:1], b[:1]) and not triton_groups.fits(s * 2, b * 2)
    assert not triton_groups.fits(normal(5, 7).split([4, 3], dim=1), [b[0], normal(7, 4)]), "two ranks"
    assert not triton_groups.fits(s, [b[0], b[1].to(BF16)]) and not triton_groups.fits([one[:0] for one in s], b)
    assert not triton_groups.fits([s[0], normal(5, 4, layout="odd")], b), "two strides"


def group_of(ranks, backend, p, dtype=FP32, k=40):
    """Three members that read [M, k], as `find_shared_inputs` groups them, with random adapters."""
    members = []
    for i, (n, rank) in enumerate(zip((48, 24, 20), ranks, strict=True)):
        base = nn.Linear(k, n, bias=i != 1, device=DEVICE, dtype=dtype)
        base.weight.data = normal(n, k, dtype=dtype, scale=k**-0.5, seed=i)
        module = LoRALinear(base, rank, 2.0 * rank, dropout=p, backend=backend)
        module.lora_A.data, module.lora_B.data = normal(rank, k, scale=0.2, seed=20 + i), normal(n, rank, seed=30 + i)
        members.append(module)
    return nn.ModuleList(members)


@pytest.mark.parametrize("backend", ["lora-first", "fused"])
@pytest.mark.parametrize("ranks", [(4, 4, 4), (4, 8, 3)], ids=name_of)
@pytest.mark.parametrize("p", [0.0, 0.3])
def test_a_group_is_its_members(backend, ranks, p, watched, launched):
    """Outputs and gradients of the group are those of three modules with the same masks, and cost fewer launches."""
    model = group_of(ranks, backend, p)
    x = normal(20, 40, seed=7).requires_grad_()
    dy = [normal(20, len(m.lora_B), seed=40 + i) for i, m in enumerate(model)]

    def step():
        torch.manual_seed(5)
        y = [module(x) for module in model]
        return y, torch.autograd.grad(
            y, [x, *model.parameters()][:1] + [p for m in model for p in (m.lora_A, m.lora_B)], dy
        )

    with watched("y", "y0", "y1", "y2", "g", "out", "other_out"):
        apart, gradients = step()
    before = [name for name in launched if not name.startswith("torch.")]
    launched.clear()
    shared = SharedInput(list(model))
    for module in model:
        module.shared = shared
    with Prepared(model), watched("y", "y0", "y1", "y2", "g", "out", "other_out"):
        together, found = step()
    after = [name for name in launched if not name.startswith("torch.")]
    for one, other in zip((*apart, *gradients), (*together, *found), strict=True):
        torch.testing.assert_close(other, one, rtol=2e-5, atol=2e-5)
    assert len(after) < len(before)
    if backend == "lora-first" and len(set(ranks)) == 1:
        assert after.count("lora_expands") == after.count("lora_expand_sum") == 1 and "lora_expand" not in after
        assert after.count("lora_shrink") == (p > 0)


@pytest.mark.parametrize("unused", [0, 1, 2])
@pytest.mark.parametrize("p", [0.0, 0.3])
def test_an_output_that_nothing_reads(unused, p, watched):
    """It has no gradient, nor have its adapters; the others' are what they are alone."""
    model = group_of((4, 4, 4), "lora-first", p)
    x = normal(20, 40, seed=7).requires_grad_()
    used = [i for i in range(3) if i != unused]
    found = []
    for grouped in (False, True):
        if grouped:
            shared = SharedInput(list(model))
            for module in model:
                module.shared = shared
        torch.manual_seed(5)
        with Prepared(model):
            y = [module(x) for module in model]
            sum(y[i].square().sum() for i in used).backward()
        found.append({"x": x.grad, **{name: value.grad for name, value in model.named_parameters()}})
        x.grad = None
        model.zero_grad()
    assert all((found[0][name] is None) == (value is None) for name, value in found[1].items())
    assert found[1][f"{unused}.lora_A"] is None
    for name, value in found[0].items():
        if value is not None:
            assert (found[1][name] - value).norm() <= 1e-5 * value.norm(), name


@pytest.mark.parametrize("needs", list(itertools.product([False, True], repeat=3)), ids=name_of)
def test_gradients_that_nobody_needs(needs, launched):
    model = group_of((4, 4, 4), "lora-first", 0.0)
    x = normal(20, 40, seed=7).requires_grad_(needs[0])
    for module in model:
        module.lora_A.requires_grad_(needs[1])
        module.lora_B.requires_grad_(needs[2])
    shared = SharedInput(list(model))
    for module in model:
        module.shared = shared
    with Prepared(model):
        y = [module(x) for module in model]
        assert all(one.requires_grad == any(needs) for one in y)
        if any(needs):
            torch.autograd.backward(y, [torch.ones_like(one) for one in y])
    assert launched.count("lora_expand_sum") == needs[0]
    a, w = [m.lora_A.detach() for m in model], [m.base.weight for m in model]
    for i, module in enumerate(model):
        exact = reference.lora_linear_grads(
            torch.ones(20, len(w[i]), dtype=torch.float64, device=DEVICE),
            x.detach(),
            w[i],
            a[i],
            module.lora_B.detach(),
            2.0,
        )
        for name, need in (("lora_A", needs[1]), ("lora_B", needs[2])):
            got = getattr(module, name).grad
            assert (got is not None) == need
            if need:
                torch.testing.assert_close(got.double(), exact[name], rtol=1e-4, atol=1e-4)
    assert (x.grad is not None) == needs[0]
