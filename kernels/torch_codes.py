"""Codes of quantised weights in plain torch: how they are made and read. The formats are described in codes.py.

NF4 is read by one gather of 8 bytes (two float32 levels) for each byte of codes, and fp8 by one for each two: on a CPU torch's
own conversion of fp8 takes 10 times as long, and a gather of rows of two levels 3 times. NF4 is made with a table of 256 equal cells of [-1, 1]: a cell
holds at most one of the 15 midpoints between levels, so a comparison with that midpoint decides, as a search would.
"""

import functools
import math
import sys

import torch

LEVELS = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
BLOCK = 64  # elements that share an absmax
NESTED = 256  # absmax that share one of their own
CHUNK = 1 << 18  # elements at a time: intermediate results then stay in the cache of a CPU
CELLS = 256
E4M3 = torch.float8_e4m3fn
MOST_E4M3 = 448.0


@functools.cache
def _pairs(device: torch.device) -> torch.Tensor:
    """For each byte its two levels, float32, seen as one float64: one element to gather, whose bits are copied."""
    levels, byte = torch.tensor(LEVELS), torch.arange(256)
    return torch.stack([levels[byte >> 4], levels[byte & 15]], 1).view(torch.float64).view(-1).to(device)


@functools.cache
def _e4m3(device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """The float32 value of each byte, and for each two bytes their two, seen as one float64."""
    one = torch.arange(256).to(torch.uint8).view(E4M3).float()
    two = torch.arange(1 << 16)
    return one.to(device), torch.stack([one[two & 255], one[two >> 8]], 1).view(torch.float64).view(-1).to(device)


@functools.cache
def _cells(device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """For each cell, the code at its left end, and the midpoint inside it (infinite: none)."""
    levels = torch.tensor(LEVELS)
    midpoints = (levels[1:] + levels[:-1]) / 2
    inside = ((midpoints + 1) * (CELLS / 2)).int()
    first = (inside[None] < torch.arange(CELLS + 1)[:, None]).sum(1).to(torch.uint8)
    midpoint = torch.full((CELLS + 1,), math.inf)
    midpoint[inside.long()] = midpoints
    return first.to(device), midpoint.to(device)


def decode_nf4(packed: torch.Tensor, absmax: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    """Writes level x absmax, multiplied in float32 and rounded once, into `out` (contiguous), and returns it."""
    packed, flat = packed.reshape(-1), out.view(-1)
    count = flat.numel()
    wide = None if out.dtype == torch.float32 and count % 2 == 0 else flat.new_empty(CHUNK, dtype=torch.float32)
    pairs, indices = _pairs(out.device), torch.empty(CHUNK // 2, dtype=torch.int32, device=out.device)
    for begin in range(0, count, CHUNK):
        end = min(begin + CHUNK, count)
        index = indices[: -(-(end - begin) // 2)].copy_(packed[begin // 2 : -(-end // 2)])
        values = flat[begin:end] if wide is None else wide[: 2 * len(index)]
        torch.index_select(pairs, 0, index, out=values.view(torch.float64))
        values, scale = values[: end - begin], absmax[begin // BLOCK : -(-end // BLOCK)]
        whole = len(values) // BLOCK * BLOCK
        values[:whole].view(-1, BLOCK).mul_(scale[: whole // BLOCK, None])
        if whole < len(values):
            values[whole:].mul_(scale[-1])
        if wide is not None:
            flat[begin:end] = values
    return out


def encode_nf4(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(codes, absmax) of W [N, K], as bitsandbytes makes them: uint8 [ceil(N K / 2), 1] and float32 [ceil(N K / 64)]."""
    flat = weight.detach().reshape(-1)
    count, first, midpoint = flat.numel(), *_cells(flat.device)
    packed = torch.empty(-(-count // 2), dtype=torch.uint8, device=flat.device)
    absmax = torch.empty(-(-count // BLOCK), dtype=torch.float32, device=flat.device)
    for begin in range(0, count, CHUNK):
        values = flat[begin : begin + CHUNK].float()
        size = len(values)
        if size % BLOCK:
            values = torch.nn.functional.pad(values, (0, BLOCK - size % BLOCK))
        blocks = values.view(-1, BLOCK)
        largest = torch.linalg.vector_norm(blocks, ord=math.inf, dim=1)
        absmax[begin // BLOCK :][: len(largest)] = largest
        scaled = blocks.mul(largest.clamp_min(1e-38).reciprocal_()[:, None]).clamp_(-1, 1).view(-1)
        cell = scaled.add(1).mul_(CELLS / 2).int()
        codes = torch.index_select(first, 0, cell).add_(scaled > torch.index_select(midpoint, 0, cell))
        packed[begin // 2 :][: -(-size // 2)] = ((codes[::2] << 4) | codes[1::2])[: -(-size // 2)]
    return packed.view(-1, 1), absmax


def nested_scales(codes: torch.Tensor, code: torch.Tensor, absmax: torch.Tensor, offset: float) -> torch.Tensor:
    """The float32 absmax [blocks] of uint8 ones: code[codes] x their own absmax + offset."""
    index = codes.reshape(-1).int()
    scales = torch.index_select(code, 0, index)
    return scales.mul_(absmax.repeat_interleave(NESTED)[: len(scales)]).add_(offset)


def nest(absmax: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, float]:
    """(codes, code, absmax of absmax, offset): absmax [blocks] in 8 bits, by the nearest value of `dynamic_code`."""
    offset = absmax.mean().item() if absmax.numel() else 0.0
    centred = absmax - offset
    padded = torch.nn.functional.pad(centred, (0, -len(centred) % NESTED)).view(-1, NESTED)
    largest = padded.abs().amax(1)
    scaled = (padded / largest.clamp_min(1e-38)[:, None]).view(-1)[: len(absmax)]
    code = dynamic_code(absmax.device)
    return torch.bucketize(scaled, (code[1:] + code[:-1]) / 2).to(torch.uint8), code, largest, offset


@functools.cache
def dynamic_code(device: torch.device) -> torch.Tensor:
    """The 256 values of bitsandbytes' signed dynamic map, sorted (Dettmers, arXiv 1511.04561): a sign, an exponent of 10,
    written in unary, and a linear fraction of the bits that are left."""
    values = [0.0, 1.0]
    for exponent in range(7):
        edges = torch.linspace(0.1, 1, 2**exponent + 1, dtype=torch.float32)
        means = (10 ** (exponent - 6)) * ((edges[:-1] + edges[1:]) / 2)
        values += [*means.tolist(), *(-means).tolist()]
    return torch.tensor(sorted(values), dtype=torch.float32).to(device)


def decode_scaled(codes: torch.Tensor, scale: torch.Tensor, block: tuple[int, int], out: torch.Tensor) -> torch.Tensor:
    """Writes codes x scale, multiplied in float32 and rounded once, into `out` [N, K], and returns it."""
    high, wide = block
    n_out, n_in = out.shape
    step = max(1, CHUNK // max(n_in, 1) // high) * high
    for begin in range(0, n_out, step):
        end = min(begin + step, n_out)
        values = _values(codes[begin:end])
        factor = scale[begin // high : -(-end // high)].repeat_interleave(high, 0)[: end - begin]
        if wide < n_in:
            factor = factor.repeat_interleave(wide, 1)[:, :n_in]
        torch.mul(values, factor, out=values)
        out[begin:end] = values
    return out


def _values(codes: torch.Tensor) -> torch.Tensor:
    """int8 or fp8 codes as float32."""
    if codes.dtype == torch.int8:
        return codes.float()
    single, pairs = _e4m3(codes.device)
    codes = codes.contiguous().view(torch.uint8)
    if codes.shape[1] % 2 or codes.storage_offset() % 2 or sys.byteorder == "big":
        return torch.index_select(single, 0, codes.view(-1).int()).view(codes.shape)
    index = codes.view(torch.uint16).view(-1).int()  # half the gathers
    return torch.index_select(pairs, 0, index).view(torch.float32).view(codes.shape)


def encode_int8(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(codes int8 [N, K], scale float32 [N, 1]): the nearest of 255 multiples of absmax / 127 of each row."""
    codes = torch.empty(weight.shape, dtype=torch.int8, device=weight.device)
    scale = torch.empty(len(weight), 1, device=weight.device)
    for begin, part in _parts(weight, 1):
        values = part.float()
        largest = values.abs().amax(1, keepdim=True)
        codes[begin : begin + len(part)] = (values * (127.0 / largest.clamp_min(1e-30))).round_()
        scale[begin : begin + len(part)] = largest / 127.0
    return codes, scale


def encode_fp8(weight: torch.Tensor, block: tuple[int, int] = (128, 128)) -> tuple[torch.Tensor, torch.Tensor]:
    """(codes float8_e4m3fn [N, K], scale float32 of each block): the largest value of a block becomes 448."""
    high, wide = block
    n_out, n_in = weight.shape
    codes = torch.empty(weight.shape, dtype=E4M3, device=weight.device)
    scale = torch.empty(-(-n_out // high), -(-n_in // wide), device=weight.device)
    for begin, part in _parts(weight, high):
        rows = len(part)
        values = torch.nn.functional.pad(part.float(), (0, -n_in % wide, 0, -rows % high))
        blocks = values.view(-1, high, values.shape[1] // wide, wide)
        largest = blocks.abs().amax((1, 3)).clamp_min(1e-30) / MOST_E4M3
        scale[begin // high :][: len(largest)] = largest
        values = (blocks / largest[:, None, :, None]).view(-1, values.shape[1])[:rows, :n_in]
        codes[begin : begin + rows] = values.clamp_(-MOST_E4M3, MOST_E4M3).to(E4M3)
    return codes, scale


def _parts(weight: torch.Tensor, high: int) -> list[tuple[int, torch.Tensor]]:
    """(first row, rows) of W, in parts of about CHUNK elements and a multiple of `high` rows."""
    weight = weight.detach()
    step = max(1, CHUNK // max(weight.shape[1], 1) // high) * high
    return [(begin, weight[begin : begin + step]) for begin in range(0, len(weight), step)]
