"""Operands and yardsticks that the tests of the kernels share.

M tokens, K in, N out, R rank.
"""

from types import SimpleNamespace

import torch

from plopfast.kernels import dispatch, philox

DEVICE = torch.device("cpu" if dispatch.interpreting() else "cuda")
LONG = (1 << 31) + 48
HALF = (1 << 30) + 16  # twice that is beyond 2^31
FP32, FP16, BF16 = torch.float32, torch.float16, torch.bfloat16


def view(value, layout):
    """Copies `value` into a view of the given layout, inside a buffer of NaN so that a read outside the view shows.

    "aligned": rows start at multiples of 16 elements. "odd": every second row of a buffer, starting anywhere. "columns":
    the transpose of an aligned buffer. "sparse": no stride is 1.
    """
    if layout == "dense":
        return value
    if layout == "columns":
        return view(value.T, "aligned").T
    if value.dim() == 1:
        buffer = value.new_full((value.shape[0] + 5,), float("nan"))
        return buffer[3:-2].copy_(value)
    rows, columns = value.shape
    if layout == "aligned":
        buffer = value.new_full((rows + 2, -(-columns // 16) * 16 + 32), float("nan"))
        return buffer[1 : 1 + rows, 16 : 16 + columns].copy_(value)
    if layout == "odd":
        buffer = value.new_full((2 * rows + 3, columns + 5), float("nan"))
        return buffer[1 : 1 + 2 * rows : 2, 3 : 3 + columns].copy_(value)
    assert layout == "sparse"
    buffer = value.new_full((2 * rows + 3, 3 * columns + 5), float("nan"))
    return buffer[1 : 1 + 2 * rows : 2, 2 : 2 + 3 * columns : 3].copy_(value)


def far(value, stride):
    """Copies `value` into rows that are `stride` elements apart. Memory that nothing touches is neither backed nor filled."""
    if dispatch.interpreting():
        from interpreter import far_apart

        return far_apart(value.shape, (stride, 1), value.dtype).copy_(value)
    buffer = torch.empty((value.shape[0] - 1) * stride + value.shape[1], dtype=value.dtype, device=value.device)
    return buffer.as_strided(value.shape, (stride, 1)).copy_(value)


FAR = (1 << 29) + 16  # elements from row to row: it fits an int32, as does a row's number, but their product doesn't


def normal(*shape, dtype=FP32, scale=1.0, seed=0, layout="dense"):
    """Random numbers, the same on every device."""
    generator = torch.Generator().manual_seed(seed)
    value = (torch.randn(*shape, generator=generator) * scale).to(dtype).to(DEVICE)
    return view(value, layout)


def operands(m, n, k, r, dtype=FP32, adapter_dtype=None, layout="dense"):
    """All tensors of one LoRA linear and of its backward pass. `adapter_dtype` is that of A and B."""
    wide = adapter_dtype or dtype
    return SimpleNamespace(
        x=normal(m, k, dtype=dtype, seed=1, layout=layout),
        w=normal(n, k, dtype=dtype, scale=max(k, 1) ** -0.5, seed=2, layout=layout),
        a=normal(r, k, dtype=wide, scale=max(k, 1) ** -0.5, seed=3, layout=layout),
        b=normal(n, r, dtype=wide, scale=r**-0.5, seed=4, layout=layout),
        s=normal(m, r, dtype=dtype, seed=5, layout="dense" if layout == "dense" else "odd"),
        dy=normal(m, n, dtype=dtype, scale=max(n, 1) ** -0.5, seed=6, layout=layout),
        bias=normal(n, dtype=dtype, seed=7, layout="dense" if layout == "dense" else "odd"),
    )


def keep_of(p, seed, rows, columns):
    """The mask and 1 / (1 - p), or None and 1."""
    return (philox.keep_mask(seed, rows, columns, p, DEVICE), philox.inverse_keep(p)) if p else (None, 1.0)


def product(*matrices):
    """torch's own product in the operands' dtype. On the CPU, its bfloat16 products need dense operands."""
    left, right = (matrix.contiguous() for matrix in matrices)
    return left @ right


def name_of(value):
    """A short id of a parametrised case."""
    if isinstance(value, tuple):
        return " ".join(map(name_of, value))
    return str(value).removeprefix("torch.")
