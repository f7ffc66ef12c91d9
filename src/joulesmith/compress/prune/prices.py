"""What parts of a model cost when it decodes a token: five numbers that a shape is priced by.

Where they come from, and in what unit, is not known here.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import BaseModel, ConfigDict, Field

if TYPE_CHECKING:
    from joulesmith.compress.prune.shrink import Shape


class Prices(BaseModel):
    """Of one part each, all in one unit: a layer without its neurons and heads, one neuron of one
    layer, one query head, one key-value head, and what no layer holds (the head of the model)."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    layer: float = Field(ge=0, allow_inf_nan=False)
    neuron: float = Field(ge=0, allow_inf_nan=False)
    query: float = Field(ge=0, allow_inf_nan=False)
    kv: float = Field(ge=0, allow_inf_nan=False)
    rest: float = Field(ge=0, allow_inf_nan=False)

    def of(self, shape: Shape) -> float:
        """A decoded token of a model of that shape, whose width is the one that was priced."""
        heads = self.query * shape.kv * shape.queries + self.kv * shape.kv
        return self.rest + shape.layers * (self.layer + self.neuron * shape.neurons + heads)
