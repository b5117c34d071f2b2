"""One optimizer step without values: every byte that comes and goes, and every FLOP.

A copy of the model made of torch's fake tensors (shapes, dtypes and devices, but no memory and no arithmetic) takes the
forward and backward passes of a step, as trainer.py does. A model that was built from its configuration alone (see
models/shapes.py) lies on the device "meta", which then stands for the card, and "cpu" for the host: fake tensors of a GPU
abort the process in the backward pass where torch has no CUDA. What mixes the two without a copy raises an error.

What stands for what:

- torch's fake operations stand for plopfast's kernels, which need a GPU's tensors and allocate the same results. So no
  dropout mask is counted: the kernels make it from a seed, and plain torch makes it for one product at a time.
- experts of a mixture compute by our operations, also where transformers' own would.
- a decoded weight lies in one workspace for each device, as in kernels/codes.py.
- on "meta", torch's flash attention, with what it allocates, stands for the card's attention, without a mask; and the loss takes
  the smallest chunk of logits that it takes on a GPU (models/cross_entropy.py takes more where more is free).
- AdamW's moments, the best values and the average are tensors that live from the start, as in all steps but the first.

Not counted: what libraries, the CUDA context and the allocator take for themselves. liger-kernel and torch.compile are not
modelled: plopfast's own operations are.
"""

import contextlib
import copy
import dataclasses
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeCopyMode, FakeTensorMode

from ..lora.injection import inject
from ..lora.placement import Placement
from ..lora.shared import Prepared
from ..models.embedding import at_home
from ..models.experts import BySegments, mixtures
from ..models.frozen import find_frozen, is_linear
from ..models.lean import lean_modules
from ..models.quantized import one_workspace
from ..models.quantized_experts import make_dense
from ..models.rotary import rotated
from ..models.running import body, device_of, exchanged, output_head, remember_requires_grad
from ..models.shapes import miniature
from ..models.streaming import stream, unstream
from ..models.tiles import TOKENS, token_wise
from ..support.config import TrainConfig
from .blocks import prepared_blocks
from .loss import Objective
from .meter import Meter
from .moments import bytes_of_moments

MIB = 2**20
LINEAR, EMBEDDING, HEAD, OTHER = "linear weights", "embedding", "output head", "norms and other weights"
SLOTS, STREAMED = "slots of streamed blocks", "streamed blocks in CPU memory"
WORKSPACE = "workspace of a decoded weight"
ADAPTERS, CASTS, GRADIENTS, MOMENTS = "adapters", "adapters in the weights' dtype", "gradients", "AdamW's moments"
BEST, AVERAGE = "best values so far", "moving average"
KEPT, LOSS, BACKWARD = "kept for the backward pass", "loss", "backward pass, a block at a time"
PARTS = (
    LINEAR, SLOTS, EMBEDDING, HEAD, OTHER, WORKSPACE, ADAPTERS, CASTS, GRADIENTS, MOMENTS, BEST, AVERAGE, KEPT, LOSS, BACKWARD,
)  # fmt: skip


@dataclass(frozen=True)
class Estimate:
    """What a step costs with one choice of what is trained. `total_mib` is the peak; its parts need not be alive at the
    same time: `weights_mib` of the base model, `adapters_mib` for what is trained (values, where they are not base
    weights, gradients, AdamW's two moments, the best values so far, the moving average), `activations_mib` saved for the
    backward pass of a micro-batch, `logits_mib` beside them in the loss.

    `parts` are MiB that were alive at the peak, by name; they sum to it. `host_mib` is the peak of what lies in CPU memory
    instead, and `crossed_mib` is copied from one to the other in a step."""

    name: str
    types: list[str]
    parameters: int
    weights_mib: float
    adapters_mib: float
    activations_mib: float
    logits_mib: float
    total_mib: float
    tflops_per_step: float
    parts: dict[str, float] = field(default_factory=dict)
    host_mib: float = 0.0
    crossed_mib: float = 0.0


@dataclass(frozen=True)
class Step:
    """A step to estimate: all but the placement.

    `lean` tells what `recognised` found in a model with values: name -> kind. `like` is that model: its family's rotary
    embedding is compared there. A micro-batch has `rows` of `tokens` tokens, of which the last `labels` have a label.
    """

    objective: Objective
    like: nn.Module | None
    lean: dict[str, str]
    config: TrainConfig
    rows: int
    tokens: int
    labels: int
    best: bool
    device: torch.device
    resident_share: float | None = None  # a model without values is streamed, but for this share of its blocks
    embedding: str = "device"  # where its rows are looked up, of a model without values

    @classmethod
    def of_model(cls, model: nn.Module, config: TrainConfig, **of: Any) -> "Step":
        """A step of a model with values, on its own device; `of` are the fields rows, tokens, labels and best."""
        objective = Objective(model, recomputed=config.checkpointing)
        return cls(objective, model, recognised(model, config), config, device=device_of(model), **of)

    @classmethod
    def of_shapes(cls, model: Any, config: TrainConfig, **of: Any) -> "Step":
        """A step of a model without values, which lies on "meta"; `of` as in `of_model`, with the device that it would be on.

        What takes values to find out is found in a miniature of it. Where there is none, all is counted as transformers
        computes it.
        """
        small = miniature(model)
        kinds = recognised(small, config) if small is not None else {}
        by_place: dict[str, set[str | None]] = {}
        for name, _ in small.named_modules() if small is not None else ():
            by_place.setdefault(_numberless(name), set()).add(kinds.get(name))
        lean = {}
        for name, _ in model.named_modules():
            found = by_place.get(_numberless(name), set())
            if len(found) == 1 and (kind := next(iter(found))) is not None:
                lean[name] = kind
        why = Objective(small).why if small is not None else "no small model of its family can be built to compare"
        objective = Objective(model, recomputed=config.checkpointing, why=why)
        return cls(objective, small, lean, config, **of)

    def estimate(self, name: str, placement: Placement | None) -> Estimate:
        """Runs the step on a copy of the model without values."""
        mode, live = FakeTensorMode(), Meter(self.device)
        with FakeCopyMode(mode):
            objective = copy.deepcopy(self.objective)
        model = objective.model
        _choose_attention(model, self.tokens, self.device)
        config = dataclasses.replace(self.config, liger=False, compile=False)
        rotary = rotated(self.like) if self.like is not None else contextlib.nullcontext()
        with rotary, mode:  # compared before values are gone
            self._place(model)
            if placement is None:
                unstream(model)
                make_dense(model)
                _widen(model)
                model.requires_grad_(True)
            else:
                inject(model, placement, dropout=config.dropout, dora=config.dora, backend="torch")
            _experts_by_segments(model)
            for tensor, part in _parts_of(model):
                live.add(
                    tensor, part, host=part == STREAMED
                )  # on a CPU it lies in a mapped file, which the system may drop
            trained = [p for p in model.parameters() if p.requires_grad]
            values = sum(p.nbytes for p in trained)
            weights = live.now - (values if placement is not None else 0)
            model.train()
            passes = min(config.accumulate, 2)  # a third one finds what the second one found
            kept = self._kept(trained)
            for tensor, part in kept:
                live.add(tensor, part)
            for p in trained:
                p.register_post_accumulate_grad_hook(lambda p: live.name(p.grad, GRADIENTS))
            body(model).register_forward_hook(lambda *_: setattr(live, "part", LOSS))
            with live, one_workspace(lambda space: live.name(space, WORKSPACE)):
                live.part = CASTS
                with prepared_blocks(model, config, self.lean), Prepared(model):
                    saved, logits = self._passes(objective, passes, live)
        return Estimate(
            name=name,
            types=placement.types if placement is not None else [],
            parameters=sum(p.numel() for p in trained),
            weights_mib=weights / MIB,
            adapters_mib=(
                sum(t.nbytes for t, _ in kept if t.device.type == self.device.type)
                + (2 if placement is not None else 1) * values
            )
            / MIB,
            activations_mib=saved / MIB,
            logits_mib=logits / MIB,
            total_mib=live.peak / MIB,
            tflops_per_step=live.flops / passes * config.accumulate / 1e12,
            parts={part: live.at_peak[part] / MIB for part in PARTS if live.at_peak[part]},
            host_mib=live.host_peak / MIB,
            crossed_mib=live.crossed / passes * config.accumulate / MIB,
        )

    def _place(self, model: nn.Module) -> None:
        """Puts a model without values on its devices, as `loading.load_model` puts one with values."""
        if self.like is self.objective.model:
            return
        apart = self.resident_share is not None or self.embedding == "cpu"
        put_on(model, torch.device("cpu") if apart else self.device)
        if self.resident_share is not None:
            with at_home(model, self.device, self.embedding):
                stream(model, self.device, self.resident_share)
        elif apart:
            with at_home(model, self.device, self.embedding):
                put_on(model, self.device)

    def _passes(self, objective: Objective, passes: int, live: Meter) -> tuple[int, int]:
        """Runs micro-batches forward and backward. Returns the bytes that the first one keeps for its backward pass, and how
        much more there was at the most until then."""
        live.part, found = KEPT, []
        batch = self._batch()
        for _ in range(passes):
            live.part = KEPT
            loss = objective(batch)
            found.append((live.parts[KEPT] + live.parts[LOSS], live.peak - live.now))
            live.part = BACKWARD
            loss.backward()
            del loss
        return found[0]

    def _kept(self, trained: list[nn.Parameter]) -> list[tuple[torch.Tensor, str]]:
        """What lives as long as the training does, beside the parameters."""
        parts = [*([BEST] if self.best else []), *([AVERAGE] if self.config.ema else [])]
        moments = torch.empty(bytes_of_moments(trained, self.config.optimizer), dtype=torch.uint8, device=self.device)
        host = {BEST: "cpu"} if self.config.keep_best == "cpu" else {}
        copies = [(torch.empty_like(p, device=host.get(part, p.device)), part) for part in parts for p in trained]
        return [(moments, MOMENTS), *copies]

    def _batch(self) -> dict[str, Any]:
        """Returns what `Objective` takes; the places of the labels are indices, as fake labels cannot be read."""
        ids = torch.zeros(self.rows, self.tokens, dtype=torch.long, device=self.device)
        columns = torch.arange(self.tokens - 1 - self.labels, self.tokens - 1, device=self.device)
        row = torch.arange(self.rows, device=self.device)
        row = row.repeat_interleave(self.labels, output_size=self.rows * self.labels)
        return {"input_ids": ids, "labels": ids, "at": (row, columns.repeat(self.rows))}


def _experts_by_segments(model: nn.Module) -> None:
    """Makes experts compute with our operations: torch's grouped product refuses float32 and odd widths where tensors have no
    values."""
    for mixture in mixtures(model).values():
        mixture.module.forward = BySegments(mixture)


def recognised(model: nn.Module, config: TrainConfig) -> dict[str, str]:
    """Returns the kinds of the modules that `prepared_blocks` would give another forward, by name; it takes them where the
    tensors have no values. `model` stays as it is."""
    put_back = remember_requires_grad(model)
    model.requires_grad_(False)  # as beside adapters; weights that are trained go other ways by themselves
    lean = lean_modules(model)
    kinds = {name: str(module.forward.kind) for name, module in lean.items()}  # type: ignore[attr-defined]
    try:
        alone = token_wise(model)[0] if config.mlp_rows else {}
    finally:
        for module in lean.values():
            del module.forward
        put_back()
    return dict.fromkeys(alone, TOKENS) | kinds


def _numberless(name: str) -> str:
    return re.sub(r"\d+", "#", name)


def _parts_of(model: nn.Module) -> Iterator[tuple[torch.Tensor, str]]:
    """The model's tensors with the part that each one is."""
    head = output_head(model)
    embedding = getattr(model, "get_input_embeddings", lambda: None)()
    for module in (embedding, head):
        part = HEAD if module is head else EMBEDDING
        for tensor in module.parameters() if module is not None else ():
            yield tensor, part
    for module in model.modules():
        part = LINEAR if is_linear(module) and find_frozen(module) else OTHER
        for name, tensor in module.named_parameters(recurse=False):
            yield tensor, ADAPTERS if name in ("lora_A", "lora_B", "lora_magnitude") else part
    for tensor in model.buffers():
        yield tensor, OTHER
    if streaming := getattr(model, "streaming", None):
        for tensor in streaming.streamer.slots:
            yield tensor, SLOTS
        for payload in streaming.streamer.payloads:
            for tensors in payload.tensors.values():
                yield from ((tensor, STREAMED) for tensor in tensors.values())


def put_on(model: nn.Module, device: torch.device) -> None:
    """Puts the fake tensors of a model from "meta" on the device that it would be on."""
    exchanged(model, lambda tensor: tensor if tensor.device == device else torch.empty_like(tensor, device=device))


def _widen(model: nn.Module) -> None:
    """Makes all floating-point tensors float32, as full fine-tuning has them."""
    exchanged(model, lambda tensor: tensor.float() if tensor.is_floating_point() else tensor)


def _choose_attention(model: Any, tokens: int, device: torch.device) -> None:
    """Makes attention run without a mask where training has none. transformers builds no mask where no row is packed, but
    it cannot see that in tensors without values; for an attention that it does not know, it never builds one."""
    config = getattr(model, "config", None)
    if getattr(config, "_attn_implementation", None) != "sdpa":
        return
    from transformers import AttentionInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    window = getattr(config, "sliding_window", None)
    if device.type == "meta":
        AttentionInterface.register("plopfast_card", _flash)
        model.set_attn_implementation("plopfast_card")
    elif window is None or window >= tokens:
        AttentionInterface.register("plopfast_sdpa", sdpa_attention_forward)
        model.set_attn_implementation("plopfast_sdpa")


def _flash(module: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: Any, **how: Any) -> tuple[Any, None]:
    """torch's flash attention of q [B, H, T, D] and k, v [B, G, T, D] as transformers calls one: [B, T, H, D]. On "meta" torch
    itself would take plain products, whose T x T matrices no card has in memory."""
    found = torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, 0.0, True, scale=how.get("scaling"))
    return found[0].transpose(1, 2).contiguous(), None
