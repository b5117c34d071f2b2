"""Peak and free memory against what torch allocates."""

import os
import subprocess
import sys

import psutil
import pytest
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


FREED = """
import os
from plopfast.support import memory

def anonymous():
    line = next(line for line in open("/proc/self/status") if line.startswith("RssAnon"))
    return int(line.split()[1]) / 1024

def given_back(mib, kept_mib):
    "Which share of 20 blocks goes back when they are freed, with kept ones between that fit no hole of the blocks before."
    blocks = []
    for _ in range(20):
        blocks.append(b"1" * int(mib * 2**20))
        kept.append(b"1" * int(kept_mib * 2**20))
    full = anonymous()
    del blocks
    return (full - anonymous()) / (20 * mib)

kept = []
b"1" * (31 << 20)  # freed, it makes glibc take smaller ones from its heap
print(given_back(2, 0.2))
os.environ["MALLOC_MMAP_THRESHOLD_"] = "33554432"  # somebody's choice
memory.free_large_at_once()
print(given_back(3, 2.5))
del os.environ["MALLOC_MMAP_THRESHOLD_"]
memory.free_large_at_once()
print(given_back(5, 4))
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc is Linux's")
def test_large_blocks_go_back_at_once():
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}
    done = subprocess.run([sys.executable, "-c", FREED], capture_output=True, text=True, env=environment)
    plain, chosen, freed = map(float, done.stdout.split())
    assert plain < 0.5 and chosen < 0.5 and freed > 0.9, done.stdout + done.stderr
