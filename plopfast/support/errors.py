"""What goes wrong in a user's hands: every message says what was expected, what came, where, and how to mend it."""

import difflib
from collections.abc import Sequence


class PlopfastError(Exception):
    """Base of all errors that plopfast raises about its inputs; the command line prints it and exits with 2."""


class ConfigError(PlopfastError):
    """Options that contradict each other or have impossible values."""


class DataError(PlopfastError):
    """A data file that is missing, broken, empty or does not fit the model."""


class ModelError(PlopfastError):
    """A model that cannot be found, loaded or scored."""


class PlacementError(PlopfastError):
    """A placement that does not fit the model or the scores."""


class AdapterError(PlopfastError):
    """An adapter that is broken or belongs to another base model."""


class BackendError(PlopfastError, RuntimeError):
    """A backend that cannot run on this device; the message says why."""


class TrainingError(PlopfastError):
    """Training that cannot go on."""


class RankError(PlopfastError):
    """Another rank's failure, which has its own message there."""


class FileError(PlopfastError):
    """A file or folder that cannot be read, written or may not be overwritten."""


class Interrupted(KeyboardInterrupt):
    """A signal that stopped the work after its state was saved; the command line exits with 128 + its number."""

    def __init__(self, message: str, number: int) -> None:
        super().__init__(message)
        self.number = number


def nearest(name: str, known: Sequence[str]) -> str:
    """The end of an error about an unknown name: what may have been meant, or nothing."""
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.4)
    return f"; did you mean {close[0]!r}?" if close else ""
