"""What all readers of model files share: a stored tensor, and checks of paths, shapes,
places and JSON that keep a hostile file to one line and little memory.

Knows no format.
"""

from __future__ import annotations

import json
import math
import os
import stat
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from joulesmith.errors import JoulesmithError

MAX_TENSORS = 1 << 17
MAX_DIMS = 16
MAX_NAME = 1 << 10
AGAIN = "download or write it again"


@dataclass(frozen=True)
class StoredTensor:
    """A tensor's place. shape: in elements. type: the format's name of the element type.
    bits: of one element; None for strings. offset: bytes from the start of ``file``."""

    name: str
    shape: tuple[int, ...]
    type: str
    bits: int | None
    file: Path
    offset: int
    nbytes: int

    @property
    def elements(self) -> int:
        return math.prod(self.shape)


def quoted(name: object) -> str:
    """A name from a file, fit for one line of an error."""
    text = str(name)
    return repr(text if len(text) <= 80 else f"{text[:79]}…")


def regular_size(path: Path) -> int:
    """Bytes of a regular file. Raises `JoulesmithError` for anything else: opening a pipe
    waits for ever, and a device has no end."""
    try:
        found = path.stat()
    except (OSError, ValueError) as e:
        reason = getattr(e, "strerror", None) or e
        raise JoulesmithError(f"cannot read: {path}: {reason}") from e
    if not stat.S_ISREG(found.st_mode):
        raise JoulesmithError(f"cannot read: {path}: not a regular file: give a model file")
    return found.st_size


def member(folder: Path, name: object, told_by: Path) -> Path:
    """The file ``name`` of a model's folder, as another file (``told_by``) names it.

    Raises `JoulesmithError` unless it is a plain name of a regular file that lies in the
    folder, or where the hub's cache keeps a folder's files (``../../blobs``).
    """
    plain = isinstance(name, str) and 0 < len(name) <= 255 and name.isprintable()
    if not plain or name in (".", "..") or any(c in str(name) for c in "/\\:"):
        raise JoulesmithError(
            f"{told_by} names a file outside its folder: {quoted(name)}: do not trust this model"
        )
    path = folder / str(name)
    if not os.path.lexists(path):
        raise JoulesmithError(f"file {name} is missing: {folder}: {AGAIN}")
    try:
        home, real = folder.resolve(), path.resolve(strict=True)
    except (OSError, RuntimeError) as e:
        raise JoulesmithError(f"cannot read: {path}: a broken link: {AGAIN}") from e
    blobs = home.parent.parent / "blobs"
    hub = home.parent.name == "snapshots" and real.parent == blobs
    if real.parent != home and not hub:
        raise JoulesmithError(
            f"{path} is a link out of its folder: do not trust this model, or copy the file in"
        )
    regular_size(real)
    return path


def stored_bytes(shape: tuple[int, ...], bits: int) -> int | None:
    """Bytes of a dense tensor; None for a shape that none can have."""
    if len(shape) > MAX_DIMS or any(not 0 <= d < 1 << 63 for d in shape):
        return None
    n = 1
    for d in shape:
        n *= d
        if n >= 1 << 62:
            return None
    return -(-n * bits // 8)


def overlapping(tensors: Iterable[StoredTensor], *, shared: bool = False) -> str | None:
    """The name of a tensor whose bytes are also another's, or None.

    shared: allow tensors that lie on exactly the same bytes, as formats that store
    equal constants once do.
    """
    placed = sorted((t.file, t.offset, t.nbytes, t.name) for t in tensors if t.nbytes)
    for (file, start, length, _), (other, begins, size, name) in pairwise(placed):
        same = shared and (start, length) == (begins, size)
        if file == other and begins < start + length and not same:
            return name
    return None


def bounded_json(
    raw: bytes, path: Path, *, objects: int, items: int, what: str = "JSON"
) -> dict[str, Any]:
    """A JSON object with at most so many objects or arrays, and items, in it.

    They are counted before parsing, as parsed JSON takes up to 30 times its text.
    Raises `JoulesmithError` for more, for damaged JSON, and for a key given twice.
    """
    if raw.count(b"{") + raw.count(b"[") > objects or raw.count(b",") > items:
        raise JoulesmithError(f"absurdly large JSON: {path}: {AGAIN}")

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            raise ValueError("a key appears twice")
        return found

    def number(text: str) -> Any:
        raise ValueError(f"{text} is no JSON number")

    try:
        found = json.loads(raw.decode("utf-8"), object_pairs_hook=once, parse_constant=number)
    except (ValueError, RecursionError) as e:
        raise JoulesmithError(f"damaged {what}: {path}: {' '.join(str(e).split())[:120]}") from e
    if not isinstance(found, dict):
        raise JoulesmithError(f"damaged {what}: no JSON object: {path}: {AGAIN}")
    return found


def read_bounded_json(
    path: Path, limit: int = 1 << 24, objects: int = 1 << 16, what: str = "JSON"
) -> dict[str, Any]:
    """A JSON object from a regular file of at most ``limit`` bytes."""
    length = regular_size(path)
    if length > limit:
        raise JoulesmithError(f"absurdly large JSON file: {path}: {AGAIN}")
    try:
        with path.open("rb") as f:
            raw = f.read(length)  # not more, should it grow meanwhile
    except OSError as e:
        raise JoulesmithError(f"cannot read: {path}: {e.strerror or e}") from e
    return bounded_json(raw, path, objects=objects, items=1 << 20, what=what)
