"""What of a pruning is kept on disk for a run that is interrupted: the survey, and of each block
that is done the new weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import torch
from torch import Tensor

from joulesmith.compress.calls import Batch
from joulesmith.compress.checkpoint import Checkpoint
from joulesmith.compress.layers import Linear
from joulesmith.compress.prune.allocate import Curve, Thresholds
from joulesmith.compress.prune.survey import Survey
from joulesmith.compress.prune.task import Task


@dataclass(frozen=True)
class Solved:
    """A pruned layer. error: as `walk.Pruned` has it."""

    weight: Tensor
    bias: Tensor | None
    error: float

    def write(self, layer: Linear) -> None:
        """Give the layer these weights."""
        layer.write(self.weight)
        if self.bias is not None and layer.bias is not None:
            with torch.no_grad():
                layer.bias.copy_(self.bias)


class Kept:
    """Of one task on one set of data, in ``folder``; None keeps nothing."""

    def __init__(self, folder: Path | None, task: Task, batches: list[Batch] | None) -> None:
        settings = {f.name: getattr(task, f.name) for f in fields(task)}
        del settings["scratch"]
        settings["chosen"] = list(task.chosen)
        self._files = Checkpoint(folder, "prune", settings, batches)

    def survey(self, compute: Callable[[], Survey]) -> Survey:
        """The kept one, or the computed one, kept. Raises `JoulesmithError` for a full disk."""
        found = self._files.get_tensors("survey")
        if found is None:
            told = compute()
            parts = {f"rows.{n}": t for n, t in told.rows.items()}
            parts |= {f"slopes.{n}": t for n, t in told.slopes.items()}
            counts = told.thresholds.counts
            parts |= {f"counts.{n}": torch.from_numpy(c) for n, c in counts.items()}
            self._files.put_tensors("survey", {n: asdict(c) for n, c in told.curves.items()}, parts)
            return told
        parts = found[1]
        curves = {
            n: Curve(c["size"], tuple(c["low"]), tuple(c["high"])) for n, c in found[0].items()
        }

        def named(kind: str) -> dict[str, Tensor]:
            return {n[len(kind) :]: t for n, t in parts.items() if n.startswith(kind)}

        thresholds = Thresholds({n: t.numpy() for n, t in named("counts.").items()})
        return Survey(thresholds, curves, named("rows."), named("slopes."))

    def block(self, index: int) -> dict[str, Solved] | None:
        """The pruned layers of a block that is done."""
        found = self._files.get_tensors(f"block-{index}")
        if found is None:
            return None
        errors, parts = found
        return {
            n: Solved(parts[f"weight.{n}"], parts.get(f"bias.{n}"), error)
            for n, error in errors.items()
        }

    def keep_block(
        self, index: int, layers: Mapping[str, Linear], errors: Mapping[str, float]
    ) -> None:
        """Layers of a block, all pruned. Raises `JoulesmithError` for a full disk."""
        parts = {f"weight.{n}": x.matrix.clone() for n, x in layers.items()}
        parts |= {
            f"bias.{n}": x.bias.detach().clone() for n, x in layers.items() if x.bias is not None
        }
        self._files.put_tensors(f"block-{index}", dict(errors), parts)
