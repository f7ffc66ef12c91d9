"""The step that sets weights to zero: settings of `walk.prune_module`, for a recipe."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, model_validator

from joulesmith.compress.prune.task import Allocation, Method
from joulesmith.compress.step import Resumable, StepRecord, register
from joulesmith.errors import JoulesmithError
from joulesmith.progress import Tick, silent

if TYPE_CHECKING:
    from torch import Tensor

    from joulesmith.models import Model


@register
class Prune(Resumable):
    """Zeros in the linear layers of the blocks; see `walk.prune_module` for method, allocation,
    pattern, threshold, repair and layers.

    sparsity: share of those layers' weights that become zero. parameters: instead, how many
    weights of the whole model may be other than zero. before: for "movement" and "update", the
    model before training: a folder or file, as `models.load` takes it.
    """

    name: ClassVar[str] = "prune"
    sparsity: float | None = Field(default=None, gt=0, lt=1)
    parameters: int | None = Field(default=None, gt=0)
    pattern: str = "unstructured"
    method: Method = "admm"
    allocation: Allocation | None = None
    threshold: float | None = None
    repair: bool = False
    layers: tuple[str, ...] = ("*",)
    before: str | None = None
    seed: int = 0

    @model_validator(mode="after")
    def _settings(self) -> Prune:
        from joulesmith.compress.prune.patterns import parse_pattern

        try:
            kind = parse_pattern(self.pattern)
        except JoulesmithError as e:
            raise ValueError(str(e)) from e
        given = [v for v in (self.sparsity, self.parameters, self.threshold) if v is not None]
        if len(given) + (kind.sparsity is not None) != 1:
            raise ValueError(
                "give one of sparsity, parameters and threshold, or a pattern N:M by itself"
            )
        return self

    def share(self, model: Model) -> float | None:
        """The sparsity that is asked of the chosen layers. Raises `JoulesmithError`."""
        if self.parameters is None:
            return self.sparsity
        from joulesmith.compress.prune.task import prunable

        size = sum(x.matrix.numel() for x in prunable(model.module, self.layers).values())
        rest = model.parameters - size
        if self.parameters >= model.parameters:
            raise JoulesmithError(
                f"{self.parameters:,} parameters are asked for, and the model has "
                f"{model.parameters:,}: ask for fewer"
            )
        if self.parameters <= rest:
            raise JoulesmithError(
                f"{self.parameters:,} parameters are asked for, and what is not pruned (embedding, "
                f"head, norms) has {rest:,}: ask for more"
            )
        return (model.parameters - self.parameters) / size

    def check(self, model: Model) -> None:
        """Raises `JoulesmithError` for what shapes and settings alone tell is wrong."""
        from joulesmith.compress.prune.patterns import parse_pattern
        from joulesmith.compress.prune.task import check, prunable

        if (self.before is not None) != (self.method in ("movement", "update")):
            raise JoulesmithError(
                f"{self.method} compares with the model before training: give before"
                if self.before is None
                else f"{self.method} does not look at the model before training: leave before out"
            )
        check(
            prunable(model.module, self.layers), self.share(model), self.threshold,
            parse_pattern(self.pattern), self.method, self.allocation, self.repair,
        )  # fmt: skip

    def apply(
        self,
        model: Model,
        calibration: NDArray[np.int32],
        progress: Tick = silent,
        keep: Path | None = None,
    ) -> StepRecord:
        """Prune in place. Errors: those of `walk.prune_module`; the model is then as it was."""
        from joulesmith.compress.prune.walk import prune_module

        found = prune_module(
            model.module,
            calibration,
            sparsity=self.share(model),
            pattern=self.pattern,
            method=self.method,
            allocation=self.allocation,
            threshold=self.threshold,
            repair=self.repair,
            layers=self.layers,
            before=None if self.before is None else self._before(),
            seed=self.seed,
            keep=keep,
            progress=progress,
        )
        size = sum(p.shape[0] * p.shape[1] for p in found)
        zeros = sum(p.sparsity * p.shape[0] * p.shape[1] for p in found)
        note = (
            f"{zeros / size:.1%} of the weights of {len(found)} layers are zero "
            f"({self.pattern}, {self.method}), {min(p.sparsity for p in found):.0%} to "
            f"{max(p.sparsity for p in found):.0%} of a layer"
        )
        return StepRecord(self.name, notes=(note,), pruned=tuple(found))

    def _before(self) -> dict[str, Tensor]:
        from joulesmith.compress.layers import linears_of
        from joulesmith.models import load

        assert self.before is not None
        return {n: x.matrix for n, x in linears_of(load(self.before).module).items()}
