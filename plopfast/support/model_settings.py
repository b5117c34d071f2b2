"""Settings of the model, of what computes it, and of the processes that share the work."""

from dataclasses import dataclass

from .errors import ConfigError
from .options import Settings, option


@dataclass(frozen=True, kw_only=True)
class Seed(Settings):
    title = "model and device"
    seed: int = option(0, "seed of sampling, initialisation, batch order and dropout", below=2**63)


@dataclass(frozen=True, kw_only=True)
class Backend(Settings):
    title = "model and device"
    backend: str = option(
        "auto",
        "how low-rank products are computed: auto takes what plopfast bench --tune found to be the fastest on this GPU, "
        "without a measurement torch, and with dropout Triton where it runs; the others name one path for every module",
        ("auto", "torch", "triton", "fused", "lora-first"),
    )


@dataclass(frozen=True, kw_only=True)
class ModelSettings(Backend):
    """The model, and what computes it."""

    model: str | None = option(None, "hub id, local folder or .gguf file (default: SmolLM2-135M-Instruct)")
    dtype: str = option(
        "auto",
        "type of the frozen weights and the activations; auto is bfloat16 on a GPU or CPU that multiplies in it, else "
        "float32. Adapters are always float32",
        ("auto", "float32", "bfloat16", "float16"),
    )
    quantize: str | None = option(
        None,
        "keep the linear weights of the layers and their experts as codes, to save memory: a half (nf4) or one (int8, fp8) byte a weight "
        "(default: as the checkpoint holds them)",
        ("nf4", "int8", "fp8"),
    )
    quantize_head: bool = option(False, "with --quantize: the output head, too")
    embedding: str = option(
        "device",
        "where the embedding's rows are looked up: cpu saves the device's memory where the output head has a weight of its own",
        ("device", "cpu"),
        free=True,
    )
    stream: bool = option(
        False,
        "keep the frozen linear weights of the layers in CPU memory (with --device cpu: in files), from where two layers at a "
        "time come to the device",
        free=True,
    )
    resident_share: float = option(
        0.0, "with --stream: share of the layers that stay on the device", below=1, free=True
    )
    device: str = option("auto", "auto (a GPU if there is one), cpu, cuda, cuda:1 or mps", free=True)
    threads: int | None = option(None, "CPU threads (default: torch's choice)", positive=True, below=1025, free=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.quantize_head and not self.quantize:
            raise ConfigError("quantize_head needs --quantize nf4, int8 or fp8: give it, or leave out --quantize-head")
        if self.resident_share and not self.stream:
            raise ConfigError(
                "resident_share is a share of streamed layers: give --stream, or leave out --resident-share"
            )


@dataclass(frozen=True, kw_only=True)
class RankSettings(Settings):
    """Several processes, started by torchrun."""

    title = "several devices (torchrun)"
    parallel: str = option(
        "ddp", "ddp: the whole model on each rank; fsdp: its frozen blocks spread over the ranks", ("ddp", "fsdp")
    )
    timeout: int = option(1800, "seconds that a rank waits for the others before it gives up", positive=True, free=True)
