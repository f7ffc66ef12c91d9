"""How a sparse training runs: numbers that people choose. Knows no torch."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from joulesmith.errors import JoulesmithError

Method = Literal["static", "magnitude", "movement", "set", "rigl"]
Allocation = Literal["erk", "uniform"]
Start = Literal["random", "magnitude", "pruned"]
GRADUAL = ("magnitude", "movement")
"""Methods that begin dense; the others have as many live weights from the first step on."""
EXCHANGE = ("set", "rigl")
"""Methods that exchange live weights for dead ones."""
OPTIMIZERS = ("sgd", "momentum", "adamw")
"""Those that treat each weight by itself."""
_NOT_OF: dict[str, tuple[str, ...]] = {
    "static": ("every", "begin", "until", "drop"),
    "magnitude": ("drop", "start"),
    "movement": ("drop", "start"),
    "set": ("begin",),
    "rigl": ("begin",),
}
_FINAL = 0.75
"""Share of the steps after which masks stay, unless told: about that of Evci et al. 2020, 25,000 of
32,000."""


class SparseSettings(BaseModel):
    """Zeros in linear layers, in training.

    method: static (one mask), magnitude (Zhu and Gupta 2017), movement (Sanh et al. 2020), set
    (Mocanu et al. 2018) or rigl (Evci et al. 2020). sparsity: share of zeros in all of these layers
    at the end. pattern: unstructured or N:M, which settles the sparsity; for methods that exchange
    nothing also row and block:RxC. allocation: of live weights to layers, the same share (uniform)
    or by Erdos-Renyi (erk), the default of set and rigl without N:M. every: steps between changes
    of the masks. begin: step from which zeros grow. until: the last step at which masks change;
    default three quarters of the steps. drop: share of live weights that is exchanged, of rigl
    falling as a cosine. start: which weights live at first, of methods that do not begin dense:
    random, the largest, or those that are not zero (pruned, without a sparsity). layers: names or
    patterns with ``*``. seed: of what is drawn.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)
    method: Method
    sparsity: float | None = Field(default=None, gt=0, lt=1)
    pattern: str = "unstructured"
    allocation: Allocation | None = None
    every: int = Field(default=100, ge=1)
    begin: int = Field(default=0, ge=0)
    until: int | None = Field(default=None, ge=1)
    drop: float = Field(default=0.3, gt=0, lt=1)
    start: Start = "random"
    layers: tuple[str, ...] = ("*",)
    seed: int = Field(default=0, ge=0)

    @model_validator(mode="after")
    def _fit(self) -> SparseSettings:
        from joulesmith.compress.prune.patterns import UNSTRUCTURED, parse_pattern

        try:
            kind = parse_pattern(self.pattern)
        except JoulesmithError as e:
            raise ValueError(str(e)) from e
        for field in _NOT_OF[self.method]:
            if field in self.model_fields_set:
                raise ValueError(f"{self.method} has no {field}: leave it out")
        told = [self.sparsity is not None, bool(kind.of), self.start == "pruned"]
        if sum(told) != 1:
            raise ValueError("give one of a sparsity, a pattern N:M and start=pruned")
        if (kind.of or self.start == "pruned") and self.allocation is not None:
            raise ValueError("a pattern N:M and start=pruned settle the allocation: leave it out")
        if kind.name != UNSTRUCTURED and not kind.of:
            if self.method in EXCHANGE:
                raise ValueError(f"{self.method} exchanges single weights: not with {kind.name}")
            if self.start == "pruned":
                raise ValueError(f"start=pruned goes with single weights: not with {kind.name}")
        if self.until is not None and self.begin >= self.until:
            raise ValueError(f"begin {self.begin} is not before until {self.until}")
        return self

    def last(self, steps: int) -> int:
        """``until``, for a training of so many steps. Raises `JoulesmithError` where it is beyond
        them, or ``begin`` is."""
        found = max(1, round(_FINAL * steps)) if self.until is None else self.until
        if found > steps:
            raise JoulesmithError(f"until {found} is beyond the {steps} steps: give fewer")
        if self.begin >= found:
            raise JoulesmithError(f"begin {self.begin} is not before the last change at {found}")
        return found
