"""Criteria other than NFN's mean of where adapters belong. Each gives a number for every linear module.

explained_variance   share of an input's energy along its `rank` leading directions    EVA, arXiv 2410.07170: highest
condition_numbers    largest over smallest singular value of W                         KappaTune, arXiv 2506.16289: lowest
gradient_energy      ||dL/dB||^2 at B = 0, for each trainable parameter                first order in the loss: highest
weight_nfn           spectral norm of W over that of a random W, roughly               NFN of the best input: lowest
sizes                n_in n_out                                                        a rival that must be beaten: highest

The audit compares those that have a source with NFN. A trial's arms and `place(..., criteria=...)` place by any of them. A new
one is an entry of the table in placing/rules.py (its direction, mean and source) and its function in `COMPUTE`.
"""

import contextlib
import math
import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import nn

from ..data.batches import collate, group_by_length
from ..data.example import Example
from ..lora.injection import inject, unload
from ..lora.layer import adapters
from ..lora.placement import Placement
from ..models.experts import weights_of
from ..models.linears import LinearInfo, linear_modules
from ..models.running import device_of, evaluating, remember_requires_grad
from ..placing.rules import RULES, Rule
from ..scoring.report import NFNReport
from ..support.errors import DataError, ModelError
from ..support.progress import bar
from ..training.loss import Objective

Spectrum = tuple[LinearInfo, torch.Tensor]  # a module, and the squared singular values of its weight
BATCH_TOKENS = 384  # padded tokens in a batch of gradient_energy; a longer row makes a batch of its own


def explained_variance(report: NFNReport) -> dict[str, float]:
    """Returns module -> share of its inputs' energy along their `eva_rank` leading directions, 0 to 1.

    The energy is ||X||_F^2 of the inputs X [tokens, n_in]; the share is a lower bound (see `eva.InputSketch`). `report` is
    that of `score(..., eva_rank=...)`. EVA (Paischer et al., arXiv 2410.07170) gives the most rank to where the share is
    highest. Raises DataError for a report without EVA's vectors.
    """
    if not report.eva_ratios:
        raise DataError("this report holds no spectrum of the inputs: make it with score(model, batches, eva_rank=...)")
    return {name: float(ratios.sum()) for name, ratios in report.eva_ratios.items()}


@torch.no_grad()
def spectra(model: nn.Module, progress: bool = False) -> Iterator[Spectrum]:
    """Yields each module with the squared singular values of its weight, ascending, float64.

    They are the eigenvalues of the smaller of W W^T and W^T W. On SmolLM2-135M's weights this takes a third of the time of
    svdvals in float64 and agrees with it to 2e-9; svdvals in float32 takes twice as long and errs by 1e-4. Raises ModelError
    for a weight that is not finite or all zeros.
    """
    infos = linear_modules(model)
    with bar("spectra", len(infos), "modules", progress) as meter:
        for info in infos:
            weight = info.frozen.dequantize()
            weight = weight if weight.is_cuda else weight.cpu()  # mps has no float64
            w = (weight if info.n_out <= info.n_in else weight.T).double()
            gram = w @ w.T
            if not 0 < float(gram.trace()) < math.inf:
                raise ModelError(f"{info.name}: the weight is all zeros, or holds NaN or infinity: no singular values")
            yield info, torch.linalg.eigvalsh(gram)
            meter.update()


def condition_numbers(model: nn.Module, progress: bool = False) -> dict[str, float]:
    """Returns module -> largest over smallest singular value of its weight, from the weights alone.

    KappaTune (Ludwig, arXiv 2506.16289) adapts the tensors where it is lowest: they are less specialised. Rounding hides
    numbers above 1 / sqrt(n eps), where n is the smaller side: a singular weight gets that value, 2e6 for n = 1024. Raises
    what `spectra` raises.
    """
    return _conditions(spectra(model, progress))


def _conditions(found_spectra: Iterable[Spectrum]) -> dict[str, float]:
    found, eps = {}, torch.finfo(torch.float64).eps
    for info, squares in found_spectra:
        low, high = float(squares[0]), float(squares[-1])
        found[info.name] = math.sqrt(high / max(low, len(squares) * eps * high))
    return found


def weight_nfn(model: nn.Module, progress: bool = False) -> dict[str, float]:
    """Returns module -> sigma_max sqrt(n_in) / ||W||_F, from the weights alone: the NFN of the input that W stretches most.

    It is 1 for a weight that stretches all inputs alike, and 1 + sqrt(n_in / n_out) or so for a random one. Raises what
    `spectra` raises.
    """
    return _weight_nfn(spectra(model, progress))


def _weight_nfn(found_spectra: Iterable[Spectrum]) -> dict[str, float]:
    return {
        info.name: math.sqrt(float(squares[-1]) * info.n_in / float(squares.clamp(min=0).sum()))
        for info, squares in found_spectra
    }


def nfns(report: NFNReport) -> dict[str, float]:
    """Returns module -> NFN."""
    return {name: score.nfn for name, score in report.scores.items()}


def sizes(report: NFNReport) -> dict[str, float]:
    """Returns module -> the number of its weights."""
    return {name: float(score.n_in * score.n_out) for name, score in report.scores.items()}


def strongest(report: NFNReport, energies: Mapping[str, float]) -> str:
    """Returns the module of highest gradient energy, not divided by its parameters: where PAGE (arXiv 2605.06183) puts its one
    adapter. `energies` as `gradient_energy` returns them."""
    whole = {name: energies[name] * (s.n_in + s.n_out) for name, s in report.scores.items() if s.layer is not None}
    return max(whole, key=lambda name: whole[name])


def gradient_energy(
    model: nn.Module, examples: Sequence[Example], rank: int = 16, seed: int = 0, progress: bool = False
) -> dict[str, float]:
    """Returns module -> ||dL/dB||_F^2 / (rank (n_in + n_out)) at B = 0, with a Gaussian A [rank, n_in] drawn from `seed`.

    L is the mean loss over the label tokens of `examples`. A step of gradient descent of size eta lowers L by
    eta ||dL/dB||^2 to first order (dL/dA = 0 there), so this is the gain for each trainable parameter: where it is
    highest, adapters promise most. As dL/dB = (dL/dW) A^T, it is LoRA-GA's gradient (Wang et al., arXiv 2407.05000) in
    `rank` random directions. It takes one forward and backward pass, as in training, and no base weight's gradient.

    The model is left as it was, even on an error. Raises DataError where no token has a label or the loss is not finite,
    PlacementError for a rank that does not fit, AdapterError where the model has adapters already.
    """
    infos = {info.name: info for info in linear_modules(model)}
    labels = sum(e.label_tokens for e in examples)
    if labels < 1:
        raise DataError(f"no label token in {len(examples)} rows: there is no loss to take a gradient of")
    with _injected(model, Placement(dict.fromkeys(infos, (rank, float(rank))), [], "all", 0), seed):
        added = adapters(model)
        for module in added.values():
            module.lora_A.requires_grad_(False)
        _backward(model, examples, progress)
        found = {}
        for name, module in added.items():
            if module.lora_B.grad is None:
                raise ModelError(f"{name}: no gradient reaches it; is the module unused in the forward pass?")
            energy = float(module.lora_B.grad.double().square().sum()) / labels**2
            found[name] = energy / (rank * (infos[name].n_in + infos[name].n_out))
        return found


def _backward(model: nn.Module, examples: Sequence[Example], progress: bool) -> None:
    """Adds the gradient of the summed loss to the parameters that take one. Raises DataError for a loss that is not finite."""
    objective, total = Objective(model), torch.zeros((), device=device_of(model))
    with bar("gradient", len(examples), "prompts", progress) as meter:
        for group in group_by_length([len(e.tokens) for e in examples], BATCH_TOKENS):
            rows = [examples[i] for i in group]
            batch = collate(rows, device_of(model))
            loss = objective(batch)  # the sum, not the mean: small gradients would vanish in half precision
            loss.backward()
            total += loss.detach()
            meter.update(len(group))
    if not total.isfinite():
        raise DataError("the loss is not finite: no gradient; try dtype bfloat16 or float32, or leave a row out")


def random_ranks(model: nn.Module, seed: int = 0) -> dict[str, float]:
    """Returns module -> its type's place in a random order. The lowest k are what `place(report, "random")` draws."""
    infos = weights_of(model)
    types = sorted({info.type for info in infos})
    order = random.Random(seed).sample(types, len(types))
    return {info.name: float(order.index(info.type)) for info in infos}


@contextlib.contextmanager
def _injected(model: nn.Module, placement: Placement, seed: int) -> Iterator[None]:
    """Puts adapters into `model` and sets evaluation mode; afterwards modules, modes and `requires_grad` are as before."""
    put_back = remember_requires_grad(model)
    mine = not adapters(model)  # otherwise inject refuses, and these adapters must stay
    with evaluating(model):
        try:
            inject(model, placement, seed=seed, init="gaussian")
            yield
        finally:
            if mine:
                unload(model)
            put_back()


@dataclass(frozen=True)
class Given:
    """What criteria are computed from."""

    model: nn.Module
    examples: Sequence[Example]
    rank: int  # of the inputs' spectrum and of the gradient
    seed: int
    progress: bool
    score_with_eva: Callable[[], NFNReport]  # the NFN report with EVA's vectors of `rank`
    report: NFNReport

    @cached_property
    def spectra(self) -> list[Spectrum]:
        """What `spectra` yields, for all criteria that need it."""
        return list(spectra(self.model, self.progress))


COMPUTE: dict[str, Callable[[Given], Mapping[str, float]]] = {  # rule -> module -> score
    "input-spectrum": lambda given: explained_variance(given.score_with_eva()),
    "condition-number": lambda given: _conditions(given.spectra),
    "gradient-energy": lambda given: gradient_energy(
        given.model, given.examples, given.rank, given.seed, given.progress
    ),
    "random": lambda given: random_ranks(given.model, given.seed),
    "nfn-median": lambda given: nfns(given.report),
    "nfn-no-outliers": lambda given: nfns(given.report),
    "nfn-per-size": lambda given: {n: s.nfn / (s.n_in * s.n_out) for n, s in given.report.scores.items()},
    "weight-nfn": lambda given: _weight_nfn(given.spectra),
    "weight-size": lambda given: sizes(given.report),
}


def compared() -> list[tuple[Rule, Callable[[Given], Mapping[str, float]]]]:
    """Returns the criteria that the audit sets beside NFN, each with its function."""
    return [(rule, COMPUTE[name]) for name, rule in RULES.items() if rule.source and not rule.by_nfn]
