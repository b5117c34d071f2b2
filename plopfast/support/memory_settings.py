"""Settings that make a training step need less memory, and what each one costs is time."""

from dataclasses import dataclass

from .options import Settings, option


@dataclass(frozen=True, kw_only=True)
class MemorySettings(Settings):
    """What a training step need not hold, or holds elsewhere. The estimate counts each of them."""

    title = "training"
    checkpointing: bool = option(
        False, "save memory: compute activations again in the backward pass, block by block", free=True
    )
    mlp_rows: int | None = option(
        None,
        "save memory: compute each MLP so many tokens at a time, and again in the backward pass (default: all at once)",
        positive=True,
    )
    offload: bool = option(False, "save GPU memory: keep activations in CPU memory until the backward pass", free=True)
    optimizer: str = option(
        "adamw",
        "adamw8bit saves memory: it keeps AdamW's moments in 8 bits, through bitsandbytes or torchao",
        ("adamw", "adamw8bit"),
    )
    keep_best: str = option(
        "device", "where the best adapters so far are kept; cpu saves the device's memory", ("device", "cpu"), free=True
    )
