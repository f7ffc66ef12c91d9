"""The step that smooths a model: see `smooth` for the maths, `sites` for where.

The float model's outputs stay as they were; its weights and norms change in place.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray

from joulesmith.atomic import atomic_path
from joulesmith.calibrate import calibrate
from joulesmith.compress.step import Step, StepRecord, register
from joulesmith.moments import Moments
from joulesmith.progress import Tick, silent

if TYPE_CHECKING:
    import torch

    from joulesmith.models import Model

TOKENS = 512
"""Tokens of a layer's sample that factors are judged on, evenly spread."""
WINDOWS = 16
"""Calibration windows that are enough to choose factors."""


@dataclass(frozen=True)
class Smoothed:
    """What one block's factors came to.

    scales: producer, relative to the block -> factors (channels,) that its channels were
    divided by. alpha: the same -> chosen exponent, None where nothing was moved.
    damage: the same -> predicted nats a token before and after. excess: what a static
    scale costs of it above one by token; 0 where scales are by token.
    """

    scales: dict[str, torch.Tensor]
    alpha: dict[str, float | None]
    damage: dict[str, tuple[float, float]]
    excess: dict[str, float]


def smooth_block(
    block: torch.nn.Module,
    config: object,
    moments: Mapping[str, Moments],
    kind: Literal["int8", "fp8"],
    dynamic: bool,
    symmetric: bool = True,
    bearable: float | None = None,
) -> Smoothed:
    """Choose and fold the factors of one decoder block, in place.

    moments: of its linear layers, with samples. Layers without a sample are left alone.
    bearable: of `search`.
    """
    import torch

    from joulesmith.compress.quantize.activations import Scheme
    from joulesmith.compress.quantize.fold import scale_channels
    from joulesmith.compress.quantize.sites import folds_of
    from joulesmith.compress.quantize.smooth import Layer, search

    found = Smoothed({}, {}, {}, {})
    for fold in folds_of(block, config):
        samples = [m.sample for c in fold.consumers if (m := moments.get(c)) is not None]
        if len(samples) != len(fold.consumers) or any(s is None for s in samples):
            continue
        first = samples[0]
        assert first is not None
        step = max(1, len(first.x) // TOKENS)
        layers = []
        for name, sample in zip(fold.consumers, samples, strict=True):
            weight = block.get_submodule(name).weight
            assert isinstance(weight, torch.Tensor) and sample is not None
            g = None if sample.g is None else sample.g[::step]
            layers.append(Layer(weight.detach().float(), g))
        chosen = search(
            first.x[::step],
            layers,
            Scheme(kind, dynamic, symmetric),
            ends=moments[fold.consumers[0]].ends,
            channels=fold.channels,
            columns=fold.columns,
            bearable=bearable,
        )
        found.alpha[fold.producer] = chosen.alpha
        found.damage[fold.producer] = (chosen.before, chosen.damage)
        found.excess[fold.producer] = chosen.damage - chosen.by_token
        if chosen.alpha is not None:
            scale_channels(block, fold, 1 / chosen.scale.double())
            found.scales[fold.producer] = chosen.scale
    return found


def smooth_model(
    model: Model,
    windows: NDArray[np.int32],
    kind: Literal["int8", "fp8"] = "int8",
    dynamic: bool = True,
    symmetric: bool = True,
    *,
    seed: int = 0,
    progress: Tick = silent,
) -> dict[int, Smoothed]:
    """Smooth every block in place; block number -> what was done. windows: (n, length)."""
    done: dict[int, Smoothed] = {}
    layers = model.module.model.layers

    # A block is visited when nothing needs its weights any more, and its outputs stay.
    def visit(index: int, moments: Mapping[str, Moments]) -> None:
        config = model.module.config
        done[index] = smooth_block(layers[index], config, moments, kind, dynamic, symmetric)

    calibrate(model.module, windows[:WINDOWS], visit, seed=seed, progress=progress)
    return done


def predicted_excess(done: Mapping[int, Smoothed]) -> dict[str, float]:
    """What smoothing predicted of static scales: dotted name of a producer's first reader ->
    nats a token above a scale by token."""
    from joulesmith.compress.quantize.sites import READERS

    return {
        f"model.layers.{i}.{READERS[producer]}": excess
        for i, s in done.items()
        for producer, excess in s.excess.items()
    }


def write_smoothed(found: Smoothed, path: Path) -> None:
    """Keep what was done to a block, complete or not at all."""
    told = {"alpha": found.alpha, "damage": found.damage, "excess": found.excess}
    with atomic_path(path) as temporary, temporary.open("wb") as f:
        scales = {f"scale.{p}": s.numpy() for p, s in found.scales.items()}
        np.savez(f, told=json.dumps(told), **scales)  # type: ignore[arg-type]


def read_smoothed(path: Path) -> Smoothed | None:
    """What `write_smoothed` kept, None where there is nothing."""
    import torch

    if not path.exists():
        return None
    with np.load(path, allow_pickle=False) as z:
        told = json.loads(str(z["told"]))
        names = [n.removeprefix("scale.") for n in z.files if n.startswith("scale.")]
        scales = {n: torch.from_numpy(z[f"scale.{n}"]) for n in names}
    damage = {p: (float(a), float(b)) for p, (a, b) in told["damage"].items()}
    return Smoothed(scales, told["alpha"], damage, told["excess"])


@register
class Smooth(Step):
    """SmoothQuant with an exponent for each set of layers, chosen by least output error.

    kind: of the inputs and weights that it prepares for. dynamic: whether inputs will be
    scaled by token. symmetric: whether inputs will have no zero point. seed: of the labels
    drawn for gradients.
    """

    name: ClassVar[str] = "smooth"
    kind: Literal["int8", "fp8"] = "int8"
    dynamic: bool = True
    symmetric: bool = True
    seed: int = 0

    def apply(
        self, model: Model, calibration: NDArray[np.int32], progress: Tick = silent
    ) -> StepRecord:
        """Move factors between norms, rows and columns; the float model says the same."""
        done = smooth_model(
            model,
            calibration,
            self.kind,
            self.dynamic,
            self.symmetric,
            seed=self.seed,
            progress=progress,
        )
        moved = sum(len(s.scales) for s in done.values())
        before = sum(b for s in done.values() for b, _ in s.damage.values())
        after = sum(a for s in done.values() for _, a in s.damage.values())
        note = f"{moved} sets of factors folded, predicted {before:.5f} -> {after:.5f} nats"
        return StepRecord(self.name, notes=(note,))
