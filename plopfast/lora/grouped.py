"""LoRA linears that read one input as one function: their outputs come together, and so does the gradient of x.

S_i = c drop_i(X) A_i^T;  Y_i = X W_i^T + S_i B_i^T + bias_i;  dX = sum over i of dY_i W_i + mask_i (dS_i A_i)

M tokens, K in, N_i out, R_i rank. The sums are those of ops.py in another order. See kernels/groups.py for what it saves.
"""

from typing import Any

import torch

from ..kernels import groups
from ..kernels.autograd import once
from ..kernels.groups import Group


class LoRAGroup(torch.autograd.Function):
    """`apply(x, s, weights, biases, low, stacked_A, group, *lora_As, *lora_Bs)` -> a tuple of Y_i [M, N_i].

    x [M, K] is dense. `s` has the members' S where the norm before them made these, else it is None. `weights`, `biases`,
    `low` (the members' A and B in x's dtype) and `stacked_A` [R, K] are lists that autograd does not look into: frozen, or
    copies of the adapters that come last.
    """

    @staticmethod
    def forward(ctx: Any, x_MK, s, weights, biases, low, stacked_A, group: Group, *adapters):
        a, b = low
        if s is None:
            s = groups.shrink(x_MK, a, stacked_A, group)
        ctx.frozen = weights, a, b, group
        ctx.dtypes = adapters[0].dtype, adapters[-1].dtype
        ctx.save_for_backward(x_MK, *s)
        ctx.set_materialize_grads(False)
        return tuple(groups.forward(x_MK, s, weights, b, biases, group))

    @staticmethod
    @once
    def backward(ctx: Any, *dy: torch.Tensor | None) -> tuple[Any, ...]:
        x_MK, *s = ctx.saved_tensors
        weights, a, b, group = ctx.frozen
        count = len(dy)
        need_x, of_adapters = ctx.needs_input_grad[0], ctx.needs_input_grad[-2 * count :]
        need_a, need_b = any(of_adapters[:count]), any(of_adapters[count:])
        used = [i for i, one in enumerate(dy) if one is not None]  # an output that nothing read has no gradient
        da: list[torch.Tensor | None] = [None] * count
        db: list[torch.Tensor | None] = [None] * count
        dx_MK: torch.Tensor | None = None
        if used:
            pick = lambda of: [of[i] for i in used]  # noqa: E731
            dense = [one.contiguous() for one in dy if one is not None]
            if len(used) < count:
                group = Group(group.c, group.p, tuple(pick(group.seeds)), tuple(pick(group.ranks)), group.plan)
            dx_MK, some_a, some_b = groups.backward(
                dense, x_MK, pick(s), pick(weights), pick(a), pick(b), group, (need_x, need_a, need_b), ctx.dtypes
            )
            for i, one, other in zip(used, some_a, some_b, strict=True):
                da[i], db[i] = one, other
        return dx_MK, None, None, None, None, None, None, *da, *db
