"""Several processes, one a device, as torchrun starts them: sums over all ranks, sharded weights, and how they fail.

Every rank runs the same program on its share of the data; rank 0 alone writes and prints. A program that torchrun did
not start is one rank of one, for which everything here does nothing.

Gradients are averaged by torch's DistributedDataParallel, in both layouts: "ddp" keeps the whole model on each rank,
"fsdp" spreads the frozen blocks by fully_shard and leaves the adapters, which are hundreds of times smaller, whole.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from typing import Any

import torch
from torch import distributed as dist

from . import machine
from .errors import RankError

_store: Any = None  # the launcher's, which outlives every rank


def init(device: torch.device, timeout_s: int) -> None:
    """Joins the processes that torchrun started, if it did; a rank waits `timeout_s` for the others and then fails.

    Small values travel between CPUs (gloo), tensors on GPUs by nccl.
    """
    global _store
    if machine.launch().size == 1:
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)
    from torch.distributed.rendezvous import rendezvous

    timeout = timedelta(seconds=timeout_s)
    _store, rank, size = next(rendezvous("env://", timeout=timeout))
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, store=_store, rank=rank, world_size=size, timeout=timeout)


def close() -> None:
    """Waits for the other ranks, so that torchrun ends none of them early, and leaves them."""
    if size() > 1:
        barrier()
        dist.destroy_process_group()


def size() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    return dist.get_rank() if size() > 1 else 0


def is_main() -> bool:
    return rank() == 0


def gather(tensor: torch.Tensor) -> list[torch.Tensor]:
    """Every rank's `tensor` (on the CPU, of one shape and dtype), in the order of the ranks."""
    if size() == 1:
        return [tensor]
    parts = [torch.empty_like(tensor) for _ in range(size())]
    dist.all_gather(parts, tensor.contiguous())
    return parts


def total(values: Sequence[float] | torch.Tensor) -> torch.Tensor:
    """The sum over all ranks in float64, with the same bits on each of them."""
    return torch.stack(gather(torch.as_tensor(values, dtype=torch.float64))).sum(0)


def largest(value: int) -> int:
    """The largest of all ranks' values."""
    return max(int(part) for part in gather(torch.tensor(value)))


def barrier() -> None:
    largest(0)


def on_main(action: Callable[[], Any]) -> bool:
    """Whether `action`, run on rank 0 while the others wait, gave a true value. Its error ends every rank: the others
    raise RankError."""
    failure, value = None, None
    if is_main():
        try:
            value = action()
        except Exception as error:  # raised below, once the others know
            failure = error
    outcome = largest(2 if failure else int(bool(value)))
    if failure:
        raise failure
    if outcome == 2:
        raise RankError("rank 0 has failed; its message says why")
    return outcome == 1


@contextlib.contextmanager
def first_on_each_machine() -> Iterator[None]:
    """The first rank of each machine goes ahead, and the others find in the cache what it left there."""
    ahead = machine.launch().local_rank == 0
    if not ahead:
        barrier()
    yield
    if ahead:
        barrier()


def share(count: int) -> list[tuple[int, bool]]:
    """(index, True) of every size()-th of `count` items, from this rank's number on. Where other ranks have one more,
    (the last index, False) follows: a sharded model must run equally often on all of them."""
    mine = [(index, True) for index in range(rank(), count, size())]
    return mine + [(count - 1, False)] * (-(-count // size()) - len(mine))


def first_to_fail() -> bool:
    """Whether no rank has failed before this one, from whose failure this one's follows."""
    return machine.launch().local_rank == 0 if _store is None else _store.add("failed", 1) == 1


def is_loss(error: Exception) -> bool:
    """Whether an operation of all ranks failed because one of them has ended, or did not answer in time."""
    return isinstance(error, RuntimeError) and any(word in str(error) for word in ("gloo", "NCCL"))
