"""What parts of a decoder cost when it decodes a token on this machine: the joule table, read as
the price of a layer, a neuron, a head.

Each kind of matrix is priced at its size and at about half of it; between and around them its
cost is taken for a straight line. Attention over the cache, norms and waiting are not in it: they
go with the layers, and are a small part of a token.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from joulesmith.compress.prune.prices import Prices
from joulesmith.errors import JoulesmithError
from joulesmith.gguf_file import type_table

if TYPE_CHECKING:
    from joulesmith.compress.prune.shrink import Shape

Matrices = Callable[[int], list[tuple[int, int]]]
"""How many of a part there are -> the (rows, columns) of a block's matrices made of them."""


def _parts(shape: Shape) -> dict[str, tuple[int, int, Matrices]]:
    """Part -> (how many, of how many elements each, its matrices)."""
    dim, hidden = shape.dim, shape.hidden
    return {
        "neuron": (shape.neurons, 1, lambda n: [(n, hidden), (n, hidden), (hidden, n)]),
        "query": (shape.kv * shape.queries, dim, lambda n: [(n * dim, hidden), (hidden, n * dim)]),
        "kv": (shape.kv, dim, lambda n: [(n * dim, hidden), (n * dim, hidden)]),
    }


def _fewer(count: int, size: int, block: int) -> int:
    """About half of so many parts, whole blocks of a row; 0 where there is no such number."""
    step = block // math.gcd(block, size)
    return count // 2 // step * step


def cells(shape: Shape, vocabulary: int, kind: str) -> Iterator[tuple[int, int]]:
    """The (rows, columns) that `shape_prices` asks for, some of them twice."""
    block = type_table()[kind][1]
    for count, size, matrices in _parts(shape).values():
        yield from matrices(count)
        if fewer := _fewer(count, size, block):
            yield from matrices(fewer)
    yield vocabulary, shape.hidden


def shape_prices(
    shape: Shape, vocabulary: int, kind: str, decode: Callable[[int, int, str], float]
) -> Prices:
    """The prices of a model of that shape whose matrices are all of type ``kind``.

    decode: (rows, columns, type) -> what one token costs, as `JouleTable.price` has it first.
    Raises `JoulesmithError` where blocks of the type do not divide the matrices.
    """
    block = type_table()[kind][1]
    if bad := [c for _, c in cells(shape, vocabulary, kind) if c % block]:
        raise JoulesmithError(
            f"{kind} has blocks of {block} weights, which do not divide rows of {bad[0]}: price "
            "the shapes at another --type"
        )
    found, fixed = {}, 0.0
    for part, (count, size, matrices) in _parts(shape).items():
        whole = sum(decode(r, c, kind) for r, c in matrices(count))
        slope = whole / count
        if fewer := _fewer(count, size, block):
            less = sum(decode(r, c, kind) for r, c in matrices(fewer))
            slope = min(slope, max(0.0, (whole - less) / (count - fewer)))
        found[part] = slope
        fixed += whole - slope * count
    return Prices(layer=max(0.0, fixed), rest=decode(vocabulary, shape.hidden, kind), **found)
