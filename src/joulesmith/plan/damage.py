"""Predicted damage of replacing one tensor: a second-order estimate of the KL divergence.

Around the unchanged weights the KL divergence to the changed model is, to second
order, half the Fisher quadratic form of the change. With the Fisher block of a
linear layer y = W x taken as diag(E[g^2]) (x) E[s x x^T] (Kronecker-factored, as in
Martens & Grosse 2015, with the output factor's diagonal), one tensor's share is

    KL ~ 1/2 sum_r E[g_r^2] dW_r H dW_r^T        nats per token

That form takes a layer's output gradients for uncorrelated with each other and with
its inputs, which they are not: a residual stream's largest directions carry almost no
gradient, as the next norm divides by them. So where calibration kept some tokens as
they came, the Fisher form is taken over them directly,

    KL ~ 1/2 E[(g^T dW x)^2]   for weights,   1/2 E[(g^T W e)^2]   for inputs off by e.

Shares add up while they are small. What the approximation misses (higher orders,
tokens that act together) is the same in kind within a role, so measured KL of a few
whole-role replacements corrects it: see `Correction`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    from joulesmith.moments import HeadMoments, Moments

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


ROWS = 4096
"""Rows judged at a time."""

INPUTS = "inputs"
"""The name under which `Correction` keeps the factor of rounded inputs."""


def group(role: str) -> str:
    """The correction group of a tensor's role."""
    return GROUPS.get(role, role)


def linear_damage(change: Callable[[int, int], torch.Tensor], rows: int, moments: Moments) -> float:
    """Predicted KL in nats per token of adding a change to a linear layer of ``rows`` rows.

    change(start, stop): (stop - start, columns), those rows of it; asked for once each.
    """
    import torch

    total, shift = 0.0, torch.zeros(())
    sample = moments.sample
    for start in range(0, rows, ROWS):
        stop = min(start + ROWS, rows)
        part = change(start, stop)
        if sample is not None and sample.g is not None:
            shift = shift + ((sample.x @ part.T) * sample.g[:, start:stop]).sum(dim=1)
        else:
            quadratic = ((part @ moments.hessian) * part).sum(dim=1).clamp_min(0)
            total += float((quadratic * moments.fisher[start:stop]).sum())
    if sample is not None and sample.g is not None:
        total = float(shift.square().mean())
    return 0.5 * total


def activation_damage(weight: torch.Tensor, moments: Moments, block: int) -> float:
    """Predicted KL in nats per token of rounding the layer's inputs to 8 bits in blocks.

    weight: (rows, columns). block: how many neighbours share a scale; 0 where the engine
    multiplies floats, which does no damage. Where a few inputs are huge, this outweighs the
    rounding of the weights. Zero without a sample of tokens.
    """
    sample = moments.sample
    if sample is None or not block or weight.shape[1] % block:
        return 0.0
    if sample.pull is not None:
        pull = sample.pull
    elif sample.g is not None:
        pull = sample.g @ weight
    else:
        return 0.0
    lost = round_activations(sample.x, block).sub_(sample.x)
    return 0.5 * float((pull * lost).sum(dim=1).square().mean())


def round_activations(x: torch.Tensor, block: int) -> torch.Tensor:
    """x (tokens, columns) rounded to 8 bits, one scale for each ``block`` neighbours, as
    llama.cpp rounds the inputs of block types (Q8_0: 32, Q8_K: 256)."""
    parts = x.reshape(x.shape[0], -1, block)
    step = parts.abs().amax(dim=2, keepdim=True) / 127
    return ((parts / step.clamp_min(1e-30)).round() * step).reshape(x.shape)


def embedding_damage(
    change: Callable[[int, int], torch.Tensor], rows: int, moments: HeadMoments
) -> float:
    """The same for the embedding's rows, weighted by how often each token is read."""
    total = 0.0
    for start in range(0, rows, ROWS):
        stop = min(start + ROWS, rows)
        per_row = change(start, stop).square() @ moments.input_fisher
        total += float((per_row * moments.token_share[start:stop]).sum())
    return 0.5 * total


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
