"""How a training runs: numbers that people choose. Knows no torch."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

Optimizer = Literal["sgd", "momentum", "adamw", "adafactor", "muon"]
Schedule = Literal["cosine", "linear", "constant"]
Precision = Literal["float32", "bfloat16"]


class TrainSettings(BaseModel):
    """steps: optimizer steps. batch: windows a step, over all ranks. micro: windows in one forward
    pass of one rank; gradients are added up to a batch. rate: the highest learning rate; warmup:
    share of the steps in which it rises, final: share of it at the end. decay: weight decay of
    matrices. clip: largest norm of the gradient, 0 for none. precision: of products (autocast);
    weights and optimizer states are float32. recompute: activations again in the backward pass
    (gradient checkpointing). every: steps between evaluations, 0 for the end alone.
    budget_joules, budget_seconds: stop when so many are spent, evaluations not counted.
    joules_per_percent: stop when the next percent of
    quality costs more. start_length: tokens that windows are cut to at first, a divisor of theirs,
    0 for whole ones; they grow until ``short`` of the steps are done (Li, Zhang and He 2022). seed:
    of the order of windows and of all that is drawn.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)
    steps: int = Field(ge=1)
    batch: int = Field(default=8, ge=1)
    micro: int = Field(default=4, ge=1)
    optimizer: Optimizer = "adamw"
    rate: float = Field(default=3e-4, gt=0, allow_inf_nan=False)
    schedule: Schedule = "cosine"
    warmup: float = Field(default=0.05, ge=0, le=1)
    final: float = Field(default=0.1, ge=0, le=1)
    decay: float = Field(default=0.0, ge=0, allow_inf_nan=False)
    clip: float = Field(default=1.0, ge=0, allow_inf_nan=False)
    precision: Precision = "float32"
    recompute: bool = False
    every: int = Field(default=0, ge=0)
    budget_joules: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    budget_seconds: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    joules_per_percent: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    start_length: int = Field(default=0, ge=0)
    short: float = Field(default=0.3, gt=0, le=1)
    seed: int = Field(default=0, ge=0)
