"""The step that says in how many bits keys and values are to be cached."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray

from joulesmith.compress.step import Step, StepRecord, register
from joulesmith.progress import Tick, silent

if TYPE_CHECKING:
    from joulesmith.models import Model


@register
class QuantizeCache(Step):
    """Settings as `KVScheme` has them; an engine makes the cache, so no file holds any of it."""

    name: ClassVar[str] = "kv-cache"
    bits: Literal[8, 4, 2] = 8
    keys: Literal["channel", "token"] = "token"
    group: int = 32
    symmetric: bool = False
    rotate: bool = False
    rope: bool = False

    def apply(
        self, model: Model, calibration: NDArray[np.int32], progress: Tick = silent
    ) -> StepRecord:
        """Record the scheme; raises `JoulesmithError` where the model's heads do not fit it."""
        from joulesmith.compress.quantize.kv_cache import KVScheme
        from joulesmith.compress.quantize.kv_layers import PackedCache

        scheme = KVScheme(self.bits, self.keys, self.group, self.symmetric, self.rotate, self.rope)
        PackedCache(model.module.config, scheme)
        return StepRecord(self.name, cache=scheme)
