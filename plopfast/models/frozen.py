"""The frozen weight of a linear module, however it is stored.

LoRA, scoring, merging and file checks ask a FrozenWeight; nothing else reads the weight of a frozen module. So another
kind of storage is a subclass of FrozenWeight, and one line of `find_frozen` that chooses it.

N out, K in.
"""

import weakref
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

from ..kernels import library  # noqa: F401  # registers the operation that `frobenius` calls
from ..kernels.codes import Codes
from ..support.errors import ModelError
from .quantized import QuantizedLinear, forget_quantization, is_nested, linear_of, quantized, reader_of

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


class StoredWeight:
    """Values that a module has in a parameter, `stored`, in its own layout."""

    streamed = False  # whether the values lie elsewhere than on `device`, see streaming.py

    @property
    def stored(self) -> torch.Tensor:
        """The parameter itself."""
        raise NotImplementedError

    @property
    def kind(self) -> str:
        """How the values are stored: "dense", "nf4", "int8" or "fp8"."""
        return "dense"

    @property
    def dtype(self) -> torch.dtype:
        """The dtype that products with W are computed in."""
        return self.stored.dtype

    @property
    def device(self) -> torch.device:
        return self.stored.device

    def fingerprint(self) -> list[float]:
        """The first four values as they are stored. Every rank has to call this."""
        return whole(self.stored.detach()).flatten()[:4].float().tolist()


class FrozenWeight(StoredWeight):
    """The weight W [N, K] of a module that stores it densely: [N, K] in nn.Linear, [K, N] in transformers' Conv1D.

    It holds the module and not the tensor, because `model.to`, FSDP and `functional_call` put other tensors in the
    module's place. It is cheap to make, and a LoRALinear keeps one as its attribute `frozen`.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.transposed = is_transposed(module)  # PEFT's fan_in_fan_out

    @property
    def stored(self) -> torch.Tensor:
        """The parameter itself, in the module's own layout."""
        return self.module.weight  # type: ignore[return-value]

    @property
    def weight_NK(self) -> Any:
        """What stands for W [N, K] in products: a view of the parameter, or its Codes. A sharded weight stays sharded."""
        return self.stored.T if self.transposed else self.stored

    @property
    def shape(self) -> tuple[int, int]:
        """(N, K)"""
        n_out, n_in = self.weight_NK.shape
        return n_out, n_in

    def dequantize(self) -> torch.Tensor:
        """All values of W as a dense tensor [N, K], which must not be written to. It has no gradient.

        A sharded weight is gathered, so every rank has to call this.
        """
        weight = whole(self.stored.detach())
        return weight.T if self.transposed else weight

    def frobenius(self) -> torch.Tensor:
        """||W||_F, 0-d, in float32 (float64 for float64). Every rank has to call this."""
        return torch.ops.plopfast.row_norms(self.dequantize(), None, "auto").norm()

    @torch.no_grad()
    def plus(self, delta_NK: torch.Tensor) -> torch.Tensor:
        """W + delta in the module's own layout and dtype: summed in float32 and rounded once. W stays as it is."""
        delta = delta_NK.T if self.transposed else delta_NK
        return (self.stored.float() + delta).to(self.dtype)

    @torch.no_grad()
    def add_(self, delta_NK: torch.Tensor) -> None:
        """W += delta, as `plus` sums it."""
        self.stored.copy_(self.plus(delta_NK))


class QuantizedWeight(FrozenWeight):
    """The weight of a module that stores codes, see quantized.py. It takes no update in place."""

    def __init__(self, module: nn.Module, reader: Callable[[Any], Codes]) -> None:
        super().__init__(module)
        self._reader = reader
        self.compute_dtype: torch.dtype | None = None  # bitsandbytes' int8 and fp8 do not say which

    def _codes(self) -> Codes:
        codes = self._reader(self.module)
        return codes if self.compute_dtype is None else codes.to(self.compute_dtype)

    @property
    def kind(self) -> str:
        return self._codes().kind

    @property
    def weight_NK(self) -> Codes:
        return self._codes()

    @property
    def dtype(self) -> torch.dtype:
        return self._codes().dtype

    def dequantize(self) -> torch.Tensor:
        return self._codes().new()

    def frobenius(self) -> torch.Tensor:
        return self._codes().frobenius()

    def fingerprint(self) -> list[float]:
        return self._codes().rows(0, 1).to(torch.float32).new().flatten()[:4].tolist()

    def plus(self, delta_NK: torch.Tensor) -> torch.Tensor:
        """W + delta as a dense weight in `dtype`: decoded and summed in float32, and rounded once."""
        codes = self._codes()
        return (codes.to(torch.float32).new() + delta_NK).to(codes.dtype)

    def merged(self, delta_NK: torch.Tensor, *, dense: bool) -> nn.Module:
        """A module with W + delta in place of W: an nn.Linear, or a QuantizedLinear of the same kind."""
        linear = linear_of(self.plus(delta_NK), self.module)
        return linear if dense else quantized(linear, self.kind, nested=is_nested(self._codes()))

    def add_(self, delta_NK: torch.Tensor) -> None:
        """Raises ModelError: most of a small update would be lost between two codes."""
        raise ModelError(f"{self.kind} weights take no update in place: make them dense first")


def frozen_of(module: nn.Module, name: str = "") -> FrozenWeight:
    """The frozen weight of a linear module, or of the one that a LoRALinear or a PEFT module wraps.

    Raises ModelError for every other module, with `name`, the module's class and its tensors: those of GPTQ, AWQ and HQQ, and
    tensors of torchao's classes, too.
    """
    frozen = find_frozen(module)
    if frozen is None:
        got = ", ".join(
            f"{key} {type(t).__name__} {t.dtype} {list(t.shape)}" for key, t in _own_tensors(module).items()
        )
        raise ModelError(
            f"{name or 'module'}: expected a floating-point weight [out, in] in an nn.Linear or transformers' Conv1D, or codes "
            f"as bitsandbytes (nf4, int8) and FineGrainedFP8 keep them, got {type(module).__name__} ({got or 'no tensors'}): "
            "load the model in bfloat16 or float32, or with --quantize"
        )
    return frozen


def frozen_in(model: nn.Module, module: nn.Module, name: str = "") -> FrozenWeight:
    """As `frozen_of`; the dtype of other libraries' codes is that of the model's first parameter that has one of `DTYPES`, as
    a rule the embedding."""
    frozen = frozen_of(module, name)
    if isinstance(frozen, QuantizedWeight) and not isinstance(frozen.module, QuantizedLinear):
        frozen.compute_dtype = next((p.dtype for p in model.parameters() if p.dtype in DTYPES), None)
    return frozen


def find_frozen(module: nn.Module) -> FrozenWeight | None:
    """As `frozen_of`, but None where that raises."""
    carried = getattr(module, "frozen", None)
    if isinstance(carried, FrozenWeight):
        return carried
    module = getattr(module, "base_layer", module)  # PEFT's name for it
    weight = getattr(module, "weight", None)
    plain = isinstance(module, nn.Linear) or is_transposed(module)
    if plain and _is_dense(weight):
        return FrozenWeight(module)
    reader = reader_of(module)
    return QuantizedWeight(module, reader) if reader is not None else None


def is_linear(module: nn.Module) -> bool:
    """True for nn.Linear, transformers' Conv1D, QuantizedLinear and the linear modules of quantisation libraries, some of
    which `frozen_of` refuses. False for subclasses of nn.Linear that compute something else (`is_altered`).

    It recognises those of libraries by their names (QuantLinear, WQLinear_GEMM, HQQLinear) and a matrix of integers.
    """
    if isinstance(module, nn.Linear | QuantizedLinear) or is_transposed(module):
        return not is_altered(module)
    return "Linear" in type(module).__name__ and any(
        t.dim() > 1 and not t.is_floating_point() for t in _own_tensors(module).values()
    )


def is_altered(module: nn.Module) -> bool:
    """True for a subclass of nn.Linear with a floating-point weight that computes something else than x W^T + bias: a router
    that returns a pair, or a product by groups. Falcon's own class, which computes just that, is none, and nor are the
    subclasses of quantisation libraries, which compute it from codes.
    """
    kind = type(module)
    if not isinstance(module, nn.Linear) or kind.forward is nn.Linear.forward:
        return False
    if not _is_dense(module.weight) or reader_of(module) is not None:
        return False
    if kind not in _ALTERED:
        _ALTERED[kind] = not _computes_a_product(module)
    return _ALTERED[kind]


_ALTERED: "weakref.WeakKeyDictionary[type, bool]" = weakref.WeakKeyDictionary()  # class -> what its first module showed


@torch.no_grad()
def _computes_a_product(module: nn.Linear) -> bool:
    """Whether its forward gives nn.Linear's result for two tokens; their shapes alone, where the weight has no values."""
    x_MK = torch.randn(2, module.weight.shape[1], generator=torch.Generator().manual_seed(0)).to(module.weight)
    want_MN = nn.functional.linear(x_MK, module.weight, module.bias)
    try:
        got_MN = type(module).forward(module, x_MK)
    except Exception:  # anybody's forward may raise anything where it takes inputs of another shape
        return False
    if not isinstance(got_MN, torch.Tensor) or (got_MN.shape, got_MN.dtype) != (want_MN.shape, want_MN.dtype):
        return False
    within = 8 * torch.finfo(want_MN.dtype).eps
    return want_MN.is_meta or bool((got_MN - want_MN).norm() <= within * want_MN.norm())


def is_transposed(module: nn.Module) -> bool:
    """True for transformers' Conv1D, which stores its weight [in, out]."""
    return type(module).__name__ == "Conv1D" and not isinstance(module, nn.Conv1d)


def sharers(model: nn.Module, names: Iterable[str]) -> dict[str, list[str]]:
    """Named linear module -> the other modules that share its weight; only those that share one.

    An update added to such a weight changes them all: an output head that is tied to the embedding, say.
    """
    owners: dict[Any, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        owners.setdefault(_place(parameter), []).append(name.rpartition(".")[0])
    shared = {}
    for name in names:
        frozen = frozen_of(model.get_submodule(name), name)
        others = {owner.removesuffix(".base") for owner in owners.get(_place(frozen.stored), [])}
        others -= {name.removesuffix(".base")}  # where it has an adapter
        if others:
            shared[name] = sorted(others)
    return shared


def _place(tensor: torch.Tensor) -> Any:
    """Where the values are stored, the same for two Parameters that share them."""
    real = type(tensor) in (torch.Tensor, nn.Parameter) and not tensor.is_meta  # sharded and fake ones have no address
    pointer = tensor.data_ptr() if real else 0
    return (tensor.device, pointer) if pointer else id(tensor)


def streamed_in(model: nn.Module) -> list[str]:
    """The names of the linear modules whose weights are streamed."""
    carried = [(name, module, vars(module).get("frozen")) for name, module in model.named_modules()]
    return [name for name, own, f in carried if isinstance(f, FrozenWeight) and f.streamed and f.module is own]


def make_linears_dense(model: nn.Module) -> list[str]:
    """Puts an nn.Linear with the decoded weight in the place of each quantised linear module; returns their names."""
    names = []
    if streamed_in(model):
        raise ModelError(f"{type(model).__name__} is streamed: unstream(model) first")
    for name, module in list(model.named_modules()):
        frozen = find_frozen(module) if "frozen" not in vars(module) and is_linear(module) else None
        if frozen is not None and frozen.kind != "dense":
            model.set_submodule(name, linear_of(frozen_in(model, module, name).dequantize(), module))
            names.append(name)
    forget_quantization(model)
    return names


def is_sharded(tensor: torch.Tensor) -> bool:
    """True for a DTensor, which is spread over several ranks. (Importing that class takes torch 0.6 s.)"""
    return hasattr(tensor, "full_tensor")


def whole(tensor: Any) -> Any:
    """Gathers a sharded tensor on each rank; returns any other as it is."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor


def _is_dense(weight: Any) -> bool:
    """Whether a product can take it. Quantisation libraries have tensor classes that give a floating dtype as theirs."""
    own = isinstance(weight, torch.Tensor) and type(weight).__module__.partition(".")[0] == "torch"
    return own and weight.dim() == 2 and weight.dtype in DTYPES


def _own_tensors(module: nn.Module) -> dict[str, torch.Tensor]:
    return dict(module.named_parameters(recurse=False)) | dict(module.named_buffers(recurse=False))
