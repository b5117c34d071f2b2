"""What ranks share and tell one another, looked at from one of them, without the others."""

import os
import sys

import pytest
import torch
from torch import distributed

from plopfast.support import machine, ranks, threads
from plopfast.support.errors import RankError
from plopfast.support.machine import Launch


def test_how_torchrun_started_this(monkeypatch):
    given = {"RANK": "3", "LOCAL_RANK": "1", "WORLD_SIZE": "4"}
    for left_out in (None, "RANK", "LOCAL_RANK"):
        for name, value in given.items():
            monkeypatch.delenv(name, raising=False)
            if name != left_out:
                monkeypatch.setenv(name, value)
        assert machine.launch() == (Launch(3, 1, 4) if left_out is None else Launch(0, 0, 1))


def test_the_timeout_reaches_torch(monkeypatch):
    given = []

    def meet(url, timeout):
        given.append(timeout.total_seconds())
        return iter([(None, 0, 2)])

    def begin(*_, timeout, **__):
        given.append(timeout.total_seconds())

    monkeypatch.setattr(machine, "launch", lambda: Launch(0, 0, 2))
    monkeypatch.setattr(ranks, "Peers", lambda *_: None)
    monkeypatch.setattr(sys.modules["torch.distributed.rendezvous"], "rendezvous", meet)
    monkeypatch.setattr(distributed, "init_process_group", begin)
    ranks.init(torch.device("cpu"), 77)
    assert given == [77, 77]


@pytest.mark.parametrize("chosen", [None, "ACTIVE", "PASSIVE"])
@pytest.mark.parametrize(
    ("others", "quota", "spins"),
    [(0.0, 4, "20000"), (0.49, 4, "20000"), (0.5, 4, "1000"), (2.0, 4, "1000"), (0.0, 3, "1000")],
)
def test_threads_spin_longer_on_idle_cores_and_a_users_choice_stays(monkeypatch, chosen, others, quota, spins):
    monkeypatch.setattr(threads, "affinity", lambda: {0, 1, 2, 3})
    monkeypatch.setattr(threads, "usable_cores", lambda: quota)
    monkeypatch.setattr(threads, "busy_cores", lambda seconds: others)
    for name in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT"):
        monkeypatch.delenv(name, raising=False)
        if chosen:
            monkeypatch.setenv(name, chosen)
    threads.set_waiting_policy()
    assert os.environ["OMP_WAIT_POLICY"] == (chosen or "PASSIVE") and os.environ["GOMP_SPINCOUNT"] == (chosen or spins)


def test_one_process_is_the_main_one():
    for value, true in ((None, False), (0, False), (5, True), ([], False), ("a", True), (False, False)):
        assert ranks.on_main(lambda value=value: value) is true
    with pytest.raises(KeyError, match="mine"):
        ranks.on_main(lambda: {}["mine"])


@pytest.mark.parametrize("size", [2, 3])
def test_all_ranks_hear_how_it_went(monkeypatch, size):
    """What the main one's value or error is to the others, by the largest of all ranks' numbers."""
    for number, heard in ((0, False), (1, True)):
        monkeypatch.setattr(ranks, "rank", lambda: 1)
        monkeypatch.setattr(ranks, "largest", lambda own, number=number: max(own, number))
        assert ranks.on_main(lambda: pytest.fail("not here")) is heard
    monkeypatch.setattr(ranks, "largest", lambda own: 2)
    with pytest.raises(RankError):
        ranks.on_main(lambda: None)


@pytest.mark.parametrize("size", [1, 2, 3, 4])
@pytest.mark.parametrize("count", [1, 2, 3, 7, 8])
def test_shares_are_of_one_length_and_hold_all(monkeypatch, size, count):
    monkeypatch.setattr(ranks, "size", lambda: size)
    parts = []
    for rank in range(size):
        monkeypatch.setattr(ranks, "rank", lambda rank=rank: rank)
        parts.append(ranks.share(count))
    assert len({len(part) for part in parts}) == 1
    assert sorted(index for part in parts for index, mine in part if mine) == list(range(count))
    assert all(0 <= index < count for part in parts for index, _ in part)


def test_sums_are_exact():
    assert ranks.total([2.0**53, 1.0]).tolist() == [2.0**53, 1.0] and ranks.total([0.1]).dtype == torch.float64
    assert ranks.total(torch.tensor([0.1])).dtype == torch.float64


@pytest.mark.parametrize(("local", "order"), [(0, ["work", "wait"]), (1, ["wait", "work"]), (3, ["wait", "work"])])
def test_the_first_one_on_a_machine_goes_ahead(monkeypatch, local, order):
    done = []
    monkeypatch.setattr(machine, "launch", lambda: Launch(4 + local, local, 8))
    monkeypatch.setattr(ranks, "barrier", lambda: done.append("wait"))
    with ranks.first_on_each_machine():
        done.append("work")
    assert done == order


@pytest.mark.parametrize(
    ("error", "loss"),
    [
        (RuntimeError("gloo: Connection closed"), True), (RuntimeError("NCCL error"), True), (distributed.DistError("x"), True),
        (RuntimeError("shapes do not fit"), False), (ValueError("gloo"), False), (torch.OutOfMemoryError("CUDA"), False),
    ],
)  # fmt: skip
def test_which_errors_mean_that_a_rank_is_gone(error, loss):
    assert ranks.is_loss(error) is loss
