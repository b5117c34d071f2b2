"""NEFTune (Jain et al., arXiv 2310.05914): uniform noise on the embeddings while a model trains."""

import contextlib
import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn


@contextlib.contextmanager
def neftune(model: nn.Module, alpha: float) -> Iterator[None]:
    """Uniform noise of at most alpha / sqrt(tokens x width) on the embeddings while training (Jain et al., NEFTune,
    arXiv 2310.05914), tokens counted with padding as in Hugging Face's trainer."""
    if not alpha:
        yield
        return

    def add_noise(module: nn.Module, _args: Any, output: torch.Tensor) -> torch.Tensor:
        bound = alpha / math.sqrt(output.shape[-2] * output.shape[-1])
        return output + torch.empty_like(output).uniform_(-bound, bound) if module.training else output

    handle = model.get_input_embeddings().register_forward_hook(add_noise)  # type: ignore[operator]
    try:
        yield
    finally:
        handle.remove()
