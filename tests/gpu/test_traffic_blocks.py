"""As test_traffic.py, of norms and gates: 10 and 16 bytes an element, forward and backward."""

import pytest
import torch
from cases import BF16, FP32
from formulas import BLOCKS, cost
from interpreter import checked
from test_traffic import H100, RANK, TOKENS, compare, outside
from traffic import SMALL, recorded

from plopfast.kernels import triton_blocks, triton_ops


def norms_and_gates(m, k, dtype, rank, device="cpu", residual=True, weight=True):
    """Launches each kernel of norms and gates once, or with a residual twice, as a block does."""
    x, w = torch.zeros(m, k, dtype=dtype, device=device), torch.zeros(k, dtype=dtype, device=device) if weight else None
    adapters = [torch.zeros(rank, k, device=device) for _ in range(3)]
    g, u, dg, du = (torch.zeros_like(x) for _ in range(4))
    dy, r = torch.zeros_like(x), torch.zeros_like(x)
    for other in (None, r) if residual else (None,):
        rstd = triton_blocks.rms_norm(x, w, 1e-6, "narrow", other)[1]
        triton_blocks.rms_norm_grad(dy, x, w, rstd, "narrow", other)
    if rank:
        triton_blocks.rms_norm_shrink(x, w, 1e-6, "narrow", adapters, 1.0, 0.25, (1, 2, 3))
    triton_blocks.gate(g, u, "silu")
    triton_blocks.gate_grad(x, g, u, "silu", (dg, du))


@pytest.mark.parametrize("case", [(7, 33, BF16, 3, True), (40, 520, BF16, 16, False), (3, 72, FP32, 24, True)], ids=str)
@pytest.mark.parametrize("longest", [64, 8192])
def test_formula_is_count_for_norms_and_gates(case, longest, monkeypatch):
    """Rows that are taken in parts count once too: the second read finds them in the cache."""
    monkeypatch.setattr(triton_blocks, "LONGEST", longest)
    monkeypatch.setattr(triton_blocks, "SHARE", 0.0)
    monkeypatch.setattr(triton_blocks, "LOOPED", min(longest, 4096))
    with checked(race=False, compute=False) as check, recorded(SMALL) as launches:
        norms_and_gates(*case[:4], weight=case[4])
    assert {launch.kernel for launch in launches if launch.grid} == set(BLOCKS)
    compare([launch for launch in launches if launch.grid], check)


def test_bytes_of_norms_and_gates():
    """10 bytes an element of a norm forward and backward, 16 of a gate in 16 bits; beside them the weight and 1 / rms [M]."""
    m, k = TOKENS, 4096
    with recorded(H100) as launches:
        norms_and_gates(m, k, BF16, 0, "meta", residual=False)
    moved = {launch.kernel: cost(launch).bytes for launch in launches if launch.grid}
    assert moved["rms_norm"] + moved["rms_norm_grad"] == 10 * m * k + 2 * (2 * k + 4 * m)
    assert moved["gate"] + moved["gate_grad"] == 16 * m * k


def test_a_norm_that_hands_out_s_saves_a_read_of_its_rows():
    x, w, a = (torch.zeros(*shape, dtype=BF16, device="meta") for shape in ((TOKENS, 4096), (4096,), (RANK, 4096)))
    with recorded(H100) as together:
        triton_blocks.rms_norm_shrink(x, w, 1e-6, "narrow", (a,) * 3, 1.0)
    with recorded(H100) as apart:
        triton_ops.shrink_stacked(triton_blocks.rms_norm(x, w, 1e-6, "narrow")[0], (a,) * 3, 1.0)
    saved = outside(apart) - outside(together)
    assert x.nbytes <= saved <= 1.1 * x.nbytes  # and the parts of S
