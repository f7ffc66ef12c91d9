"""How ranks share a training: numbers that people choose. Knows no torch."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from joulesmith.errors import JoulesmithError


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

    def data_ranks(self, world: int) -> int:
        """How many of ``world`` ranks see windows of their own. Raises `JoulesmithError` for ranks
        that ``tensor`` does not divide."""
        if world % self.tensor:
            raise JoulesmithError(
                f"{world} rank{'s' * (world > 1)} cannot be split by tensor {self.tensor}: give a "
                "divisor of  torchrun --nproc-per-node"
            )
        return world // self.tensor

    def check_batch(self, batch: int, world: int) -> None:
        """Raises `JoulesmithError` for a batch that ranks cannot share evenly: the mean over ranks
        would not be that over windows, and some would wait for passes that others do not make."""
        data = self.data_ranks(world)
        if batch % data:
            raise JoulesmithError(f"a batch of {batch} windows on {data} ranks: give a multiple")

    def parts(self, world: int) -> bool:
        """Whether ranks hold parts of matrices."""
        return world > 1 and (self.data == "shard" or self.tensor > 1)
