"""Scores from gradients of the loss: what it costs, to first and second order, to zero a weight.

LeCun et al. 1989, "Optimal brain damage", eq. 5 with the Fisher information in place of the
Hessian; Molchanov et al. 2019, "Importance estimation for neural network pruning", eq. 7 and 8.
"""

from __future__ import annotations

from torch import Tensor


def taylor(weight: Tensor, gradient: Tensor) -> Tensor:
    """|w g|, the first-order change of the loss; gradient: its mean, same shape as ``weight``."""
    return (weight * gradient).abs()


def fisher(weight: Tensor, squares: Tensor) -> Tensor:
    """w^2 F / 2, in nats; squares: F, the mean squared gradient of -log p, same shape."""
    return weight.square() * squares / 2
