"""Where a pass of scoring may end: the same scores, nothing of a model is broken, and no call is missed."""

import pytest
import torch
from helpers import random_batches
from torch import nn

import plopfast as pf
from plopfast.scoring import passes


class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.up = nn.Linear(8, 8)

    def forward(self, x):
        return x + self.up(x)


class Toy(nn.Module):
    """Two layers; `calls` lists, pass by pass, how often each is called. It notes the passes that ran to their end."""

    def __init__(self, calls=((1, 1),)):
        super().__init__()
        self.embedding = nn.Embedding(300, 8)
        self.layers = nn.ModuleList(Layer() for _ in range(2))
        self.calls, self.passes, self.finished = calls, 0, []

    def forward(self, input_ids, attention_mask):
        x, number = self.embedding(input_ids), self.passes
        self.passes += 1
        for layer, times in zip(self.layers, self.calls[min(number, len(self.calls) - 1)], strict=True):
            for _ in range(times):
                x = layer(x)
        self.finished.append(number)
        return x


def score(model, **options):
    """In several passes."""
    return pf.score(model, random_batches(count=4, rows=3), batch_tokens=60, **options)


def test_every_architecture_has_the_same_scores(any_model, monkeypatch):
    ended, run = [], passes.contextlib.suppress.__exit__
    monkeypatch.setattr(
        passes.contextlib.suppress,
        "__exit__",
        lambda self, kind, *rest: ended.append(kind is passes.PassEnded) or run(self, kind, *rest),
    )
    early = score(any_model)
    assert len(ended) >= 3 and not ended[0] and all(ended[1:])
    monkeypatch.setattr(passes, "may_be_left", lambda model: False)
    whole = score(any_model)
    assert not any(ended[len(ended) // 2 :])
    assert early.modules == whole.modules and torch.equal(early.prompt_stats, whole.prompt_stats)
    with_head = score(any_model, include_head=True)
    assert early.types == pytest.approx(with_head.types)
    assert not any("forward" in vars(module) or module._forward_hooks for module in any_model.modules())


def test_a_pass_ends_where_the_first_one_called_its_last_module():
    model = Toy()
    score(model)
    assert model.passes >= 3 and model.finished == [0]


def test_a_model_that_catches_errors_does_not_catch_the_end():
    class Careful(Toy):
        def forward(self, input_ids, attention_mask):
            try:
                return super().forward(input_ids, attention_mask)
            except Exception as error:
                raise RuntimeError("the model failed") from error

    model = Careful()
    score(model)
    assert model.finished == [0]


@pytest.mark.parametrize("first", [(2, 1), (1, 2)])
def test_modules_that_are_not_called_once_keep_passes_whole(first):
    model = Toy([first])
    score(model)
    assert model.finished == list(range(model.passes))


def test_other_calls_than_the_first_pass_has_are_not_missed():
    model = Toy([(1, 1), (2, 1), (1, 1)])
    report = score(model)
    assert model.finished == [0, 1]
    one, two = report.scores.values()
    assert one.tokens > two.tokens


@pytest.mark.parametrize(
    "disturb",
    [
        lambda m: m.layers[0].register_forward_hook(lambda *_: None),
        lambda m: m.register_forward_pre_hook(lambda *_: None),
        lambda m: setattr(m.layers[1], "forward", m.layers[1].forward),
        lambda m: setattr(m, "config", type("Config", (), {"output_hidden_states": True})()),
        lambda m: m.layers[0].compile(backend="eager"),
        lambda m: setattr(m, "wrapped", nn.parallel.DataParallel(nn.Identity())),
    ],
    ids=["hook", "pre-hook", "forward", "hidden states", "compiled", "parallel"],
)
def test_a_model_that_waits_for_the_end_of_a_forward_is_not_left(disturb):
    model = Toy()
    assert passes.may_be_left(model)
    disturb(model)
    assert not passes.may_be_left(model)


def test_an_error_leaves_no_hook():
    model = Toy([(1, 1), (1,)])
    with pytest.raises(ValueError, match="zip"):
        score(model)
    assert not any("forward" in vars(module) or module._forward_hooks for module in model.modules())
