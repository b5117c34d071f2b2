"""The checkpoints of GRPO: those of Hugging Face's Trainer, in a folder of the run's.

The adapter in them is a safetensors file. The optimizer's state, the schedule and the random states are torch files, which
transformers reads with `weights_only=True`: they cannot run code. `training_args.bin`, which nobody reads, is a pickle and
is not kept.
"""

import contextlib
from pathlib import Path

from ..support import files

GRPO_CHECKPOINTS = "grpo-checkpoints"  # their folder within a run's folder
_WHOLE = "plopfast.json"  # written last: a checkpoint without it was cut short
_FILES = (
    "adapter_config.json", "adapter_model.safetensors", "README.md", "optimizer.pt", "scheduler.pt", "rng_state.pth", "scaler.pt",
    "trainer_state.json", "training_args.bin", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json",
    "added_tokens.json", "vocab.json", "merges.txt", "tokenizer.model", "spiece.model", "chat_template.jinja", "*.tiktoken", _WHOLE,
)  # fmt: skip
GRPO_CHECKPOINT_FILES = tuple(f"checkpoint-*/{name}" for name in _FILES)


def whole_ones(folder: Path) -> list[Path]:
    """The whole checkpoints in a folder, the newest last."""
    return sorted((path.parent for path in folder.glob(f"checkpoint-*/{_WHOLE}")), key=step_of)


def last_checkpoint(folder: Path) -> Path | None:
    """The newest whole checkpoint in a folder, if any."""
    return next(reversed(whole_ones(folder)), None)


def step_of(checkpoint: Path) -> int:
    """The step after which a checkpoint was written."""
    return int(checkpoint.name.rpartition("-")[2])


def finish(folder: Path, step: int) -> None:
    """Marks the checkpoint of a step as whole, without its pickle."""
    path = folder / f"checkpoint-{step}"
    (path / "training_args.bin").unlink(missing_ok=True)
    files.write_json(path / _WHOLE, {"plopfast": "grpo checkpoint", "step": step})


def rotate(folder: Path, keep: int) -> None:
    """Deletes the files of all whole checkpoints but the newest `keep`. What else lies in their folders stays."""
    for path in whole_ones(folder)[:-keep]:
        (path / _WHOLE).unlink()  # first: what is left of it is no checkpoint any more
        for name in _FILES:
            for file in path.glob(name):
                file.unlink()
        with contextlib.suppress(OSError):  # not empty
            path.rmdir()
