"""Two PEFT models with equal values, one of them accelerated, and how near their results are."""

import peft
import torch
from helpers import build, random_batches

import plopfast as pf

BATCH = random_batches(1)[0]
LORA = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}


def wrapped(architecture="llama", dtype=torch.float32, adapters=None, **options):
    """A PEFT model whose B are not zero, all of it in `dtype`, but for the adapters where they have one of their own."""
    with_peft = peft.get_peft_model(build(architecture).to(dtype), peft.LoraConfig(**LORA | options))
    for module in with_peft.modules():
        if isinstance(module, torch.nn.Dropout) and "lora_dropout" not in options:  # GPT-2 has its own
            module.p = 0.0
    filled(with_peft)
    return with_peft.to(dtype) if adapters is None else with_peft


def filled(model, seed=1):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return model


def twins(*arguments, **options):
    """(PEFT's, accelerated)"""
    plain, fast = wrapped(*arguments, **options), wrapped(*arguments, **options)
    pf.accelerate(fast)
    return plain, fast


def results(model, batch=BATCH, **arguments):
    """Name -> the loss, the logits, and each gradient of a training step."""
    model.train()
    model.zero_grad()
    output = model(**batch, **arguments)
    found = {"loss": output.loss, "logits": output.logits}
    output.loss.backward()
    found |= {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {name: value.detach().clone() for name, value in found.items()}


def logits(model, batch=BATCH, **arguments):
    model.eval()
    with torch.no_grad():
        return {"logits": model(**{k: v for k, v in batch.items() if k != "labels"}, **arguments).logits}


def errors(got, want):
    """Name -> the difference, of the tensor's norm (of a hundredth of the largest, where it is smaller: a sum that cancels has
    other tensors' roundings). A shape, a dtype or a name more or less is a difference, too."""
    assert [(name, one.shape) for name, one in got.items()] == [(name, one.shape) for name, one in want.items()]
    norms = {name: one.double().norm().item() for name, one in want.items()}
    least = max(norms.values()) / 100 or 1.0
    return {
        name: (got[name].double() - one.double()).norm().item() / max(norms[name], least) for name, one in want.items()
    }


def assert_equal(ours, theirs, within=1e-5):
    """An operation is within 1e-6 of PEFT's (see `test_one_layer_is_equal`); over three layers and back, roundings add up."""
    assert [one.dtype for one in ours.values()] == [one.dtype for one in theirs.values()]
    found = errors(ours, theirs)
    worst = max(found, key=found.__getitem__)
    assert found[worst] <= within, f"{worst}: {found[worst]:.1e}"
