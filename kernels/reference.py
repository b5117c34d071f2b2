"""The specification of every op in float64. Each backend is tested against it, by the rule of accuracy.py.

M tokens, K in, N out, R rank; s scaling; keep_MK the dropout mask and q = 1 / (1 - p).
"""

import torch


def dropped(x_MK: torch.Tensor, keep_MK: torch.Tensor | None, q: float) -> torch.Tensor:
    return x_MK.double() if keep_MK is None else x_MK.double() * keep_MK * q


def lora_linear(x_MK, w_NK, a_RK, b_NR, s, bias_N=None, keep_MK=None, q=1.0) -> torch.Tensor:
    """Y = X W^T + s (drop(X) A^T) B^T + bias"""
    y_MN = x_MK.double() @ w_NK.double().T + s * (dropped(x_MK, keep_MK, q) @ a_RK.double().T) @ b_NR.double().T
    return y_MN if bias_N is None else y_MN + bias_N.double()


def lora_linear_grads(dy_MN, x_MK, w_NK, a_RK, b_NR, s, keep_MK=None, q=1.0) -> dict[str, torch.Tensor]:
    """dS = s dY B;  dB = s dY^T S;  dA = dS^T drop(X);  dX = dY W + mask (dS A) / (1 - p)"""
    dy_MN, x_drop_MK = dy_MN.double(), dropped(x_MK, keep_MK, q)
    ds_MR = s * dy_MN @ b_NR.double()
    return {
        "x": dy_MN @ w_NK.double() + dropped(ds_MR @ a_RK.double(), keep_MK, q),
        "lora_A": ds_MR.T @ x_drop_MK,
        "lora_B": s * dy_MN.T @ (x_drop_MK @ a_RK.double().T),
        "bias": dy_MN.sum(0),
    }


def nfn(x_MK, w_NK) -> torch.Tensor:
    """NFN per token, [M]: ||W x|| / (||x|| ||W||_F / sqrt(K)), arXiv 2506.20629 with the closed-form baseline."""
    x_MK, w_NK = x_MK.double(), w_NK.double()
    return (x_MK @ w_NK.T).norm(dim=1) / (x_MK.norm(dim=1) * w_NK.norm() / w_NK.shape[1] ** 0.5)


def rotary(x_BHTD, cos_BTP, sin_BTP, interleaved=False) -> torch.Tensor:
    """y = x cos + turned(x) sin on the first P columns of each head; `turned` makes (-b, a) of each pair (a, b).

    Pairs are (d, d + P / 2), or neighbours if `interleaved`. The gradient is autograd's.
    """
    width = cos_BTP.shape[-1]
    x_BHTD, cos, sin = (one.double() for one in (x_BHTD, cos_BTP.unsqueeze(1), sin_BTP.unsqueeze(1)))
    x, rest = x_BHTD[..., :width], x_BHTD[..., width:]
    if interleaved:
        turned = torch.stack([-x[..., 1::2], x[..., ::2]], -1).flatten(-2)
    else:
        turned = torch.cat([-x[..., width // 2 :], x[..., : width // 2]], -1)
    return torch.cat([x * cos + turned * sin, rest], -1)


def cross_entropy(z_nV, targets_n, bias_V=None, multiplier=1.0, cap=None) -> torch.Tensor:
    """logsumexp(z') - z'[target] per row, z' = cap tanh(multiplier (z + bias) / cap). The gradient is autograd's."""
    z_nV = (z_nV.double() + (0 if bias_V is None else bias_V.double())) * multiplier
    z_nV = z_nV if cap is None else cap * (z_nV / cap).tanh()
    return z_nV.logsumexp(-1) - z_nV.gather(1, targets_n[:, None])[:, 0]
