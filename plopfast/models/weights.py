"""Are a model's weights all there, and finite? Asked when a model is loaded, and again before it is written."""

from collections.abc import Collection, Iterable
from typing import Any

import torch
from torch import nn

from ..support.errors import ModelError
from .frozen import whole

SHOWN = 4  # names in a message


def check_loaded(source: str, found: dict[str, Any]) -> None:
    """Raises ModelError where transformers did not find exactly the model's weights; it would draw the others at random.

    `found` is what `from_pretrained(..., output_loading_info=True)` returns. It leaves out what may differ: tied heads,
    buffers of rotary embeddings, and names that the model's class ignores, such as GPT-2's attn.bias.
    """
    kinds = (("missing_keys", "missing"), ("unexpected_keys", "not expected"), ("mismatched_keys", "of another shape"))
    problems = [f"{len(found[key])} {words} ({_few(found[key])})" for key, words in kinds if found.get(key)]
    problems += [str(message) for message in found.get("error_msgs") or ()]
    if problems:
        raise ModelError(
            f"model {source!r}: its weights are not those that its config.json describes: {'; '.join(problems)}. The files "
            "are incomplete or of different models: download or save them again"
        )


def check_finite(model: nn.Module, who: str) -> None:
    """Raises ModelError, with the tensors' names, where a weight or a stored buffer is NaN or infinite.

    Every rank has to call this for a sharded model.
    """
    refuse_nonfinite([name for name, tensor in model.state_dict().items() if not is_finite(whole(tensor))], who)


def refuse_nonfinite(bad: Collection[str], who: str) -> None:
    """Raises ModelError where there are names of tensors that are NaN or infinite somewhere."""
    if bad:
        raise ModelError(f"{who}: NaN or infinity in {len(bad)} of its weights ({_few(bad)})")


def is_finite(tensor: torch.Tensor) -> bool:
    """False where one value is NaN or infinite. The smallest and largest value tell, without a mask of all values."""
    if not tensor.is_floating_point() or not tensor.numel() or tensor.is_meta:
        return True
    if tensor.dtype == torch.float8_e4m3fn:  # it has no infinity, and NaN is all ones but for the sign
        return not bool((tensor.detach().view(torch.uint8) & 0x7F).max() == 0x7F)
    return all(bool(end.isfinite()) for end in tensor.detach().aminmax())


def _few(keys: Iterable[Any]) -> str:
    names = sorted(key if isinstance(key, str) else " ".join(str(part) for part in key) for key in keys)
    return ", ".join(names[:SHOWN]) + (", ..." if len(names) > SHOWN else "")
