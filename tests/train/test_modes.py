"""Modes of training, and memory that ends."""

from __future__ import annotations

import pytest
import torch

from joulesmith.errors import JoulesmithError
from joulesmith.train.modes import fits


def test_memory_that_ends_is_one_line() -> None:
    with pytest.raises(JoulesmithError, match="out of memory"), fits():
        torch.empty(2**55, dtype=torch.uint8)  # the processor's own refusal
    for error in (MemoryError(), torch.OutOfMemoryError("CUDA out of memory. Tried")):
        with pytest.raises(JoulesmithError, match="--micro"), fits():
            raise error
    with pytest.raises(RuntimeError, match="another"), fits():
        raise RuntimeError("another")
