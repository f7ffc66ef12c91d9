"""Run a model file: one file an engine."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from joulesmith.errors import JoulesmithError

if TYPE_CHECKING:
    from joulesmith.engines.base import Engine

ENGINES = ("llama.cpp",)


def get_engine(name: str = "llama.cpp", *, library: str | os.PathLike[str] | None = None) -> Engine:
    """The engine of that name; ``library`` names its shared object instead of the default.

    Raises `JoulesmithError` for an unknown name, `MissingExtraError` when it is not installed.
    """
    if name == "llama.cpp":
        from joulesmith.engines.llamacpp import LlamaCpp

        return LlamaCpp(library)
    raise JoulesmithError(f"unknown engine {name!r}: one of {', '.join(ENGINES)}")
