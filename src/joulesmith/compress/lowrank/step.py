"""The step that gives linear layers a lower rank, each as much as it can bear."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, model_validator

from joulesmith.compress.step import Step, StepRecord, register
from joulesmith.errors import JoulesmithError
from joulesmith.progress import Tick, silent

if TYPE_CHECKING:
    from joulesmith.compress.lowrank.walk import Keep
    from joulesmith.models import Model


@register
class LowRank(Step):
    """Replace the linear layers of the blocks by factors of lower rank.

    parameters: share of the numbers that are left, in (0, 1]; of: "blocks" counts the
    linear layers of the blocks alone (as the papers do), "model" all of the model.
    energy: instead, the share of each layer's energy that is kept. ranks: layer name
    ("model.layers.0.mlp.up_proj") -> rank, which overrules; with neither, the only ones.
    uniform: the same share of each layer. multiple: ranks are multiples of it.
    metric: see `walk.Metric`. pivoted: count and keep factors in the form with fewest
    numbers. kept: True keeps them as two thin layers, False merges them back into one dense
    matrix, a list names those that are kept (what was measured to cost fewer joules).
    refit: cut each layer anew for the inputs that it has by then.
    """

    name: ClassVar[str] = "lowrank"
    parameters: float | None = Field(default=None, gt=0, le=1)
    of: Literal["blocks", "model"] = "blocks"
    energy: float | None = Field(default=None, gt=0, le=1)
    ranks: dict[str, int] = Field(default_factory=dict)
    uniform: bool = False
    multiple: int = Field(default=1, ge=1)
    metric: Literal["fisher", "diagonal", "inputs", "none"] = "fisher"
    pivoted: bool = True
    kept: bool | tuple[str, ...] = True
    refit: bool = True
    seed: int = 0

    @model_validator(mode="after")
    def _one_rule(self) -> LowRank:
        if self.parameters is not None and self.energy is not None:
            raise ValueError("give parameters or energy, not both")
        if self.parameters is None and self.energy is None and not self.ranks:
            raise ValueError("give parameters, energy or ranks")
        return self

    def shapes(self, model: Model) -> dict[str, tuple[int, int]]:
        """Layers that may be factored. Raises `JoulesmithError` where one is named that is none."""
        from joulesmith.compress.lowrank.walk import factorable

        shapes = factorable(model)
        names = set(self.ranks) | (set() if isinstance(self.kept, bool) else set(self.kept))
        if unknown := sorted(names - set(shapes)):
            raise JoulesmithError(f"the model has no linear layer {unknown[0]!r} to factor")
        return shapes

    def apply(
        self, model: Model, calibration: NDArray[np.int32], progress: Tick = silent
    ) -> StepRecord:
        """Survey, choose ranks, replace. See `apply_with` to decide per layer what is kept."""
        return self.apply_with(model, calibration, None, progress)

    def apply_with(
        self,
        model: Model,
        calibration: NDArray[np.int32],
        keep: Keep | None,
        progress: Tick = silent,
    ) -> StepRecord:
        """As `apply`; ``keep`` (rows, columns, rank) -> bool overrules ``kept``.

        Raises `JoulesmithError` for a budget that cannot be met and unknown layers; the
        model is then as it was.
        """
        from joulesmith.compress.lowrank.ranks import choose_ranks, total
        from joulesmith.compress.lowrank.walk import replace, survey

        shapes = self.shapes(model)
        whole = sum(r * c for r, c in shapes.values())
        with tempfile.TemporaryDirectory(prefix="lowrank-") as folder:
            found = survey(
                model,
                calibration,
                Path(folder),
                metric=self.metric,
                seed=self.seed,
                progress=lambda share: progress(0.7 * share),
            )
            chosen = choose_ranks(
                found.curves,
                parameters=self._budget(whole, model.parameters),
                energy=self.energy,
                given=self.ranks,
                pivoted=self.pivoted,
                uniform=self.uniform,
                multiple=self.multiple,
            )
            done = replace(
                model,
                found,
                chosen,
                keep=keep or (lambda *_: True),
                only=None if keep is not None else self._named(),
                pivoted=self.pivoted,
                windows=calibration if self.refit else None,
                progress=lambda share: progress(0.7 + 0.3 * share),
            )
            left = total(found.curves, chosen, pivoted=self.pivoted)
        kept = sum(done.values())
        note = (
            f"{len(done)} of {len(shapes)} layers cut, {kept} kept as factors; as factors the "
            f"blocks' linear layers hold {left / whole:.4f} of their numbers"
        )
        return StepRecord(self.name, notes=(note,))

    def _named(self) -> tuple[str, ...] | None:
        """The layers that may be kept as factors; None for all."""
        if isinstance(self.kept, tuple):
            return self.kept
        return None if self.kept else ()

    def _budget(self, blocks: int, model: int) -> int | None:
        if self.parameters is None:
            return None
        if self.of == "blocks":
            return int(self.parameters * blocks)
        budget = int(self.parameters * model) - (model - blocks)
        if budget <= 0:
            raise JoulesmithError(
                f"{self.parameters:g} of the model's numbers are fewer than its embedding, head "
                f"and norms hold ({(model - blocks) / model:.3f}): keep more, or count blocks only"
            )
        return budget
