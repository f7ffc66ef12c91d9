"""GGUF files whose scales are not finite are refused by the loader, whatever the type."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from joulesmith.compress.quantize.grids import grid
from joulesmith.errors import JoulesmithError
from joulesmith.export.gguf_packed import write_packed
from joulesmith.models import Model, gguf_weight, load
from tiny import write_tiny

NAME = "blk.1.ffn_up.weight"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return load(write_tiny(tmp_path_factory.mktemp("model") / "m", steps=0))


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize(
    "kind", ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "IQ4_NL", "F16", "F32", "BF16"]
)
def test_a_poisoned_scale_is_one_line(
    model: Model, tmp_path: Path, kind: str, value: float
) -> None:
    packed = grid(kind).pack(gguf_weight(model, NAME)).copy()
    if kind in ("F32", "BF16"):
        bits = np.frombuffer(np.float32(value).tobytes(), np.uint8)
        packed[3, : (4 if kind == "F32" else 2)] = bits if kind == "F32" else bits[2:]
    else:  # the scale comes first in each block
        packed[3, :2] = np.frombuffer(np.float16(value).tobytes(), np.uint8)
    path = tmp_path / "m.gguf"
    write_packed(model, {NAME: (kind, packed)}, path)
    with pytest.raises(JoulesmithError, match=r"blk\.1\.ffn_up\.weight .* NaN or infinity"):
        load(path)
