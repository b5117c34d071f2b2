"""Bytes of rotary embedding and of cross-entropy: formulas against counts, and what the loss of a real vocabulary moves."""

import pytest
import torch
from cases import BF16, FP16, FP32
from formulas import cost
from interpreter import checked
from test_traffic import H100, compare
from traffic import recorded

from plopfast.kernels import dispatch, triton_rows
from plopfast.models import cross_entropy
from plopfast.models.cross_entropy import chunked_cross_entropy


def heads(b, h, t, d, dtype=BF16, device="cpu"):
    return torch.zeros(b, t, h, d, dtype=dtype, device=device).transpose(1, 2)


# B, heads of q and of k, T, D, width of cos, its dtype; rows of cos, interleaved, in place
ROTATIONS = [
    (2, 4, 2, 5, 16, 16, BF16, 1, False, False),
    (3, 3, 1, 4, 20, 8, FP32, 3, False, False),
    (2, 5, 5, 3, 24, 10, BF16, 1, True, True),
]


@pytest.mark.parametrize("case", ROTATIONS, ids=str)
def test_formula_is_count_of_a_rotation(case):
    b, hq, hk, t, d, width, table, rows, interleaved, in_place = case
    cos, sin = (torch.zeros(rows, t, width, dtype=table) for _ in range(2))
    q, k = heads(b, hq, t, d), heads(b, hk, t, d)
    with checked(race=False) as check, recorded(H100) as launches:
        for backward in (False, True):
            triton_rows.rotary(q, k, cos, sin, interleaved=interleaved, backward=backward, in_place=in_place)
    compare(launches, check)
    assert len(launches) == 2


@pytest.mark.parametrize("bias, cap, gradient", [(False, None, True), (True, 3.0, True), (True, None, False)])
@pytest.mark.parametrize("v", [7, 300, 40000])
def test_formula_is_count_of_cross_entropy(v, bias, cap, gradient):
    z, targets, bias = (
        torch.zeros(3, v, dtype=FP16),
        torch.zeros(3, dtype=torch.int64),
        torch.zeros(v) if bias else None,
    )
    with checked(race=False) as check, recorded(H100) as launches:
        triton_rows.cross_entropy(z, targets, bias, cap=cap, gradient=gradient)
    compare(launches, check)


def test_a_rotation_moves_q_and_k_twice():
    """Llama-3-8B, 16,384 tokens: once in and once out, in each direction; the tables, in float32, are a fortieth of it."""
    q, k, cos = (
        heads(4, 32, 4096, 128, device="meta"),
        heads(4, 8, 4096, 128, device="meta"),
        torch.zeros(1, 4096, 128, device="meta"),
    )
    with recorded(H100) as launches:
        for backward in (False, True):
            triton_rows.rotary(q, k, cos, cos, backward=backward)
    moved = [cost(launch).bytes for launch in launches]
    floor = 2 * (q.nbytes + k.nbytes)
    assert len(moved) == 2 and all(floor <= one <= 1.03 * floor for one in moved)


def test_the_loss_moves_eight_bytes_a_logit(monkeypatch):
    """The product writes 2, the kernel reads and writes 2, the product for dh reads 2; nothing else touches logits."""
    monkeypatch.setattr(dispatch, "runs_kernels", lambda *a: True)
    n, h, v = 24, 16, 1000
    monkeypatch.setitem(cross_entropy.CHUNK_ELEMENTS, "cpu", 10 * v)
    hidden, weight = torch.zeros(n, h, dtype=BF16, requires_grad=True), torch.zeros(v, h, dtype=BF16)
    targets = torch.zeros(n, dtype=torch.int64)
    with checked(race=False), recorded(H100, weight) as launches:
        chunked_cross_entropy(hidden, weight, targets)
    assert [one.kernel for one in launches if not one.kernel.startswith("torch.")] == ["mm", "cross_entropy", "mm"] * 3
    costs = [cost(one) for one in launches if not one.kernel.startswith("torch.")]
    beside = 2 * 3 * weight.nbytes + 2 * hidden.nbytes + targets.nbytes + 4 * n
    assert sum(one.bytes for one in costs) - beside == 8 * n * v
    small = {
        "torch.new_zeros",
        "torch.sum",
        "torch.add_",
        "torch.cross_entropy_",
    }  # of losses, and what holds the kernel
    assert {one.kernel for one in launches if one.kernel.startswith("torch.")} <= small


@pytest.mark.parametrize("l2, least, most", [(1 << 20, 4.0, 4.01), (1 << 16, 5.0, 5.5)])
def test_the_second_read_comes_from_the_cache_as_far_as_it_holds_the_rows_under_way(l2, least, most, monkeypatch):
    """Two programs at a time, with rows of 64 KiB: 4 bytes a logit cross DRAM if 1 MiB is there. In 64 KiB a part of the
    rows is left, which the second pass begins with."""
    monkeypatch.setattr(triton_rows, "BLOCK", 4096)
    z = torch.zeros(6, 32768, dtype=BF16)
    with checked(race=False, trace=True) as check:
        triton_rows.cross_entropy(z, torch.zeros(6, dtype=torch.int64))
    found = check.l2_replay(l2, 2)
    assert least <= (found["dram_read"] + found["dram_write"]) / z.numel() <= most
