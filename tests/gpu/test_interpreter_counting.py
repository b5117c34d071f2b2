"""The checked interpreter counts bytes and FLOPs exactly, and replays accesses through a cache."""

import pytest
import torch
import triton
import triton.language as tl
from interpreter import checked
from planted import BF16, FP32, empty, gapped, run_double, run_matmul


def test_traffic_of_a_copy():
    check = run_double()[2]
    moved = check.counts()
    assert list(moved) == ["x", "y"] and moved["x"].load.lanes == 21 * 13
    size = 21 * 13 * 4
    assert moved["x"].load.bytes == moved["x"].load.program_bytes == moved["x"].load.launch_bytes == size
    assert moved["y"].store.bytes == moved["y"].store.launch_bytes == size
    assert moved["x"].store.lanes == moved["y"].load.lanes == moved["y"].atomic.lanes == 0
    # 84 bytes from row to row, the first at byte 100: how many 32-byte sectors the 52 bytes of each row touch
    sectors = [set(range((100 + 84 * row) // 32, (100 + 84 * row + 51) // 32 + 1)) for row in range(21)]
    per_program = [set().union(*sectors[start : start + 8]) for start in range(0, 21, 8)]
    assert moved["x"].load.sectors == sum(map(len, per_program))
    assert check.compulsory() == 2 * size and check.compulsory("y") == size and not check.flops


def test_traffic_of_a_matmul():
    M, N, K = 64, 48, 80
    a, b, c = gapped(M, K, dtype=BF16), gapped(K, N, dtype=BF16), empty(M, N)
    check = run_matmul(a, b, c, block=(32, 16, 16), trace=True)
    moved = check.counts()
    assert moved["a"].load.bytes == moved["a"].load.program_bytes == M * K * 2 * (N // 16)
    assert moved["b"].load.bytes == K * N * 2 * (M // 32)
    assert [moved[name].load.launch_bytes for name in "abc"] == [M * K * 2, K * N * 2, 0]
    assert check.launches[0].kernel == "matmul" and check.launches[0].args == moved
    assert check.launches[0].compulsory("a", "b") == (M + N) * K * 2
    assert check.compulsory() == (M + N) * K * 2 + M * N * 4
    assert check.flops == {"bf16": 2 * M * N * K}


def test_lanes_that_share_an_address_count_once():
    @triton.jit
    def spread(x, y):
        lanes = tl.arange(0, 64)
        value = tl.load(x + lanes // 16) + tl.load(x + lanes // 32)
        tl.store(y + tl.program_id(0) * 64 + lanes, value)

    with checked() as check:
        spread[3,](torch.randn(4), torch.zeros(192))
    load = check.counts()["x"].load
    assert (load.bytes, load.program_bytes, load.launch_bytes, load.sectors) == (3 * 2 * 256, 3 * 16, 16, 6)


def test_traffic_without_arithmetic():
    a, b = torch.zeros(64, 64, dtype=BF16), torch.zeros(64, 64, dtype=BF16)
    full, dry = (
        run_matmul(a, b, torch.zeros(64, 64), block=(32, 32, 32), compute=compute) for compute in (True, False)
    )
    assert full.counts() == dry.counts() and full.flops == dry.flops


def test_l2_replay():
    a, b, c = (torch.zeros(64, 64, dtype=FP32) for _ in range(3))  # 16 KiB each: whole cache lines
    check = run_matmul(a, b, c, block=(16, 16, 32), compute=False, trace=True)
    size = 64 * 64 * 4
    endless = check.l2_replay(2**20, concurrent=4)
    assert endless["dram_read"] == 2 * size and endless["dram_write"] == size
    none = check.l2_replay(0, concurrent=4)
    assert none["hits"] == 0 and none["dram_read"] > 2 * 4 * size
    small = check.l2_replay(4096, concurrent=4)
    assert endless["dram_read"] < small["dram_read"] < none["dram_read"]
    with pytest.raises(ValueError, match="trace=True"):
        run_matmul(a, b, c, block=(64, 64, 64)).l2_replay(2**20, concurrent=4)
