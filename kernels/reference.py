"""The specification of every op in float64. Each backend is tested against it, by the rule of accuracy.py.

M tokens, K in, N out, R rank; s scaling; keep_MK the dropout mask and q = 1 / (1 - p).
"""

import math

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


def segments(x_SK, w_ENK, a_ERK, b_ENR, ends, s) -> torch.Tensor:
    """lora_linear by segments: rows up to ends[e] have the weights of e"""
    starts = [0, *ends]
    of = [
        lora_linear(x_SK[i:j], w_ENK[e], a_ERK[e], b_ENR[e], s)
        for e, (i, j) in enumerate(zip(starts, ends, strict=False))
    ]
    return torch.cat(of)


def nfn(x_MK, w_NK) -> torch.Tensor:
    """NFN per token, [M]: ||W x|| / (||x|| ||W||_F / sqrt(K)), arXiv 2506.20629 with the closed-form baseline."""
    x_MK, w_NK = x_MK.double(), w_NK.double()
    return (x_MK @ w_NK.T).norm(dim=1) / (x_MK.norm(dim=1) * w_NK.norm() / w_NK.shape[1] ** 0.5)


def rms_norm(x_MK, w_K=None, eps=0.0, offset=False) -> torch.Tensor:
    """y = w x / rms(x), rms(x)^2 = mean(x^2) + eps; 1 + w in place of w if `offset`."""
    x_MK = x_MK.double()
    x_hat_MK = x_MK * (x_MK.square().mean(-1, keepdim=True) + eps).rsqrt()
    return x_hat_MK if w_K is None else x_hat_MK * (w_K.double() + offset)


def rms_norm_grad(dy_MK, x_MK, w_K=None, eps=0.0, offset=False) -> torch.Tensor:
    """dx = (g - x_hat mean(g x_hat)) / rms(x),   g = w dy"""
    g_MK = dy_MK.double() if w_K is None else dy_MK.double() * (w_K.double() + offset)
    rstd_M1 = (x_MK.double().square().mean(-1, keepdim=True) + eps).rsqrt()
    x_hat_MK = x_MK.double() * rstd_M1
    return (g_MK - x_hat_MK * (g_MK * x_hat_MK).mean(-1, keepdim=True)) * rstd_M1


def act(g, name) -> tuple[torch.Tensor, torch.Tensor]:
    """(act(g), act'(g)) of "silu", "gelu_tanh" or "gelu"."""
    g = g.double()
    if name == "silu":
        return g * g.sigmoid(), g.sigmoid() * (1 + g * (1 - g.sigmoid()))
    if name == "gelu":
        normal = (-g.square() / 2).exp() / math.sqrt(2 * math.pi)
        return g / 2 * (1 + (g / math.sqrt(2)).erf()), (1 + (g / math.sqrt(2)).erf()) / 2 + g * normal
    z, slope = math.sqrt(2 / math.pi) * (g + 0.044715 * g**3), math.sqrt(2 / math.pi) * (1 + 3 * 0.044715 * g**2)
    return g / 2 * (1 + z.tanh()), (1 + z.tanh()) / 2 + g / 2 * (1 - z.tanh().square()) * slope


def gate(g, u, name) -> torch.Tensor:
    """y = act(g) u"""
    return act(g, name)[0] * u.double()


def gate_grad(dy, g, u, name) -> tuple[torch.Tensor, torch.Tensor]:
    """dg = dy u act'(g),   du = dy act(g)"""
    value, slope = act(g, name)
    return dy.double() * u.double() * slope, dy.double() * value


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


def nf4(packed, absmax, levels, n, k, nested=None) -> torch.Tensor:
    """W = levels[code] absmax; byte i holds codes 2 i (high half) and 2 i + 1 of the row-major stream, 64 share an absmax.

    If `nested` is (code, scales, offset), an absmax is code[byte] scale + offset, and 256 of them share a scale.
    """
    if nested is not None:
        code, scales, offset = nested
        absmax = code.double()[absmax.long()] * scales.double().repeat_interleave(256)[: absmax.numel()] + offset
    codes = torch.stack([packed.flatten() >> 4, packed.flatten() & 15], -1).flatten().long()
    return (levels.double()[codes] * absmax.double().repeat_interleave(64)[: n * k]).view(n, k)


def scaled(q_NK, scale, block) -> torch.Tensor:
    """w[n, k] = q[n, k] scale[n // BN, k // BK], block (BN, BK)"""
    rows, columns = (
        torch.arange(size, device=q_NK.device) // step for size, step in zip(q_NK.shape, block, strict=True)
    )
    return q_NK.double() * scale.double()[rows][:, columns]
