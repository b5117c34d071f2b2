"""Cross-entropy of hidden states under an output head, without logits for more than a chunk of tokens at a time.

    z = c tanh(m (h W^T + b) / c);  loss = sum over tokens of logsumexp(z) - z[target]
    dh = m (1 - (z / c)^2) (softmax(z) - onehot) W                  m multiplier, c soft cap (infinite: none)

Loss and gradient are formed together, chunk by chunk, while the logits of the chunk are there. So logits are computed
once, and never held for more than a chunk of tokens (as in Wijmans et al., "Cut Your Losses", arXiv 2411.09009). Where
Triton runs, the chunk has the model's dtype, and one kernel turns it into its gradient in place: 8 bytes a logit move in
16-bit types (written and read by the products, read and written by the kernel). In plain torch the chunk is float32.

    where = labels != -100
    total = chunked_cross_entropy(hidden[where], head.weight, labels[where])
    (total / where.sum()).backward()

n tokens, H hidden, V vocabulary.
"""

from collections.abc import Sequence
from typing import Any

import torch

from ..kernels import dispatch, library_rows, torch_rows  # noqa: F401  # the second registers the operation
from ..kernels.autograd import once
from ..kernels.codes import Codes, Weight, dense

CHUNK_ELEMENTS = {"cpu": 1 << 25}  # logits held at once: 128 MiB in float32; an eighth of it takes 25 % longer
LEAST, MOST = 64 << 20, 512 << 20  # bytes of logits held at once on GPUs, so that the products stay large
SHARE = 4  # of a GPU's free memory, one part for logits
ALIGNED = 64  # columns: rows of a chunk start at multiples of it, for wide copies


def chunked_cross_entropy(
    hidden_nH: torch.Tensor,
    weight_VH: Weight,
    targets_n: torch.Tensor,
    bias_V: torch.Tensor | None = None,
    *,
    multiplier: float = 1.0,
    cap: float | None = None,
    backend: str = "auto",
    parts: Sequence[int] | None = None,
) -> torch.Tensor:
    """Returns the summed cross-entropy of n tokens, 0-d in float32, with gradients for hidden states, weight and bias; of
    `parts`, numbers of tokens that sum to n, the sum of each part [parts], with a gradient for hidden states alone.

    z = cap tanh(multiplier (hidden weight^T + bias) / cap). Every target must be a token's number (int64): leave ignored
    positions out before. `backend`: "auto", "torch" or "triton". A weight of codes (kernels/codes.py) is decoded a few thousand
    rows at a time, forward and for dh, and takes no gradient.

    Raises ValueError for shapes and dtypes that do not fit, and kernels.dispatch.UnsupportedError where `backend` cannot
    run.
    """
    if isinstance(weight_VH, Codes):
        weight_VH = weight_VH.to(hidden_nH.dtype)
    _check(hidden_nH, weight_VH, targets_n, bias_V)
    if parts is not None and (
        sum(parts) != len(hidden_nH) or any(p is not None and p.requires_grad for p in (weight_VH, bias_V))
    ):
        raise ValueError(
            f"chunked_cross_entropy: expected parts that sum to {len(hidden_nH)} tokens and a frozen weight, got {list(parts)}"
        )
    tensors: list[Any] = [hidden_nH, weight_VH, bias_V]
    if not torch.is_grad_enabled():  # which needs_input_grad does not tell
        tensors = [tensor.detach() if isinstance(tensor, torch.Tensor) else tensor for tensor in tensors]
    return _ChunkedCrossEntropy.apply(
        *tensors, targets_n, multiplier, cap, backend, None if parts is None else tuple(parts)
    )


def _check(h: torch.Tensor, w: Weight, targets: torch.Tensor, bias: torch.Tensor | None) -> None:
    fits = h.dim() == w.dim() == 2 and h.shape[1] == w.shape[1] and h.dtype == w.dtype
    if not fits:
        raise ValueError(
            "chunked_cross_entropy: expected hidden states [n, H] and a weight [V, H] of one dtype, got "
            f"{list(h.shape)} {h.dtype} and {list(w.shape)} {w.dtype}: flatten, transpose or cast them"
        )
    if targets.shape != h.shape[:1] or targets.dtype != torch.int64:
        raise ValueError(
            f"chunked_cross_entropy: expected int64 targets [{len(h)}], one for each hidden state, got "
            f"{targets.dtype} {list(targets.shape)}"
        )
    if bias is not None and bias.shape != w.shape[:1]:
        raise ValueError(f"chunked_cross_entropy: expected a bias [{len(w)}], got {list(bias.shape)}")


def chunk_bytes(device: torch.device) -> int:
    """Returns the bytes of logits to hold at once on a GPU: a fourth of its free memory, from 64 to 512 MiB.

    What torch's allocator holds unused counts as free. The size is a power of two: so small changes of what is free change
    no sum's order. While a CUDA graph is captured, it is the largest.
    """
    if device.type == "meta":  # an estimate of a card, see training/dry.py: what is taken where memory is scarce
        return LEAST
    if device.type != "cuda" or torch.cuda.is_current_stream_capturing():
        return MOST
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    free = torch.cuda.mem_get_info(device)[0] + unused
    return min(MOST, max(LEAST, 1 << (max(free // SHARE, 1).bit_length() - 1)))


def _rows(h_nH: torch.Tensor, vocabulary: int, size: int) -> int:
    """The tokens of a chunk, with `size` bytes a logit."""
    elements = CHUNK_ELEMENTS.get(h_nH.device.type) or chunk_bytes(h_nH.device) // size
    return max(1, min(len(h_nH), elements // vocabulary))


def _product(h: torch.Tensor, w_VH: Weight, bias_V: torch.Tensor | None, z: torch.Tensor) -> torch.Tensor:
    """h W^T + bias, in z's memory."""
    if isinstance(w_VH, Codes):
        for begin, end in w_VH.slices():
            part = torch.mm(h, dense(w_VH.rows(begin, end)).T)
            z[:, begin:end] = part if bias_V is None else part.add_(bias_V[begin:end])
        return z
    return torch.mm(h, w_VH.T, out=z) if bias_V is None else torch.addmm(bias_V, h, w_VH.T, out=z)


def _hidden_gradient(dz: torch.Tensor, w_VH: Weight, dh: torch.Tensor) -> None:
    """dz W, in dh's memory."""
    if isinstance(w_VH, Codes):
        total = torch.zeros_like(dh, dtype=torch.float32)  # a sum in 16 bits would be rounded at each slice
        for begin, end in w_VH.slices():
            total += dz[:, begin:end].contiguous() @ dense(w_VH.rows(begin, end))
        dh.copy_(total)
    else:
        torch.mm(dz, w_VH, out=dh)


class _ChunkedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, h_nH, w_VH, bias_V, targets_n, multiplier: float, cap: float | None, backend: str, parts):
        need_h, need_w, need_bias = ctx.needs_input_grad[:3]  # codes need none
        gradient = need_h or need_w or need_bias
        dh_nH = torch.empty_like(h_nH) if need_h else None
        dw_VH = torch.zeros_like(w_VH, dtype=torch.float32) if need_w else None
        dbias_V = torch.zeros_like(bias_V, dtype=torch.float32) if need_bias else None
        kernel = h_nH.device.type == "meta" or dispatch.runs_kernels(h_nH.device, h_nH.dtype, backend)
        vocabulary = len(w_VH)
        rows = _rows(h_nH, vocabulary, h_nH.element_size() if kernel else 4)
        padded = -(-vocabulary // ALIGNED) * ALIGNED if kernel else vocabulary
        z_nV = h_nH.new_empty(rows, padded)[:, :vocabulary]  # of every chunk: new memory costs as much as a pass
        wide_nV = z_nV if kernel or h_nH.dtype == torch.float32 else torch.empty_like(z_nV, dtype=torch.float32)
        total = h_nH.new_zeros((), dtype=torch.float32)
        each: list[torch.Tensor] = []  # the tokens' losses, where parts are asked for
        for begin in range(0, len(h_nH), rows):
            h, targets = h_nH[begin : begin + rows], targets_n[begin : begin + rows]
            z = z_nV[: len(h)]
            if kernel:
                low = dz = _product(h, w_VH, None, z)
                losses = torch.ops.plopfast.cross_entropy_(z, targets, bias_V, multiplier, cap, gradient, backend)
            else:
                _product(h, w_VH, bias_V, z)
                wide = z if z_nV is wide_nV else wide_nV[: len(h)].copy_(z)
                losses, dz = torch_rows.cross_entropy(wide, targets, multiplier=multiplier, cap=cap, gradient=gradient)
                low = dz if dz.dtype == h.dtype else z.copy_(dz)
            if parts is None:
                total += losses.sum()
            else:
                each.append(losses)
            if dh_nH is not None:
                _hidden_gradient(low, w_VH, dh_nH[begin : begin + rows])
            if dw_VH is not None:
                dw_VH += low.T @ h
            if dbias_V is not None:
                dbias_V += dz.sum(0, dtype=torch.float32)
        ctx.save_for_backward(dh_nH, dw_VH, dbias_V)
        ctx.parts = parts
        if parts is None:
            return total
        return torch.stack(
            [part.sum() for part in torch.cat([h_nH.new_empty(0, dtype=torch.float32), *each]).split(parts)]
        )

    @staticmethod
    @once
    def backward(ctx: Any, d_total):
        dh_nH, dw_VH, dbias_V = ctx.saved_tensors
        if ctx.parts is not None:
            d_n1 = torch.cat([d.expand(n) for d, n in zip(d_total.unbind(), ctx.parts, strict=True)])[:, None]
            return None if dh_nH is None else (dh_nH * d_n1).to(dh_nH.dtype), *[None] * 7
        return *(None if g is None else g * d_total for g in (dh_nH, dw_VH, dbias_V)), *[None] * 5
