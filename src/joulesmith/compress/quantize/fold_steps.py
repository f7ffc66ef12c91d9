"""Steps that prepare a float model for low bits without changing what it says: `awq`, `rotate`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray

from joulesmith.calibrate import calibrate
from joulesmith.compress.step import Step, StepRecord, register
from joulesmith.errors import JoulesmithError
from joulesmith.moments import Moments
from joulesmith.progress import Tick, silent

if TYPE_CHECKING:
    from joulesmith.compress.quantize.grids import Grid
    from joulesmith.models import Model


@register
class Rotate(Step):
    """Rotations folded into the weights; see `rotate`.

    what: "residual" rotates the residual stream (a tied head parts from the embedding and is
    stored beside it), "values" what heads carry from value to output, "both" does both.
    """

    name: ClassVar[str] = "rotate"
    what: Literal["residual", "values", "both"] = "residual"
    seed: int = 0

    def apply(
        self, model: Model, calibration: NDArray[np.int32], progress: Tick = silent
    ) -> StepRecord:
        """Rotate in place; the float model says the same."""
        from joulesmith.compress.quantize.rotate import rotate_residual, rotate_values

        if self.what != "values":
            rotate_residual(model, self.seed)
        progress(0.5)
        if self.what != "residual":
            rotate_values(model, self.seed)
        progress(1.0)
        return StepRecord(self.name)


@register
class Awq(Step):
    """AWQ's factors for one type, folded into the layers before; see `awq`.

    type: the grid that the matrices will be rounded to. seed: of the labels drawn for the
    tokens' weights.
    """

    name: ClassVar[str] = "awq"
    type: str
    seed: int = 0

    def grid(self) -> Grid:
        """The type's. Raises `JoulesmithError` for one that is not known or has no scales."""
        from joulesmith.compress.quantize.grids import Grid, grid

        found = grid(self.type)
        if not isinstance(found, Grid):
            raise JoulesmithError(f"awq: {self.type} has no scales to protect weights by")
        return found

    def apply(
        self, model: Model, calibration: NDArray[np.int32], progress: Tick = silent
    ) -> StepRecord:
        """Choose and fold factors block by block; the float model says the same."""
        import torch

        from joulesmith.compress.quantize.awq import protect
        from joulesmith.compress.quantize.fold import scale_channels
        from joulesmith.compress.quantize.sites import folds_of

        g = self.grid()
        moved, before, after = 0, 0.0, 0.0

        def visit(index: int, moments: Mapping[str, Moments]) -> None:
            nonlocal moved, before, after
            block = model.module.model.layers[index]
            for fold in folds_of(block, model.module.config):
                found = moments.get(fold.consumers[0])
                if found is None:
                    continue
                weights = []
                for name in fold.consumers:
                    weight = block.get_submodule(name).weight
                    assert isinstance(weight, torch.Tensor)
                    weights.append(weight.detach().float())
                chosen = protect(
                    found.hessian, weights, g, channels=fold.channels, columns=fold.columns
                )
                before, after = before + chosen.before, after + chosen.error
                if chosen.alpha > 0:
                    scale_channels(block, fold, 1 / chosen.scale.double())
                    moved += 1

        calibrate(model.module, calibration, visit, seed=self.seed, progress=progress)
        note = f"{moved} sets of factors folded, output error {before:.4g} -> {after:.4g}"
        return StepRecord(self.name, notes=(note,))
