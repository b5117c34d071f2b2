"""A model on several ranks: DDP averages gradients, FSDP2 shards frozen blocks."""

import contextlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from ..models.frozen import is_sharded, streamed_in
from ..models.linears import blocks
from ..models.running import body
from ..support.errors import TrainingError
from ..support.ranks import size


def shard(model: nn.Module, device: torch.device) -> None:
    """Freezes `model` and spreads its blocks' weights over all ranks, in place. A block is gathered while it runs.

    What is outside the blocks (embeddings, last norm, head) stays whole on each rank: it would be gathered from the first
    block's forward pass to the end of the backward pass anyway. Inject adapters afterwards. From then on, every rank must
    run the model, `score` it and save its adapters equally often. Raises TrainingError for a streamed model.
    """
    if streamed_in(model):
        raise TrainingError("streamed weights are whole on each rank: leave out --stream, or --parallel fsdp")
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard  # takes 0.6 s to import

    model.requires_grad_(False)  # before the first pass: fully_shard keeps what it gathered with its requires_grad
    mesh = init_device_mesh(device.type, (size(),))
    for block in blocks(model).values():
        fully_shard(block, mesh=mesh)
    whole = {parameter for parameter in model.parameters() if not is_sharded(parameter)}
    fully_shard(body(model), mesh=mesh, ignored_params=whole)  # holds nothing, but orders the blocks' gathering
    model.to(device)


def averaged(objective: nn.Module) -> nn.Module:
    """Wraps `objective` so that each backward pass averages the gradients over all ranks, unless it is `held`. With one
    rank it stays as it is. Raises TrainingError where a sharded weight is to be trained."""
    if size() == 1:
        return objective
    sharded = [p for p in objective.parameters() if is_sharded(p)]
    if any(p.requires_grad for p in sharded):
        raise TrainingError("sharded weights are frozen: train adapters, or all weights without --parallel fsdp")
    # sharded weights cannot be broadcast; they, and the adapters, are the same by construction
    device = next(p.device for p in objective.parameters() if p.requires_grad)
    elsewhere = [
        name for name, p in objective.named_parameters() if p.device != device and not p.requires_grad
    ]  # rows are looked up there
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(objective, elsewhere)
    parallel = DistributedDataParallel(objective, init_sync=not sharded, gradient_as_bucket_view=True)
    parallel.broadcast_buffers = False  # the argument has another name from torch 2.13 on
    return parallel


def held(objective: nn.Module) -> Any:
    """Returns a context in which gradients are only added up on this rank."""
    return objective.no_sync() if isinstance(objective, DistributedDataParallel) else contextlib.nullcontext()


@torch.no_grad()
def average(parameters: Sequence[nn.Parameter]) -> None:
    """Puts the mean over all ranks in the place of each gradient; one that a rank lacks counts as zero there. With one rank nothing
    is done. For adapters, which are small: they travel in one piece."""
    if size() == 1:
        return
    for parameter in parameters:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    grads = [parameter.grad for parameter in parameters if parameter.grad is not None]
    flat = torch.cat([grad.flatten() for grad in grads])
    torch.distributed.all_reduce(flat)
    parts = (flat / size()).split([grad.numel() for grad in grads])
    torch._foreach_copy_(grads, [part.view_as(grad) for part, grad in zip(parts, grads, strict=True)])
