"""The step that fixes how inputs of linear layers are rounded, static ranges included."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray

from joulesmith.compress.step import Step, StepRecord, register
from joulesmith.errors import JoulesmithError
from joulesmith.progress import Tick, silent

if TYPE_CHECKING:
    from joulesmith.compress.quantize.activations import Scheme
    from joulesmith.models import Model


@register
class RoundInputs(Step):
    """Inputs of all linear layers inside blocks on eight bits.

    kind: int8 or fp8 (E4M3). dynamic: a scale by token, else one for the tensor, its range
    chosen by ``method`` from the calibration text. symmetric: no zero points. by_token: modules
    that keep a scale by token all the same, where a few tokens are a thousand times the usual.
    """

    name: ClassVar[str] = "round-inputs"
    kind: Literal["int8", "fp8"] = "int8"
    dynamic: bool = True
    symmetric: bool = True
    method: Literal["absmax", "percentile", "mse", "kl"] = "mse"
    by_token: tuple[str, ...] = ()

    @property
    def scheme(self) -> Scheme:
        """What rounds the inputs that have no scale by token of their own."""
        from joulesmith.compress.quantize.activations import Scheme

        return Scheme(self.kind, self.dynamic, self.symmetric)

    def apply(
        self, model: Model, calibration: NDArray[np.int32], progress: Tick = silent
    ) -> StepRecord:
        """Find the quantizers; the module itself is left as it is."""
        from joulesmith.compress.quantize.activations import InputQuantizer
        from joulesmith.compress.quantize.input_types import module_of, static_inputs, words

        scheme = self.scheme
        inside = [module_of(r) for r in model.matrices() if r.layer is not None]
        unknown = sorted(set(self.by_token) - set(inside))
        if unknown:
            raise JoulesmithError(f"the model has no linear layer {unknown[0]!r} inside a block")
        if self.dynamic:
            inputs = dict.fromkeys(inside, InputQuantizer(scheme))
        else:
            inputs = static_inputs(model, calibration, scheme, self.by_token, self.method, progress)
        note = f"inputs: {words(scheme, len(self.by_token))}"
        return StepRecord(self.name, inputs=inputs, notes=(note,))
