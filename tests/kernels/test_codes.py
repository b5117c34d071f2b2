"""Codes of frozen weights on the CPU: against bitsandbytes' own, and products with them against products with the decoded W."""

import bitsandbytes.functional as bnb
import pytest
import torch

from plopfast.kernels import codes, library_codes, torch_codes
from plopfast.kernels.accuracy import assert_no_worse

SHAPES = [(1, 2), (3, 22), (7, 64), (1, 130), (5, 100), (300, 200), (257, 1024)]  # the last one: more than a chunk
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def normal(*shape, dtype=torch.float32, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def made(kind, weight, nested=False):
    """The codes of a weight."""
    if kind == "nf4":
        packed, absmax = torch_codes.encode_nf4(weight)
        if not nested:
            return codes.NF4(packed, absmax, weight.shape, weight.dtype)
        inner, code, outer, offset = torch_codes.nest(absmax)
        return codes.NF4(packed, inner, weight.shape, weight.dtype, (code, outer, offset))
    if kind == "int8":
        return codes.Scaled(*torch_codes.encode_int8(weight), (1, weight.shape[1]), weight.shape, weight.dtype)
    return codes.Scaled(*torch_codes.encode_fp8(weight), (128, 128), weight.shape, weight.dtype)


KINDS = [("nf4", False), ("nf4", True), ("int8", False), ("fp8", False)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_nf4_is_made_and_read_as_bitsandbytes_does(shape, dtype):
    weight = normal(*shape, dtype=dtype) * 0.02
    packed, state = bnb.quantize_4bit(weight, quant_type="nf4", compress_statistics=False)
    ours = made("nf4", weight)
    assert torch.equal(ours.packed, packed) and torch.equal(ours.absmax, state.absmax)
    assert torch.equal(codes.dense(ours), bnb.dequantize_4bit(packed, state).view(shape))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_double_quantised_nf4_is_read_as_bitsandbytes_does(shape, dtype):
    weight = normal(*shape, dtype=dtype) * 0.02
    packed, state = bnb.quantize_4bit(weight, quant_type="nf4", compress_statistics=True)
    nested = state.state2.code, state.state2.absmax, float(state.offset)
    theirs = codes.NF4(packed, state.absmax, shape, dtype, nested)
    assert torch.equal(codes.dense(theirs), bnb.dequantize_4bit(packed, state).view(shape))
    ours = made("nf4", weight, nested=True)
    assert torch.equal(ours.nested[0], nested[0]) and torch.equal(ours.nested[1], nested[1])
    assert ours.nested[2] == pytest.approx(nested[2])
    assert (ours.scales() != theirs.scales()).double().mean() < 0.005, "a few are rounded the other way"


@pytest.mark.parametrize("shape", [*SHAPES, (257, 1040)], ids=str)  # the last one bitsandbytes 0.50.2 reads wrongly
def test_nf4_is_read_by_the_table(shape):
    ours, count = made("nf4", normal(*shape)), shape[0] * shape[1]
    packed = ours.packed.view(-1).long()
    levels = torch.tensor(torch_codes.LEVELS)[torch.stack([packed >> 4, packed & 15], 1).view(-1)[:count]]
    want = (levels * ours.absmax.repeat_interleave(64)[:count]).view(shape)
    assert torch.equal(codes.dense(ours), want) and torch.equal(codes.dense(ours.to(torch.bfloat16)), want.bfloat16())


def test_a_block_of_zeros_and_one_of_a_single_value():
    weight = torch.zeros(3, 64)
    weight[1], weight[2, 5] = -0.3, 7.0
    for kind, nested in KINDS[:1] + KINDS[2:]:
        assert torch.allclose(codes.dense(made(kind, weight, nested)), weight, rtol=0.05), kind


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_int8_is_within_half_a_step_and_fp8_within_a_sixteenth(shape):
    weight = normal(*shape)
    int8, fp8 = made("int8", weight), made("fp8", weight)
    assert ((codes.dense(int8) - weight).abs() <= int8.scale * 0.5001).all()
    error = (codes.dense(fp8) - weight).abs()
    assert (error <= weight.abs() / 16 + 1e-5).all() and fp8.codes.float().abs().max() == 448
    theirs = bnb.int8_vectorwise_dequant(int8.codes, int8.scale[:, 0] * 127)
    torch.testing.assert_close(codes.dense(int8), theirs, rtol=3e-7, atol=0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("kind", "nested"), KINDS)
def test_all_of_it_in_parts_and_anew(kind, nested, dtype):
    """Rows, another dtype and the operation of torch.compile give the same values; codes and scales are counted."""
    weight = made(kind, normal(300, 200, dtype=dtype) * 0.1, nested)
    whole = codes.dense(weight).clone()
    assert whole.dtype == dtype and whole.shape == weight.shape == (300, 200) and len(weight) == 300
    assert torch.equal(torch.cat([codes.dense(weight.rows(a, b)).clone() for a, b in ((0, 128), (128, 300))]), whole)
    assert torch.equal(codes.dense(weight.rows(256, 257)), whole[256:257])
    assert torch.equal(codes.dense(weight.to(torch.float32)).to(dtype), whole) and weight.to(dtype) is weight
    assert torch.equal(weight.new(), whole)
    each = 0.535 if nested else {"nf4": 0.5626, "int8": 1.021, "fp8": 1.001}[kind]
    assert weight.nbytes <= whole.numel() * each


@pytest.mark.parametrize(("kind", "nested"), KINDS)
def test_the_frobenius_norm_needs_no_whole_weight(kind, nested, monkeypatch):
    monkeypatch.setattr(codes, "SLICE", 128 * 200)
    weight = made(kind, normal(300, 200), nested)
    assert weight.slices() == [(0, 128), (128, 256), (256, 300)]
    assert float(weight.frobenius()) == pytest.approx(float(codes.dense(weight).double().norm()), rel=1e-6)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("kind", "nested"), KINDS)
def test_a_frozen_product_and_its_gradient(kind, nested, dtype):
    weight, bias = made(kind, normal(40, 72, dtype=dtype), nested), normal(40, dtype=dtype, seed=1)
    whole = weight.new()
    for shape in ((72,), (5, 72), (0, 72), (2, 3, 72)):
        x = normal(*shape, dtype=dtype, seed=2).requires_grad_()
        y = codes.frozen_linear(x, weight, bias)
        dy = normal(*y.shape, dtype=dtype, seed=3)
        (dx,) = torch.autograd.grad(y, x, dy)
        want, exact = x.detach() @ whole.T + bias, x.detach().double() @ whole.double().T + bias.double()
        assert_no_worse(y.detach(), want, exact)
        assert_no_worse(dx, dy @ whole, dy.double() @ whole.double())


def test_nothing_but_codes_is_kept_for_the_backward_pass():
    weight, x, saved = made("nf4", normal(64, 64)), normal(3, 64).requires_grad_(), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        codes.frozen_linear(x, weight)
    assert not saved


def test_products_in_another_dtype_and_under_autocast():
    weight, x = made("nf4", normal(64, 64)), normal(3, 64)
    assert codes.frozen_linear(x.bfloat16(), weight).dtype == torch.bfloat16
    with torch.autocast("cpu", torch.bfloat16):
        y = codes.frozen_linear(x, weight, normal(64))
    assert torch.equal(y, codes.frozen_linear(x.bfloat16(), weight, normal(64).bfloat16()))


def test_the_workspace_is_one_and_grows():
    codes.free_workspaces()
    small, large = made("nf4", normal(8, 64)), made("int8", normal(64, 64))
    one = codes.dense(small).data_ptr()
    assert codes.dense(small.to(torch.bfloat16)).data_ptr() == one
    two = codes.dense(large).data_ptr()
    assert codes.dense(small).data_ptr() == two and len(codes._KEPT) == 1
    assert next(iter(codes._KEPT.values())).nbytes == 64 * 64 * 4
    codes.free_workspaces()
    assert not codes._KEPT


@pytest.mark.parametrize(("kind", "nested"), KINDS)
def test_opcheck(kind, nested):
    weight = made(kind, normal(40, 72, dtype=torch.bfloat16), nested)
    if kind == "nf4":
        inner = weight.nested or (None, None, 0.0)
        arguments = weight.packed, weight.absmax, *inner, 40, 72, torch.bfloat16
        torch.library.opcheck(torch.ops.plopfast.decode_nf4.default, arguments)
    else:
        arguments = weight.codes, weight.scale, *weight.block, torch.bfloat16
        tests = (
            ("test_faketensor", "test_aot_dispatch_dynamic") if kind == "fp8" else ()
        )  # the others multiply operands
        torch.library.opcheck(
            torch.ops.plopfast.decode_scaled.default, arguments, **({"test_utils": tests} if tests else {})
        )
    assert library_codes.LIBRARY is not None


@pytest.mark.parametrize(("kind", "nested"), KINDS)
def test_without_values_there_are_shapes(kind, nested):
    from torch._subclasses.fake_tensor import FakeTensorMode

    weight = made(kind, normal(40, 72), nested)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        for tensors in (weight.tensors, [t.to("meta") for t in weight.tensors]):
            fake = [mode.from_tensor(t) if not t.is_meta else t for t in tensors]
            if kind == "nf4":
                inner = (fake[2], fake[3], 0.0) if nested else None
                same = codes.NF4(fake[0], fake[1], (40, 72), torch.bfloat16, inner)
            else:
                same = codes.Scaled(fake[0], fake[1], weight.block, (40, 72), torch.bfloat16)
            y = codes.dense(same)
            assert y.shape == (40, 72) and y.dtype == torch.bfloat16
