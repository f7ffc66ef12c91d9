"""The step that stores a model's matrices as GGUF blocks, one type a tensor."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, model_validator

from joulesmith.compress.quantize.chosen import Ranges
from joulesmith.compress.quantize.walk import Rounded, walk
from joulesmith.compress.step import Step, StepRecord, register
from joulesmith.errors import JoulesmithError
from joulesmith.progress import Tick, silent

if TYPE_CHECKING:
    from joulesmith.models import Model, TensorRef


@register
class Quantize(Step):
    """Round each matrix onto its type with error feedback from calibration.

    types: GGUF tensor name, or pattern such as "blk.*.attn_?.weight" -> type, None for "as it
    is"; default: the type of matrices inside decoder blocks that are not named (embedding and
    head stay as they are unless they are); see `choice.choose`. A type with rounded inputs
    ("W8A8", see `input_types`) is for all: default alone. ranges: how scales of
    integer grids are chosen, see `chosen`; None for the search under the Hessian. learn_steps:
    of learned rounding, block by block (`learned`; 0 for none). tune_epochs: of
    tuning scales and norms (`tune`; 2 is enough). seed: of the labels drawn for the
    Fisher information, and of both.
    """

    name: ClassVar[str] = "quantize"
    types: dict[str, str | None] = Field(default_factory=dict)
    default: str | None = None
    effort: Literal["nearest", "fast", "default", "thorough"] = "default"
    ranges: Ranges | None = None
    learn_steps: int = Field(default=0, ge=0)
    tune_epochs: int = Field(default=0, ge=0)
    seed: int = 0

    @model_validator(mode="after")
    def _has_curvature(self) -> Quantize:
        if self.ranges == "second-order" and self.effort == "nearest":
            raise ValueError("second-order ranges need the Hessian: not with effort: nearest")
        return self

    def apply(
        self, model: Model, calibration: NDArray[np.int32], progress: Tick = silent
    ) -> StepRecord:
        """Pack the matrices. The module is left as it is, unless they are learned or tuned:
        then it has the quantized weights, and norms that go with them."""
        from joulesmith.compress.quantize.choice import HEAD, choose
        from joulesmith.compress.quantize.input_types import SCHEMES

        if self.default in SCHEMES:
            raise JoulesmithError(
                f"{self.default} as a default is for `joulesmith quantize`: in Python use the "
                "steps smooth, quantize and round-inputs"
            )
        choice = choose(model, self.types, self.default)
        self.check_ranges(choice.types)
        packed: dict[str, tuple[str, NDArray[np.uint8]]] = {}

        def types(ref: TensorRef) -> list[str]:
            kind = choice.types.get(ref.name)
            return [] if kind is None else [kind]

        def emit(_: str, rounded: list[Rounded]) -> None:
            for r in rounded:
                packed[r.ref.name] = (r.type, r.packed)

        walk(
            model,
            calibration,
            types,
            emit,
            effort=self.effort,
            ranges=self.ranges,
            split_head=HEAD in choice.types,
            seed=self.seed,
            progress=progress,
        )
        if self.learn_steps or self.tune_epochs:
            packed = self._refined(model, packed, calibration, progress)
        return StepRecord(self.name, packed, choice.notes)

    def check_ranges(self, types: Mapping[str, str]) -> None:
        """Raises `JoulesmithError` where ``ranges`` are asked for of types that have their own."""
        from joulesmith.compress.quantize.chosen import check
        from joulesmith.compress.quantize.grids import grid

        for kind in set(types.values()) if self.ranges is not None else ():
            check(grid(kind), self.ranges or "")

    def _refined(
        self,
        model: Model,
        packed: dict[str, tuple[str, NDArray[np.uint8]]],
        windows: NDArray[np.int32],
        progress: Tick,
    ) -> dict[str, tuple[str, NDArray[np.uint8]]]:
        """As `job.refine`, which also keeps what is done: the same bytes."""
        import torch

        from joulesmith.compress.quantize.grids import grid
        from joulesmith.compress.quantize.learned import learn
        from joulesmith.compress.quantize.rounding import FINE_BITS
        from joulesmith.compress.quantize.tune import teacher_of, tune

        if "output.weight" in packed and model.tied:
            raise JoulesmithError("a tied head stored apart cannot be learned or tuned")
        if all(grid(kind).bits_per_weight >= FINE_BITS for kind, _ in packed.values()):
            return packed
        teacher = teacher_of(model, windows)
        inside = {n: p for n, p in packed.items() if model.ref(n).layer is not None}
        if self.learn_steps:
            packed |= learn(
                model, inside, windows, steps=self.learn_steps, seed=self.seed, progress=progress
            ).packed
        if self.tune_epochs:
            packed |= tune(
                model, packed, windows, teacher, epochs=self.tune_epochs, seed=self.seed,
                progress=progress,
            ).packed  # fmt: skip
        with torch.no_grad():
            for p in model.module.parameters():
                if p.ndim == 1:
                    p.copy_(p.half())
        return packed
