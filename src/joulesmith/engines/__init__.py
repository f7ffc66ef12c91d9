"""Run a model file: one file an engine."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from joulesmith.errors import JoulesmithError, MissingExtraError

if TYPE_CHECKING:
    from joulesmith.engines.base import Engine

ENGINES = ("llama.cpp", "torch")


def get_engine(name: str = "llama.cpp", *, library: str | os.PathLike[str] | None = None) -> Engine:
    """The engine of that name; ``library`` names its shared object instead of the default.

    "torch" runs compressed-tensors folders with packed weights (`engines.packed_folder`).

    Raises `JoulesmithError` for an unknown name, `MissingExtraError` when it is not installed.
    """
    if name == "llama.cpp":
        from joulesmith.engines.llamacpp import LlamaCpp

        return LlamaCpp(library)
    if name == "torch":
        try:
            from joulesmith.engines.packed_folder import PackedTorch
        except ImportError as e:
            raise MissingExtraError(e.name or "torch") from e

        return PackedTorch()
    raise JoulesmithError(f"unknown engine {name!r}: one of {', '.join(ENGINES)}")
