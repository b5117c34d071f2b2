"""What an optimizer keeps of a parameter, under names that do not depend on who made the optimizer.

torch's AdamW                          step, exp_avg, exp_avg_sq
8-bit AdamW of bitsandbytes, torchao   step, state1, state2: codes of the parameter's shape (uint8), and absmax1, absmax2:
                                       the largest of each block of 256; float32 and without absmax for small parameters
"""

import importlib
import importlib.util
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from ..support.errors import ConfigError

PLAIN = ("step", "exp_avg", "exp_avg_sq")
CODED = ("step", "state1", "absmax1", "state2", "absmax2")
LIBRARIES = ("bitsandbytes", "torchao")
BLOCK, FEWEST = 256, 4096  # values that share a scale; smaller parameters keep float32
DEVICES = ("cpu", "cuda", "xpu")  # with kernels of bitsandbytes


def library() -> str:
    """The installed library whose 8-bit AdamW is taken. Nothing is imported. Raises ConfigError where there is none."""
    for name in LIBRARIES:
        if importlib.util.find_spec(name) is not None:
            return name
    raise ConfigError(
        "optimizer adamw8bit needs bitsandbytes or torchao, and neither is installed: pip install bitsandbytes, or leave it out"
    )


def eight_bit(groups: Sequence[dict[str, Any]], lr: float, weight_decay: float) -> torch.optim.Optimizer:
    """Makes the 8-bit AdamW of `library`, with torch's defaults. Raises ConfigError where it does not run."""
    device, name = groups[0]["params"][0].device, library()
    if device.type not in DEVICES:
        raise ConfigError(f"optimizer adamw8bit runs on {', '.join(DEVICES)}, not on {device.type}: leave it out")
    try:  # not before: bitsandbytes fetches kernels where the package `kernels` is installed
        made: Any = importlib.import_module(f"{name}.optim").AdamW8bit
    except (ImportError, OSError, RuntimeError) as error:
        raise ConfigError(
            f"optimizer adamw8bit: {name} is installed and cannot be imported ({error}): reinstall it, or leave it out"
        ) from error
    return made(groups, lr=lr, betas=(0.9, 0.999), eps=1e-8, weight_decay=weight_decay)


def maker_of(optimizer: torch.optim.Optimizer) -> str:
    """ "torch", "bitsandbytes" or "torchao" """
    return type(optimizer).__module__.partition(".")[0]


def moments_of(optimizer: torch.optim.Optimizer, parameter: nn.Parameter) -> dict[str, torch.Tensor]:
    """Returns what the optimizer keeps of a parameter; nothing before its first step."""
    state: Mapping[str, Any] = optimizer.state.get(parameter, {})
    maker = maker_of(optimizer)
    if not state or maker == "torch":
        return {name: state[name] for name in PLAIN if name in state}
    if maker == "bitsandbytes":
        step = torch.tensor(float(state["step"]))
        return {"step": step, **{name: state[name] for name in CODED[1:] if name in state}}
    found = {"step": state["step"]}
    for number, name in ((1, "exp_avg"), (2, "exp_avg_sq")):
        codes = getattr(state[name], "codes", None)
        found[f"state{number}"] = state[name] if codes is None else codes
        if codes is not None:
            found[f"absmax{number}"] = state[name].scale
    return found


def put_moments(optimizer: Any, parameter: nn.Parameter, moments: Mapping[str, torch.Tensor]) -> None:
    """Takes over what `moments_of` gave for an optimizer of the same maker."""
    maker, device = maker_of(optimizer), parameter.device
    there = {name: value.to(device) for name, value in moments.items() if name != "step"}
    step = moments["step"]
    if maker == "torch":
        optimizer.state[parameter] = {"step": step.to(device) if optimizer.defaults["fused"] else step.cpu(), **there}
    elif maker == "bitsandbytes":
        if "absmax1" in there:
            maps = optimizer.name2qmap
            maps |= {name: values.to(device) for name, values in maps.items()}
            there |= {"qmap1": maps["dynamic"], "qmap2": maps["udynamic"]}
        optimizer.state[parameter] = {"step": int(step), **there}
    else:
        state = {"step": step.cpu()}
        for number, name, signed in ((1, "exp_avg", True), (2, "exp_avg_sq", False)):
            state[name] = kept = optimizer._new_buffer(parameter, signed)
            if (codes := getattr(kept, "codes", None)) is None:
                kept.copy_(there[f"state{number}"])
            else:
                codes.copy_(there[f"state{number}"])
                kept.scale.copy_(there[f"absmax{number}"])
        optimizer.state[parameter] = state


def shapes_of(optimizer: torch.optim.Optimizer, parameter: nn.Parameter) -> dict[str, tuple[tuple[int, ...], bool]]:
    """Name -> (the shape that `moments_of` will find, whether it is codes)."""
    shape = tuple(parameter.shape)
    if maker_of(optimizer) == "torch":
        return {"step": ((), False), "exp_avg": (shape, False), "exp_avg_sq": (shape, False)}
    coded = _is_coded(parameter, maker_of(optimizer))
    scales = ((-(-parameter.numel() // BLOCK),), False)
    found = {"step": ((), False), "state1": (shape, coded), "state2": (shape, coded)}
    return found | ({"absmax1": scales, "absmax2": scales} if coded else {})


def has_moved(optimizer: torch.optim.Optimizer, parameter: nn.Parameter) -> torch.Tensor:
    """A tensor of zeros alone if each squared gradient of the parameter was zero."""
    moments = moments_of(optimizer, parameter)
    return next(moments[name] for name in ("exp_avg_sq", "absmax2", "state2") if name in moments)


def bytes_of_moments(parameters: Sequence[torch.Tensor], kind: str) -> int:
    """Bytes that the optimizer `kind`, of the option --optimizer, keeps for parameters; the shared tables aside."""
    if kind == "adamw":
        return sum(2 * p.nbytes for p in parameters)
    coded = [p.numel() for p in parameters if _is_coded(p, "bitsandbytes")]
    plain = sum(p.numel() for p in parameters) - sum(coded)
    return 8 * plain + sum(2 * n + 8 * -(-n // BLOCK) for n in coded)


def _is_coded(parameter: torch.Tensor, maker: str) -> bool:
    whole_blocks = maker == "bitsandbytes" or parameter.numel() % BLOCK == 0
    return parameter.numel() >= FEWEST and whole_blocks
