"""Settings of what fits: a model by its configuration alone, and the memory that a training may take."""

from dataclasses import dataclass

from .options import Settings, option


@dataclass(frozen=True, kw_only=True)
class ShapeSettings(Settings):
    """A model that is not loaded."""

    title = "model and device"
    model_config: str | None = option(
        None,
        "estimate by a configuration alone, without weights, data or a run folder: {models}, a config.json, a folder with one, "
        "or a hub id in the cache",
    )


@dataclass(frozen=True, kw_only=True)
class FitSettings(Settings):
    """The memory of the card, or of the CPU where that trains."""

    title = "training"
    fit: str | None = option(
        None,
        "memory of the device, such as 6GB or 4.5GiB: choose the cheapest options with which a step fits, and say what they "
        "cost (options that you give stay)",
        free=True,
    )
