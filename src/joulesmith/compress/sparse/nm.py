"""Which weights are stored: N in every M neighbouring columns, as numbers of combinations.

A group has one of C(M, N) patterns. The ranks of several groups are digits of one number, as
many as waste least: five groups of 2:4 in 13 bits, 2.6 a group where log2 6 = 2.585
(enumerative coding, Cover 1973). A group with fewer weights than N is filled up with zeros.
Knows no values.
"""

from __future__ import annotations

import functools
import itertools
import math
import re

import numpy as np
from numpy.typing import NDArray

from joulesmith.compress.sparse.bits import MOST, Bytes, Mask, pack_bits, packed_size, unpack_bits
from joulesmith.errors import JoulesmithError

LARGEST = 16
"""Columns of a group at most: a table of all patterns must stay small."""


class NM:
    """At most ``n`` of ``m`` columns. Raises `JoulesmithError` unless 1 <= n < m <= 16."""

    exact = False

    def __init__(self, n: int, m: int) -> None:
        if not 1 <= n < m <= LARGEST:
            raise JoulesmithError(f"{n}:{m} sparsity: give N below M, and M up to {LARGEST}")
        self.n, self.m, self.name = n, m, f"{n}:{m}"
        self.patterns = math.comb(m, n)

    def fits(self, mask: Mask) -> bool:
        """Whether no group of columns has more than N weights."""
        if mask.shape[1] % self.m:
            return False
        return bool((mask.reshape(-1, self.m).sum(1, dtype=np.uint8) <= self.n).all())

    def keep(self, mask: Mask) -> Mask:
        """mask (rows, columns) -> the same with N in every group.

        Raises `JoulesmithError` where a group has more, or columns do not cut into groups.
        """
        if not self.fits(mask):
            raise JoulesmithError(f"weights of shape {mask.shape} are not {self.name} sparse")
        groups = mask.reshape(-1, self.m)
        first = np.argsort(~groups, axis=1, kind="stable")[:, : self.n]
        kept = np.zeros_like(groups)
        np.put_along_axis(kept, first, True, 1)
        return kept.reshape(mask.shape)

    def encode(self, kept: Mask) -> Bytes:
        """kept (rows, columns), N in every group -> bytes."""
        groups = kept.reshape(-1, self.m)
        word = groups @ (1 << np.arange(self.m))
        ranks = _tables(self.n, self.m)[1][word]
        if len(ranks) and int(ranks.min()) < 0:
            raise JoulesmithError(f"a group has not {self.n} of {self.m} weights")
        digits, width = _joint(self.patterns)
        padded = np.zeros(-(-len(ranks) // digits) * digits, np.int64)
        padded[: len(ranks)] = ranks
        places = self.patterns ** np.arange(digits, dtype=np.int64)
        return pack_bits(padded.reshape(-1, digits) @ places, width)

    def decode(self, raw: Bytes, rows: int, columns: int) -> Mask:
        """The inverse of `encode`. Raises `JoulesmithError` for another length, and for
        numbers that stand for no pattern."""
        if columns % self.m:
            raise JoulesmithError(f"{columns} columns do not cut into groups of {self.m}")
        count = rows * columns // self.m
        digits, width = _joint(self.patterns)
        words = -(-count // digits)
        if len(raw) != packed_size(words, width):
            raise JoulesmithError(f"{len(raw)} bytes are not {count} groups of {self.name}")
        value = unpack_bits(raw, width, words)
        if words and int(value.max()) >= self.patterns**digits:
            raise JoulesmithError(f"a number beyond the patterns of {self.name}")
        ranks = np.empty((words, digits), np.int64)
        for i in range(digits):
            value, ranks[:, i] = np.divmod(value, self.patterns)
        flat = ranks.reshape(-1)
        if flat[count:].any():
            raise JoulesmithError(f"patterns behind the {count} groups")
        table = _tables(self.n, self.m)[0]
        return table[flat[:count]].reshape(rows, columns)


@functools.cache
def _joint(patterns: int) -> tuple[int, int]:
    """(groups in one number, its bits) of least waste; the fewest groups among equals."""
    most = int(MOST / math.log2(patterns))
    each = [(d, (patterns**d - 1).bit_length()) for d in range(1, max(1, most) + 1)]
    # a long number costs time and wins little
    best = min(b / d for d, b in each)
    return next((d, b) for d, b in each if b / d <= 1.006 * best)


@functools.cache
def _tables(n: int, m: int) -> tuple[Mask, NDArray[np.int64]]:
    """(rank -> pattern (C(m, n), m), word of bits -> rank, -1 for no pattern)."""
    chosen = np.array(list(itertools.combinations(range(m), n)))
    patterns = np.zeros((len(chosen), m), np.bool_)
    np.put_along_axis(patterns, chosen, True, 1)
    ranks = np.full(1 << m, -1, np.int64)
    ranks[patterns @ (1 << np.arange(m))] = np.arange(len(chosen))
    return patterns, ranks


def by_name(name: str) -> NM | None:
    """The layout "2:4", "4:8" ...; None for another name."""
    match = re.fullmatch(r"(\d{1,2}):(\d{1,2})", name)
    return None if match is None else NM(int(match[1]), int(match[2]))
