"""NFN as the PLoP authors' code computes it."""

import contextlib
import math
import statistics
from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any

import torch
from torch import nn

from ..models.linears import LinearInfo, linear_modules
from ..models.running import device_of
from ..support.errors import ConfigError, DataError, ModelError
from .report import ModuleScore, NFNReport, unseen_note


def score_official(model: nn.Module, batches: Iterable[Mapping[str, Any]], seed: int, meter: Any) -> NFNReport:
    """Scores by the authors' procedure (github soufiane001/plop at 561524d), seeded.

    Padding and BOS count. Each token has a random unit vector of its own. A score is the ratio of batch means, averaged
    over batches. W z and W z~ are computed again in float32. Every module with a weight is scored, the output head too,
    but embeddings and modules named "norm" are not. Raises ConfigError for batches with `counted`, DataError where there
    is no token, ModelError for NaN, infinity, and where no module is used.
    """
    device = device_of(model)
    generator = torch.Generator(device).manual_seed(seed)
    ratios: dict[str, list[float]] = {}
    tokens = prompts = 0

    def record(info: LinearInfo, _module: nn.Module, args: tuple[Any, ...], _output: torch.Tensor) -> None:
        z_MK = args[0].float().reshape(-1, info.n_in)
        w_NK = info.frozen.dequantize().to(z_MK.device, torch.float32)
        w = w_NK / (w_NK.square().mean().sqrt() + 1e-8)
        z = z_MK / (z_MK.norm(dim=1, keepdim=True) + 1e-8)
        g = torch.randn(z.shape, generator=generator, device=device)
        g = g / (g.norm(dim=1, keepdim=True) + 1e-8)
        actual, random = (z @ w.T).norm(dim=1).mean().item(), (g @ w.T).norm(dim=1).mean().item()
        ratios.setdefault(info.name, []).append(actual / random if random else math.nan)

    chosen = [info for info in linear_modules(model, include_head=True) if "norm" not in info.name.lower()]
    with contextlib.ExitStack() as hooks:
        for info in chosen:
            hooks.enter_context(info.module.register_forward_hook(partial(record, info)))
        for index, batch in enumerate(batches):
            if "counted" in batch:
                raise ConfigError(f"batch {index}: compat='official' scores every token, but 'counted' leaves some out")
            inputs = {k: torch.as_tensor(batch[k]).to(device) for k in ("input_ids", "attention_mask") if k in batch}
            model(**inputs)
            tokens += inputs["input_ids"].numel()
            prompts += len(inputs["input_ids"])
            meter.update(len(inputs["input_ids"]))
    if not tokens:
        raise DataError("there is no token to score: the batches are empty")
    if not ratios:
        raise ModelError(f"{chosen[0].name}: is not used in the forward pass, and nor is any other linear module")
    scores = {}
    for info in (info for info in chosen if info.name in ratios):
        values = ratios[info.name]
        mean = statistics.fmean(values)
        if not math.isfinite(mean):
            first = next(i for i, value in enumerate(values) if not math.isfinite(value))
            raise ModelError(f"{info.name}: NaN or infinity in batch {first}")
        std = statistics.pstdev(values)
        scores[info.name] = ModuleScore(mean, std, tokens, info.type, info.layer, info.n_in, info.n_out)
    notes = unseen_note([info for info in chosen if info.name not in ratios])
    return NFNReport(scores, tokens, prompts, 0.0, settings={"compat": "official", "seed": seed}, notes=notes)
