"""Calls of what works in other people's tools, returning and raising, each with what it is there to change."""

import peft
from face_world import case

import plopfast as pf
from plopfast.support.errors import AdapterError, ConfigError

IN_PLACE = r"^model "


def _wrapped(w):
    w.model = peft.get_peft_model(w.model, peft.LoraConfig(r=2, target_modules=["q_proj", "k_proj", "up_proj"]))
    return w.model


@case("accelerate", changes=[IN_PLACE])
def _accelerates(w):
    model = _wrapped(w)
    return lambda: vars(pf.accelerate(model)), ()


@case("accelerate", raises=AdapterError)
def _without_adapters_of_pefts(w):
    return lambda: pf.accelerate(w.model), ()


@case("accelerate", raises=ConfigError)
def _another_loss(w):
    model = _wrapped(w)
    return lambda: pf.accelerate(model, loss="chunks"), ()


@case("accelerate", raises=AdapterError)
def _a_loss_that_cannot_be(w):
    model = _wrapped(w)
    inner = model.get_base_model()
    inner.forward = inner.forward
    return lambda: pf.accelerate(model, loss=True), ()


@case("restore", changes=[IN_PLACE])
def _restores(w):
    model = _wrapped(w)
    pf.accelerate(model)
    return lambda: pf.restore(model), ()


@case("restore", raises=AdapterError)
def _nothing_of_pefts(w):
    return lambda: pf.restore(w.model), ()
