"""The records of a training, one for each step and each validation: in memory, in metrics.jsonl (of GRPO: rewards.jsonl), and in the log."""

import contextlib
from pathlib import Path
from typing import Any

from ..support import files, ranks
from ..support.errors import FileError
from ..support.strict_json import StrictJSON, dumps
from .logs import Log


class Records:
    """Keeps records in `history`, in the file `name` of a folder (rank 0; without a folder, nowhere) and in the targets of
    `log`."""

    def __init__(self, folder: Path | None, name: str = "metrics.jsonl") -> None:
        self.path = folder / name if folder is not None else None
        self.history: list[dict[str, Any]] = []
        self.log = Log()

    def begin(self, step: int) -> None:
        """Cuts the file back to the first `step` steps, those of the checkpoint that is resumed (0: anew)."""
        self.history.clear()
        if self.path is None:
            return
        if step and self.path.exists():
            for line in self.path.read_text(encoding="utf-8", errors="replace").splitlines():
                with contextlib.suppress(ValueError):  # a kill may have cut the last line short
                    record = StrictJSON().parse(line.strip())
                    if isinstance(record, dict) and isinstance(at := record.get("step"), int) and at <= step:
                        self.history.append(record)
        if ranks.is_main():
            files.write_text(self.path, "".join(dumps(record) + "\n" for record in self.history))

    def add(self, record: dict[str, Any]) -> None:
        """Adds a record, which holds its "step". Raises FileError where it cannot be written."""
        self.history.append(record)
        self.log.write({key: value for key, value in record.items() if isinstance(value, int | float)})
        if self.path is not None and ranks.is_main():
            try:
                with self.path.open("a", encoding="utf-8") as file:
                    file.write(dumps(record) + "\n")
            except OSError as error:
                raise FileError(f"{self.path}: writing failed ({error}); make room and --resume") from None
