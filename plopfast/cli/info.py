"""`plopfast info`: what a model's linear modules are, and how this machine computes them."""

import re
from collections import Counter

import torch
from torch import nn

from ..kernels import library
from ..lora import tuning
from ..lora.ops import or_backend_error, path
from ..models.linears import linear_modules, words_of_codes
from ..models.loading import load_model
from ..support.config import RunConfig
from ..support.devices import device_for, dtype_for

_REASON = re.compile(r" \((.*?)\)(?=; with dropout|\Z)")  # at the end of a path's text
TOKENS = 1024  # rows of the product whose path is shown


def info(config: RunConfig) -> str:
    """Lists the model's linear modules by type, with the path that each one takes and why."""
    device = device_for(config.device)
    lines = [tuning.describe()]
    if path(device, config.backend) != "torch":
        tuning.load()
    model, _ = load_model(config.model, quantize=config.quantize, quantize_head=config.quantize_head)
    codes = words_of_codes(model)
    lines.append(f"model: {model.name_or_path}" + (f", {codes}" if codes else ""))
    dtype = dtype_for(config.dtype, device)
    return "\n".join(
        [*lines, *table(module_paths(model, device, dtype, config.rank, config.backend), device, config.rank)]
    )


def table(rows: list[tuple[int, str, str, str]], device: torch.device, rank: int) -> list[str]:
    """The lines of a table of `module_paths`. Each reason stands below it, once, with a number where there are several."""
    said: dict[str, int] = {}

    def numbered(found: re.Match[str]) -> str:
        return f" [{said.setdefault(found[1], len(said) + 1)}]"

    short = [(number, type_, shape, _REASON.sub(numbered, path)) for number, type_, shape, path in rows]
    width = max([len("module type"), *(len(type_) for _, type_, _, _ in rows)])
    lines = [f"{'modules':>7} {'module type':<{width}} {'in -> out':<14} path on {device}, rank {rank}"]
    for number, type_, shape, way in short:
        lines.append(f"{number:>7} {type_:<{width}} {shape:<14} {way if len(said) > 1 else way.replace(' [1]', '')}")
    return lines + [f"{f'[{number}]' if len(said) > 1 else 'why:'} {why}" for why, number in said.items()]


def module_paths(
    model: nn.Module, device: torch.device, dtype: torch.dtype, rank: int = 16, backend: str = "auto"
) -> list[tuple[int, str, str, str]]:
    """The path that each kind of linear module would take on `device`, for 1,024 tokens and adapters of `rank`.

    Returns rows (number of modules, module type, "in -> out", path and why; with dropout, too, where that differs). Raises BackendError where `backend` cannot
    run, and ModelError for a model without linear modules.
    """
    rows = Counter[tuple[str, str, str]]()
    for info in linear_modules(model):
        x_MK = torch.empty(1, 1, dtype=dtype, device=device).expand(TOKENS, info.n_in)
        w_NK = torch.empty_strided((info.n_out, info.n_in), info.frozen.weight_NK.stride(), dtype=dtype, device="meta")
        plan, dropped = (or_backend_error(library.plan_of, x_MK, w_NK, rank, backend, drop) for drop in (False, True))
        text = str(plan) if plan.backend == dropped.backend else f"{plan}; with dropout {dropped}"
        rows[info.type, f"{info.n_in} -> {info.n_out}", text] += 1
    return [(number, *row) for row, number in rows.items()]
