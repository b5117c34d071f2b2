"""A training run's checkpoints: one safetensors file a step, of which the newest good one is found again."""

import contextlib
import json
import os
import shutil
import warnings
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from ..support import files
from ..support.errors import FileError


def save_state(folder: Path, step: int, tensors: dict[str, torch.Tensor], facts: dict[str, Any], keep: int) -> Path:
    """Writes a training run's tensors and JSON facts as one file, step-N.safetensors, so that a torn write leaves no
    half of it, and then removes all but the newest `keep` checkpoints. Raises FileError; earlier ones are intact then."""
    path = checkpoint_path(folder, step)
    with files.replacing(path) as scratch:
        save_file({k: t.detach().cpu().contiguous() for k, t in tensors.items()}, scratch, {"facts": json.dumps(facts)})
        with scratch.open("rb") as file:
            os.fsync(file.fileno())  # the rename must not reach the disk before the data does
    for old in checkpoints(folder)[keep:]:
        old.unlink(missing_ok=True)
    return path


def checkpoint_path(folder: Path, step: int) -> Path:
    return folder / f"step-{step:08d}.safetensors"


def checkpoints(folder: Path) -> list[Path]:
    """The checkpoints in a folder, newest first."""
    return sorted(folder.glob("step-*.safetensors"), reverse=True)


def load_state(folder: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any], Path]:
    """The newest good checkpoint that `save_state` wrote, and its path; one that is damaged is passed over with a warning.

    What writes that were killed left behind is removed, and the damaged files are renamed, so that they do not count
    among those to keep. Raises FileError where there is no good one.
    """
    for scratch in folder.glob(".step-*"):
        shutil.rmtree(scratch, ignore_errors=True)
    problems: dict[Path, str] = {}
    for path in checkpoints(folder):
        try:
            tensors, metadata = files.read_tensors(path, "plopfast train")
            facts = json.loads(metadata["facts"])
        except (FileError, KeyError, json.JSONDecodeError) as error:
            problems[path] = f"{path}: not a readable training checkpoint ({error})"
            continue
        for damaged, problem in problems.items():
            warnings.warn(f"{problem}; going on from {path.name}", stacklevel=2)
            with contextlib.suppress(FileNotFoundError):  # another rank was quicker
                damaged.rename(damaged.with_suffix(".damaged"))
        return tensors, facts, path
    found = "; ".join(problems.values()) or f"{folder}: no training checkpoint"
    raise FileError(f"{found}; start anew without --resume")
