"""PEFT's LoRA layers on bitsandbytes' codes; imported where a model has such layers."""

from peft.tuners.lora import bnb

from .peft_layers import Fast


class FastLinear4bit(Fast, bnb.Linear4bit):
    """A `peft.tuners.lora.Linear4bit`: the codes are decoded for each product, forward and backward."""


class FastLinear8bitLt(Fast, bnb.Linear8bitLt):
    """A `peft.tuners.lora.Linear8bitLt`. The codes are decoded, and x is not rounded to 8 bits, as bitsandbytes does."""


CLASSES: dict[type, type] = {bnb.Linear4bit: FastLinear4bit, bnb.Linear8bitLt: FastLinear8bitLt}
