"""What follows rounding in `joulesmith quantize`: learned codes, tuned scales and norms.

Learned blocks are kept in the run's folder as they come, so that an interrupted run goes on.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from joulesmith.atomic import atomic_path
from joulesmith.compress.quantize.grids import Bytes, grid
from joulesmith.compress.quantize.learned import STEPS, Block, learn
from joulesmith.compress.quantize.rounding import FINE_BITS
from joulesmith.compress.quantize.tune import EPOCHS, teacher_of, tune
from joulesmith.progress import Progress

if TYPE_CHECKING:
    from joulesmith.models import Model

Packed = dict[str, tuple[str, Bytes]]


@dataclass(frozen=True)
class Effort:
    """rounding: of `walk`. learn_steps, tune_epochs: of `learn` and `tune`; 0 for none."""

    rounding: Literal["nearest", "fast", "default", "thorough"]
    learn_steps: int = 0
    tune_epochs: int = 0


EFFORTS = {
    "nearest": Effort("nearest"),
    "fast": Effort("fast"),
    "default": Effort("default", STEPS, EPOCHS),
    "thorough": Effort("thorough", 4 * STEPS, 2 * EPOCHS),
}
"""Rounding alone, to nearest or with error feedback; learned and tuned as well."""
_TUNE, _LEARN = 90, 300  # costs of the stages


def refine(
    model: Model,
    packed: Mapping[str, tuple[str, Bytes]],
    calibration: NDArray[np.int32],
    folder: Path,
    seed: int,
    show: Progress,
    *,
    learn_steps: int,
    tune_epochs: int,
) -> Packed:
    """Better codes, scales and norms for what is packed; ``model`` has them at the end.

    model: the float model. Norms and biases are rounded to float16 where they were tuned,
    since that is what folders hold. learn_steps, tune_epochs: of `learn` and `tune`; 0 for none.
    Neither runs where all types are of eight bits and more.
    """
    coarse = any(grid(kind).bits_per_weight < FINE_BITS for kind, _ in packed.values())
    if not coarse or not (learn_steps or tune_epochs):
        _fill(model, packed)
        return dict(packed)
    teacher = teacher_of(model, calibration)
    found = dict(packed)
    if learn_steps:
        show.expected.setdefault("learn", _LEARN)
        with show.stage("learn") as tick:
            found = learn(
                model,
                packed,
                calibration,
                steps=learn_steps,
                seed=seed,
                keep=lambda index, block: _keep(folder / f"learned-{index}.npz", block),
                known=lambda index: _known(folder / f"learned-{index}.npz"),
                progress=tick,
            ).packed
    if tune_epochs:
        show.expected.setdefault("tune", _TUNE)
        with show.stage("tune") as tick:
            found = tune(
                model, found, calibration, teacher, epochs=tune_epochs, seed=seed, progress=tick
            ).packed
    else:
        _fill(model, found)
    with torch.no_grad():
        for p in model.module.parameters():
            if p.ndim == 1:
                p.copy_(p.half())
    return found


def _fill(model: Model, packed: Mapping[str, tuple[str, Bytes]]) -> None:
    from joulesmith.models import set_gguf_weight

    for name, (kind, raw) in packed.items():
        back = grid(kind).unpack(raw, model.ref(name).shape[1])
        set_gguf_weight(model, name, torch.as_tensor(back))


def _keep(path: Path, block: Block) -> None:
    """Keep what was learned of a block, complete or not at all."""
    with atomic_path(path) as temporary, temporary.open("wb") as f:
        np.savez(
            f,
            names=np.array(list(block.packed)),
            kinds=np.array([kind for kind, _ in block.packed.values()]),
            errors=np.array([block.before, block.after]),
            **{f"packed-{i}": raw for i, (_, raw) in enumerate(block.packed.values())},  # type: ignore[arg-type]
        )


def _known(path: Path) -> Block | None:
    """What `_keep` kept, None where there is nothing."""
    if not path.exists():
        return None
    with np.load(path, allow_pickle=False) as z:
        names, kinds = z["names"].tolist(), z["kinds"].tolist()
        packed = {
            n: (k, z[f"packed-{i}"]) for i, (n, k) in enumerate(zip(names, kinds, strict=True))
        }
        before, after = z["errors"].tolist()
    return Block(packed, before, after)
