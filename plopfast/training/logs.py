"""Metrics for TensorBoard and Weights & Biases; records.py writes metrics.jsonl."""

import importlib
from pathlib import Path
from typing import Any

from ..support.errors import ConfigError

TARGETS = ("tensorboard", "wandb")


class Log:
    """Forwards records of numbers to its targets; without targets, nowhere. Made by `open_log`."""

    def __init__(self, writer: Any = None, run: Any = None) -> None:
        self.writer, self.run = writer, run

    def write(self, record: dict[str, Any]) -> None:
        """Writes the numbers in `record` under their names, at its integer "step"."""
        step = record["step"]
        numbers = {key: value for key, value in record.items() if key != "step"}
        if self.writer is not None:
            for tag, value in numbers.items():
                self.writer.add_scalar(tag, value, step)
        if self.run is not None:
            self.run.log(numbers, step=step)

    def close(self) -> None:
        """Writes what is buffered and closes the targets; a second call does nothing."""
        if self.writer is not None:
            self.writer.close()
        if self.run is not None:
            self.run.finish()
        self.writer = self.run = None


def targets(log_to: str) -> list[str]:
    """Returns the names in `log_to` ("none", or a comma list), and imports their packages. Raises ConfigError for an unknown
    name or a package that is not installed."""
    names = [name.strip() for name in log_to.split(",") if name.strip()]
    if names == ["none"]:
        return []
    if not names or set(names) - set(TARGETS):
        raise ConfigError(f"log_to: expected none or a comma list of {', '.join(TARGETS)}, got {log_to!r}")
    for name in names:
        try:
            importlib.import_module(name)
        except ImportError as error:
            raise ConfigError(
                f"log_to: {name} cannot be imported ({error}): pip install {name}, or leave it out"
            ) from error
    return names


def open_log(folder: str | Path | None, log_to: str, run_name: str | None = None, first_step: int = 1) -> Log:
    """Opens a log to the targets in `log_to`: "none", or a comma list of "tensorboard" and "wandb".

    TensorBoard's events are in FOLDER/tensorboard; earlier ones from `first_step` on, of a run that was interrupted after
    its last checkpoint, are dropped. W&B's files are in FOLDER/wandb; the user chooses its mode and account (WANDB_MODE,
    `wandb login`). Raises ConfigError as `targets` does, for TensorBoard without a folder, and where W&B does not start.
    """
    names = targets(log_to)
    log = Log()
    if "tensorboard" in names:
        if folder is None:
            raise ConfigError("log_to: tensorboard needs a folder for its events; give one, or leave tensorboard out")
        from torch.utils.tensorboard import SummaryWriter

        log.writer = SummaryWriter(str(Path(folder) / "tensorboard"), purge_step=first_step)
    if "wandb" in names:
        import wandb

        if folder is not None:
            Path(folder).mkdir(parents=True, exist_ok=True)  # else wandb takes the temporary folder
        try:
            log.run = wandb.init(project="plopfast", dir=None if folder is None else str(folder), name=run_name)
        except wandb.Error as error:
            log.close()
            raise ConfigError(f"log_to: wandb does not start ({error}): wandb login, or WANDB_MODE=offline") from error
    return log
