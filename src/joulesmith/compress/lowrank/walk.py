"""Walk a model: every linear layer of its blocks in the metric of its activations, then cut.

`survey` is one streamed pass of calibration that puts each layer's decomposition on disk;
ranks can then be chosen over the whole model, and `replace` cuts layer by layer. In memory
there is one block at a time. Knows models; not how ranks are chosen.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from joulesmith.atomic import check_space
from joulesmith.calibrate import calibrate
from joulesmith.compress.lowrank.factors import pivot, plain, stored
from joulesmith.compress.lowrank.ranks import Curve
from joulesmith.compress.lowrank.sequential import replace_refitted
from joulesmith.compress.lowrank.thin import place
from joulesmith.compress.lowrank.weighted import Spectrum, decompose, output_root, root
from joulesmith.errors import JoulesmithError
from joulesmith.moments import Moments
from joulesmith.progress import Tick, silent

if TYPE_CHECKING:
    from joulesmith.models import Model

Metric = Literal["fisher", "diagonal", "inputs", "none"]
"""What a change of weights costs: inputs and full output Fisher; inputs and its diagonal;
inputs alone (the whitening of SVD-LLM); or nothing but the weights (plain SVD)."""

RIDGE = {"inputs": 1e-6, "outputs": 1e-3}
"""Shares of the mean diagonal that are added to the moments of the two sides."""

Keep = Callable[[int, int, int], bool]
"""(rows, columns, rank) -> whether to keep the factors apart rather than their product."""


@dataclass(frozen=True)
class Survey:
    """What `survey` found. curves: module name -> `Curve`. folder: where the factors lie."""

    curves: dict[str, Curve]
    folder: Path

    def spectrum(self, name: str) -> Spectrum:
        """The decomposition of one layer, float32, read from disk."""
        index = list(self.curves).index(name)
        left, right = (
            torch.from_numpy(np.load(self.folder / f"{index}.{part}.npy", allow_pickle=False))
            for part in ("left", "right")
        )
        return Spectrum(left, right, torch.from_numpy(self.curves[name].energy))

    def outputs(self, name: str) -> torch.Tensor | None:
        """Root of the layer's output moment, as `decompose` takes it; None without."""
        path = self.folder / f"{list(self.curves).index(name)}.outputs.npy"
        if not path.is_file():
            return None
        return torch.from_numpy(np.load(path, allow_pickle=False))


def factorable(model: Model) -> dict[str, tuple[int, int]]:
    """Module name -> (rows, columns) of the linear layers inside the model's blocks."""
    return {
        r.parameter.removesuffix(".weight"): (r.shape[0], r.shape[1])
        for r in model.matrices()
        if r.layer is not None
        and isinstance(
            model.module.get_submodule(r.parameter.removesuffix(".weight")), torch.nn.Linear
        )
    }


def survey(
    model: Model,
    windows: NDArray[np.int32],
    scratch: Path,
    *,
    metric: Metric = "fisher",
    seed: int = 0,
    progress: Tick = silent,
) -> Survey:
    """Decompose every linear layer of the blocks; the model is not changed.

    windows: int32 (n, length) of calibration tokens. scratch: an existing folder with
    space for two to three times the float32 weights. seed: of the labels that are drawn for
    the Fisher information. Raises `JoulesmithError` for unknown structures, activations
    that are not finite, and a full disk.
    """
    shapes = factorable(model)
    needed = 4 * sum(min(s) * (s[0] + s[1]) + s[0] ** 2 for s in shapes.values())
    check_space(scratch, needed)
    order = {name: i for i, name in enumerate(shapes)}
    energy: dict[str, NDArray[np.float64]] = {}

    def visit(index: int, moments: Mapping[str, Moments]) -> None:
        for inner, m in moments.items():
            name = next((n for n in shapes if n.endswith(f".{index}.{inner}")), None)
            if name is None:
                continue
            inputs, outputs = roots(m, metric)
            found = decompose(model.module.get_submodule(name).weight, inputs, outputs)
            energy[name] = found.energy.numpy()
            for part, t in (("left", found.left), ("right", found.right)):
                write_array(scratch / f"{order[name]}.{part}.npy", t)
            if outputs is not None:
                write_array(scratch / f"{order[name]}.outputs.npy", outputs)

    calibrate(
        model.module,
        windows,
        visit,
        seed=seed,
        scratch=scratch,
        outputs=metric == "fisher",
        progress=progress,
    )
    missing = [n for n in shapes if n not in energy]
    if missing:
        raise JoulesmithError(f"calibration never reached the layer {missing[0]}")
    return Survey({n: Curve(*shapes[n], energy[n]) for n in shapes}, scratch)


def roots(m: Moments, metric: Metric) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Roots of a layer's input and output moments, as `decompose` takes them."""
    if metric == "none":
        return None, None
    inputs = root(m.hessian, ridge=RIDGE["inputs"])
    if metric == "inputs":
        return inputs, None
    if metric == "diagonal" or m.outputs is None:
        return inputs, output_root(m.fisher)
    return inputs, root(m.outputs, ridge=RIDGE["outputs"])


def write_array(path: Path, t: torch.Tensor) -> None:
    """``t`` as a float32 ``.npy``; raises `JoulesmithError` where the disk refuses."""
    try:
        np.save(path, t.detach().float().numpy())
    except OSError as e:
        raise JoulesmithError(
            f"cannot keep factors in {path.parent}: {e.strerror or e}; free some space"
        ) from e


def replace(
    model: Model,
    found: Survey,
    ranks: Mapping[str, int],
    *,
    keep: Keep,
    only: Collection[str] | None = None,
    pivoted: bool = True,
    windows: NDArray[np.int32] | None = None,
    progress: Tick = silent,
) -> dict[str, bool]:
    """Cut each layer at its rank and put it in place; returns name -> kept as factors.

    ranks: of every layer in ``found``; the full rank leaves a layer as it is. keep: asked
    for each layer that is cut, and among ``only`` where given. pivoted: the form with
    r^2 fewer numbers (see `factors`). windows: int32 (n, length), to refit each layer to the
    inputs that it has by then (see `sequential`); None leaves the cuts as they are.
    """
    kept = {
        name: (only is None or name in only) and bool(keep(c.rows, c.columns, ranks[name]))
        for name, c in found.curves.items()
        if ranks[name] < c.full
    }
    if windows is not None and kept:
        replace_refitted(
            model, found, ranks, kept, windows, found.folder, pivoted=pivoted, progress=progress
        )
    else:
        for i, (name, apart) in enumerate(kept.items()):
            form = pivot if pivoted and apart else plain
            place(model.module, name, form(*found.spectrum(name).cut(ranks[name])), keep=apart)
            progress((i + 1) / len(kept))
    for name, apart in kept.items():
        if apart:
            c = found.curves[name]
            model.parameters -= c.rows * c.columns
            model.parameters += stored(c.rows, c.columns, ranks[name], pivoted=pivoted)
    return kept
