"""What has to be compiled is compiled before the first step, so that no step stalls for it."""

import time

import torch

from ..lora.ops import path
from ..lora.shared import Prepared
from ..lora.warmup import warm_up
from ..models.running import device_of
from .loss import Objective

ROWS, TOKENS = 2, 17  # of which the last is only predicted; blocks and loss have one kernel for all numbers of tokens


def make_ready(objective: Objective, prepared: Prepared, tokens: int, progress: bool = False) -> list[str]:
    """Compiles the kernels of adapters on `tokens` tokens, then those of blocks and loss by a tiny batch, where Triton runs.

    The model is in training mode, and the settings' choices are in force. No gradient is kept, and torch's generators are as
    before. Returns a line about each part. Raises BackendError where a backend cannot run.
    """
    lines, model = warm_up(prepared, tokens, progress), objective.model
    device = device_of(model)
    if path(device, "auto") == "torch":
        return lines
    began = time.perf_counter()
    ids = torch.ones(ROWS, TOKENS, dtype=torch.long, device=device)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    with prepared, torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.autograd.grad(objective({"input_ids": ids, "labels": ids}), trained, allow_unused=True)
    return [*lines, f"kernels of blocks and loss were ready after {time.perf_counter() - began:.1f} s"]
