"""Compiles the kernels of a training before its first step, so that no later step waits for the compiler.

A kernel is compiled for each kind of linear (shape, rank, dropout, dtype), and for no number of tokens, see kernels/grids.py.
So one small and one full step of each kind ask for all variants, and so it is with the experts of a mixture. Triton keeps what it
compiled on disk for the next run.
"""

import time

import torch

from ..kernels import dispatch, library, library_segments
from ..models.routed import Route
from ..support.progress import bar
from .experts import LoRAExperts
from .layer import LoRALinear
from .ops import or_backend_error
from .shared import Prepared

FEW = 16  # tokens of a small step, whose sums are in one part


def warm_up(prepared: Prepared, tokens: int, progress: bool = False) -> list[str]:
    """Runs each kind of LoRA linear, and of group (see shared.py), on `tokens` zeros and on a few, forward and backward.

    The modules are to be in training mode. No gradient is kept and torch's generator is as before. Returns a line about it;
    none where plain torch computes, which has nothing to compile. Raises BackendError where a backend cannot run.
    """
    kinds: dict[tuple[object, ...], list[LoRALinear]] = {}
    for module in (one for one in prepared.modules if isinstance(one, LoRALinear)):
        members = module.shared.members if module.shared else [module]
        if module is members[0] and any(_compiles(member, tokens) for member in members):
            kinds.setdefault(tuple(map(_kind, members)), members)
    experts = {_kind_of_experts(one): one for one in prepared.experts if _compiles_experts(one)}
    if not kinds and not experts:
        return []
    began, count = time.perf_counter(), len(kinds) + len(experts)
    with prepared, torch.random.fork_rng(devices=[]), bar("compile", count, "kinds of modules", progress) as shown:
        for members in kinds.values():
            for rows in (FEW, tokens):
                _step(members, rows)
            shown.update()
        for layer in experts.values():
            each = layer.mixture.weight(layer.mixture.keys[0]).experts
            for rows in (FEW, max(tokens, dispatch.MANY_ROWS * each)):  # tiles differ by the rows of an expert
                _step_of_experts(layer, rows, each)
            shown.update()
    return [f"kernels for {count} kinds of modules were ready after {time.perf_counter() - began:.1f} s"]


def _compiles(module: LoRALinear, tokens: int) -> bool:
    weight, drop = module.frozen.weight_NK, module.training and module.dropout > 0
    x = torch.empty(tokens, 0, dtype=weight.dtype, device=weight.device)
    return or_backend_error(library.plan_of, x, weight, module.rank, module.backend, drop).backend == "triton"


def _kind(module: LoRALinear) -> tuple[object, ...]:
    frozen, trained = module.frozen, (module.lora_A.requires_grad, module.lora_B.requires_grad)
    dtypes = frozen.dtype, module.lora_A.dtype, module.lora_B.dtype
    layout = frozen.shape, frozen.weight_NK.stride(), module.bias is None
    return *layout, module.rank, module.dropout, module.backend, dtypes, trained


def _step(members: list[LoRALinear], rows: int) -> None:
    first = members[0].frozen
    x = torch.zeros(rows, first.shape[1], dtype=first.dtype, device=first.device, requires_grad=True)
    norm = members[0].shared.norm if members[0].shared else None  # makes their S, for many tokens
    read = norm(x) if norm else x
    y = [module(read) for module in members]
    trained = [p for module in members for p in (module.lora_A, module.lora_B) if p.requires_grad]
    torch.autograd.grad(y, [x, *trained], [torch.zeros_like(one) for one in y])


def _compiles_experts(module: LoRAExperts) -> bool:
    adapter = next(iter(module.adapters().values()))
    x = torch.empty(0, dtype=adapter.frozen.dtype, device=adapter.frozen.device)
    return bool(or_backend_error(library_segments.runs_kernels, x, adapter.rank, adapter.backend))


def _kind_of_experts(module: LoRAExperts) -> tuple[object, ...]:
    weights = [module.mixture.weight(key) for key in module.mixture.keys]
    adapters = [(key, one.rank, one.backend, one.lora_A.requires_grad) for key, one in module.adapters().items()]
    return *[(w.shape, w.experts, w.dtype, w.kind, w.transposed) for w in weights], *adapters


def _step_of_experts(module: LoRAExperts, rows: int, experts: int) -> None:
    for key in module.mixture.keys:
        frozen = module.mixture.weight(key)
        x = torch.zeros(rows, frozen.shape[1], dtype=frozen.dtype, device=frozen.device, requires_grad=True)
        route = Route.of(torch.arange(rows, device=frozen.device)[:, None] % experts, experts)
        y = module.product(key, x, route)
        adapter = module.adapters().get(key)
        trained = [] if adapter is None else [p for p in (adapter.lora_A, adapter.lora_B) if p.requires_grad]
        torch.autograd.grad(y, [x, *trained], torch.zeros_like(y))
