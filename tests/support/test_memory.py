"""Peak and free memory against what torch allocates."""

import psutil
import torch

from plopfast.support import memory

MIB = 2**20


def test_the_peak_is_seen_and_begins_anew():
    memory.reset_peak()
    before = memory.peak_mib()
    x = torch.ones(64 * MIB // 4)
    assert 60 < memory.peak_mib() - before < 80
    del x
    memory.reset_peak()
    assert memory.peak_mib() < before + 20


def test_free_memory():
    free = memory.free_mib(torch.device("cpu"))
    assert 1 < free < psutil.virtual_memory().total / MIB
    assert abs(free - psutil.virtual_memory().available / MIB) < 2048
