"""Which adapter each row of a batch takes, and in which modules; and an adapter that is in the weights for a while.

pf.load_adapter(model, "legal/adapter", name="legal")
pf.load_adapter(model, "support/adapter", name="support")
with pf.active(model, ["legal", "support", None]):     # one for each row of the batch; None is the base alone
    logits = model(input_ids, attention_mask=mask).logits
"""

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn

from ..models.frozen import sharers, streamed_in
from ..models.linears import place_in_layer
from ..models.running import body, device_of, evaluating
from ..support.errors import AdapterError, nearest
from .layer import adapters
from .many import NamedLoRA, Routing, Use, adapter_names, merge_place, named_places, routing_of, unmerge_place


@contextlib.contextmanager
def active(
    model: nn.Module, names: str | Use | Sequence[str | Use | None] | None, *, without: Sequence[str] = ()
) -> Iterator[None]:
    """Chooses adapters while it lasts: one name for all rows, or a sequence with one for each row of each batch. None is the base
    alone, and a `Use` says in which modules the adapter is off; `without` says so for all rows.

    A batch of another number of rows is refused: where beams or several answers multiply the rows, give a name for each.
    Contexts nest. The choice is the model's, so threads that share a model have to take turns.

    Raises AdapterError for a model without adapters that have names, for an unknown name or module, and for a model whose modules
    don't read the rows of a batch one after the other.

    >>> placement = pf.place(pf.score(model, batches), rank=4)
    >>> for name in ("legal", "support"):
    ...     names = pf.inject(model, placement, name=name)
    >>> with pf.active(model, ["legal", "support", None]):
    ...     model(torch.ones(3, 5, dtype=torch.long)).logits.shape
    torch.Size([3, 5, 300])
    >>> with pf.active(model, "legal", without=["mlp"]):
    ...     answer = model.generate(torch.ones(1, 2, dtype=torch.long), max_new_tokens=2)
    """
    routing = known_routing(model)
    several = not (names is None or isinstance(names, str | Use))
    given: list[Any] = list(names) if several else [names]  # type: ignore[arg-type]
    if not given:
        raise AdapterError("active: expected a name, or one for each row, got none")
    uses = [_use(model, one, without) for one in given]
    if len({*uses}) > 1:
        check_rows(model, routing)
    with chosen(model, routing, [(use, 1) for use in uses], rows=len(uses) if several else None):
        yield


@contextlib.contextmanager
def chosen(
    model: nn.Module, routing: Routing, runs: Sequence[tuple[Use, int]], *, rows: int | None = None
) -> Iterator[None]:
    """Puts runs of rows (or tokens, where these are one row) in force while it lasts. `rows`: what each batch has to have."""
    hook: Any = contextlib.nullcontext()
    if rows is not None:
        hook = body(model).register_forward_pre_hook(
            lambda _, args, kwargs: _check_batch(args, kwargs, rows), with_kwargs=True
        )
    routing.enter(runs)
    try:
        with hook:
            yield
    finally:
        routing.leave()


def _check_batch(args: tuple[Any, ...], kwargs: dict[str, Any], rows: int) -> None:
    given = [*args[:1], *(kwargs.get(key) for key in ("input_ids", "inputs_embeds"))]
    found = next((one.shape[0] for one in given if isinstance(one, torch.Tensor)), None)
    if found is not None and found != rows:
        raise AdapterError(
            f"adapters were named for {rows} rows, and the batch has {found}: name one for each row (beams and several answers of a "
            "prompt are rows, too, next to each other), or one for all"
        )


def known_routing(model: nn.Module) -> Routing:
    """The model's Routing. Raises AdapterError for a model without adapters that have names."""
    routing = routing_of(model)
    if routing is None:
        remedy = "load_adapter(model, path, name=...) or inject(model, placement, name=...) gives one"
        raise AdapterError(f"the model has no adapters with names: {remedy}")
    return routing


def _use(model: nn.Module, given: str | Use | None, without: Sequence[str]) -> Use:
    """Raises AdapterError for an unknown adapter, and for modules `without` that don't have it."""
    use = given if isinstance(given, Use) else Use(given)
    for one in (without, use.without):
        if isinstance(one, str):
            raise AdapterError(f"without: expected a list of modules, got {one!r}: write [{one!r}]")
    use = Use(use.name, (*use.without, *without))
    if use.name is None:
        return use
    known = adapter_names(model)
    if use.name not in known:
        raise AdapterError(
            f"unknown adapter {use.name!r}{nearest(str(use.name), known)}; the model has {', '.join(known)}"
        )
    modules = adapters(model, use.name)
    for part in use.without:
        if not any(Use(None, (part,)).leaves_out(module) for module in modules):
            types = sorted({place_in_layer(module)[1][-1] for module in modules})
            raise AdapterError(
                f"without: {part!r} is no module of adapter {use.name!r}; its types are {', '.join(types)}, and parts of names such "
                "as mlp or layers.0 count, too"
            )
    return use


@torch.no_grad()
def check_rows(model: nn.Module, routing: Routing) -> None:
    """Raises AdapterError unless each module with adapters reads the rows of a batch one after the other, found by running the
    model on two rows, one of which changes."""
    if routing.is_checked:
        return
    inputs: dict[str, list[torch.Tensor]] = {}
    device = device_of(model)
    with contextlib.ExitStack() as stack:
        for place in named_places(model):

            def note(module: Any, args: tuple[torch.Tensor, ...]) -> None:
                inputs.setdefault(module.name, []).append(args[0].flatten(0, -2).clone())

            stack.enter_context(place.register_forward_pre_hook(note))
        stack.enter_context(evaluating(model))
        stack.enter_context(chosen(model, routing, [(Use(None), 1)]))
        for row in ([4, 5, 6], [7, 5, 8]):
            ids = torch.tensor([[1, 2, 3], row], device=device)
            body(model)(input_ids=ids, use_cache=False)
    for name, seen in inputs.items():
        half = len(seen) // 2
        for one, other in zip(seen[:half], seen[half:], strict=False):
            first = len(one) // 2
            alike = len(one) == len(other) and len(one) % 2 == 0 and torch.equal(one[:first], other[:first])
            if not alike or torch.equal(one[first:], other[first:]):
                raise AdapterError(
                    f"{name} of this {type(model).__name__} does not read the rows of a batch one after the other, so rows cannot have "
                    "adapters of their own there: run rows of one adapter at a time, or leave the module out of the placement"
                )
    routing.is_checked = True


def merge_adapter(model: nn.Module, name: str) -> list[str]:
    """Adds the adapter's update to the weights, for as long as most rows take it: these then cost what the base costs. Rows that
    take another adapter, or leave it out, have it taken off again beside their product, so `active` works as before, to the
    rounding of the weights' dtype. Returns the names of the modules.

    The weights as they were lie in CPU memory until `unmerge_adapter` or `unload` puts them back, bit for bit.

    Raises AdapterError for an unknown name, where an adapter is merged already, where any adapter of its modules is DoRA's, and
    for weights that are quantised, streamed or shared.

    >>> names = pf.inject(model, pf.place(pf.score(model, batches), rank=4), name="legal")
    >>> pf.merge_adapter(model, "legal") == names
    True
    >>> pf.unmerge_adapter(model)
    """
    _use(model, name, ())
    modules: dict[str, tuple[Any, NamedLoRA]] = {
        path: (model.get_submodule(path), one) for path, one in adapters(model, name).items()
    }
    merged = next((place.merged for place in named_places(model) if place.merged), None)
    if merged is not None:
        raise AdapterError(f"the adapter {merged!r} is merged already: unmerge_adapter(model) first")
    if streamed := streamed_in(model):
        raise AdapterError(f"{streamed[0].removesuffix('.base')} is streamed, and the host's copy takes no update")
    for path, others in sharers(model, modules).items():
        raise AdapterError(f"{path} shares its weight with {' and '.join(others)}: merging would change these too")
    for path, (place, _) in modules.items():
        if dora := next((one.name for one in place.members if one.lora_magnitude is not None), None):
            raise AdapterError(
                f"{path}: the adapter {dora!r} is DoRA's, which scales W itself, so no update can be taken off again beside it: "
                "unload it, or leave the weights as they are"
            )
        if place.frozen.kind != "dense":
            raise AdapterError(f"{path} has {place.frozen.kind} weights, which take no update in place")
    try:
        for place, one in modules.values():
            merge_place(place, one)
    except BaseException:
        unmerge_adapter(model)
        raise
    return list(modules)


def unmerge_adapter(model: nn.Module) -> None:
    """Puts the weights back as they were before `merge_adapter`."""
    for place in named_places(model):
        unmerge_place(place)
