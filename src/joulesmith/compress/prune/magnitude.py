"""Scores that need no data: the size of a weight.

Han et al. 2015, "Learning both weights and connections for efficient neural networks".
"""

from __future__ import annotations

from torch import Tensor


def magnitude(weight: Tensor) -> Tensor:
    """|w|, same shape as ``weight``."""
    return weight.abs()
