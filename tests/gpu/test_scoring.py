"""Scoring on the Triton path: norms come out of the products, and passes end at the last scored module."""

import pytest
import torch
from cases import BF16, DEVICE, FP16, FP32, name_of, normal
from toy_model import Toy, batches

import plopfast as pf
from plopfast.kernels import dispatch, library, reference
from plopfast.kernels.accuracy import assert_no_worse
from plopfast.lora import ops
from plopfast.models.linears import linear_modules
from plopfast.scoring.sums import NFNState

MODULES = [f"layers.{i}.{name}" for i in range(2) for name in ("gate", "up", "down")]


@pytest.mark.parametrize("dtype", [BF16, FP16, FP32], ids=name_of)
def test_scores_are_the_references(dtype, watched, monkeypatch):
    """NFN is that of the inputs which the passes had, without the bias; of three passes the first runs to its end."""
    model, seen, take = Toy(dtype=dtype, device=DEVICE), {}, NFNState.take

    def record(state, index, name, x, norms):
        seen.setdefault(name, []).append((x, norms))
        take(state, index, name, x, norms)

    monkeypatch.setattr(NFNState, "take", record)
    with watched("norms", "out"):
        report = pf.score(model, batches(), backend="triton", batch_tokens=24)
    assert list(report.modules) == MODULES and model.finished == 1
    for info in linear_modules(model):
        w, calls = info.frozen.dequantize(), seen[info.name]
        assert len(calls) == 3
        for x, norms in calls:
            exact = (x.double() @ w.double().T).norm(dim=-1)
            # a product that is written is rounded to 8 or 11 bits; its norm, before that, is not
            torch.testing.assert_close(norms.double(), exact, rtol=2e-5, atol=0)
        x = torch.cat([x.flatten(0, 1) for x, _ in calls])
        assert report.modules[info.name] == pytest.approx(reference.nfn(x, w).mean().item(), rel=1e-5)
    assert report.modules == pytest.approx(pf.score(model, batches(), backend="torch").modules, rel=0.01)
    assert not any("forward" in vars(module) or module._forward_hooks for module in model.modules())


@pytest.mark.parametrize("tokens, epilogue", [(2048, False), (8192, True)])
def test_small_products_are_the_vendors(tokens, epilogue, monkeypatch):
    """Of 1024 x 4096; launching ours takes the host longer than a small product takes the GPU."""
    monkeypatch.undo()
    x, w = (torch.empty(rows, 4096, dtype=BF16, device="meta") for rows in (tokens, 1024))
    monkeypatch.setattr(dispatch, "runs_kernels", lambda *_: True)
    monkeypatch.setattr(dispatch, "target_of", lambda device: dispatch.Target("sm_90", 132))
    assert library.norms_in_epilogue(x, w, "triton") == epilogue


@pytest.mark.parametrize("layout", ["aligned", "columns", "odd"])
@pytest.mark.parametrize("store", [True, False])
def test_a_product_and_its_norms(store, layout, watched):
    """Y has the bias, the norms don't; leading dimensions are kept. Rows that start anywhere go the other way round."""
    x, bias = normal(2, 9, 48, dtype=BF16, seed=1), normal(40, dtype=BF16, seed=3)
    w = normal(40, 48, dtype=BF16, scale=0.2, seed=2, layout=layout)
    with watched("norms", "out", *(["y"] if store and layout != "odd" else [])):
        y, norms = ops.linear_and_norms(x, w, bias, store=store, backend="triton")
    exact = x.double() @ w.double().T
    torch.testing.assert_close(norms.double(), exact.norm(dim=-1), rtol=2e-5 if layout != "odd" else 5e-3, atol=0)
    assert norms.shape == (2, 9) and norms.dtype == FP32
    if store:
        assert y.shape == (2, 9, 40)
        assert_no_worse(y, torch.nn.functional.linear(x, w.contiguous(), bias), exact + bias.double())
    else:
        assert y.numel() == 0


def test_autocast_takes_the_modules_own_forward(watched, monkeypatch):
    """A bfloat16 model under float16: what the products hand on is float16."""
    model, dtypes, take = Toy(device=DEVICE), {}, NFNState.take

    def record(state, index, name, x, norms):
        dtypes[name] = x.dtype
        take(state, index, name, x, norms)

    want = pf.score(model, batches(), backend="torch").modules
    monkeypatch.setattr(NFNState, "take", record)
    with watched("norms"), torch.autocast(DEVICE.type, FP16):
        got = pf.score(model, batches(), backend="triton").modules
    assert dtypes["layers.0.down"] == FP16 and got == pytest.approx(want, rel=0.02)


def test_float64_has_no_kernel():
    with pytest.raises(pf.BackendError, match="float64 has no Triton kernels"):
        pf.score(Toy(dtype=torch.float64, device=DEVICE), batches(), backend="triton")
