"""Which type each matrix of a model gets: names, patterns, a default, and what fits its rows.

A recipe says types by GGUF tensor name or by pattern; here they become one type a matrix.
Knows names and shapes; rounds nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING

from joulesmith.compress.quantize.grids import grid
from joulesmith.errors import JoulesmithError

if TYPE_CHECKING:
    from joulesmith.models import Model, TensorRef

HEAD = "output.weight"
ROW = "-ROW"
"""Ending of a type with one scale a row, whatever the row's length: "INT8-ROW", "FP8-ROW"."""

FALLBACK = {"Q4_K": "Q5_0", "Q5_K": "Q5_1", "Q6_K": "Q8_0", "TQ1_0": "Q4_0", "TQ2_0": "Q4_0"}
"""What llama.cpp stores where a row holds no whole number of blocks (src/llama-quant.cpp,
release b11549); all others with blocks of more than 32 weights become `_SMALL`."""
_SMALL = "IQ4_NL"
_LAST = "F16"


@dataclass(frozen=True)
class Choice:
    """types: GGUF name -> type, of the matrices that get one. notes: what fell back, in words."""

    types: dict[str, str]
    notes: tuple[str, ...] = ()


def choose(
    model: Model,
    types: Mapping[str, str | None],
    default: str | None,
    *,
    untied: bool = False,
    fall_back: bool = True,
) -> Choice:
    """The type of each matrix of ``model``.

    types: GGUF name or shell pattern ("blk.*.ffn_down.weight") -> type, or None for "as it
    is". A full name wins over patterns, and of patterns the first that matches. default: of
    matrices inside decoder blocks that nothing names. The head of a model whose head is the
    embedding is a matrix of its own only under its full name, or where untied says that it
    will have parted by then. fall_back: give rows that a
    GGUF type's blocks do not cut another type, as llama.cpp does; else refuse them.
    Raises `JoulesmithError` for names and patterns that match nothing, and types that are
    unknown or do not fit.
    """
    refs = {r.name: r for r in model.matrices(split_head=untied or HEAD in types)}
    used: set[str] = set()
    chosen: dict[str, str] = {}
    fallen: dict[tuple[str, str, int], list[str]] = {}
    for name, ref in refs.items():
        key = name if name in types else next((k for k in types if fnmatchcase(name, k)), None)
        if key is not None:
            used.add(key)
        kind = types[key] if key is not None else default if ref.layer is not None else None
        if kind is None:
            continue
        found = fitting(kind, ref, fall_back)
        if found != kind and not kind.endswith(ROW):
            fallen.setdefault((kind, found, ref.shape[1]), []).append(name)
        chosen[name] = found
    # A pattern may be there for other models, or stand behind one that takes all it matches.
    matched = {k for k in types if any(fnmatchcase(n, k) for n in refs)}
    if unknown := sorted(set(types) - used - matched):
        raise JoulesmithError(f"the model has no matrix {unknown[0]!r} to quantize")
    notes = []
    for (kind, found, columns), names in fallen.items():
        more = f" and {len(names) - 1} more" if len(names) > 1 else ""
        notes.append(
            f"{names[0]}{more}: rows of {columns} weights hold no whole {kind} blocks of "
            f"{grid(kind).block}: {found} instead"
        )
    return Choice(chosen, tuple(notes))


def check_type(kind: str) -> None:
    """Raises `JoulesmithError` for a type that there is not."""
    try:
        grid(f"{kind.removesuffix(ROW)}-G64" if kind.endswith(ROW) else kind)
    except JoulesmithError as e:
        raise JoulesmithError(str(e).replace(kind.replace(ROW, "-G64"), kind, 1)) from e


def fitting(kind: str, ref: TensorRef, fall_back: bool = True) -> str:
    """``kind``, or what stands in for it where its blocks do not cut the rows of ``ref``."""
    columns = ref.shape[1]
    if kind.endswith(ROW):
        return f"{kind.removesuffix(ROW)}-G{columns}"
    g = grid(kind)
    if g.fits(columns):
        return kind
    if not fall_back or g.ggml_type < 0:
        try:
            g.row_bytes(columns)
        except JoulesmithError as e:
            raise JoulesmithError(f"{ref.name}: {e}") from e
    small = FALLBACK.get(kind, _SMALL) if g.block > 32 else _LAST
    return small if grid(small).fits(columns) else _LAST
