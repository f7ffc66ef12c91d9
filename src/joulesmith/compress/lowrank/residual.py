"""A quantized matrix whose error is absorbed by a small factor: ``W ~ Q + A B``.

One pass rounds W and takes the best factors of what is left in the metric of the
layer's activations: LQER (Zhang et al. 2024, section 3) with the exact metric of QERA (Zhang et
al. 2024, theorem 1). More passes alternate, rounding ``W - A B`` and factoring ``W - Q``:
CALDERA (Saha et al. 2024, algorithm 1); the best pass is kept, since rounding does not
promise to descend.

Tensors in, packed bytes out. Any `Format`, any rounding onto it. Knows no models.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from joulesmith.compress.lowrank.factors import plain
from joulesmith.compress.lowrank.svd import check_matrix, check_rank
from joulesmith.compress.lowrank.weighted import decompose
from joulesmith.compress.quantize.grids import Bytes, Format, grid
from joulesmith.errors import JoulesmithError

Rounding = Callable[[Tensor], Bytes]
"""(rows, columns) float32 -> packed rows, e.g. ``lambda w: gptq(w, curve, grid)``."""


@dataclass(frozen=True)
class Residual:
    """``W ~ Q + outer @ inner``, everything as it is stored.

    packed: Q, uint8 (rows, bytes a row). outer (rows, rank), inner (rank, columns): float32,
    holding the values of ``factor_type`` exactly. bits_per_weight: of Q and the factors
    together, scales counted. damage: ``tr(G D H D^T)`` of what is left, after each pass
    (the first entry is that of Q alone, no factor).
    """

    packed: Bytes
    outer: Tensor
    inner: Tensor
    factor_type: str
    bits_per_weight: float
    damage: tuple[float, ...]


def absorb(
    w: Tensor,
    rounding: Rounding,
    kind: Format,
    rank: int,
    *,
    inputs: Tensor | None = None,
    outputs: Tensor | None = None,
    sweeps: int = 1,
    factor_type: str = "F16",
) -> Residual:
    """w (rows, columns) -> `Residual` of that rank.

    rounding: onto ``kind``. inputs, outputs: roots as `weighted.decompose` takes them.
    sweeps: passes of rounding and factoring; 1 is LQER. factor_type: a `Format`'s name,
    "F16" or "Q8_0"; blocks run along columns in ``inner`` and along rows in ``outer``.
    Raises `JoulesmithError` for ranks, types and values that cannot be.
    """
    t = check_matrix(w)
    rows, columns = t.shape
    check_rank(rank, rows, columns)
    if sweeps < 1:
        raise JoulesmithError(f"at least one pass of rounding is needed, not {sweeps}")
    store = grid(factor_type)
    bits = 8.0 * rows * kind.row_bytes(columns)
    bits += 8.0 * rank * (store.row_bytes(rows) + store.row_bytes(columns))
    best: tuple[float, Bytes, Tensor, Tensor] | None = None
    correction = torch.zeros_like(t)
    damage: list[float] = []
    for _ in range(sweeps):
        packed = rounding((t - correction).float())
        left = t - torch.as_tensor(kind.unpack(packed, columns)).double()
        if not damage:
            damage.append(_damage(left, inputs, outputs))
        factors = plain(*decompose(left, inputs, outputs).cut(rank))
        outer, inner = _as_stored(factors.outer.T, store).T, _as_stored(factors.inner, store)
        correction = outer.double() @ inner.double()
        damage.append(_damage(left - correction, inputs, outputs))
        if best is None or damage[-1] < best[0]:
            best = (damage[-1], packed, outer, inner)
    assert best is not None
    _, packed, outer, inner = best
    return Residual(
        packed, outer, inner, store.name, bits / (rows * columns), tuple(damage)
    )  # fmt: skip


def _as_stored(x: Tensor, store: Format) -> Tensor:
    x = x.float().contiguous()
    return torch.as_tensor(store.unpack(store.pack(x), x.shape[1])).float()


def _damage(d: Tensor, inputs: Tensor | None, outputs: Tensor | None) -> float:
    if inputs is not None:
        d = d @ inputs.double()
    if outputs is not None:
        d = outputs.double()[:, None] * d if outputs.ndim == 1 else outputs.double().T @ d
    return float(d.square().sum())
