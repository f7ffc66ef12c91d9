"""joulesmith's own rounding, by effort. Needs joulesmith on the path."""

from __future__ import annotations

import os
from hashlib import sha256
from pathlib import Path
from typing import Any

from benchmarks.quantizers.peers.common import installed
from benchmarks.quantizers.settings import Setting


def load(folder: Path, task: dict[str, Any]) -> Any:
    """As the command line loads it."""
    from joulesmith import models
    from joulesmith.memory import return_large_blocks

    return_large_blocks()
    return models.load(folder)


def warm_imports() -> None:
    """Imported before the clock starts."""
    import joulesmith.job.refine
    import joulesmith.plan.candidates  # noqa: F401


def type_name(setting: Setting) -> str:
    """ "INT4-G64" or "INT4-G64-ZP"."""
    return f"INT{setting.bits}-G{setting.group}" + ("" if setting.symmetric else "-ZP")


def quantize(model: Any, windows: Any, setting: Setting, variant: str, seed: int) -> Any:
    """Round every matrix of the blocks; the model then holds the rounded weights.

    variant: an effort of the command `joulesmith quantize`. With ``ROUNDED`` set, what error
    feedback gave is kept there for the efforts that start from it, and times mean nothing.
    """
    import numpy as np
    import torch

    from joulesmith.compress.quantize.grids import grid
    from joulesmith.compress.quantize.learned import learn
    from joulesmith.compress.quantize.rounding import FINE_BITS
    from joulesmith.compress.quantize.tune import teacher_of, tune
    from joulesmith.compress.quantize.walk import walk
    from joulesmith.job.refine import EFFORTS
    from joulesmith.models import set_gguf_weight

    kind = type_name(setting)
    packed: dict[str, Any] = {}

    def types(ref: Any) -> list[str]:
        return [] if ref.layer is None else [kind]

    effort = EFFORTS[variant]
    place = os.environ.get("ROUNDED")
    learns = setting.bits < FINE_BITS and bool(effort.tune_epochs)
    stored: dict[str, int] = {}

    def fill(name: str, kind: str, raw: Any) -> None:
        columns = model.ref(name).shape[1]
        set_gguf_weight(model, name, torch.from_numpy(grid(kind).unpack(raw, columns)))
        stored[name] = raw.size

    def emit(_: str, rounded: Any) -> None:
        for r in rounded:
            if place is None and not learns:  # nothing reads a block's old weights any more
                fill(r.ref.name, r.grid.name, r.packed)
            else:
                packed[r.ref.name] = (r.grid.name, r.packed)

    digest = sha256(windows.tobytes() + model.name.encode()).hexdigest()[:16]
    kept = None if place is None else Path(place) / f"{digest}-{kind}-{effort.rounding}-{seed}.npz"
    if kept is not None and kept.exists():
        with np.load(kept, allow_pickle=False) as z:
            packed = {name: (kind, z[name]) for name in z.files}
    else:
        walk(model, windows, types, emit, effort=effort.rounding, seed=seed)
        if kept is not None:
            np.savez(kept, **{name: raw for name, (_, raw) in packed.items()})
    if learns:
        teacher = teacher_of(model, windows)
        packed = learn(model, packed, windows, steps=effort.learn_steps, seed=seed).packed
        packed = tune(model, packed, windows, teacher, epochs=effort.tune_epochs, seed=seed).packed
    for name, (k, raw) in packed.items():
        fill(name, k, raw)
    with torch.no_grad():  # as folders hold them
        for p in model.module.parameters():
            if p.ndim == 1:
                p.copy_(p.half())
    bits = sum(8 * size for size in stored.values())
    count = sum(model.ref(name).shape[0] * model.ref(name).shape[1] for name in stored)
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
