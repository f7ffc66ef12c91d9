"""Predicted damage of replacing one tensor: a second-order estimate of the KL divergence.

Around the unchanged weights the KL divergence to the changed model is, to second
order, half the Fisher quadratic form of the change. With the Fisher block of a
linear layer y = W x taken as diag(E[g^2]) (x) E[s x x^T] (Kronecker-factored, as in
Martens & Grosse 2015, with the output factor's diagonal), one tensor's share is

    KL ~ 1/2 sum_r E[g_r^2] dW_r H dW_r^T        nats per token

Shares add up while they are small. What the approximation misses (correlated
outputs, higher orders) is the same in kind within a role, so measured KL of a few
whole-role replacements corrects it: see `Correction`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    from joulesmith.calibrate import HeadMoments, Moments

GROUPS: Mapping[str, str] = {
    "attn_q": "attn_qk",
    "attn_k": "attn_qk",
    "attn_v": "attn_vo",
    "attn_output": "attn_vo",
    "ffn_gate": "ffn_in",
    "ffn_up": "ffn_in",
    "ffn_down": "ffn_down",
    "token_embd": "head",
    "output": "head",
}
"""Roles that share a correction. Any other role is a group of its own."""


INPUTS = "inputs"
"""The name under which `Correction` keeps the factor of rounded inputs."""


def group(role: str) -> str:
    """The correction group of a tensor's role."""
    return GROUPS.get(role, role)


def linear_damage(change: torch.Tensor, moments: Moments, start: int = 0) -> float:
    """Predicted KL in nats per token of adding ``change`` to a linear layer.

    change: (some rows, columns), the layer's rows from ``start`` on.
    """
    quadratic = ((change @ moments.hessian) * change).sum(dim=1).clamp_min(0)
    return 0.5 * float((quadratic * moments.fisher[start : start + len(change)]).sum())


def activation_damage(weight: torch.Tensor, moments: Moments, block: int) -> float:
    """Predicted KL in nats per token of rounding the layer's inputs to 8 bits in blocks.

    weight: (rows, columns). Each input is off by an independent e_c, so the outputs move by
    sum_c W_rc e_c. Zero where the engine multiplies floats (``block`` 0). Where a few inputs
    are huge, this outweighs the rounding of the weights.
    """
    error = moments.rounding.get(block)
    if error is None:
        return 0.0
    return 0.5 * float(moments.fisher @ (weight.square() @ error))


def embedding_damage(change: torch.Tensor, moments: HeadMoments, start: int = 0) -> float:
    """The same for the embedding's rows, weighted by how often each token is read."""
    per_row = change.square() @ moments.input_fisher
    return 0.5 * float((per_row * moments.token_share[start : start + len(change)]).sum())


@dataclass
class Correction:
    """Factors by which the predicted damage of a (group, type) is off, from measured KL.

    A factor is measured / predicted for the replacement of a whole group. A type or
    group that was not measured takes the geometric mean of the factors nearest to it.
    """

    factors: dict[tuple[str, str], float] = field(default_factory=dict)

    def learn(self, group_name: str, type_name: str, predicted: float, measured: float) -> None:
        """Keep one measurement; noise below zero is held at a hundredth of the prediction."""
        if predicted <= 0:
            return
        self.factors[group_name, type_name] = max(measured, 0.01 * predicted) / predicted

    def factor(self, group_name: str, type_name: str) -> float:
        """The factor for a group and type."""
        exact = self.factors.get((group_name, type_name))
        if exact is not None:
            return exact
        if type_name == INPUTS:
            same_group = []
        else:
            same_group = [
                f for (g, t), f in self.factors.items() if g == group_name and t != INPUTS
            ]
        same_type = [f for (_, t), f in self.factors.items() if t == type_name]
        return _geometric_mean(same_group or same_type)


def _geometric_mean(values: Iterable[float]) -> float:
    logs = [math.log(v) for v in values]
    return math.exp(sum(logs) / len(logs)) if logs else 1.0
