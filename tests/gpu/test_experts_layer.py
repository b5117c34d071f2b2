"""A layer of experts on the Triton path: adapters with their gradients, and scores."""

import pytest
import torch
from cases import BF16, DEVICE, FP32, name_of
from torch import nn
from toy_model import batches

import plopfast as pf
from plopfast.kernels import dispatch
from plopfast.kernels.accuracy import assert_no_worse
from plopfast.lora.layer import adapters
from plopfast.models.experts import expert_weights

COUNT, TAKEN, WIDTH, INNER = 5, 2, 32, 24


class Experts(nn.Module):
    """As transformers' usual classes: one parameter for all experts, a loop over them."""

    has_gate, has_post_expert_norm, is_transposed = True, False, False

    def __init__(self):
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.randn(COUNT, 2 * INNER, WIDTH) / WIDTH**0.5)
        self.down_proj = nn.Parameter(torch.randn(COUNT, WIDTH, INNER) / INNER**0.5)
        self.act_fn = nn.SiLU()

    def _apply_gate(self, h):
        gate, up = h.chunk(2, dim=-1)
        return self.act_fn(gate) * up

    def forward(self, hidden, chosen, weights):
        out = torch.zeros_like(hidden)
        for e in range(COUNT):
            token, place = torch.where(chosen == e)
            y = self._apply_gate(hidden[token] @ self.gate_up_proj[e].T) @ self.down_proj[e].T
            out.index_add_(0, token, y * weights[token, place, None].to(y.dtype))
        return out


class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.router, self.experts = nn.Linear(WIDTH, COUNT, bias=False), Experts()

    def forward(self, x):
        rows = x.flatten(0, 1)
        weights, chosen = self.router(rows).softmax(-1).topk(TAKEN)
        return x + self.experts(rows, chosen, weights).view(x.shape)


class Model(nn.Module):
    def __init__(self, dtype):
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(50, WIDTH)
        self.layers = nn.ModuleList(Layer() for _ in range(2))
        self.to(dtype).to(DEVICE)

    def forward(self, input_ids, attention_mask=None):
        x = self.embedding(input_ids.to(DEVICE))
        for layer in self.layers:
            x = layer(x)
        return x


def adapted(dtype, backend, only=""):
    model = Model(dtype)
    chosen = {info.name: (4, 8.0) for info in expert_weights(model) if info.name.endswith(only)}
    assert len(chosen) == (2 if only else 4)
    pf.inject(model, pf.Placement(chosen, [], "explicit", 0), backend=backend)
    draw = torch.Generator().manual_seed(1)
    for module in adapters(model).values():
        module.lora_B.data = 0.1 * torch.randn(module.lora_B.shape, generator=draw).to(DEVICE)
    return model


@pytest.mark.parametrize("only", ["", "down_proj"])
@pytest.mark.parametrize("dtype", [BF16, FP32], ids=name_of)
def test_outputs_and_gradients_are_torchs(dtype, only, launched, watched):
    """A weight without an adapter takes the path of its neighbour."""
    found = []
    for kind, backend in ((torch.float64, "torch"), (dtype, "torch"), (dtype, "triton")):
        model = adapted(kind, backend, only)
        launched.clear()
        with watched():
            y = model(batches(1)[0]["input_ids"])
            (y.double() * torch.linspace(-1, 1, WIDTH, device=DEVICE)).sum().backward()
        found.append((y.detach(), *[one.grad for module in adapters(model).values() for one in module.parameters()]))
    exact, plain, ours = ([one.to(dtype) for one in row] if i else row for i, row in enumerate(found))
    for got, theirs, of in zip(ours, plain, exact, strict=True):
        assert_no_worse(got, theirs, of.double())
    kernels = [name for name in launched if name.startswith("segment_")]
    # dX is computed only for what depends on an adapter before it
    assert kernels.count("segment_gemm") == 4 + (2 if only else 3)
    assert kernels.count("segment_grads") == 2 * (2 if only else 4)


def test_scores_are_torchs(launched, watched):
    with watched():
        ours = pf.score(Model(FP32), batches(), backend="triton")
        assert launched.count("segment_gemm") >= 4
        plain = pf.score(Model(FP32), batches(), backend="torch")
    assert ours.modules == pytest.approx(plain.modules, rel=1e-5) and ours.experts.keys() == plain.experts.keys()
    for name, each in ours.experts.items():
        assert each.tokens == plain.experts[name].tokens
        assert each.nfn == pytest.approx(plain.experts[name].nfn, rel=1e-5)


def test_a_backend_that_cannot_run_is_an_error():
    model = Model(torch.float64)
    name = expert_weights(model)[0].name
    pf.inject(model, pf.Placement({name: (4, 8.0)}, [], "explicit", 0), backend="triton")
    with pytest.raises(pf.BackendError, match="float64"):
        model(batches(1)[0]["input_ids"])
    assert dispatch.resolve(DEVICE, "triton") == "triton"
