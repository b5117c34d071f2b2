"""Modules that no gradient reaches are found, named and counted."""

import warnings

import pytest
import torch
from helpers import Syncs, adapted, build, made, parameters, randomise

import plopfast as pf
from plopfast.lora.layer import adapters
from plopfast.support import ranks
from plopfast.training.census import Unmoved, census, warning

FIRST, END = "in the first step, so they learn nothing", "in any step, so they learn nothing"


def cut(model, ending, layers=(0, 1, 2)):
    """Cuts the modules of a type off from the gradient, as a hook can."""
    for name, module in model.named_modules():
        if name.endswith(ending) and any(f"layers.{layer}." in name for layer in layers):
            module.register_forward_hook(lambda module, args, output: output.detach())
    return model


def test_all_move(examples):
    trainer = made(examples, max_steps=2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert trainer.fit().unmoved == {}


def test_adapters_without_a_gradient_are_named_at_once_and_at_the_end(examples):
    trainer = made(examples, model=cut(adapted(), "v_proj", (0, 2)), max_steps=3)
    before = parameters(trainer)
    with pytest.warns(UserWarning) as caught:
        result = trainer.fit()
    told = [str(w.message) for w in caught]
    assert len(told) == 2 and result.unmoved == {"v_proj": 2}
    for text, when in zip(told, (FIRST, END), strict=True):
        assert text.startswith(
            f"no gradient reached 2 of 3 v_proj adapters (layers 0, 2) {when}. Likely causes: these mod"
        )
    still = {name for name, value in parameters(trainer).items() if torch.equal(value, before[name])}
    assert still == {f"model.layers.{n}.self_attn.v_proj.lora_{x}" for n in (0, 2) for x in "AB"}, "and they did not"


def test_a_gradient_of_zeros_is_none_and_a_later_one_counts(examples):
    trainer = made(examples, max_steps=3)
    modules = [m for n, m in adapters(trainer.model).items() if n.endswith("o_proj")]
    for module in modules:
        module.lora_B.register_hook(lambda grad: grad * (trainer.step > 0))
    with pytest.warns(UserWarning) as caught:
        result = trainer.fit()
    assert result.unmoved == {} and [str(w.message) for w in caught] == [
        warning([Unmoved("o_proj", 3, 3, (0, 1, 2))], "in the first step", full=False, dtype=torch.float32)
    ]


def test_modules_that_move_do_not_stand_for_others(examples):
    """Where all parameters of the modules before had a gradient, and these had zeros."""
    trainer = made(examples, max_steps=3)
    randomise(trainer.model)
    for n in (0, 2):
        module = adapters(trainer.model)[f"model.layers.{n}.self_attn.v_proj"]
        for parameter in (module.lora_A, module.lora_B):
            parameter.register_hook(torch.zeros_like)
    with pytest.warns(UserWarning, match=r"2 of 3 v_proj adapters \(layers 0, 2\)") as caught:
        assert trainer.fit().unmoved == {"v_proj": 2}
    assert len(caught) == 2


def test_only_a_is_zero_at_first(examples):
    """A's gradient is zero while B is: that alone is no finding."""
    trainer = made(examples)
    trainer._train_step([list(range(9))])
    zero = [n for n, p in trainer.parameters.items() if not trainer.optimizer.state[p]["exp_avg_sq"].any()]
    assert zero and all(name.endswith("lora_A") for name in zero)
    assert census(trainer.model, trainer.parameters, trainer.optimizer) == []


def test_full_fine_tuning_names_modules(examples):
    model = cut(build("llama"), "k_proj").requires_grad_(True)
    trainer = pf.Trainer(model, pf.TrainConfig(max_steps=1, batch_tokens=300), examples[:16])
    with pytest.warns(
        UserWarning, match=r"no gradient reached 3 of 3 k_proj modules \(layers 0, 1, 2\) in the first step"
    ):
        assert trainer.fit().unmoved == {"k_proj": 3}


def test_types_are_named_as_placing_names_them(examples):
    """GPT-2 has a c_proj in its attention and one in its MLP, of which one alone is adapted here."""
    model = build("gpt2")
    names = [info.name for info in pf.linear_modules(model) if info.type == "mlp.c_proj"]
    pf.inject(model, pf.Placement(dict.fromkeys(names, (2, 4.0)), ["mlp.c_proj"], "explicit", 0))
    for module in adapters(model).values():
        for parameter in (module.lora_A, module.lora_B):
            parameter.register_hook(torch.zeros_like)
    trainer = pf.Trainer(model, pf.TrainConfig(max_steps=1, batch_tokens=300), examples[:16])
    with pytest.warns(UserWarning, match="3 of 3 mlp.c_proj adapters"):
        assert trainer.fit().unmoved == {"mlp.c_proj": 3}


def test_the_causes():
    many = [Unmoved("up_proj", 12, 30, tuple(range(12))), Unmoved("lm_head", 1, 1, ())]
    text = warning(many, "in the first step", full=False, dtype=torch.float16)
    assert text.startswith(
        "no gradient reached 12 of 30 up_proj adapters (layers 0, 1, 2, 3, 4, 5, 6, 7, ...) and 1 of 1 lm_head adapters in"
    )
    assert "float16 is too narrow" in text
    assert "float16" not in warning(many, "in the first step", full=False, dtype=torch.bfloat16)
    assert "(layer 4)" in warning([Unmoved("x", 1, 2, (4,))], "", full=True, dtype=torch.float32)


def test_rank_0_speaks_for_all(examples, monkeypatch):
    trainer = made(examples, model=cut(adapted(), "v_proj"))
    trainer._train_step([list(range(9))])
    monkeypatch.setattr(ranks, "is_main", lambda: False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert trainer._census("in any step") == {"v_proj": 3}


def test_a_resumed_training_looks_at_all_its_steps(examples, tmp_path):
    """Its first step is not the training's first one, and what moved before counts."""

    def stopped(step, loss):
        if step == 4:
            raise KeyboardInterrupt

    trainer = made(examples, tmp_path, save_every=2)
    trainer.on_valid = stopped
    with pytest.raises(KeyboardInterrupt):
        trainer.fit()
    again = made(examples, tmp_path, model=cut(adapted(), "v_proj"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert again.fit(resume=True).unmoved == {}


def test_a_look_waits_for_the_device_once_at_most(examples):
    trainer = made(examples)
    trainer._train_step([list(range(9))])
    with Syncs() as syncs:
        census(trainer.model, trainer.parameters, trainer.optimizer)
    assert syncs.count <= 1


def test_either_half_of_an_adapter_counts(examples):
    """With a B that is not zero, A alone may have a gradient."""
    trainer = made(examples)
    randomise(trainer.model)
    for module in adapters(trainer.model).values():
        module.lora_B.register_hook(torch.zeros_like)
    trainer._train_step([list(range(9))])
    assert census(trainer.model, trainer.parameters, trainer.optimizer) == []
