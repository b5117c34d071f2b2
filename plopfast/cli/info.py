"""`plopfast info`: what a model's linear modules are, and how this machine computes them."""

from ..lora import tuning
from ..lora.ops import path
from ..models.loading import load_model
from ..support.config import RunConfig
from ..support.devices import device_for, dtype_for
from .doctor import module_paths

TOKENS = 1024  # rows of the product whose path is shown


def info(config: RunConfig) -> str:
    """Lists the model's linear modules by type, with the path that each one takes and why."""
    device = device_for(config.device)
    lines = [tuning.describe()]
    if path(device, config.backend) != "torch":
        tuning.load()
    model, _ = load_model(config.model)
    lines.append(f"model: {model.name_or_path}")
    lines.append(f"{'modules':>7} {'module type':<16} {'in -> out':<14} path on {device}, rank {config.rank}")
    dtype = dtype_for(config.dtype, device)
    for number, type_, shape, plan in module_paths(model, device, dtype, TOKENS, config.rank, config.backend):
        lines.append(f"{number:>7} {type_:<16} {shape:<14} {plan}")
    return "\n".join(line for line in lines if line)
