"""The step that stores a model's matrices as GGUF blocks, one type a tensor."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from joulesmith.compress.quantize.walk import Rounded, walk
from joulesmith.compress.step import Step, StepRecord, register
from joulesmith.errors import JoulesmithError
from joulesmith.progress import Tick, silent

if TYPE_CHECKING:
    from joulesmith.models import Model, TensorRef


@register
class Quantize(Step):
    """Round each matrix onto its type with error feedback from calibration.

    types: GGUF tensor name -> type. default: the type of tensors not named; None
    leaves them as they are. seed: of the labels drawn for the Fisher information.
    """

    name: ClassVar[str] = "quantize"
    types: dict[str, str] = Field(default_factory=dict)
    default: str | None = None
    effort: Literal["nearest", "default", "thorough"] = "default"
    seed: int = 0

    def apply(
        self, model: Model, calibration: NDArray[np.int32], progress: Tick = silent
    ) -> StepRecord:
        """Pack the matrices; the module itself is left as it is."""
        known = {r.name for r in model.matrices(split_head=True)}
        unknown = sorted(set(self.types) - known)
        if unknown:
            raise JoulesmithError(f"the model has no matrix {unknown[0]!r} to quantize")
        packed: dict[str, tuple[str, NDArray[np.uint8]]] = {}

        def types(ref: TensorRef) -> list[str]:
            chosen = self.types.get(ref.name, self.default)
            return [chosen] if chosen else ["F32"]

        def emit(_: str, rounded: list[Rounded]) -> None:
            for r in rounded:
                packed[r.ref.name] = (r.type, r.packed)

        walk(
            model,
            calibration,
            types,
            emit,
            effort=self.effort,
            split_head="output.weight" in self.types,
            seed=self.seed,
            progress=progress,
        )
        return StepRecord(self.name, packed)
