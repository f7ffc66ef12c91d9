"""Columns of a linear layer taken out at the least cost, and the rest refitted.

What a set S of columns costs, when the others may make up for it, is a Schur complement of
the layer's input moments: the structured Optimal Brain Surgeon (Kurtic et al. 2023, "ZipLM",
eqs. 2 and 3; Ling et al. 2024, "SlimGPT", eq. 4; after Hassibi and Stork 1993). Neurons are
groups of one column of the down projection, attention heads groups of the output projection's.

Tensors in, tensors out; float64 inside. Knows no models.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from joulesmith.errors import JoulesmithError

RIDGE = 1e-2
"""Share of the moments' mean diagonal that is added to it: columns whose inputs hardly vary
are then pulled towards their own weights and not towards noise."""


@dataclass(frozen=True)
class Removal:
    """kept, gone: numbers of groups, ``kept`` rising, ``gone`` in the order of going. costs: of
    ``gone``, each with those that went before, in the unit of `remove_groups`."""

    kept: Tensor
    gone: Tensor
    costs: Tensor


def damp(h: Tensor, ridge: float = RIDGE) -> Tensor:
    """h (columns, columns) -> symmetric float64 with ``ridge`` x its mean diagonal added.

    All 0 becomes the identity. Raises `JoulesmithError` for NaN, infinity, another shape.
    """
    if h.ndim != 2 or h.shape[0] != h.shape[1]:
        raise JoulesmithError(f"input moments have shape {tuple(h.shape)}, which is not square")
    c = h.detach().double()
    if not bool(torch.isfinite(c).all()):
        raise JoulesmithError("input moments hold NaN or infinity")
    if not 0 <= ridge < float("inf"):
        raise JoulesmithError(f"a ridge of {ridge} cannot be")
    c = (c + c.T) / 2
    mean = float(c.diagonal().mean())
    extra = ridge * mean if mean > 0 else 1.0
    return c + extra * torch.eye(len(c), dtype=c.dtype)


def targets(
    w: Tensor, h: Tensor, cross: Tensor | None, mix: float, ridge: float = RIDGE
) -> tuple[Tensor, Tensor]:
    """The two sides of the normal equations of a layer fitted anew, float64.

    w: (rows, columns) its weights. h: E[x x^T] of the inputs that it has now. cross: E[t x^T]
    (rows, columns) of outputs t that are wanted of it. mix: share of t in what is fitted; the
    rest is its own output W x. The ridge stands for inputs on which W itself is wanted.
    Returns (T, C): columns S fitted to it are ``T[:, S] C[S, S]^-1``.
    """
    weight = _matrix(w)
    c = damp(h, ridge)
    if c.shape[0] != weight.shape[1]:
        raise JoulesmithError(f"moments of {len(c)} inputs, weights of {weight.shape[1]}")
    if not 0 <= mix <= 1:
        raise JoulesmithError(f"a mix of {mix} is not in 0 to 1")
    own = weight @ c
    if cross is None or mix == 0:
        return own, c
    if cross.shape != weight.shape:
        raise JoulesmithError(f"targets {tuple(cross.shape)}, weights {tuple(weight.shape)}")
    symmetric = (h.double() + h.double().T) / 2
    return mix * (_matrix(cross) + weight @ (c - symmetric)) + (1 - mix) * own, c


def refit(target: Tensor, c: Tensor, columns: Tensor | None = None) -> Tensor:
    """Least squares on these columns alone (None: all): ``T[:, S] C[S, S]^-1``.

    target (rows, n), c (n, n) positive definite, as of `targets` -> (rows, len(S)) float64.
    """
    if columns is not None:
        target, c = target[:, columns], c[columns][:, columns]
    lower = _cholesky(c)
    return torch.cholesky_solve(target.T, lower).T


def remove_groups(
    w: Tensor,
    c: Tensor,
    groups: Tensor,
    keep: int,
    *,
    rows: Tensor | None = None,
    classes: Sequence[int] | None = None,
    class_keep: int | None = None,
    at_once: int | None = None,
) -> Removal:
    """Which groups of columns to keep, by greedy removal with the rest made to compensate.

    w: (rows, columns). c: (columns, columns) positive definite E[x x^T] (`damp`). groups:
    (n, size) column numbers; a column is in one group at most. keep: how many of the n stay.
    rows: (rows,) weights of output rows, the Fisher information E[g^2] in nats per unit
    squared. The cost is then half of ``sum_r f_r E[(d_r x)^2]``: nats of KL divergence per
    token, to second order. None: half of the mean squared error. classes: class of each group,
    of which ``class_keep`` stay in each. at_once: groups that go before costs are counted
    again; None for a 64th of them.

    Raises `JoulesmithError` for shapes that do not fit, and a count that cannot be kept.
    """
    weight = _matrix(w).clone()
    n = len(groups)
    if groups.ndim != 2 or not n or int(groups.max()) >= weight.shape[1] or int(groups.min()) < 0:
        raise JoulesmithError("groups name columns that are not there")
    if len(set(groups.flatten().tolist())) != groups.numel():
        raise JoulesmithError("a column is in two groups")
    if not 1 <= keep <= n:
        raise JoulesmithError(f"of {n} groups, {keep} cannot be kept")
    room = _Room(n, keep, classes, class_keep)
    if rows is not None:
        weight *= _weights(rows, len(weight)).sqrt()[:, None]
    inverse = torch.cholesky_inverse(_cholesky(c.double()))
    at_once = at_once or max(1, n // 64)
    gone: list[int] = []
    costs: list[Tensor] = []
    alive = torch.ones(n, dtype=torch.bool)
    while len(gone) < n - keep:
        cost = _costs(weight, inverse, groups, alive)
        batch = room.take(cost, alive, min(at_once, n - keep - len(gone)))
        columns = groups[batch].flatten()
        # removing S: W -= W_S B^-1 Hinv_S, Hinv -= Hinv_S^T B^-1 Hinv_S, with B = Hinv_SS
        inner = torch.linalg.cholesky(inverse[columns][:, columns])
        x = torch.cholesky_solve(inverse[columns], inner)
        joint = (weight[:, columns] * torch.cholesky_solve(weight[:, columns].T, inner).T).sum()
        costs += [cost[i] * joint / cost[batch].sum().clamp_min(1e-300) for i in batch]
        # columns that are gone become 0 by this, up to rounding, and are not looked at again
        weight.addmm_(weight[:, columns], x, alpha=-1)
        inverse.addmm_(inverse[:, columns], x, alpha=-1)
        alive[batch] = False
        gone += batch
    total = torch.stack(costs) / 2 if costs else torch.zeros(0, dtype=torch.float64)
    return Removal(torch.nonzero(alive)[:, 0], torch.tensor(gone, dtype=torch.long), total)


class _Room:
    """How many groups may still go, in all and of each class."""

    def __init__(
        self, n: int, keep: int, classes: Sequence[int] | None, class_keep: int | None
    ) -> None:
        self.classes = list(classes) if classes is not None else [0] * n
        names = sorted(set(self.classes))
        each = keep if class_keep is None else class_keep
        if len(self.classes) != n or (class_keep is not None and each * len(names) != keep):
            raise JoulesmithError(f"{keep} groups are not {each} of each of {len(names)} classes")
        self.left = {k: self.classes.count(k) - each for k in names}
        if min(self.left.values()) < 0:
            raise JoulesmithError(f"a class has fewer than {each} groups")

    def take(self, cost: Tensor, alive: Tensor, most: int) -> list[int]:
        """The cheapest that may go, ``most`` at the most."""
        found: list[int] = []
        for i in cost.masked_fill(~alive, float("inf")).argsort(stable=True).tolist():
            if len(found) == most:
                break
            if bool(alive[i]) and self.left[self.classes[i]] > 0:
                self.left[self.classes[i]] -= 1
                found.append(i)
        return found


def _costs(weight: Tensor, inverse: Tensor, groups: Tensor, alive: Tensor) -> Tensor:
    """(n,) tr(W_S (Hinv_SS)^-1 W_S^T) of each group that is left."""
    out = torch.full((len(groups),), float("inf"), dtype=torch.float64)
    if groups.shape[1] == 1:
        at = groups[alive, 0]
        out[alive] = weight[:, at].square().sum(dim=0) / inverse.diagonal()[at]
        return out
    for i in torch.nonzero(alive)[:, 0].tolist():
        s = groups[i]
        lower = torch.linalg.cholesky(inverse[s][:, s])
        half = torch.linalg.solve_triangular(lower, weight[:, s].T, upper=False)
        out[i] = half.square().sum()
    return out


def _matrix(w: Tensor) -> Tensor:
    if w.ndim != 2 or not bool(torch.isfinite(w).all()):
        raise JoulesmithError("weights must be a matrix without NaN and infinity")
    return w.detach().double()


def _weights(rows: Tensor, n: int) -> Tensor:
    f = rows.detach().double()
    if tuple(f.shape) != (n,) or not bool((torch.isfinite(f) & (f >= 0)).all()):
        raise JoulesmithError(f"weights of rows must be {n} numbers, finite and not below 0")
    # rows that gradients never reached still hold something
    filled: Tensor = f + 1e-6 * f.mean()
    return filled if float(f.sum()) > 0 else torch.ones_like(f)


def _cholesky(c: Tensor) -> Tensor:
    lower, info = torch.linalg.cholesky_ex(c.double())
    if int(info) != 0 or not bool(torch.isfinite(lower).all()):
        raise JoulesmithError("input moments are not positive definite: use a larger ridge")
    found: Tensor = lower
    return found
