"""DoRA: LoRA gives the direction of each row of the weight, and its length is trained (Liu et al., arXiv 2402.09353).

    y = g (W x + s B A x) + bias,   g = m / ||W + s B A||, row by row

The norm has no gradient (the paper's section 4.3), so g is linear in m. It takes no [N, K] matrix, only one product of R rows:

    ||W_n + s B_n A||^2 = ||W_n||^2 + 2 s (W A^T)_n . B_n + s^2 B_n (A A^T) . B_n

So all that computes LoRA computes DoRA too. With dropout PEFT drops elements of x before W as well, here A alone sees them.
"""

import torch

from ..kernels.codes import Weight, linear
from ..models.frozen import FrozenWeight

TINY = 1e-30  # the length of a row of zeros, whose magnitude is 0


@torch.no_grad()
def squares(frozen: FrozenWeight) -> torch.Tensor:
    """||W_n||^2 [N] in float32 (float64 for float64)."""
    return torch.ops.plopfast.row_norms(frozen.dequantize(), None, "auto").square()


@torch.no_grad()
def lengths(
    weight: Weight, squares_N: torch.Tensor, a_RK: torch.Tensor, b_NR: torch.Tensor, scaling: float
) -> torch.Tensor:
    """||W + s B A|| of each row [N], in the dtype of `squares_N`."""
    low = a_RK.to(weight.dtype)
    wa_RN = linear(low, weight, None)
    a, b = a_RK.to(squares_N.dtype), b_NR.to(squares_N.dtype)
    cross = (wa_RN.T.to(squares_N.dtype) * b).sum(1)
    own = ((b @ (a @ a.T)) * b).sum(1)
    return (squares_N + 2 * scaling * cross + scaling**2 * own).clamp_min_(0).sqrt_().clamp_min_(TINY)


def scaled(
    y: torch.Tensor, magnitude_N: torch.Tensor, lengths_N: torch.Tensor, bias_N: torch.Tensor | None
) -> torch.Tensor:
    """g y + bias, for y = W x + s B A x [..., N]."""
    y = y * (magnitude_N / lengths_N).to(y.dtype)
    return y if bias_N is None else y + bias_N
