"""The step that quantizes the blocks and lets small factors take up the error; see `absorb`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from joulesmith.compress.step import Step, StepRecord, register
from joulesmith.errors import JoulesmithError
from joulesmith.progress import Tick, silent

if TYPE_CHECKING:
    from joulesmith.models import Model


@register
class Absorb(Step):
    """Each matrix of the blocks as ``Q + A B``: Q on its type, A B of low rank for what Q misses.

    The factors are written beside the model as a LoRA adapter, which engines add as they run.
    types, default: as the step `quantize` has them, of all matrices inside blocks. rank: of the
    factors, at most what a matrix has; ranks: GGUF name or pattern -> another rank. effort:
    of rounding. metric: in which the factors are best, see `walk.Metric`. sweeps: rounding and
    factoring in turn; 1 is LQER, more is CALDERA. seed: of the labels drawn for gradients.
    """

    name: ClassVar[str] = "absorb"
    types: dict[str, str | None] = Field(default_factory=dict)
    default: str | None = None
    rank: int = Field(default=8, ge=1)
    ranks: dict[str, int] = Field(default_factory=dict)
    effort: Literal["nearest", "default", "thorough"] = "default"
    metric: Literal["fisher", "diagonal", "inputs", "none"] = "fisher"
    sweeps: int = Field(default=1, ge=1)
    seed: int = 0

    def apply(
        self, model: Model, calibration: NDArray[np.int32], progress: Tick = silent
    ) -> StepRecord:
        """Pack the matrices and find their factors; the module is left as it is."""
        from joulesmith.compress.lowrank.absorb import absorb_model
        from joulesmith.compress.quantize.choice import choose

        choice = choose(model, self.types, self.default)
        ranks = self.chosen_ranks(model, choice.types)
        found = absorb_model(
            model,
            calibration,
            lambda ref: choice.types[ref.name],
            lambda ref: ranks[ref.name],
            effort=self.effort,
            metric=self.metric,
            sweeps=self.sweeps,
            seed=self.seed,
            progress=progress,
        )
        before, after = (sum(r.damage[k] for r in found.values()) for k in (0, -1))
        weights = {n: r.packed.shape[0] * model.ref(n).shape[1] for n, r in found.items()}
        bits = sum(r.bits_per_weight * weights[n] for n, r in found.items())
        note = (
            f"factors take up the error of {len(found)} matrices, predicted {before:.4g} -> "
            f"{after:.4g}; {bits / sum(weights.values()):.3f} bits per weight with them"
        )
        return StepRecord(
            self.name,
            {n: (choice.types[n], r.packed) for n, r in found.items()},
            (*choice.notes, note),
            factors={n: (r.outer, r.inner) for n, r in found.items()},
        )

    def chosen_ranks(self, model: Model, types: Mapping[str, str]) -> dict[str, int]:
        """GGUF name -> rank. Raises `JoulesmithError` for matrices outside blocks, blocks'
        matrices without a type, and names that match nothing."""
        from fnmatch import fnmatchcase

        inside = {r.name: r for r in model.matrices() if r.layer is not None}
        if outside := sorted(set(types) - set(inside)):
            raise JoulesmithError(
                f"absorb is for matrices inside blocks: give {outside[0]} a step quantize"
            )
        if bare := sorted(set(inside) - set(types)):
            raise JoulesmithError(f"absorb needs a type for every matrix of the blocks: {bare[0]}")
        for key in self.ranks:
            if not any(fnmatchcase(n, key) for n in inside):
                raise JoulesmithError(f"the model has no matrix {key!r} in its blocks")
        found = {}
        for name, ref in inside.items():
            matching = [name, *(k for k in self.ranks if fnmatchcase(name, k))]
            rank = next((self.ranks[k] for k in matching if k in self.ranks), self.rank)
            found[name] = max(1, min(rank, *ref.shape))
        return found
