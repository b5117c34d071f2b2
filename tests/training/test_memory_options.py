"""Options that keep something elsewhere or smaller: the same results, what is where, resumed as if nothing had happened."""

from pathlib import Path

import pytest
import torch
import transformers
from helpers import SMALL, made, parameters, same
from torch._subclasses.fake_tensor import FakeTensorMode

import plopfast as pf
from plopfast.support.errors import ConfigError, TrainingError
from plopfast.training import moments
from plopfast.training.state import TrainState


def fitted(examples, out=None, resume=False, steps=6, **settings):
    trainer = made(examples, out, max_steps=steps, eval_every=2, schedule="constant", **settings)
    trainer.fit(resume=resume)
    return trainer


def interrupted(examples, out, at=4, **settings):
    """A training of six steps that was killed after the validation of step `at`, before its checkpoint."""

    def kill(step, loss):
        if step == at:
            raise KeyboardInterrupt

    trainer = made(examples, out, max_steps=6, eval_every=2, schedule="constant", **settings)
    trainer.on_valid = kill
    with pytest.raises(KeyboardInterrupt):
        trainer.fit()
    return trainer


def test_the_best_adapters_in_cpu_memory():
    """On a stand-in for a card; only values of the CPU can be compared, below."""
    with FakeTensorMode():
        parameter = torch.nn.Parameter(torch.empty(3, device="meta"))
        optimizer = torch.optim.AdamW([parameter])
        for on_cpu in (False, True):
            state = TrainState({"a": parameter}, optimizer, validated=True, averaged=True, best_on_cpu=on_cpu)
            place = "cpu" if on_cpu else "meta"
            assert (state.best["a"].device.type, state.average["a"].device.type) == (place, "meta")
            state.keep_best(0.5)
            state.take(state.best)
            assert (state.best["a"].device.type, parameter.device.type) == (place, "meta")


def test_best_values_come_and_go_between_devices():
    """Values in float64 stand for another place: what is kept stays there, and what is taken is the parameter's."""
    parameter = torch.nn.Parameter(torch.ones(3))
    state = TrainState(
        {"a": parameter}, torch.optim.AdamW([parameter]), validated=True, averaged=True, best_on_cpu=True
    )
    state.best["a"] = elsewhere = state.best["a"].double()
    with torch.no_grad():
        parameter.fill_(2)
    state.step = 3
    state.keep_best(0.5)
    assert state.best["a"] is elsewhere and elsewhere.tolist() == [2.0] * 3
    with torch.no_grad():
        parameter.fill_(5)
    kept = state.state_dict()
    elsewhere.zero_()
    state.load_state_dict(kept | {"best/a": torch.full((3,), 7.0)})
    assert state.best["a"] is elsewhere and elsewhere.tolist() == [7.0] * 3 and not elsewhere.requires_grad
    state.take(state.best)
    assert parameter.tolist() == [7.0] * 3 and parameter.dtype == torch.float32


def test_a_training_with_the_best_in_cpu_memory_is_the_same(examples, tmp_path):
    want = fitted(examples)
    got = fitted(examples, keep_best="cpu")
    assert same(parameters(want), parameters(got)) and got.state.best.keys() == got.parameters.keys()
    interrupted(examples, tmp_path, keep_best="cpu")
    again = fitted(examples, tmp_path, resume=True)  # it may change when a run is resumed
    assert same(parameters(want), parameters(again)) and same(want.state.best, again.state.best)


def wide():
    """A model of whose adapters one matrix in each layer has 4096 numbers and more: B [640, 8], of whole blocks of 256."""
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(
        transformers.LlamaConfig(**SMALL | {"intermediate_size": 640})
    )
    names = [info.name for info in pf.linear_modules(model) if info.type in ("up_proj", "v_proj")]
    pf.inject(model, pf.Placement(dict.fromkeys(names, (8, 8.0)), [], "types", 0))
    return model


@pytest.fixture(params=["bitsandbytes", "torchao"])
def maker(request, monkeypatch):
    """An installed library; the other one is hidden."""
    pytest.importorskip(request.param)
    plain = moments.importlib.util.find_spec
    monkeypatch.setattr(
        moments.importlib.util,
        "find_spec",
        lambda name, *more: None if name in moments.LIBRARIES and name != request.param else plain(name, *more),
    )
    return request.param


def test_moments_in_eight_bits(examples, maker):
    """The first step is AdamW's own, as each moment is then of one gradient; later ones differ a little."""
    settings = {"lora_plus": 4.0, "weight_decay": 0.1, "lr": 1e-2}
    plain = fitted(examples, model=wide(), **settings)
    coded = fitted(examples, model=wide(), optimizer="adamw8bit", **settings)
    assert any(f"8 bits, by {maker}" in line for line in coded.paths())
    losses = [[record["loss"] for record in t.history if "loss" in record] for t in (plain, coded)]
    assert losses[0][:2] == pytest.approx(losses[1][:2], rel=1e-4)
    assert losses[0] == pytest.approx(losses[1], rel=0.02) and losses[0] != losses[1]
    kept = {name: moments.moments_of(coded.optimizer, p) for name, p in coded.parameters.items()}
    codes = {name for name, of in kept.items() if of["state1"].dtype == torch.uint8}
    assert codes == {name for name, p in coded.parameters.items() if p.numel() >= 4096} and 0 < len(codes) < len(kept)
    assert [float(g["lr"]) for g in coded.optimizer.param_groups] == pytest.approx([1e-2, 4e-2])
    held = sum(value.nbytes for of in kept.values() for name, value in of.items() if name != "step")
    assert held == moments.bytes_of_moments(list(coded.parameters.values()), "adamw8bit")
    assert moments.bytes_of_moments(list(coded.parameters.values()), "adamw") > 2 * held


def test_eight_bits_resume_bit_for_bit(examples, maker, tmp_path):
    settings = {"optimizer": "adamw8bit", "lora_plus": 4.0, "lr": 1e-2}
    want = fitted(examples, model=wide(), **settings)
    interrupted(examples, tmp_path, model=wide(), **settings)
    again = fitted(examples, tmp_path, model=wide(), resume=True, **settings)
    assert same(parameters(want), parameters(again)) and again.step == 6
    for one, other in zip(want.parameters.values(), again.parameters.values(), strict=True):
        assert same(moments.moments_of(want.optimizer, one), moments.moments_of(again.optimizer, other))
    with pytest.raises(TrainingError, match="optimizer"):  # what is learned depends on it
        fitted(examples, tmp_path, model=wide(), resume=True, steps=8, lora_plus=4.0, lr=1e-2)
    state = again.state.state_dict()
    name = next(name for name, p in again.parameters.items() if p.numel() >= 4096)
    for key, wrong in (("state1", state[f"state1/{name}"].float()), ("absmax2", torch.zeros(3)), ("state2", None)):
        spoiled = {k: v for k, v in state.items() if k != f"{key}/{name}"} | (
            {} if wrong is None else {f"{key}/{name}": wrong}
        )
        with pytest.raises(TrainingError, match=f"expected {key}/{name}"):
            made(examples, model=wide(), **settings).state.load_state_dict(spoiled)


def test_a_gradient_that_never_came_is_seen_in_eight_bits(examples, maker):
    model = wide()
    name = "model.layers.1.mlp.up_proj"
    model.get_submodule(name).register_forward_hook(lambda _, args, y: y.detach())
    with pytest.warns(UserWarning, match="no gradient reached"):
        fitted(examples, model=model, optimizer="adamw8bit", steps=2)


def test_without_a_library_or_a_device_for_it(examples, monkeypatch):
    parameter = torch.nn.Parameter(torch.empty(3, device="meta"))
    with pytest.raises(ConfigError, match="runs on cpu, cuda, xpu, not on meta"):
        moments.eight_bit([{"params": [parameter]}], 1e-3, 0.0)
    groups = [{"params": [torch.nn.Parameter(torch.ones(3))]}]
    monkeypatch.setattr(
        moments.importlib, "import_module", lambda name: (_ for _ in ()).throw(ImportError("no kernel"))
    )
    with pytest.raises(ConfigError, match="cannot be imported .no kernel.: reinstall it"):
        moments.eight_bit(groups, 1e-3, 0.0)
    monkeypatch.undo()
    monkeypatch.setattr(moments.importlib.util, "find_spec", lambda *_: None)
    with pytest.raises(ConfigError, match="needs bitsandbytes or torchao.*pip install bitsandbytes"):
        made(examples, optimizer="adamw8bit")


def test_no_library_is_imported_before_it_is_asked_for():
    """bitsandbytes fetches kernels where a package of that name is installed."""
    for path in Path(pf.__file__).parent.rglob("*.py"):
        lines = path.read_text(encoding="utf-8").splitlines()
        assert not [
            line
            for line in lines
            if line.lstrip().startswith(("import bits", "from bits", "import torchao", "from torchao"))
        ]
