"""NEFTune (Jain et al., arXiv 2310.05914): uniform noise on the embeddings while a model trains."""

import contextlib
import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn


@contextlib.contextmanager
def neftune(model: nn.Module, alpha: float) -> Iterator[None]:
    """Adds uniform noise of at most alpha / sqrt(tokens x width) to the embeddings in training mode, while it lasts.

    Padding counts among the tokens, as in Hugging Face's trainer. With `alpha` 0 nothing is added.
    """
    if not alpha:
        yield
        return

    def add_noise(module: nn.Module, _args: Any, output: torch.Tensor) -> torch.Tensor:
        bound = alpha / math.sqrt(output.shape[-2] * output.shape[-1])
        return output + torch.empty_like(output).uniform_(-bound, bound) if module.training else output

    with model.get_input_embeddings().register_forward_hook(add_noise):  # type: ignore[operator]
        yield
