"""joulesmith's own rounding, by effort. Needs joulesmith on the path."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks.quantizers.peers.common import installed
from benchmarks.quantizers.settings import Setting


def load(folder: Path, task: dict[str, Any]) -> Any:
    """As the command line loads it."""
    from joulesmith import models

    return models.load(folder)


def warm_imports() -> None:
    """Imported before the clock starts."""
    import joulesmith.compress.quantize.walk
    import joulesmith.plan.candidates  # noqa: F401


def type_name(setting: Setting) -> str:
    """ "INT4-G64" or "INT4-G64-ZP"."""
    return f"INT{setting.bits}-G{setting.group}" + ("" if setting.symmetric else "-ZP")


def quantize(model: Any, windows: Any, setting: Setting, variant: str, seed: int) -> Any:
    """Round every matrix of the blocks; the model then holds the rounded weights.

    variant: the effort.
    """
    import torch

    from joulesmith.compress.quantize.walk import walk
    from joulesmith.models import set_gguf_weight

    kind = type_name(setting)
    packed: dict[str, Any] = {}

    def types(ref: Any) -> list[str]:
        return ["F16" if ref.layer is None else kind]

    def emit(_: str, rounded: Any) -> None:
        for r in rounded:
            if r.ref.layer is not None:
                packed[r.ref.name] = (r.grid, r.packed, r.ref.shape[1])

    walk(model, windows, types, emit, effort=variant, seed=seed)
    for name, (grid, raw, columns) in packed.items():
        set_gguf_weight(model, name, torch.from_numpy(grid.unpack(raw, columns)))
    bits = sum(8 * raw.size for _, raw, _ in packed.values())
    count = sum(raw.shape[0] * columns for _, raw, columns in packed.values())
    return model, bits / count


def weights(quantized: Any, setting: Setting, variant: str) -> tuple[dict[str, Any], float, str]:
    """Of the module; stored bits counted from the packed bytes, zeros of ``bits`` bits."""
    model, stored = quantized
    bits = setting.stored_bits()
    # The dense layout gives each zero a whole byte; the format's own count gives it its bits.
    slack = 0 if setting.symmetric else (8 - setting.bits) / setting.group
    if abs(stored - slack - bits) > 1e-9:
        raise AssertionError(f"{stored} bits stored, {bits + slack} expected")
    return model.module.state_dict(), bits, f"effort {variant}"


def versions() -> str:
    """Of what was compared."""
    return installed("joulesmith", "torch")
