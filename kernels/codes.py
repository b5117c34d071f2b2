"""Frozen weights kept as codes: NF4, int8 and fp8. They stand for W [N, K] in products, which decode them just before.

A decoded W lies in a workspace that the next one overwrites. So it must be used up at once, and autograd must not save it:
functions keep the codes and decode again in the backward pass, which costs one read of the codes and one write of W.

N out, K in.
"""

import contextlib
import copy
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any, ClassVar

import torch

from . import dispatch, torch_codes

FEW = 64  # tokens: one tile of lora_gemm_nf4's rows
SLICE = 1 << 24  # elements of W that are decoded at a time where all of it is not needed at once


class Codes:
    """A matrix W [N, K] of one of the kinds below, with what callers ask of a frozen tensor. `dtype` is that of products."""

    kind: ClassVar[str]
    requires_grad = False

    def __init__(self, tensors: Sequence[torch.Tensor], shape: Sequence[int], dtype: torch.dtype) -> None:
        n_out, n_in = shape
        self.tensors, self.shape, self.dtype = tuple(tensors), (n_out, n_in), dtype

    @property
    def device(self) -> torch.device:
        return self.tensors[0].device

    @property
    def nbytes(self) -> int:
        """The bytes of codes and scales."""
        return sum(tensor.nbytes for tensor in self.tensors)

    def dim(self) -> int:
        return 2

    def __len__(self) -> int:
        return self.shape[0]

    def stride(self) -> tuple[int, int]:
        """That of the decoded matrix."""
        return self.shape[1], 1

    def to(self, dtype: torch.dtype) -> "Codes":
        """The same codes for products in another dtype."""
        if dtype == self.dtype:
            return self
        other = copy.copy(self)
        other.dtype = dtype
        return other

    def held(self) -> "Weight":
        """What a product reads now: the codes themselves. A weight that lies elsewhere, and is brought here only while it is
        needed, gives views of where it is at this moment, which must not be kept."""
        return self

    def rows(self, begin: int, end: int) -> "Codes":
        """W[begin:end]; `begin` is a multiple of 128, or with NF4 of any number of rows that fill whole blocks."""
        raise NotImplementedError

    def decode(self, out: torch.Tensor) -> torch.Tensor:
        """Writes W into `out` [N, K], contiguous and of a floating dtype, and returns it."""
        raise NotImplementedError

    def new(self) -> torch.Tensor:
        """W [N, K] in memory of its own. It works on tensors without values and in torch.compile, too."""
        raise NotImplementedError

    def slices(self) -> list[tuple[int, int]]:
        """Ranges of rows that cover W, of about `SLICE` elements each."""
        n_out, n_in = self.shape
        step = max(128, SLICE // max(n_in, 1) // 128 * 128)
        return [(begin, min(begin + step, n_out)) for begin in range(0, n_out, step)]

    def frobenius(self) -> torch.Tensor:
        """||W||_F, 0-d float32, summed in float64; W is never whole in memory."""
        total = torch.zeros((), dtype=torch.float64, device=self.device)
        for begin, end in self.slices():
            total += dense(self.to(torch.float32).rows(begin, end)).square().sum(dtype=torch.float64)
        return total.sqrt().float()


class NF4(Codes):
    """4-bit NormalFloat (Dettmers et al., QLoRA, arXiv 2305.14314), in bitsandbytes' layout.

    `packed`, uint8 of N K / 2 bytes, holds two elements a byte, the first one in the high half. 64 elements in a row, across
    the ends of W's rows, share one of `absmax`: float32, or uint8 with `nested`: (code [256], the absmax of 256 absmax, offset).
    """

    kind = "nf4"

    def __init__(
        self,
        packed: torch.Tensor,
        absmax: torch.Tensor,
        shape: Sequence[int],
        dtype: torch.dtype,
        nested: tuple[torch.Tensor, torch.Tensor, float] | None = None,
    ) -> None:
        super().__init__((packed, absmax, *(nested[:2] if nested else ())), shape, dtype)
        self.packed, self.absmax, self.nested = packed, absmax, nested

    def scales(self) -> torch.Tensor:
        """absmax [blocks] in float32."""
        return self.absmax if self.nested is None else torch_codes.nested_scales(self.absmax, *self.nested)

    def rows(self, begin: int, end: int) -> "NF4":
        n_in = self.shape[1]
        first, last = begin * n_in, end * n_in
        packed = self.packed.view(-1)[first // 2 : -(-last // 2)]
        absmax = self.scales()[first // torch_codes.BLOCK : -(-last // torch_codes.BLOCK)]
        return NF4(packed, absmax, (end - begin, n_in), self.dtype)

    def decode(self, out: torch.Tensor) -> torch.Tensor:
        if dispatch.runs_kernels(out.device, out.dtype):
            from . import nf4_ops  # only where it can run

            return nf4_ops.decode(self.packed, self.absmax, self.nested, out)
        return torch_codes.decode_nf4(self.packed, self.scales(), out)

    def new(self) -> torch.Tensor:
        nested = (None, None, 0.0) if self.nested is None else self.nested
        return torch.ops.plopfast.decode_nf4(self.packed, self.absmax, *nested, *self.shape, self.dtype)


class Scaled(Codes):
    """`codes` [N, K], int8 or float8_e4m3fn, times `scale`, float32, one for each `block` of rows and columns.

    int8 has one for a row, as LLM.int8 (Dettmers et al., arXiv 2208.07339); fp8 as a rule one for 128 x 128 elements.
    """

    def __init__(
        self, codes: torch.Tensor, scale: torch.Tensor, block: tuple[int, int], shape: Sequence[int], dtype: torch.dtype
    ) -> None:
        super().__init__((codes, scale), shape, dtype)
        self.codes, self.scale, self.block = codes, scale, block

    @property
    def kind(self) -> str:  # type: ignore[override]
        return "int8" if self.codes.dtype == torch.int8 else "fp8"

    def rows(self, begin: int, end: int) -> "Scaled":
        high = self.block[0]
        if begin % high:  # blocks of more than 128 rows
            each = torch.arange(begin, end, device=self.device) // high
            return Scaled(
                self.codes[begin:end], self.scale[each], (1, self.block[1]), (end - begin, self.shape[1]), self.dtype
            )
        scale = self.scale[begin // high : -(-end // high)]
        return Scaled(self.codes[begin:end], scale, self.block, (end - begin, self.shape[1]), self.dtype)

    def decode(self, out: torch.Tensor) -> torch.Tensor:
        if dispatch.runs_kernels(out.device, out.dtype):
            from . import scaled_ops

            return scaled_ops.decode(self.codes, self.scale, self.block, out)
        return torch_codes.decode_scaled(self.codes, self.scale, self.block, out)

    def new(self) -> torch.Tensor:
        return torch.ops.plopfast.decode_scaled(self.codes, self.scale, *self.block, self.dtype)


class Stack:
    """The matrices W_e [N, K] of `count` experts, whose rows lie one after the other in `codes` [E N, K]; as [K, N] if `turned`.

    With NF4 an expert begins with a block: N K is a multiple of 64.
    """

    def __init__(self, codes: Codes, count: int, turned: bool = False) -> None:
        self.codes, self.count, self.turned = codes, count, turned

    @property
    def shape(self) -> tuple[int, int, int]:
        n_out, n_in = self.codes.shape[0] // self.count, self.codes.shape[1]
        return (self.count, n_in, n_out) if self.turned else (self.count, n_out, n_in)

    @property
    def dtype(self) -> torch.dtype:
        return self.codes.dtype

    @property
    def device(self) -> torch.device:
        return self.codes.device

    @property
    def is_real(self) -> bool:
        """Whether it has values, now."""
        return _is_real(self.codes.tensors[0])

    def transpose(self, one: int, other: int) -> "Stack":
        """The same with [K, N] for each."""
        assert (one, other) == (1, 2)
        return Stack(self.codes, self.count, not self.turned)

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[torch.Tensor]:
        return (self[expert] for expert in range(self.count))

    def __getitem__(self, expert: int) -> torch.Tensor:
        """One of them, for a product that is made at once."""
        n_out = self.codes.shape[0] // self.count
        w_NK = dense(self.codes.rows(expert * n_out, (expert + 1) * n_out))
        return w_NK.T if self.turned else w_NK

    def dense(self) -> torch.Tensor:
        """All of them, for a product that is made at once."""
        w_ENK = dense(self.codes).view(self.count, -1, self.codes.shape[1])
        return w_ENK.transpose(1, 2) if self.turned else w_ENK


Weight = torch.Tensor | Codes
_KEPT: dict[tuple[Any, ...], torch.Tensor] = {}  # workspaces, by device, stream and thread
_NOTED: Callable[[torch.Tensor], None] | None = None  # see `one_workspace`


def dense(weight: Weight) -> torch.Tensor:
    """W [N, K] for a product that is made at once: a tensor as it is, codes decoded into the workspace."""
    if isinstance(weight, torch.Tensor):
        return weight
    weight = weight.held()
    if isinstance(weight, torch.Tensor):
        return weight
    first = weight.tensors[0]
    if not _is_real(first):
        if _NOTED is None:
            return weight.new()
        with torch.no_grad():
            return _workspace(first.device, weight.dtype, weight.shape)
    with torch.no_grad():
        return weight.decode(_workspace(first.device, weight.dtype, weight.shape))


def _is_real(tensor: torch.Tensor) -> bool:
    """Whether it has values, now."""
    real = type(tensor) in (torch.Tensor, torch.nn.Parameter) and tensor.device.type != "meta"
    return real and not torch.compiler.is_compiling()


def _workspace(device: torch.device, dtype: torch.dtype, shape: tuple[int, int]) -> torch.Tensor:
    """The start of a buffer that grows to the largest W. Work on one stream comes in order, so it can be used again."""
    on_gpu = device.type == "cuda"
    if on_gpu and torch.cuda.is_current_stream_capturing():
        return torch.empty(shape, dtype=dtype, device=device)  # it belongs to the graph
    count = shape[0] * shape[1] * dtype.itemsize
    key = (device, torch.cuda.current_stream(device).cuda_stream if on_gpu else threading.get_ident())
    kept = _KEPT.get(key)
    if kept is None or kept.numel() < count:
        kept = _KEPT[key] = torch.empty(0)  # frees the smaller one first
        kept = _KEPT[key] = torch.empty(count, dtype=torch.uint8, device=device)
        if _NOTED is not None:
            _NOTED(kept)
    return kept[:count].view(dtype).view(shape)


@contextlib.contextmanager
def one_workspace(noted: Callable[[torch.Tensor], None]) -> Iterator[None]:
    """While it lasts, codes without values are decoded into one workspace for each device too, as those with values are: for
    who counts bytes. `noted` is called for each buffer that is made."""
    global _KEPT, _NOTED
    before, _KEPT, _NOTED = (_KEPT, _NOTED), {}, noted
    try:
        yield
    finally:
        _KEPT, _NOTED = before


def free_workspaces() -> None:
    """Gives the workspaces' memory back."""
    _KEPT.clear()


def few(x_MK: torch.Tensor, weight: Weight) -> bool:
    """Whether a kernel decodes W inside the product: for so few tokens that W would be written and read for one tile of Y."""
    fits = isinstance(weight, NF4) and x_MK.shape[0] <= FEW and not weight.shape[1] % torch_codes.BLOCK
    return fits and _is_real(x_MK) and dispatch.runs_kernels(x_MK.device, x_MK.dtype)


def linear_of_few(
    x_MK: torch.Tensor,
    weight: Weight,
    bias_N: torch.Tensor | None,
    s_MR: torch.Tensor | None = None,
    b_NR: torch.Tensor | None = None,
) -> torch.Tensor:
    """Y = X W^T + S B^T + bias [M, N], where `few(x, weight)`."""
    from . import nf4_ops

    assert isinstance(weight, NF4)
    return nf4_ops.gemm(x_MK, weight.packed, weight.absmax, weight.nested, weight.shape[0], s_MR, b_NR, bias_N)


def linear(x_MK: torch.Tensor, weight: Weight, bias_N: torch.Tensor | None) -> torch.Tensor:
    """Y = X W^T + bias [M, N]"""
    weight = weight if isinstance(weight, torch.Tensor) else weight.held()
    if few(x_MK, weight):
        return linear_of_few(x_MK, weight, bias_N)
    return torch.nn.functional.linear(x_MK, dense(weight), bias_N)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_MK: torch.Tensor, weight: Codes, bias_N: torch.Tensor | None) -> torch.Tensor:
        ctx.weight = weight
        return linear(x_MK, weight, bias_N)

    @staticmethod
    def backward(ctx: Any, dy_MN: torch.Tensor) -> tuple[torch.Tensor | None, None, None]:
        return dy_MN @ dense(ctx.weight) if ctx.needs_input_grad[0] else None, None, None


def frozen_linear(x: torch.Tensor, weight: Codes, bias: torch.Tensor | None = None) -> torch.Tensor:
    """x W^T + bias with a gradient for x alone: x [..., K] of a floating dtype -> [..., N] in x's dtype.

    Nothing but the codes is kept for the backward pass. Under autocast everything is computed in the autocast dtype.
    """
    kind = x.device.type
    if kind != "meta" and torch.is_autocast_enabled(kind):  # which raises for meta, where tools trace
        x = x.to(torch.get_autocast_dtype(kind))
        with torch.autocast(kind, enabled=False):
            return frozen_linear(x, weight, bias)
    bias = bias if bias is None else bias.to(x.dtype)
    x_MK = (x if x.dim() == 2 else x.reshape(-1, x.shape[-1])).contiguous()
    y = _Linear.apply(x_MK, weight.to(x.dtype), bias)
    return y if x.dim() == 2 else y.view(*x.shape[:-1], weight.shape[0])
