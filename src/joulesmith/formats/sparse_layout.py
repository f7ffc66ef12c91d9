"""Names in a folder of a sparse model, and what its tensors make up. Reads only headers.

Written by `export.sparse_folder`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

from joulesmith.errors import JoulesmithError
from joulesmith.formats.files import AGAIN, StoredTensor, quoted
from joulesmith.formats.packed import Logical

MODEL_TYPE = "joulesmith_sparse"
WEIGHTS = "sparse.safetensors"
PARTS = ("index", "places", "values", "steps", "zeros")
"""Of each matrix, behind its name; the last two where its grid has them."""
TYPES = {"index": "I32", "places": "U8", "values": "U8", "steps": "F16", "zeros": "U8"}


def sparse_config(config: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """What such a folder's config.json says of the layouts; None for another folder."""
    ours = config.get("joulesmith")
    return ours if isinstance(ours, dict) and ours.get("sparse") == 1 else None


def logical(tensors: Iterable[StoredTensor], ours: Mapping[str, Any]) -> list[Logical]:
    """The parameters of a sparse folder: parts of a matrix as one.

    Raises `JoulesmithError` where the config does not tell of a matrix what it should.
    """
    by_name = {t.name: t for t in tensors}
    matrices = ours.get("matrices")
    found = []
    for name, entry in matrices.items() if isinstance(matrices, dict) else ():
        parts = [by_name.pop(f"{name}.{p}") for p in PARTS if f"{name}.{p}" in by_name]
        told = entry if isinstance(entry, dict) else {}
        shape, layout, kind = (told.get(k) for k in ("shape", "layout", "kind"))
        sides = isinstance(shape, list) and len(shape) == 2
        if not (
            sides
            and all(type(d) is int and 0 < d < 1 << 31 for d in shape or ())
            and all(isinstance(v, str) and v.isprintable() for v in (layout, kind))
            and parts
        ):
            where = next(iter(by_name.values())).file if by_name else "config.json"
            raise JoulesmithError(f"damaged matrix {quoted(name)}: {where}: {AGAIN}")
        size = tuple(shape or ())
        label = f"{kind} {layout}"[:60]
        found.append(Logical(name, size, label, math.prod(size), sum(p.nbytes for p in parts)))
    found += [Logical(t.name, t.shape, t.type, t.elements, t.nbytes) for t in by_name.values()]
    return sorted(found, key=lambda q: q.name)
