"""Other answers to where adapters belong, to be set beside NFN: each gives a number for every linear module.

explained_variance   share of an input's energy along its `rank` leading directions    EVA, arXiv 2410.07170: highest
condition_numbers    largest over smallest singular value of W                         KappaTune, arXiv 2506.16289: lowest
gradient_energy      ||dL/dB||^2 at B = 0, for each trainable parameter                first order in the loss: highest
"""

import contextlib
import math
import random
from collections.abc import Iterator, Sequence

import torch
from torch import nn

from ..data.batches import collate, group_by_length
from ..data.rows import Example
from ..lora.layer import adapters, inject, unload
from ..lora.placement import Placement
from ..models.linears import linear_modules
from ..models.running import device_of
from ..scoring.report import NFNReport
from ..support.errors import DataError, ModelError
from ..support.progress import bar
from ..training.loss import Objective

BATCH_TOKENS = 384  # padded tokens in a batch of gradient_energy; a longer row makes a batch of its own


def explained_variance(report: NFNReport) -> dict[str, float]:
    """Module -> share of ||X||_F^2 of its inputs X [tokens, n_in] along their `eva_rank` leading directions, 0 to 1 (a
    lower bound; see `eva.InputSketch`), for a report of `score(..., eva_rank=...)`.

    EVA (Paischer et al., arXiv 2410.07170) gives the most rank to where that share is highest. Raises DataError for a
    report without it.
    """
    if not report.eva_ratios:
        raise DataError("this report holds no spectrum of the inputs: score(model, batches, eva_rank=...)")
    return {name: float(ratios.sum()) for name, ratios in report.eva_ratios.items()}


@torch.no_grad()
def condition_numbers(model: nn.Module, progress: bool = False) -> dict[str, float]:
    """Module -> largest over smallest singular value of its weight, from the weights alone.

    KappaTune (Ludwig, arXiv 2506.16289) adapts the tensors where it is lowest, as less specialised. It is the root of the
    ratio of the extreme eigenvalues of the smaller of W W^T and W^T W in float64: on SmolLM2-135M's weights a third of
    the time of svdvals in float64 and within 2e-9 of it (svdvals in float32 takes twice as long and errs by 1e-4). Beyond
    1 / sqrt(n eps), n the smaller side, rounding hides it: a singular weight has that value, 2e6 for n = 1024. Raises
    ModelError for a weight that is not finite or all zeros.
    """
    found, infos = {}, linear_modules(model)
    with bar("kappa", len(infos), "modules", progress) as meter:
        for info in infos:
            weight = info.frozen.dequantize()
            weight = weight if weight.is_cuda else weight.cpu()  # mps has no float64
            w = (weight if info.n_out <= info.n_in else weight.T).double()
            gram = w @ w.T
            if not 0 < float(gram.trace()) < math.inf:
                raise ModelError(f"{info.name}: the weight is all zeros, or holds NaN or infinity: no condition number")
            values = torch.linalg.eigvalsh(gram)  # ascending
            low, high = float(values[0]), float(values[-1])
            found[info.name] = math.sqrt(high / max(low, len(w) * torch.finfo(torch.float64).eps * high))
            meter.update()
    return found


def gradient_energy(
    model: nn.Module, examples: Sequence[Example], rank: int = 16, seed: int = 0, progress: bool = False
) -> dict[str, float]:
    """Module -> ||dL/dB||_F^2 / (rank (n_in + n_out)) at B = 0 under a Gaussian A [rank, n_in] drawn with `seed`.

    L is the mean loss over the label tokens of `examples`. A step of gradient descent of size eta lowers L by
    eta ||dL/dB||^2 to first order (dL/dA = 0 there), so this is the gain for each trainable parameter; where it is
    highest, adapters promise most. As dL/dB = (dL/dW) A^T, it is LoRA-GA's gradient (Wang et al., arXiv 2407.05000) in
    `rank` random directions, without the gradient of any base weight: one forward and backward pass, as in training.

    The model is left as it was, also where this fails. Raises DataError where no token has a label or the loss is not
    finite, PlacementError for a rank that does not fit, AdapterError where the model has adapters already.
    """
    infos = {info.name: info for info in linear_modules(model)}
    sequences, starts = [e.tokens for e in examples], [e.start for e in examples]
    labels = sum(len(tokens) - max(start, 1) for tokens, start in zip(sequences, starts, strict=True))
    if labels < 1:
        raise DataError(f"no label token in {len(sequences)} rows: there is no loss to take a gradient of")
    with _injected(model, Placement(dict.fromkeys(infos, (rank, float(rank))), [], "all", 0), seed):
        added = adapters(model)
        for module in added.values():
            module.lora_A.requires_grad_(False)
        objective, total = Objective(model), torch.zeros((), device=device_of(model))
        with bar("gradient", len(sequences), "prompts", progress) as meter:
            for group in group_by_length([len(tokens) for tokens in sequences], BATCH_TOKENS):
                batch = collate([sequences[i] for i in group], [starts[i] for i in group], device_of(model))
                loss = objective(batch)  # a sum: divided at the end, lest small gradients vanish in half precision
                loss.backward()
                total += loss.detach()
                meter.update(len(group))
        if not total.isfinite():
            raise DataError("the loss is not finite: no gradient; try dtype bfloat16 or float32, or leave a row out")
        found = {}
        for name, module in added.items():
            if module.lora_B.grad is None:
                raise ModelError(f"{name}: no gradient reaches it; is the module unused in the forward pass?")
            energy = float(module.lora_B.grad.double().square().sum()) / labels**2
            found[name] = energy / (rank * (infos[name].n_in + infos[name].n_out))
        return found


def random_ranks(model: nn.Module, seed: int = 0) -> dict[str, float]:
    """Module -> its type's place in a random order, lowest chosen: the types that `place(report, "random", seed=seed)`
    draws."""
    infos = linear_modules(model)
    types = sorted({info.type for info in infos})
    order = random.Random(seed).sample(types, len(types))
    return {info.name: float(order.index(info.type)) for info in infos}


@contextlib.contextmanager
def _injected(model: nn.Module, placement: Placement, seed: int) -> Iterator[None]:
    """`model` in evaluation mode with adapters while it lasts; afterwards its modules, their modes, and what requires a
    gradient are as before."""
    needed = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    modes = [(module, module.training) for module in model.modules()]
    mine = not adapters(model)  # else inject refuses, and they are not ours to take out
    model.eval()
    try:
        inject(model, placement, seed=seed, init="gaussian")
        yield
    finally:
        if mine:
            unload(model)
        for parameter, value in needed:
            parameter.requires_grad_(value)
        for module, mode in modes:
            module.training = mode
