"""A lower bound on parallel work, beside test_traffic.py's upper bound on bytes: launches fill the card.

The shapes are those of Llama-3-8B and SmolLM2-135M, on five cards; nothing runs. The rule: a launch has a program for three
of four SMs at least, if its large operand has SMALL elements. More are not always faster: parts of sums cost time, too.
"""

import pytest
import torch
from cases import BF16
from traffic import launches_of, operands, recorded

from plopfast.kernels import triton_blocks, triton_ops, triton_segments
from plopfast.kernels.dispatch import Target

CARDS = {
    "A100": Target("sm_80", 108), "H100": Target("sm_90", 132), "RTX 4090": Target("sm_89", 128),
    "B200": Target("sm_100", 148), "MI300X": Target("gfx942", 304),
}  # fmt: skip
LINEARS = {  # K in, N out
    "Llama-3-8B": [(4096, 4096), (4096, 1024), (4096, 14336), (14336, 4096)],
    "SmolLM2-135M": [(576, 576), (576, 192), (576, 1536), (1536, 576)],
}
KERNELS = (
    "lora_gemm", "lora_shrink", "lora_grads", "lora_expand", "row_norms", "rms_norm", "rms_norm_grad", "rms_norm_shrink",
    "gate", "gate_grad", "segment_shrink", "segment_gemm", "segment_grads",
)  # fmt: skip
EXPERTS = (1, 8, 128)
TOKENS, RANKS = (2048, 16384), (16, 64)
SHARE, SMALL = (
    0.75,
    1 << 22,
)  # of the SMs; elements of the large operand below which a launch takes as long as its start
MOST_SPLIT = 4  # programs an SM up to which a sum is split: beyond that, parts cost bytes and fill nothing


def cdiv(value, block):
    return -(-value // block)


def size_of(launch):
    """(rows, columns) of the large operand that the launch's programs share."""
    columns = {
        "lora_grads": "C",
        "segment_grads": "C",
        "segment_shrink": "K",
        **dict.fromkeys(("lora_shrink", "rms_norm", "rms_norm_grad", "rms_norm_shrink"), "K"),
    }
    columns = columns.get(launch.kernel, "N")
    rows = launch.t.shape[0] if launch.kernel == "segment_grads" else launch.M
    return rows, launch.arguments[columns]


def block(x, a):
    """The kernels of a norm and a gate of X's width, and S of three adapters."""
    rstd = triton_blocks.rms_norm(x, x[0], 1e-6, "narrow")[1]
    triton_blocks.rms_norm_grad(x, x, x[0], rstd, "narrow")
    triton_blocks.rms_norm_shrink(x, x[0], 1e-6, "narrow", (a,) * 3, 1.0)
    triton_blocks.gate(x, x, "silu")
    triton_blocks.gate_grad(x, x, x, "silu")


def experts(tokens, k, n, rank):
    """What the experts of a layer launch, of each number of them."""
    for count in EXPERTS:
        made = lambda *shape, dtype=BF16: torch.empty(shape, dtype=dtype, device="meta")  # noqa: E731
        x, dy, w, ends = made(tokens, k), made(tokens, n), made(count, n, k), made(count, dtype=torch.int32)
        a, b = made(count, rank, k, dtype=torch.float32), made(count, n, rank, dtype=torch.float32)
        _, s = triton_segments.forward(x, w, a, b, ends, 2.0)
        triton_segments.backward(dy, x, s, w, a, b, ends, 2.0, (True, True, True))


@pytest.fixture(scope="module")
def launches():
    """Card -> kernel -> (what it is for, launch)."""
    found = {card: {kernel: [] for kernel in KERNELS} for card in CARDS}
    for card, target in CARDS.items():
        for model, linears in LINEARS.items():
            for tokens in TOKENS:
                for k, n in linears:
                    for rank in RANKS:
                        o = operands(tokens, n, k, rank, device="meta")
                        steps = [launches_of(path, o, 0.1, target) for path in ("fused", "lora-first")]
                        made = [launch for step in steps for launch in step.forward + step.backward]
                        with recorded(target) as norms:
                            triton_ops.row_norms(torch.empty(tokens, n, dtype=BF16, device="meta"))
                            block(o.x, o.a)
                            experts(tokens, k, n, rank)
                        for launch in made + norms:
                            name = launch.kernel.removesuffix("_tma")
                            if name in KERNELS:
                                what = f"{model} {k} -> {n}, {tokens} tokens, rank {rank}"
                                found[card][name].append((what, launch))
    return found


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("card", CARDS)
def test_a_launch_fills_the_card(card, kernel, launches):
    units, low = CARDS[card].units, {}
    share = 0.5 if kernel == "segment_grads" else SHARE  # a part more of each segment may make a second wave
    assert launches[card][kernel]
    for what, launch in launches[card][kernel]:
        rows, columns = size_of(launch)
        programs = torch.Size(launch.grid).numel()
        if rows * columns >= SMALL and programs < share * units:
            low[f"{what}: [{rows}, {columns}]"] = programs
    assert not low, f"programs for {units} SMs: {low}"


@pytest.mark.parametrize("card", CARDS)
def test_sums_are_split_for_programs_alone(card, launches):
    """Each part costs bytes. So a sum has only as many parts as make MOST_SPLIT programs an SM, and none is empty."""
    units = CARDS[card].units
    for kernel in ("lora_shrink", "lora_grads"):
        for what, launch in launches[card][kernel]:
            others, parts, _ = launch.grid
            assert parts == 1 or others * (parts - 1) < MOST_SPLIT * units, (kernel, what, launch.grid)
            length, step = (launch.K, launch.k_chunk) if kernel == "lora_shrink" else (launch.M, launch.row_chunk)
            assert (parts - 1) * step < length <= parts * step, (kernel, what, launch.grid, step)


@pytest.mark.parametrize("card", CARDS)
def test_copies_are_in_flight(card, launches):
    """Two stages at least in the loops over large operands: while one tile is multiplied, the next one is on its way."""
    few = {}
    for kernel in ("lora_gemm", "lora_shrink", "lora_grads", "segment_gemm", "segment_shrink", "segment_grads"):
        for what, launch in launches[card][kernel]:
            if launch.options["num_stages"] < 2:
                few[f"{kernel}, {what}"] = launch.options["num_stages"]
    assert not few


@pytest.mark.parametrize("card", CARDS)
def test_products_take_tiles_in_groups(card, launches):
    """W's tiles are used by GROUP rows of tiles while they lie in L2; one launch of the TMA version takes all tiles in turn."""
    for what, launch in launches[card]["lora_gemm"]:
        rows, columns = size_of(launch)
        tiles = cdiv(rows, launch.BM) * cdiv(columns, launch.BN)
        assert 4 <= launch.GROUP <= 16, what
        persistent = launch.kernel == "lora_gemm_tma"
        assert persistent == (CARDS[card].name in ("sm_90", "sm_100")), what
        assert launch.grid[0] == (min(tiles, CARDS[card].units) if persistent else tiles), what
