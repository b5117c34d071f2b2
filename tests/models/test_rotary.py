"""Rotary embedding in one operation: its numbers, the functions that it replaces, and those that it leaves alone."""

import sys
import types

import pytest
import torch
import transformers
from helpers import CONFIGS, SMALL, build
from torch import nn

from plopfast.kernels import reference
from plopfast.kernels.accuracy import assert_no_worse
from plopfast.models import rotary as source
from plopfast.models.rotary import rotary, rotated

MORE = {
    "cohere": lambda: transformers.CohereConfig(**SMALL),
    "glm": lambda: transformers.GlmConfig(**SMALL, head_dim=8),
    "stablelm": lambda: transformers.StableLmConfig(**SMALL),
    "olmo2": lambda: transformers.Olmo2Config(**SMALL),
}
LEFT_ALONE = {"gpt2", "glm"}  # one has none; the other reads half of each table


def model_of(name):
    if name in CONFIGS:
        return build(name)
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(MORE[name]()).eval()


@pytest.fixture(autouse=True)
def none_too_small(monkeypatch):
    monkeypatch.setattr(source, "SMALL", {})


def theirs_of(model):
    return vars(sys.modules[type(model).__module__]).get(source.NAME)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("width", [8, 6])
@pytest.mark.parametrize("rows", [1, 3])
def test_numbers_and_gradients(dtype, interleaved, width, rows, monkeypatch):
    """In pieces of the batch that a cache holds, and whole."""
    from plopfast.kernels import torch_rows

    draw = torch.Generator().manual_seed(0)
    q, k = (torch.randn(3, 5, h, 8, generator=draw).to(dtype).transpose(1, 2).requires_grad_() for h in (4, 2))
    cos, sin = (torch.randn(rows, 5, width, generator=draw).to(dtype) for _ in range(2))
    dy = [torch.randn(one.shape, generator=draw).to(dtype) for one in (q, k)]
    found = []
    for cached in (1 << 20, 1):
        monkeypatch.setattr(torch_rows, "CACHED", cached)
        y = rotary(q, k, cos, sin, interleaved)
        found.append([*y, *torch.autograd.grad(y, [q, k], dy)])
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))
    exact = [reference.rotary(one, cos, sin, interleaved) for one in (q, k)]
    exact += torch.autograd.grad(exact, [q, k], [one.double() for one in dy])
    for got, want in zip(found[0], exact, strict=True):
        assert_no_worse(got, want.to(dtype), want.double())


@pytest.mark.parametrize("name", sorted({*CONFIGS, *MORE}))
def test_a_model_gives_the_same(name, monkeypatch):
    model, calls = model_of(name).requires_grad_(True), []
    ids = torch.arange(1, 15).view(2, 7)
    want = model(input_ids=ids).logits
    expected = torch.autograd.grad(want.square().sum(), list(model.parameters()), allow_unused=True)
    theirs, plain = theirs_of(model), source.rotary
    with rotated(model) as count:
        assert count == (name not in LEFT_ALONE) and (theirs_of(model) is not theirs) == bool(count)
        monkeypatch.setattr(source, "rotary", lambda *given: calls.append(given) or plain(*given))
        found = model(input_ids=ids).logits
        gradients = torch.autograd.grad(found.square().sum(), list(model.parameters()), allow_unused=True)
    assert theirs_of(model) is theirs
    assert len(calls) == count * model.config.num_hidden_layers
    assert (found - want).norm() <= 1e-6 * want.norm()
    for got, one in zip(gradients, expected, strict=True):
        assert got is one is None or (got - one).norm() <= 1e-5 * one.norm()


def llama_rope(q, k, cos, sin, unsqueeze_dim=1):
    return transformers.models.llama.modeling_llama.apply_rotary_pos_emb(q, k, cos, sin, unsqueeze_dim)


def other_sign(q, k, cos, sin, unsqueeze_dim=1):
    return llama_rope(q, k, cos, -sin)


def wrong_keys(q, k, cos, sin, unsqueeze_dim=1):
    return llama_rope(q, k, cos, sin)[0], k * 1.0


def wrong_gradient(q, k, cos, sin, unsqueeze_dim=1):
    q, k = llama_rope(q, k, cos, sin)
    return q.detach() + (q - q.detach()) * 2, k


def wider(q, k, cos, sin, unsqueeze_dim=1):
    return tuple(one.double() for one in llama_rope(q, k, cos, sin))


def refusing(q, k, cos, sin, unsqueeze_dim=1):
    raise RuntimeError("shapes")


def other_parameters(q, k, cos, sin, position_ids=None, unsqueeze_dim=1):
    return llama_rope(q, k, cos, sin)


OTHERS = [other_sign, wrong_keys, wrong_gradient, wider, refusing, other_parameters]


def with_function(monkeypatch, function):
    """A model whose source file has this function."""
    module = types.ModuleType("a_file_of_models")
    setattr(module, source.NAME, function)
    monkeypatch.setitem(sys.modules, module.__name__, module)
    return type("Model", (nn.Linear,), {"__module__": module.__name__})(3, 4)


@pytest.mark.parametrize("function", OTHERS, ids=lambda one: one.__name__)
def test_another_function_is_left_alone(function, monkeypatch):
    model = with_function(monkeypatch, function)
    with rotated(model) as count:
        assert count == 0 and theirs_of(model) is function


def test_the_function_comes_back_after_an_error(monkeypatch):
    model = with_function(monkeypatch, llama_rope)
    with pytest.raises(KeyError), rotated(model) as count:
        assert count == 1 and theirs_of(model) is not llama_rope
        raise KeyError
    assert theirs_of(model) is llama_rope
    with rotated(model), rotated(model):
        assert theirs_of(model) is not llama_rope
    assert theirs_of(model) is llama_rope


def test_what_another_put_there_meanwhile_stays(monkeypatch):
    model = with_function(monkeypatch, llama_rope)
    with rotated(model):
        setattr(sys.modules[type(model).__module__], source.NAME, other_sign)
    assert theirs_of(model) is other_sign


def operands(dtype=torch.float32, width=16, table=None):
    q, k = torch.randn(2, 3, 5, 16, dtype=dtype), torch.randn(2, 1, 5, 16, dtype=dtype)
    return [q, k, *(torch.randn(2, 5, width, dtype=table or dtype) for _ in range(2))]


def test_kinds_of_tensors_that_were_not_compared_take_the_old_way(monkeypatch):
    """Other dtypes, other shapes, tables with a gradient, small tensors."""
    seen = []

    def theirs(q, k, cos, sin, unsqueeze_dim=1):
        seen.append(q)
        return llama_rope(q, k, cos, sin, unsqueeze_dim)

    model = with_function(monkeypatch, theirs)
    with rotated(model):
        function = theirs_of(model)

        def old_way(*given):
            seen.clear()
            function(*given)
            return bool(seen)

        q, k, cos, sin = operands()
        assert not old_way(q, k, cos, sin) and not old_way(q, k, cos[:1], sin[:1], 1)
        assert old_way(*operands(torch.float64)) and old_way(*operands(table=torch.float64))
        assert old_way(q, k, cos, sin.double()) and old_way(q, k.double(), cos, sin)
        assert old_way(q, k, cos.requires_grad_(), sin)
        assert old_way(q[0], k[0], cos[0], sin[0], 0)
        square = q.repeat(1, 2, 1, 1)[:, :5]  # as many heads as tokens
        assert not old_way(square, square, cos.detach(), sin) and old_way(square, square, cos.detach(), sin, 2)
        monkeypatch.setattr(source, "SMALL", {"cpu": 2 * 3 * 5 * 16 + 1})
        assert old_way(q, k, cos.detach(), sin)
        monkeypatch.setattr(source, "SMALL", {"cpu": 2 * 3 * 5 * 16})
        assert not old_way(q, k, cos.detach(), sin)


def test_it_is_compiled_into_one_graph():
    q, k, cos, sin = operands()
    q.requires_grad_()
    torch._dynamo.reset()
    found = torch.compile(rotary, fullgraph=True, backend="aot_eager")(q, k, cos, sin)
    for got, want in zip(found, rotary(q, k, cos, sin), strict=True):
        assert torch.equal(got, want)
    found[0].sum().backward()
    assert q.grad.abs().sum() > 0
