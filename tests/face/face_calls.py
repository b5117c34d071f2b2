"""Calls of the whole public face. `CASES` holds them once the files that declare them are imported."""

import calls_of_adapters  # noqa: F401
import calls_of_integrations  # noqa: F401
import calls_of_training  # noqa: F401
from face_world import CASES, World

__all__ = ["CASES", "World"]
