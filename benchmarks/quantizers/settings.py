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
    """The settings of the comparison whose groups divide all these row lengths."""
    wanted = [(8, 128), (8, 64), (4, 128), (4, 64), (4, 32), (3, 128), (3, 64), (2, 64), (2, 32)]
    fitting = [(b, g) for b, g in wanted if all(c % g == 0 for c in columns)]
    # One group for 8 and for 3 bits is enough: the largest that fits.
    once = {b: max((g for c, g in fitting if c == b), default=0) for b in (8, 3, 2)}
    kept = [(b, g) for b, g in fitting if b == 4 or once[b] == g]
    return [Setting(b, g, s).name for b, g in kept for s in (True, False)]
