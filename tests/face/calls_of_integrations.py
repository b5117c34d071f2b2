"""Calls of what works in other people's tools, returning and raising, each with what it is there to change."""

import peft
from face_world import PLACEMENT, case

import plopfast as pf
from plopfast.support.errors import AdapterError, ConfigError, DataError, TrainingError

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


PROMPTS = [{"prompt": f"a word {number}", "answer": str(number)} for number in range(4)]
SMALL_STEP = {"generations": 2, "prompts": 2, "completion_length": 2, "max_steps": 1}


def _earned(completions, **_):
    return [float(len(text)) for text in completions]


@case("grpo", changes=[IN_PLACE])
def _reinforces(w):
    return lambda: pf.grpo(w.model, w.tokenizer, PROMPTS, _earned, placement=PLACEMENT, test=PROMPTS[:1], **SMALL_STEP).history, (PROMPTS,)  # fmt: skip


@case("grpo", raises=ConfigError)
def _without_a_placement(w):
    return lambda: pf.grpo(w.model, w.tokenizer, PROMPTS, "exact"), ()


@case("grpo", raises=DataError)
def _without_an_answer(w):
    return lambda: pf.grpo(w.model, w.tokenizer, [{"prompt": "a"}], "exact", placement=PLACEMENT, **SMALL_STEP), ()


@case("grpo", "a reward that is not finite", raises=TrainingError, changes=[IN_PLACE])
def _not_finite(w):
    return lambda: pf.grpo(w.model, w.tokenizer, PROMPTS, lambda completions, **_: [float("nan")] * len(completions), placement=PLACEMENT, **SMALL_STEP), ()  # fmt: skip
