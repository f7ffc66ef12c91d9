"""How a student learns from its teacher, and what of it trains: numbers that people choose. Knows
no torch."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

Divergence = Literal["forward", "reverse"]
"""KL(teacher || student), or KL(student || teacher)."""
Mode = Literal["full", "lora", "norms", "quantized"]


class DistilSettings(BaseModel):
    """hard, soft, hidden, attention: weights of the cross-entropy with the text, of the divergence
    from the teacher's probabilities, and of the matching of hidden states and attention weights.
    temperature: of both models' logits in the divergence. divergence: on the text. layers: pairs
    (student's, teacher's), both from 1, whose outputs are matched; the last is the one after the
    final norm; None for an even spread.

    on_policy: share of the forward passes on text that the student samples itself at temperature
    1, with the divergence alone, ``on_policy_divergence``. prompt: tokens of a window that it goes
    on from, 0 for half. continuation: tokens that it samples, 0 for as many as a window has left.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)
    hard: float = Field(default=0.0, ge=0, allow_inf_nan=False)
    soft: float = Field(default=1.0, ge=0, allow_inf_nan=False)
    hidden: float = Field(default=0.0, ge=0, allow_inf_nan=False)
    attention: float = Field(default=0.0, ge=0, allow_inf_nan=False)
    temperature: float = Field(default=1.0, gt=0, allow_inf_nan=False)
    divergence: Divergence = "forward"
    layers: tuple[tuple[int, int], ...] | None = None
    on_policy: float = Field(default=0.0, ge=0, le=1)
    on_policy_divergence: Divergence = "reverse"
    prompt: int = Field(default=0, ge=0)
    continuation: int = Field(default=0, ge=0)

    @model_validator(mode="after")
    def _teaches(self) -> DistilSettings:
        if not (self.hard or self.soft or self.hidden or self.attention):
            raise ValueError("all weights are 0: give one of hard, soft, hidden and attention")
        if self.on_policy and not self.soft:
            raise ValueError("on_policy needs a weight in soft")
        return self


class RecoverSettings(BaseModel):
    """What trains after a compression step.

    mode: "full", every weight; "lora", low-rank adapters of the linear layers, merged at the end;
    "norms", norms and biases; "quantized", the weights of linear layers on the grid that they will
    be stored in, with its steps, norms and biases. rank, alpha: of adapters, which count alpha /
    rank. types: of "quantized", linear layer -> grid ("INT4-G32"), or one for all. keep_zeros:
    weights of matrices that are zero stay zero; False where they are zero by rounding alone. seed:
    of the adapters' first values.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)
    mode: Mode = "full"
    rank: int = Field(default=8, ge=1)
    alpha: float = Field(default=16.0, gt=0, allow_inf_nan=False)
    types: str | dict[str, str] = "INT4-G32"
    keep_zeros: bool = True
    seed: int = Field(default=0, ge=0)
