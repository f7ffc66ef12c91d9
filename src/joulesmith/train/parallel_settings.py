"""How ranks share a training: numbers that people choose. Knows no torch."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field


class ParallelSettings(BaseModel):
    """data: what ranks with different windows hold: "replicate", the whole model and optimizer
    states each (DDP); "shard", a part, gathered block by block (FSDP2). tensor: ranks that see the
    same windows and hold a part of each matrix of a Llama-like model; the others share the data.
    probe: steps of the same batch that are timed on one rank and on all before the training, for
    speed-up and joules ratio; 0 for none.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)
    data: Literal["replicate", "shard"] = "replicate"
    tensor: int = Field(default=1, ge=1)
    probe: int = Field(default=3, ge=0)
