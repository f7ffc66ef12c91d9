"""What is asked of every quantizer: bits, group, symmetric or not; and how bits are counted."""

from __future__ import annotations

import re
from dataclasses import dataclass

SCALE_BITS = 16


@dataclass(frozen=True)
class Setting:
    """group: columns that share a scale. symmetric: no zero points."""

    bits: int
    group: int
    symmetric: bool = True

    @property
    def name(self) -> str:
        """ "W4-g64" or "W4-g64-zp"."""
        return f"W{self.bits}-g{self.group}" + ("" if self.symmetric else "-zp")

    def stored_bits(
        self, *, scale_bits: int = SCALE_BITS, zero_bits: float | None = None, extra: float = 0.0
    ) -> float:
        """Bits per weight: the code, its share of scale and zero point, and ``extra``.

        zero_bits: of one zero point; by default ``bits`` where there is one.
        """
        zero = (0 if self.symmetric else self.bits) if zero_bits is None else zero_bits
        return self.bits + (scale_bits + zero) / self.group + extra


def by_name(name: str) -> Setting:
    """The inverse of `Setting.name`. Raises `ValueError`."""
    match = re.fullmatch(r"W([2-8])-g(\d+)(-zp)?", name)
    if match is None:
        raise ValueError(f"no such setting: {name}: write W4-g64 or W4-g64-zp")
    return Setting(int(match[1]), int(match[2]), match[3] is None)


def usual(columns: set[int]) -> list[str]:
    """The settings of the comparison whose groups divide all these row lengths.

    8, 4, 3 and 2 bits with groups of 128, of 64 and 32 at 4 bits, of 64 at 2; where 128 does
    not divide (SmolLM2-135M's 576 columns) 192 stands for it, and where that does not, 64.
    """

    def fits(group: int) -> bool:
        return all(c % group == 0 for c in columns)

    large = next((g for g in (128, 192) if fits(g)), 64)
    wanted = [(8, large), (4, large), (4, 64), (4, 32), (3, large), (2, 64)]
    kept = [(b, g) for b, g in dict.fromkeys(wanted) if fits(g)]
    return [Setting(b, g, s).name for b, g in kept for s in (True, False)]
