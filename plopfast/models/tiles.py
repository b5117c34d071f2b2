"""MLPs computed some rows at a time, and again in the backward pass, in a model of anybody's.

    for module in token_wise(model).values():
        module.forward = Tiled(module, module.forward, 512)

The forward pass then keeps an MLP's input alone, and no more of what lies between its products is ever held than that of
512 tokens. Inside a block that is recomputed, the MLP runs twice in all, as it would anyway: the input is saved before the
first product, and where nothing after the MLP is saved, torch stops the recomputation at that point.
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import nn

from .frozen import find_frozen, is_linear
from .lean import SCALES, LeanMLP, relative_error, takes_one_tensor
from .linears import blocks
from .running import evaluating

TOKENS = "tokens"  # the kind, in `known`, of a module that acts on each token alone
CUT = 2  # tokens of five before the place where a module is tried in two parts


class Tiled:
    """The forward of a module that acts on each token alone, `rows` tokens at a time.

        mlp.forward = Tiled(mlp, mlp.forward, 512)

    It takes and returns what `forward` does, one tensor [..., K] -> [..., N]. The gradients are those of `forward`, summed
    over tiles. Random numbers are drawn tile by tile, and drawn again alike in the backward pass.
    """

    def __init__(self, module: nn.Module, forward: Callable[[torch.Tensor], torch.Tensor], rows: int) -> None:
        self.module, self.forward, self.rows = module, forward, rows

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        x_MK = (x if x.dim() == 2 else x.reshape(1, -1, x.shape[-1])).contiguous()  # some insist on rows of tokens
        trained = [p for p in self.module.parameters() if p.requires_grad]
        if not (torch.is_grad_enabled() and (x.requires_grad or trained)):
            y = self.forward(x) if x_MK.shape[-2] <= self.rows else _tiles(self, x_MK)
        elif not x.numel():
            y = self.forward(x)
        else:
            kept = _Keep.apply(x_MK, trained[0] if trained else x_MK)
            y = _Rows.apply(self, kept.grad_fn, x.requires_grad, kept, *trained)
        return y.view(*x.shape[:-1], y.shape[-1])


def _tiles(tiled: Tiled, x_MK: torch.Tensor) -> torch.Tensor:
    """The module's output, without a graph."""
    y_MN, at = None, 0
    for x in x_MK.split(tiled.rows, dim=-2):
        y = tiled.forward(x)
        if y_MN is None:
            y_MN = y.new_empty(*x_MK.shape[:-1], y.shape[-1])
        y_MN.narrow(-2, at, x.shape[-2]).copy_(y)
        at += x.shape[-2]
    assert y_MN is not None  # there is a tile, even of no tokens
    return y_MN


class _Keep(torch.autograd.Function):
    """Saves x before the module runs: `_Rows` itself would save it afterwards. `anchor` makes the output part of the graph
    where x needs no gradient."""

    @staticmethod
    def forward(ctx: Any, x_MK, anchor):
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x_MK)
        return x_MK.view_as(x_MK)

    @staticmethod
    def backward(ctx: Any, dx_MK):
        return dx_MK, None


class _Rows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tiled, keeper, need_x, x_MK, *trained):
        ctx.tiled, ctx.keeper, ctx.need_x, ctx.trained = tiled, keeper, need_x, trained
        ctx.versions = [p._version for p in trained]
        ctx.state = _State(x_MK.device)
        return _tiles(tiled, x_MK)

    @staticmethod
    def backward(ctx: Any, dy_MN):
        if torch.is_grad_enabled():
            raise RuntimeError("an MLP in tiles has no second derivative")
        if ctx.versions != [p._version for p in ctx.trained]:
            raise RuntimeError("a parameter of an MLP in tiles was changed between its forward and its backward pass")
        (x_MK,) = ctx.keeper.saved_tensors
        dx_MK = torch.empty_like(x_MK) if ctx.need_x else None
        sums: list[torch.Tensor | None] = [None] * len(ctx.trained)
        at, rows = 0, ctx.tiled.rows
        with ctx.state.again():
            for x, dy in zip(x_MK.split(rows, dim=-2), dy_MN.split(rows, dim=-2), strict=True):
                with torch.enable_grad():
                    x = x.detach().requires_grad_(ctx.need_x)
                    y = ctx.tiled.forward(x)
                inputs = [*([x] if ctx.need_x else []), *ctx.trained]
                found = list(torch.autograd.grad(y, inputs, dy, allow_unused=True))
                del y
                if dx_MK is not None:
                    dx = found.pop(0)
                    dx_MK.narrow(-2, at, x.shape[-2]).copy_(dx if dx is not None else x.new_zeros(()))
                    del dx
                # not in place: two parameters may share the tensor of a gradient
                sums = [b if a is None else a if b is None else a + b for a, b in zip(sums, found, strict=True)]
                at += x.shape[-2]
        return None, None, None, dx_MK, *sums


class _State:
    """What the forward pass found and the backward pass must find again: torch's generators and autocast."""

    def __init__(self, device: torch.device) -> None:
        self.kind = device.type
        self.cuda = [device] if device.type == "cuda" else []
        self.generator = torch.get_rng_state()
        self.generators = [torch.cuda.get_rng_state(one) for one in self.cuda]
        self.autocast = self.kind != "meta" and torch.is_autocast_enabled(self.kind)  # which raises for meta
        self.dtype = torch.get_autocast_dtype(self.kind) if self.autocast else None

    @contextlib.contextmanager
    def again(self) -> Iterator[None]:
        known = self.kind != "meta" and torch.amp.is_autocast_available(self.kind)
        cast = torch.autocast(self.kind, self.dtype, self.autocast) if known else contextlib.nullcontext()
        with torch.random.fork_rng(self.cuda), cast:
            torch.set_rng_state(self.generator)
            for device, state in zip(self.cuda, self.generators, strict=True):
                torch.cuda.set_rng_state(state, device)
            yield


@torch.no_grad()
def token_wise(model: nn.Module, known: Mapping[str, str] | None = None) -> tuple[dict[str, nn.Module], list[str]]:
    """Finds the MLPs of the repeated blocks that act on each token alone: (name -> module, types of others, by name).

    Such a module takes one tensor, holds two linear modules at least, and computes the same of a few random tokens at once
    and in two parts; its class does not matter. Where the tensors have no values, `known` gives `TOKENS` for the names of
    modules that were found in a model like this one. Mixtures of experts are others, as routing may look at all tokens.
    """
    found: dict[str, nn.Module] = {}
    others: dict[str, None] = {}
    with evaluating(model):
        for block_name, block in blocks(model).items():
            for name, module in block.named_modules(prefix=block_name):
                if module is block or name.startswith(tuple(f"{above}." for above in found)):
                    continue
                if not takes_one_tensor(module) or not _has_products(module):
                    continue
                lean = isinstance(vars(module).get("forward"), LeanMLP)  # which was found by what it computes
                if lean or (known.get(name) == TOKENS if known is not None else _is_alone(module)):
                    found[name] = module
                else:
                    others.setdefault(type(module).__name__)
    return found, list(others)


def _has_products(module: nn.Module) -> bool:
    return sum(is_linear(inner) for inner in module.modules()) + 2 * _has_experts(module) > 1


def _has_experts(module: nn.Module) -> bool:
    return any(isinstance(inner, nn.ModuleList) for inner in module.modules()) or any(
        p.dim() > 2 for p in module.parameters()
    )


def _is_alone(module: nn.Module) -> bool:
    """Whether the module computes the same of tokens at once and in two parts."""
    frozen = next(filter(None, map(find_frozen, module.modules())), None)
    if frozen is None or _has_experts(module):
        return False
    x = torch.randn(len(SCALES), 5, frozen.shape[1], generator=torch.Generator().manual_seed(0))
    x = (x * torch.tensor(SCALES)[:, None, None]).to(frozen.device, frozen.dtype)
    try:
        whole, parts = module(x), [module(part.contiguous()) for part in (x[:, :CUT], x[:, CUT:])]
    except RuntimeError:  # it takes inputs of another shape
        return False
    if not all(isinstance(y, torch.Tensor) and y.dim() == 3 for y in (whole, *parts)):
        return False
    return relative_error(torch.cat(parts, dim=1), whole) <= 16 * torch.finfo(x.dtype).eps
