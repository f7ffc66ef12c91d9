"""Scores from weights and the size of what they multiply.

Sun et al. 2023, "A simple and effective pruning approach for large language models", eq. 1.
"""

from __future__ import annotations

from torch import Tensor


def wanda(weight: Tensor, squares: Tensor) -> Tensor:
    """weight (rows, columns), squares (columns,) E[x^2] -> |w_ij| sqrt(E[x_j^2]), (rows, columns).

    Its authors compare the weights of one output with each other: the pattern "row".
    """
    return weight.abs() * squares.clamp_min(0).sqrt()
