"""Which neurons of a gated MLP to keep: rows of gate and up, columns of down.

Three rules: the damage of taking a column out of the down projection while the others make
up for it (`columns`), and two plain scores to compare with. Tensors in, tensors out.
"""

from __future__ import annotations

import torch
from torch import Tensor

from joulesmith.compress.prune.columns import Removal, remove_groups
from joulesmith.errors import JoulesmithError


def by_damage(
    down: Tensor,
    c: Tensor,
    keep: int,
    rows: Tensor | None = None,
    at_once: int | None = None,
) -> Removal:
    """Structured OBS over single columns of ``down`` (hidden, neurons).

    c: (neurons, neurons) damped E[x x^T] of its inputs; the rest as `columns.remove_groups`.
    """
    groups = torch.arange(down.shape[1])[:, None]
    return remove_groups(down, c, groups, keep, rows=rows, at_once=at_once)


def by_score(score: Tensor, keep: int) -> Removal:
    """The ``keep`` highest of (n,) scores; of equal ones the first. costs: the scores gone.

    Raises `JoulesmithError` for scores that are not finite and a count that cannot be.
    """
    if score.ndim != 1 or not bool(torch.isfinite(score).all()):
        raise JoulesmithError("scores must be a finite vector")
    if not 1 <= keep <= len(score):
        raise JoulesmithError(f"of {len(score)} parts, {keep} cannot be kept")
    order = score.detach().double().argsort(descending=True, stable=True)
    gone = order[keep:].flip(0)
    return Removal(order[:keep].sort().values, gone, score.detach().double()[gone])


def magnitude(gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """(neurons,) L2 norm of all that belongs to a neuron: LLM-Pruner's group magnitude
    (Ma et al. 2023, section 3.2). gate, up: (neurons, hidden); down: (hidden, neurons)."""
    squares = [m.detach().double().square() for m in (gate, up)]
    sides = [s.sum(dim=1) for s in squares]
    return (sum(sides) + down.detach().double().square().sum(dim=0)).sqrt()


def taylor(x: Tensor, g: Tensor, w: Tensor) -> Tensor:
    """(columns,) root of the summed squared change of loss, to first order, when a column's
    input becomes 0: per token ``x_j (g W)_j``, which is also the sum of ``w g`` over the column
    (Molchanov et al. 2019, eq. 8 and its squared form, with gradients of sampled labels).

    x: (tokens, columns) inputs; g: (tokens, rows) gradients at the outputs; w: (rows, columns).
    """
    if x.shape[0] != g.shape[0] or tuple(w.shape) != (g.shape[1], x.shape[1]):
        raise JoulesmithError("inputs, gradients and weights do not belong together")
    return (x.double() * (g.double() @ w.detach().double())).square().sum(dim=0).sqrt()
