"""The device and dtype that a setting names."""

import torch

from . import machine
from .errors import ConfigError


def device_for(name: str) -> torch.device:
    """Returns the device that a --device value names; under torchrun, the rank's own GPU.

    Raises ConfigError where this machine does not have it.
    """
    launch = machine.launch()
    if launch.size > 1 and name in ("auto", "cuda") and torch.cuda.is_available():
        if launch.local_rank >= (count := torch.cuda.device_count()):
            raise ConfigError(f"more processes than GPUs on this machine: --nproc-per-node {count}, or --device cpu")
        return torch.device("cuda", launch.local_rank)
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if launch.size > 1 and ":" in name:
        raise ConfigError(f"device {name!r} would put every rank on one GPU: --device cuda takes one each")
    try:
        device = torch.device(name)
        if device.type == "meta":
            raise RuntimeError("it holds no numbers")
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        first = str(error).splitlines()[0]
        raise ConfigError(f"device {name!r} cannot be used on this machine: {first}; leave --device out") from None
    return device


def dtype_for(name: str, device: torch.device, full: bool = False) -> torch.dtype:
    """Returns the dtype that a --dtype value names on `device`. Raises ConfigError for half precision with --full."""
    if full and name not in ("auto", "float32"):
        raise ConfigError(f"--full trains the weights themselves, and small steps vanish in {name}: --dtype float32")
    if name != "auto":
        return getattr(torch, name)
    if device.type == "cuda":
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        fast = device.type == "cpu" and machine.has_bfloat16()
    return torch.bfloat16 if fast and not full else torch.float32
