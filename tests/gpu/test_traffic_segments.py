"""Bytes and launches of products by segments: formulas against counts, a layer of experts against its floor, and several adapters
on one weight against as many linears."""

import pytest
import torch
from cases import BF16, FP16, FP32
from formulas import cost
from interpreter import checked
from test_traffic import A100, H100, MANY, SMALL, compare
from traffic import launches_of, launches_of_experts, launches_of_many, operands, recorded

from plopfast.kernels import dispatch, triton_ops

# rows of each segment, N, K, R, dtypes of activations and adapters; target
CASES = [
    ((1,), 1, 1, 1, BF16, FP32, SMALL),
    ((3, 0, 40, 1), 33, 47, 5, FP32, FP32, SMALL),
    ((0, 70, 0, 33), 40, 136, 16, BF16, FP32, H100),
    ((200, 130), 70, 64, 16, FP16, FP16, A100),
    ((20, 31), 150, 24, 8, BF16, FP32, MANY),
    ((0, 20, 31), 40, 24, 64, BF16, FP32, MANY),
    ((150, 0, 150), 24, 520, 24, BF16, FP32, dispatch.Target("gfx942", 304)),
]
QWEN3 = {
    "gate_up": (2048, 1536),
    "down": (768, 2048),
}  # K and N of an expert of Qwen3-30B-A3B, which has 128 and takes 8
EXPERTS, TAKEN, TOKENS, RANK = 128, 8, 16384, 16


@pytest.mark.parametrize("case", CASES, ids=str)
def test_formula_is_count(case):
    with checked(race=False, compute=False) as check:
        launches = launches_of_experts(*case)
    compare(launches, check)


@pytest.mark.parametrize("target", [H100, A100, dispatch.Target("gfx942", 304)], ids=str)
@pytest.mark.parametrize("name", QWEN3)
def test_a_layer_of_experts_is_close_to_its_floor(name, target):
    """Beside the frozen products' operands X moves twice and dY once; at most six launches for 128 experts."""
    k, n = QWEN3[name]
    rows = [TOKENS * TAKEN // EXPERTS] * EXPERTS
    launches = launches_of_experts(rows, n, k, RANK, BF16, FP32, target, "meta")
    moved, products = sum(cost(launch).bytes for launch in launches), sum(cost(launch).own for launch in launches)
    outside, x, y = moved - products, 2 * sum(rows) * k, 2 * sum(rows) * n
    assert len(launches) <= 6 and all(launch.grid for launch in launches)
    adapters = 4 * RANK * (n + k) * EXPERTS
    # X is read for S and dA, dY for dS and dB; adapters are read twice, and their gradients written
    assert 2 * x + y + 3 * adapters <= outside <= 1.2 * (2 * x + y) + 3 * adapters


def test_segments_cost_no_more_than_a_launch_for_each():
    """Nearly the bytes of every expert's own launches, in six launches instead of five for each expert."""
    k, n = QWEN3["gate_up"]
    m = TOKENS * TAKEN // EXPERTS
    made = lambda *shape, dtype=BF16: torch.zeros(shape, dtype=dtype, device="meta")  # noqa: E731
    x, dy, w, a, b = made(m, k), made(m, n), made(n, k), made(RANK, k, dtype=FP32), made(n, RANK, dtype=FP32)
    tiles = dispatch.segment_tiles(H100, BF16, m)
    with recorded(H100, w) as one:
        s = triton_ops.shrink(x, a, 2.0)
        triton_ops.gemm(x, w, s, b, tiles=tiles)
        ds, _ = triton_ops.grad_s_and_b(dy, s, b, 2.0)
        triton_ops.grad_a(ds, x, 0.0, 0, FP32)
        triton_ops.gemm(dy, w.T, ds, a.T, tiles=tiles)
    together = launches_of_experts([m] * EXPERTS, n, k, RANK, BF16, FP32, H100, "meta")
    apart = EXPERTS * sum(cost(launch).bytes for launch in one)
    assert sum(cost(launch).bytes for launch in together) <= 1.02 * apart
    assert len(together) <= 6 and len(one) * EXPERTS >= 5 * EXPERTS


def test_launches_do_not_grow_with_the_experts():
    counts = {e: len(launches_of_experts([64 // e] * e, 40, 24, 8, BF16, FP32, H100, "meta")) for e in (1, 4, 64)}
    assert max(counts.values()) <= 6, counts


def test_few_rows_of_many_experts_take_small_tiles():
    for count, size in ((1, 128), (64, 64)):
        launches = launches_of_experts([4096 // count] * count, 64, 64, 8, BF16, FP32, H100, "meta")
        assert [launch.BM for launch in launches if launch.kernel == "segment_gemm"] == [size, size]


# rows and rank of each segment, N, K, dtypes of activations and adapters; target; bias
MANY_CASES = [
    (((3, 5), (0, 2), (40, 8), (1, 0)), 33, 47, FP32, FP32, SMALL, True),
    (((0, 16), (70, 16), (33, 16)), 40, 136, BF16, FP32, H100, True),
    (((200, 16), (130, 3)), 70, 64, FP16, FP16, A100, False),
    (((0, 64), (20, 64), (31, 64)), 40, 24, BF16, FP32, MANY, False),
]


@pytest.mark.parametrize("strategy", ["lora-first", "fused"])
@pytest.mark.parametrize("case", MANY_CASES, ids=str)
def test_formula_is_count_for_several_adapters(case, strategy):
    segments, n, k, *rest = case
    with checked(race=False, compute=False) as check:
        step = launches_of_many(segments, n, k, strategy, *rest)
    compare(step.forward + step.backward, check)


def grouped_and_apart(count, rows, strategy):
    """Costs of one call with `count` adapters, and of as many lora_linears, forward and backward."""
    n = k = 4096
    together = launches_of_many([(rows // count, RANK)] * count, n, k, strategy, BF16, FP32, H100, device="meta")
    one = launches_of(strategy, operands(rows // count, n, k, RANK, device="meta"), 0.0, H100)
    return [
        ([cost(launch) for launch in ours], [cost(launch) for launch in theirs] * count)
        for ours, theirs in ((together.forward, one.forward), (together.backward, one.backward))
    ]


@pytest.mark.parametrize("strategy", ["lora-first", "fused"])
@pytest.mark.parametrize("rows", [4096, 16384])
@pytest.mark.parametrize("count", [8, 16])
def test_several_adapters_on_one_weight_cost_less_than_as_many_linears(count, rows, strategy):
    """The weight moves once instead of once for each, and launches don't grow with the adapters."""
    weight = 2 * 4096 * 4096
    for ours, theirs in grouped_and_apart(count, rows, strategy):
        assert len(ours) <= 9 and len(theirs) >= 3 * count
        saved = sum(c.bytes for c in theirs) - sum(c.bytes for c in ours)
        stacks = 30 * RANK * 4096 * count  # two stacks: read, written, scaled, read again; and parts of sums
        assert saved >= (count - 1) * weight - stacks
        assert sum(c.outside for c in ours) <= 1.2 * sum(c.outside for c in theirs) + stacks


def test_launches_do_not_grow_with_the_adapters():
    for strategy in ("lora-first", "fused"):
        steps = [
            launches_of_many([(64 // e, 8)] * e, 40, 24, strategy, BF16, FP32, H100, device="meta") for e in (2, 16, 64)
        ]
        counts = {len(step.forward) + len(step.backward) for step in steps}
        assert max(counts) <= 18, counts
