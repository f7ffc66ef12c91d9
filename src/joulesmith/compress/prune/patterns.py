"""Where zeros may lie: anywhere, N of every M in a row, or in whole tiles. Scores in, masks out.

A pattern says how much of a score is kept; what a score is it does not know.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from joulesmith.errors import JoulesmithError

UNSTRUCTURED = "unstructured"


@dataclass(frozen=True)
class Pattern:
    """keep, of: that many of so many neighbours in a row stay (2:4 keeps 2 of 4); 0 and 0 for any
    place. tile: (rows, columns) that stay or go together. by_row: the same number in each row."""

    keep: int = 0
    of: int = 0
    tile: tuple[int, int] = (1, 1)
    by_row: bool = False

    @property
    def name(self) -> str:
        """As `parse_pattern` reads it."""
        if self.of:
            return f"{self.keep}:{self.of}"
        if self.tile != (1, 1):
            return f"block:{self.tile[0]}x{self.tile[1]}"
        return "row" if self.by_row else UNSTRUCTURED

    @property
    def sparsity(self) -> float | None:
        """The share of zeros, where the pattern settles it."""
        return 1 - self.keep / self.of if self.of else None

    def check(self, name: str, shape: tuple[int, int]) -> None:
        """Raises `JoulesmithError` where the pattern does not divide a matrix of that shape."""
        rows, columns = shape
        if self.of and columns % self.of:
            raise JoulesmithError(
                f"{name} has rows of {columns} weights, which groups of {self.of} ({self.name}) do "
                "not divide: choose another pattern or leave the layer out"
            )
        if rows % self.tile[0] or columns % self.tile[1]:
            raise JoulesmithError(
                f"{name} is {rows} x {columns}, which tiles of {self.tile[0]} x {self.tile[1]} do "
                "not divide: choose other tiles or leave the layer out"
            )

    def mask(self, score: Tensor, kept: int) -> Tensor:
        """score (rows, columns), larger is dearer -> bool, same shape: True stays.

        kept: weights that stay; rounded to whole tiles, and without effect for N:M. Exactly so
        many stay where scores are equal too, the first ones. NaN counts as least.
        """
        rows, columns = score.shape
        if math.isnan(float(score.sum())):  # in one pass, without a copy
            score = torch.nan_to_num(score, nan=-math.inf)
        if self.of:
            groups = score.reshape(rows, columns // self.of, self.of)
            return _most(groups, self.keep).view(rows, columns)
        if self.tile != (1, 1):
            a, b = self.tile
            tiles = score.reshape(rows // a, a, columns // b, b).sum(
                dim=(1, 3), dtype=torch.float64
            )
            found = _top(tiles.flatten(), round(kept / (a * b))).view_as(tiles)
            return found.repeat_interleave(a, 0).repeat_interleave(b, 1)
        if self.by_row:
            return _top_rows(score, kept // rows, kept % rows)
        return _top(score.flatten(), kept).view_as(score)


def parse_pattern(text: str) -> Pattern:
    """ "unstructured", "row", "2:4", "block:4x4" -> `Pattern`. Raises `JoulesmithError`."""
    if text == UNSTRUCTURED:
        return Pattern()
    if text == "row":
        return Pattern(by_row=True)
    if match := re.fullmatch(r"(\d{1,4}):(\d{1,4})", text):
        keep, of = int(match[1]), int(match[2])
        if 0 < keep < of:
            return Pattern(keep, of)
    if match := re.fullmatch(r"block:(\d{1,4})x(\d{1,4})", text):
        tile = int(match[1]), int(match[2])
        if min(tile) > 0 and tile != (1, 1):
            return Pattern(tile=tile)
    raise JoulesmithError(
        f"unknown pattern {text[:40]!r}: give unstructured, row, N:M such as 2:4 (2 of 4 stay), or "
        "block:4x4"
    )


def _top(score: Tensor, kept: int) -> Tensor:
    """(n,) -> bool: the ``kept`` largest."""
    n = len(score)
    kept = min(max(kept, 0), n)
    found = torch.zeros(n, dtype=torch.bool)
    if kept in (0, n):
        return found if kept == 0 else ~found
    # numpy's selection takes a tenth of torch's time
    least = float(np.partition(score.numpy(), n - kept)[n - kept])
    found = score >= least
    if more := int(torch.count_nonzero(found)) - kept:
        ties = (score == least).nonzero().flatten()
        found[ties[len(ties) - more :]] = False
    return found


def _most(groups: Tensor, keep: int) -> Tensor:
    """(..., m) -> bool: the ``keep`` largest of each group, the first ones where they are equal.

    By counting how many of a group come before each of it: sorting so few takes far longer.
    """
    parts = groups.unbind(-1)
    stays = []
    for i, a in enumerate(parts):
        before = torch.zeros_like(a, dtype=torch.int16)
        for j, b in enumerate(parts):
            if j != i:
                before += (b >= a) if j < i else (b > a)
        stays.append(before < keep)
    return torch.stack(stays, -1)


def _top_rows(score: Tensor, each: int, more: int) -> Tensor:
    """The ``each`` largest of every row, one more in the first ``more`` rows."""
    rank = score.argsort(dim=1, descending=True, stable=True).argsort(dim=1, stable=True)
    count = torch.full((len(score), 1), each)
    count[:more] += 1
    return rank < count
