"""What is asked of every pruner: a share of zeros, or N left of every M weights of a row."""

from __future__ import annotations

import re
from dataclasses import dataclass

NAMES = ("50%", "60%", "70%", "2:4", "4:8")


@dataclass(frozen=True)
class Setting:
    """sparsity: share of zeros. group: M of N:M, or 0 where zeros may be anywhere."""

    sparsity: float
    group: int = 0

    @property
    def zeros(self) -> int:
        """M - N: zeros in every group, 0 without groups."""
        return round(self.sparsity * self.group)

    @property
    def name(self) -> str:
        """ "50%" or "2:4", where two of four are left."""
        if self.group:
            return f"{self.group - self.zeros}:{self.group}"
        return f"{100 * self.sparsity:.0f}%"


def by_name(name: str) -> Setting:
    """The inverse of `Setting.name`. Raises `ValueError`."""
    if match := re.fullmatch(r"(\d+)%", name):
        return Setting(int(match[1]) / 100)
    if (match := re.fullmatch(r"(\d+):(\d+)", name)) and 0 < int(match[1]) < int(match[2]):
        return Setting(1 - int(match[1]) / int(match[2]), int(match[2]))
    raise ValueError(f"no such setting: {name}: write 50% or 2:4")


def key(name: str) -> tuple[bool, float, int]:
    """Order of a table: shares first, then groups."""
    s = by_name(name)
    return bool(s.group), s.sparsity, s.group
