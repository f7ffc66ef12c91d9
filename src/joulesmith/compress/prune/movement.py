"""Scores from what training did to a weight.

Sanh et al. 2020, "Movement pruning: adaptive sparsity by fine-tuning", eq. 5: weights that move
away from zero are kept.
"""

from __future__ import annotations

from torch import Tensor


def update_size(weight: Tensor, before: Tensor) -> Tensor:
    """|w - w_0|: how far training moved a weight; same shapes."""
    return (weight - before).abs()


def movement(weight: Tensor, before: Tensor) -> Tensor:
    """(w^2 - w_0^2) / 2: positive where a weight moved away from zero; same shapes.

    The paper's sum over steps of -w dL/dw, weighed by the learning rate, is the sum of w dw,
    and this is its value for small steps: begin and end are all that is needed.
    """
    return (weight.square() - before.square()) / 2
