"""Several processes (ranks), one for each device, as torchrun starts them: sums over all of them, and how they fail.

Every rank runs the same program on its share of the data; only rank 0 writes and prints. Without torchrun there is one
rank, and everything here does nothing.

Gradients are averaged by torch's DistributedDataParallel, in both layouts: "ddp" keeps the whole model on each rank,
"fsdp" spreads the frozen blocks with fully_shard. The adapters, hundreds of times smaller, are whole on each rank.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from typing import Any

import torch
from torch import distributed as dist

from . import machine
from .errors import RankError
from .peers import Peers

_peers: Peers | None = None
_FAILED = "failed"  # counts, in the launcher's store, the ranks that failed with a message of their own


def init(device: torch.device, timeout_s: int) -> None:
    """Joins the processes that torchrun started, if any. A rank that waits for the others longer than `timeout_s` fails.

    Small values travel between CPUs (gloo), tensors on GPUs by nccl.
    """
    global _peers
    if machine.launch().size == 1:
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)
    from torch.distributed.rendezvous import rendezvous

    timeout = timedelta(seconds=timeout_s)
    store, rank, size = next(rendezvous("env://", timeout=timeout))
    _peers = Peers(store, rank, size)
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=timeout)


def close() -> None:
    """Leaves the other ranks. Waits for them first, so that torchrun ends none of them early."""
    if size() > 1:
        barrier()
        dist.destroy_process_group()


def size() -> int:
    """Returns the number of ranks."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """Returns this process's number, from 0."""
    return dist.get_rank() if size() > 1 else 0


def is_main() -> bool:
    return rank() == 0


def gather(tensor: torch.Tensor) -> list[torch.Tensor]:
    """Returns every rank's `tensor` in the order of the ranks; they are on the CPU and of one shape and dtype."""
    if size() == 1:
        return [tensor]
    parts = [torch.empty_like(tensor) for _ in range(size())]
    dist.all_gather(parts, tensor.contiguous())
    return parts


def total(values: Sequence[float] | torch.Tensor) -> torch.Tensor:
    """Returns the sum over all ranks in float64, bit for bit the same on each."""
    return torch.stack(gather(torch.as_tensor(values, dtype=torch.float64))).sum(0)


def largest(value: int) -> int:
    """Returns the largest of all ranks' values."""
    return max(int(part) for part in gather(torch.tensor(value)))


def barrier() -> None:
    """Waits until every rank is here."""
    largest(0)


def on_main(action: Callable[[], Any]) -> bool:
    """Runs `action` on rank 0 while the others wait, and returns whether its value is true. If it raises, every rank does:
    the others RankError."""
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
    """Lets the first rank of each machine run alone first; the others then find in the cache what it left."""
    ahead = machine.launch().local_rank == 0
    if not ahead:
        barrier()
    yield
    if ahead:
        barrier()


def share(count: int) -> list[tuple[int, bool]]:
    """Returns (index, True) for this rank's share of `count` items: every size()-th. Where other ranks have one more,
    (the last index, False) follows, as a sharded model must run equally often on all of them."""
    mine = [(index, True) for index in range(rank(), count, size())]
    return mine + [(count - 1, False)] * (-(-count // size()) - len(mine))


def first_to_fail() -> bool:
    """Returns whether this rank is the first that fails; a later failure follows from the first one."""
    if _peers is None:
        return machine.launch().local_rank == 0
    try:
        return bool(_peers.store.add(_FAILED, 1) == 1)
    except RuntimeError:  # the launcher's store has ended with rank 0
        return True


def is_loss(error: Exception) -> bool:
    """Returns whether an operation of all ranks failed because one of them has ended or did not answer in time."""
    words = ("gloo", "NCCL")
    return isinstance(error, dist.DistError) or (
        isinstance(error, RuntimeError) and any(word in str(error) for word in words)
    )


def explain_loss() -> str | None:
    """Says which rank has ended, after `is_loss`. None where a rank has failed and says why itself."""
    if _peers is None:
        return "not every rank has come within --timeout"
    try:
        if _peers.store.add(_FAILED, 0):
            return None
    except RuntimeError:  # the launcher's store has ended with rank 0
        pass
    return _peers.message()
