"""The optimizer of a training, and its learning rate over the steps."""

import math
from collections.abc import Mapping

import torch
from torch import nn

from ..support.config import TrainConfig
from .moments import eight_bit


def lr_factor(step: int, steps: int, warmup: float, schedule: str) -> float:
    """Returns the share of the peak learning rate at a step (from 0): linear warmup, then cosine, linear or constant."""
    rising = round(warmup * steps)
    if step < rising:
        return (step + 1) / (rising + 1)
    done = (step - rising) / max(1, steps - rising)
    return {"constant": 1.0, "linear": 1.0 - done, "cosine": 0.5 * (1.0 + math.cos(math.pi * done))}[schedule]


def make_optimizer(parameters: Mapping[str, nn.Parameter], config: TrainConfig) -> torch.optim.Optimizer:
    """Makes the optimizer of `config` for parameters by name. With LoRA+ (Hayou et al., arXiv 2402.12354) every lora_B learns
    faster. Raises ConfigError where 8-bit AdamW is not installed or does not run.
    """
    groups = []
    for is_b, ratio in ((False, 1.0), (True, config.lora_plus)):
        if chosen := [p for name, p in parameters.items() if name.endswith("lora_B") == is_b]:
            groups.append({"params": chosen, "ratio": ratio})
    if config.optimizer == "adamw8bit":
        return eight_bit(groups, config.lr, config.weight_decay)
    fused = next(iter(parameters.values())).device.type in ("cpu", "cuda")
    return torch.optim.AdamW(groups, lr=config.lr, weight_decay=config.weight_decay, fused=fused)


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Sets the learning rate; groups that learn faster (LoRA+) get their multiple of it."""
    for group in optimizer.param_groups:
        if isinstance(group["lr"], torch.Tensor):  # torchao's
            group["lr"].fill_(lr * group["ratio"])
        else:
            group["lr"] = lr * group["ratio"]
