"""Messages between an engine's parent and its worker: one JSON line, then raw arrays.

A message is a dict of plain values; its arrays follow the line as C-ordered bytes,
described by the key ``arrays`` as ``[[dtype, shape], ...]``. Knows no engines.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]


class WireError(Exception):
    """The other side hung up or wrote something else."""


def send(
    write: Callable[[bytes | memoryview], object],
    message: dict[str, Any],
    arrays: Sequence[Array] = (),
) -> None:
    """Write one message through ``write``, which must take all bytes it is given."""
    flat = [np.ascontiguousarray(a) for a in arrays]
    head = {**message, "arrays": [[a.dtype.str, list(a.shape)] for a in flat]}
    write(json.dumps(head, allow_nan=True).encode() + b"\n")
    for a in flat:
        if a.size:
            write(a.data.cast("B"))


def receive(
    read_line: Callable[[], bytes], read_into: Callable[[memoryview], None]
) -> tuple[dict[str, Any], list[Array]]:
    """Read one message. Raises `WireError` at the end of the stream or on foreign bytes."""
    line = read_line()
    if not line.endswith(b"\n"):
        raise WireError("end of stream")
    try:
        message = json.loads(line)
        shapes = message.pop("arrays")
        arrays: list[Array] = [np.empty(tuple(shape), np.dtype(dtype)) for dtype, shape in shapes]
    except (ValueError, TypeError, KeyError, AttributeError) as e:
        raise WireError(f"not a message: {line[:80]!r}") from e
    for a in arrays:
        if a.size:
            read_into(a.data.cast("B"))
    return message, arrays
