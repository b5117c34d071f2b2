"""plopfast: find where LoRA adapters belong (PLoP, arXiv 2506.20629), and train them fast in little memory.

    import plopfast as pf
    model, tokenizer = pf.load_model("HuggingFaceTB/SmolLM2-135M-Instruct")
    report = pf.score(model, batches)
    placement = pf.place(report, rule="plop", k=3, rank=16)
    pf.inject(model, placement)
    result = pf.Trainer(model, pf.TrainConfig(lr=2e-4), train, valid).fit()
    pf.save_adapter(model, "out/adapter")

Names are imported when they are first used, so that the command line can answer, and set OpenMP's waiting policy,
before torch is loaded.
"""

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from .checkpoint import load_adapter as load_adapter, save_adapter as save_adapter
    from .config import RunConfig as RunConfig, TrainConfig as TrainConfig
    from .data import read_jsonl as read_jsonl, tokenize as tokenize
    from .errors import BackendError as BackendError, PlopfastError as PlopfastError
    from .lora import LoRALinear as LoRALinear, inject as inject, merge as merge, unload as unload
    from .models import linear_modules as linear_modules, load_model as load_model
    from .nfn import NFNReport as NFNReport, score as score
    from .ops import linear_norms as linear_norms, lora_linear as lora_linear
    from .placement import Placement as Placement, place as place
    from .train import Trainer as Trainer, TrainResult as TrainResult

_HOME = {
    name: module
    for module, names in {
        "checkpoint": "load_adapter save_adapter", "config": "RunConfig TrainConfig", "data": "read_jsonl tokenize",
        "errors": "BackendError PlopfastError", "lora": "LoRALinear inject merge unload", "models": "linear_modules load_model",
        "nfn": "NFNReport score", "ops": "linear_norms lora_linear", "placement": "Placement place", "train": "Trainer TrainResult",
    }.items()
    for name in names.split()
}  # fmt: skip
__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(importlib.import_module(f".{_HOME[name]}", __name__), name)
    raise AttributeError(f"module 'plopfast' has no attribute {name!r}")
