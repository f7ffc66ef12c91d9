"""Which windows of a text are trained on: numbers that people choose. Knows no torch."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

By = Literal["loss", "gradient", "learnable"]
Keep = Literal["middle", "high", "low"]


class DataSettings(BaseModel):
    """repeats: windows of which a larger share was seen before (in earlier windows, or in those
    that are judged on) are left out; None leaves all. share: of the windows that is trained on, by
    a score: by, "loss" of the teacher, or of the model itself where there is none; "gradient", its
    norm by the logits; "learnable", the model's loss less the teacher's. keep: which end, or the
    middle.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)
    repeats: float | None = Field(default=None, ge=0, le=1)
    share: float = Field(default=1.0, gt=0, le=1)
    by: By = "loss"
    keep: Keep = "middle"

    @model_validator(mode="after")
    def _chosen(self) -> DataSettings:
        if self.share == 1 and self.model_fields_set & {"by", "keep"}:
            raise ValueError("by and keep choose a share of the windows: give a share below 1")
        return self
