"""Running a model: its body and head, logits only where they are asked for, and a check of packed batches."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from ..support.errors import ModelError


def output_head(model: nn.Module) -> nn.Module | None:
    """Returns the module that makes the logits, or None where the model has none."""
    get = getattr(model, "get_output_embeddings", None)
    return get() if get else None


def body(model: nn.Module) -> nn.Module:
    """Returns the model without its output head, which scoring does not need."""
    inner = getattr(model, getattr(model, "base_model_prefix", "") or "", None)
    return inner if isinstance(inner, nn.Module) else model


def device_of(model: nn.Module) -> torch.device:
    """Returns the device that a batch must be on: `model.computes_on` where parts of it live elsewhere, else the device of
    the model's first parameter."""
    return getattr(model, "computes_on", None) or next(model.parameters()).device


def in_backward() -> bool:
    """Whether autograd is at work, which runs blocks again where they are recomputed."""
    return torch._C._current_graph_task_id() != -1


def exchanged(model: nn.Module, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """Puts `change(tensor)` in the place of each parameter and buffer; what modules share they share afterwards.

    Module._apply, which `to` and `float` call, cannot do so for tensors without values.
    """
    made: dict[torch.Tensor, torch.Tensor] = {}
    for module in model.modules():
        for tensors in (module._parameters, module._buffers):
            for name, tensor in tensors.items():
                if tensor is None:
                    continue
                if tensor not in made:
                    other = change(tensor.detach())
                    made[tensor] = (
                        nn.Parameter(other, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else other
                    )
                tensors[name] = made[tensor]  # type: ignore[assignment]


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Puts the model into evaluation mode, without dropout, while it lasts."""
    with modes_kept(model):
        model.eval()
        yield


@contextlib.contextmanager
def modes_kept(model: nn.Module) -> Iterator[None]:
    """Gives each module its own mode back at the end: some of a training model may be in evaluation mode."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def remember_requires_grad(model: nn.Module) -> Callable[[], None]:
    """Returns a function that gives each of today's parameters its present `requires_grad` back."""
    before = [(parameter, parameter.requires_grad) for parameter in model.parameters()]

    def put_back() -> None:
        for parameter, needed in before:
            parameter.requires_grad_(needed)

    return put_back


def text_setting(model: nn.Module, name: str) -> Any:
    """Returns what the configuration says of its text model, or None. Configurations of several models hold that inside."""
    config: Any = getattr(model, "config", None)
    value = getattr(config, name, None)
    if value is None and hasattr(config, "get_text_config"):
        value = getattr(config.get_text_config(decoder=True), name, None)
    return value


def context_length(model: nn.Module) -> int | None:
    """Returns the most tokens that a row may have, or None where the model's configuration does not say."""
    return text_setting(model, "max_position_embeddings")


def run_for_logits(model: nn.Module, batch: dict[str, torch.Tensor], where: torch.Tensor) -> torch.Tensor:
    """Returns logits [n, vocabulary] at the n True positions of the bool mask `where` [rows, tokens], in row order.

    The hidden states are gathered just before the output head. So logits exist only where they are asked for, and the
    model still does to them what it does to all logits (soft-capping, scaling).
    """
    head = output_head(model)
    if head is None:
        raise ModelError(f"{type(model).__name__} has no output head; load it as a causal language model")
    called: list[bool] = []

    def gather(_: nn.Module, args: tuple[Any, ...]) -> tuple[torch.Tensor]:
        called.append(True)
        of_values = isinstance(where, torch.Tensor)  # else indices, as the dry run has no mask to read
        if of_values and args[0].shape[:-1] != where.shape:
            raise ModelError(
                f"{type(model).__name__}: its output head gets {list(args[0].shape[:-1])} hidden states, where the batch has "
                f"{list(where.shape)} tokens, so no token's own logits can be told"
            )
        return (args[0][where].unsqueeze(0),)

    hook = head.register_forward_pre_hook(gather)
    try:
        logits = model(**batch, use_cache=False).logits
    finally:
        hook.remove()
    if not called:
        raise ModelError(f"{type(model).__name__}: its output head, a {type(head).__name__}, is never called itself")
    return logits[0]


@torch.no_grad()
def first_logits(model: nn.Module) -> tuple[torch.Tensor, torch.Tensor]:
    """(ids, logits) of two short rows that begin alike: the model's own logits [2, 4, vocabulary] in float32.

    Raises ModelError for a model that takes no plain rows of tokens, whose logits are not those of the tokens, and whose
    logits of a token depend on the next ones, as padding on the right would then change them.
    """
    kind, config = type(model).__name__, getattr(model, "config", None)
    if getattr(config, "model_type", "") == "reformer":
        raise ModelError(
            f"{kind} trains on rows of one length alone, and its reversible layers give adapters no gradient"
        )
    ids = torch.tensor([[1, 2, 3, 4], [1, 2, 5, 6]], device=device_of(model))
    try:
        with evaluating(model):
            logits = model(input_ids=ids, use_cache=False).logits.float()
    except torch.OutOfMemoryError:
        raise
    except (IndexError, RuntimeError, TypeError, ValueError) as error:  # of the model's own code
        raise ModelError(f"{kind} does not take 2 rows of 4 tokens: {type(error).__name__}: {error}") from error
    if logits.shape[:-1] != ids.shape:
        raise ModelError(
            f"{kind}: logits {list(logits.shape)} for {list(ids.shape)} tokens, so no token's own can be told"
        )
    one, other = logits[:, :2]
    # all of them: rounding can send a token to another expert
    within = 1e-4 if model.dtype == torch.float32 else 0.02
    if bool(((one - other).norm(dim=-1) > within * one.norm(dim=-1)).all()):
        raise ModelError(
            f"{kind} is not causal: its logits of a token depend on the tokens after it, so training by the next token teaches it "
            "to copy, and padding changes it"
        )
    return ids, logits


@torch.no_grad()
def check_packing(model: nn.Module) -> None:
    """Raises ModelError unless the model keeps the sequences of a packed batch (`data.collate_packed`) apart.

    It runs two short sequences twice: other tokens in the first one must not change the logits of the second.
    """
    device = device_of(model)
    positions = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3]], device=device)

    def logits(first: list[int]) -> torch.Tensor:
        ids = torch.tensor([[*first, 9, 8, 7, 6]], device=device)
        return model(input_ids=ids, position_ids=positions, use_cache=False).logits[0, 4:].float()

    try:
        with evaluating(model):  # dropout would change them too
            one, two = logits([1, 2, 3, 4]), logits([9, 5, 8, 7])
    except TypeError as error:
        raise ModelError(f"{type(model).__name__} takes no position_ids ({error}): train it without packing") from error
    if not (one - two).norm() <= 0.01 * one.norm():  # 0 in dense models; rounding where experts share a batch
        raise ModelError(
            f"{type(model).__name__} mixes the sequences of a packed batch (its attention does not follow position_ids, "
            "or a recurrent state runs through them): train it without packing"
        )
