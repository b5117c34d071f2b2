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
    from .data.describe import describe_data as describe_data
    from .data.labels import tokenize as tokenize
    from .data.rows import read_jsonl as read_jsonl, read_rows as read_rows
    from .integrations.grpo import grpo as grpo
    from .integrations.peft import accelerate as accelerate, restore as restore
    from .lora.active import active as active, merge_adapter as merge_adapter, unmerge_adapter as unmerge_adapter
    from .lora.injection import inject as inject, unload as unload
    from .lora.layer import LoRALinear as LoRALinear
    from .lora.many import Use as Use
    from .lora.many_ops import lora_linear_grouped as lora_linear_grouped
    from .lora.merging import merge as merge
    from .lora.ops import linear_norms as linear_norms, lora_linear as lora_linear
    from .lora.peft_files import load_adapter as load_adapter, save_adapter as save_adapter
    from .lora.placement import Placement as Placement
    from .models.linears import linear_modules as linear_modules
    from .models.loading import load_model as load_model
    from .placing.place import place as place
    from .placing.suggest import suggest as suggest
    from .scoring.nfn import score as score
    from .scoring.report import NFNReport as NFNReport
    from .support.config import RunConfig as RunConfig, TrainConfig as TrainConfig
    from .support.errors import BackendError as BackendError, PlopfastError as PlopfastError
    from .training.trainer import Trainer as Trainer, TrainResult as TrainResult

_HOME = {
    name: module
    for module, names in {
        "integrations.peft": "accelerate restore",
        "lora.active": "active merge_adapter unmerge_adapter",
        "lora.injection": "inject unload",
        "lora.layer": "LoRALinear",
        "lora.many": "Use",
        "lora.many_ops": "lora_linear_grouped",
        "lora.merging": "merge",
        "lora.ops": "linear_norms lora_linear",
        "lora.peft_files": "load_adapter save_adapter",
        "lora.placement": "Placement",
        "data.describe": "describe_data",
        "data.labels": "tokenize",
        "data.rows": "read_jsonl read_rows",
        "integrations.grpo": "grpo",
        "models.linears": "linear_modules",
        "models.loading": "load_model",
        "placing.place": "place",
        "placing.suggest": "suggest",
        "scoring.nfn": "score",
        "scoring.report": "NFNReport",
        "support.config": "RunConfig TrainConfig",
        "support.errors": "BackendError PlopfastError",
        "training.trainer": "Trainer TrainResult",
    }.items()
    for name in names.split()
}
__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(importlib.import_module(f".{_HOME[name]}", __name__), name)
    raise AttributeError(f"module 'plopfast' has no attribute {name!r}")
