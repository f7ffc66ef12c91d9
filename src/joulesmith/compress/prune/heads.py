"""Which attention heads to keep, so that grouped-query attention stays valid.

A key-value head goes with all query heads that read it, or every group loses the same
number of query heads. Tensors in, tensors out; knows no models.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from joulesmith.compress.prune.columns import remove_groups
from joulesmith.compress.prune.neurons import by_score
from joulesmith.errors import JoulesmithError


@dataclass(frozen=True)
class Layout:
    """kv: key-value heads. queries: query heads that read each. dim: elements of a head."""

    kv: int
    queries: int
    dim: int

    @property
    def heads(self) -> int:
        """Query heads."""
        return self.kv * self.queries


@dataclass(frozen=True)
class Heads:
    """What stays. kv: (k,) key-value heads. query: (k q,) query heads, group after group, q of
    each. costs: of each step, as `columns.Removal` has it; gone: what went, "kv 2", "head 7"."""

    kv: Tensor
    query: Tensor
    gone: tuple[str, ...]
    costs: Tensor


def columns_of(heads: Tensor, dim: int) -> Tensor:
    """(n,) heads -> (n dim,) columns of o, rows of q; of key-value heads the rows of k and v."""
    return (heads[:, None] * dim + torch.arange(dim)).flatten()


def whole(layout: Layout) -> Heads:
    """All of them."""
    return Heads(
        torch.arange(layout.kv), torch.arange(layout.heads), (), torch.zeros(0, dtype=torch.float64)
    )


def check_counts(layout: Layout, kv: int, queries: int) -> None:
    """Raises `JoulesmithError` unless that many can be kept."""
    if not (1 <= kv <= layout.kv and 1 <= queries <= layout.queries):
        raise JoulesmithError(
            f"{kv} key-value heads with {queries} query heads each cannot be kept of "
            f"{layout.kv} with {layout.queries}"
        )


def of_share(layout: Layout, share: float) -> tuple[int, int]:
    """(key-value heads, query heads of each) that are ``share`` of the query heads; whole groups
    where that is possible. Raises `JoulesmithError` naming the shares that there are."""
    for kv in range(layout.kv, 0, -1):  # whole groups first: they take k and v along
        if abs(kv / layout.kv - share) < 5e-3:
            return kv, layout.queries
    for queries in range(layout.queries, 0, -1):
        for kv in range(layout.kv, 0, -1):
            if abs(kv * queries / layout.heads - share) < 5e-3:
                return kv, queries
    counts = {k * q for k in range(1, layout.kv + 1) for q in range(1, layout.queries + 1)}
    shares = ", ".join(f"{n / layout.heads:.4g}" for n in sorted(counts))
    raise JoulesmithError(
        f"{share:g} of {layout.heads} heads in {layout.kv} groups cannot be kept: {shares} can"
    )


def by_damage(
    o: Tensor, c: Tensor, layout: Layout, kv: int, queries: int, rows: Tensor | None = None
) -> Heads:
    """Structured OBS over blocks of the columns of ``o`` (hidden, heads x dim): first whole
    groups, then query heads, the same number of each group that is left.

    c, rows: as `columns.remove_groups`. Raises `JoulesmithError` as `check_counts`.
    """
    check_counts(layout, kv, queries)
    size = layout.queries * layout.dim
    groups = torch.arange(layout.kv * size).reshape(layout.kv, size)
    first = remove_groups(o, c, groups, kv, rows=rows, at_once=1)
    gone = [f"kv {i}" for i in first.gone.tolist()]
    left = (first.kept[:, None] * layout.queries + torch.arange(layout.queries)).flatten()
    if queries == layout.queries:
        return Heads(first.kept, left, tuple(gone), first.costs)
    columns = columns_of(left, layout.dim)
    lower = torch.linalg.cholesky(c[columns][:, columns])
    fitted = torch.cholesky_solve((o.detach().double() @ c[:, columns]).T, lower).T
    blocks = torch.arange(len(columns)).reshape(len(left), layout.dim)
    classes = torch.arange(kv).repeat_interleave(layout.queries).tolist()
    second = remove_groups(
        fitted,
        c[columns][:, columns],
        blocks,
        kv * queries,
        rows=rows,
        classes=classes,
        class_keep=queries,
        at_once=1,
    )
    gone += [f"head {int(left[i])}" for i in second.gone.tolist()]
    costs = torch.cat([first.costs, second.costs])
    return Heads(first.kept, left[second.kept], tuple(gone), costs)


def by_columns(score: Tensor, layout: Layout, kv: int, queries: int) -> Heads:
    """By plain scores of the columns of o, (heads x dim,): a head has the root of the sum of
    their squares, as a group has of its heads."""
    check_counts(layout, kv, queries)
    squares = score.detach().double().square().reshape(layout.kv, layout.queries, layout.dim)
    heads = squares.sum(dim=2)
    first = by_score(heads.sum(dim=1).sqrt(), kv)
    gone, costs = [f"kv {i}" for i in first.gone.tolist()], [first.costs]
    query = []
    for group in first.kept.tolist():
        found = by_score(heads[group].sqrt(), queries)
        query.append(group * layout.queries + found.kept)
        gone += [f"head {group * layout.queries + i}" for i in found.gone.tolist()]
        costs.append(found.costs)
    return Heads(first.kept, torch.cat(query), tuple(gone), torch.cat(costs))
