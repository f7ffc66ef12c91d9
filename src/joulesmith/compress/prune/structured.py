"""The step that makes a smaller dense model: fewer layers, heads, neurons, or a narrower stream."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, model_validator

from joulesmith.compress.prune.prices import Prices
from joulesmith.compress.step import Resumable, StepRecord, register
from joulesmith.errors import JoulesmithError
from joulesmith.progress import Tick, silent

if TYPE_CHECKING:
    from joulesmith.compress.prune.shapes import Trial
    from joulesmith.compress.prune.shrink import Shape
    from joulesmith.models import Model

By = Literal["damage", "magnitude", "taylor", "block-influence"]


@dataclass(frozen=True)
class Decision:
    """One part that went. layer: of the model as it was. part: "layer", "kv 2", "head 7" (within
    the layer), "neuron 12", "channel 3". score: by the rule of choice; unit: of the score.
    """

    layer: int | None
    part: str
    score: float
    unit: str


@dataclass(frozen=True)
class Shrunk:
    """All that a step decided, for people who ask why.

    decisions: layers first, then the others in the order of going. trials: shapes tried, best
    first. repaired: whether the least-squares repair is in the model. damage: nats of KL per
    token on the held-out windows, with and without repair, None where it was not measured.
    read: parameters read per decoded token, before and after. gguf: why llama.cpp does not load
    the shape, None where it does. cost: of a decoded token before and after, by the step's prices.
    """

    before: Shape
    after: Shape
    parameters: tuple[int, int]
    read: tuple[int, int]
    decisions: tuple[Decision, ...]
    trials: tuple[Trial, ...]
    repaired: bool
    damage: float | None
    unrepaired: float | None
    layers: tuple[int, ...]
    gguf: str | None = None
    cost: tuple[float, float] | None = None

    def notes(self) -> tuple[str, ...]:
        """In a few lines."""
        gone = [d for d in self.decisions if d.part == "layer"]
        lines = [
            f"{self.before.words()} became {self.after.words()}",
            f"{self.parameters[0]} parameters became {self.parameters[1]} "
            f"({self.parameters[1] / self.parameters[0]:.4f}); a decoded token reads "
            f"{self.read[1] / self.read[0]:.4f} of those it read",
        ]
        if self.cost is not None:
            lines.append(
                f"predicted cost of a decoded token: {self.cost[1] / self.cost[0]:.4f} of before"
            )
        if gone:
            which = ", ".join(f"{d.layer} ({d.score:.4g})" for d in gone)
            if gone[0].unit == "as asked":
                which = ", ".join(str(d.layer) for d in gone)
            lines.append(f"layers dropped, in this order ({gone[0].unit}): {which}")
        if self.damage is not None and self.unrepaired is not None:
            lines.append(
                f"held-out KL {self.damage:.4f} nats a token; without repair {self.unrepaired:.4f}"
            )
        if self.gguf is not None:
            lines.append(f"no GGUF of this shape will load: {self.gguf}")
        if self.trials:
            first = self.trials[0]
            lines.append(
                f"{len(self.trials)} shapes tried, the best by {first.damage:.4f} nats: "
                f"{first.shape.words()}"
            )
        return tuple(lines)


@register
class Shrink(Resumable):
    """Remove rows, columns and layers: a smaller model of the same architecture.

    parameters: how many the whole model shall have at most: a count, or a share in (0, 1].
    Or cost and prices: what a decoded token shall cost at most, and what each part of it does.
    neurons: kept of each MLP, a share in (0, 1] or a count. heads: share of the query heads
    kept, whole groups where that is possible; or kv_heads and queries: key-value heads, and
    query heads of each. layers: how many stay, or drop: which go (the model's numbers). width: of
    the residual stream, a share or a count; rotate: by principal directions instead of channels.
    With ``parameters`` or ``cost`` alone the mix is chosen by trying shapes out; with parts it is
    only checked. by: the rule of choice (with a budget, "magnitude" and "taylor" cut neurons,
    "block-influence" layers). repair: fit what is left. multiple: neurons and width are
    multiples of it, 32 for Q8_0 and Q4_0, 256 for the K types. fisher: damage of neurons and heads
    in nats, by the gradients at each channel of the stream (slower, and measured no better than
    squared error, in which all channels count alike). trials: most shapes tried.
    """

    name: ClassVar[str] = "shrink"
    parameters: int | float | None = Field(default=None, gt=0)
    cost: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    prices: Prices | None = None
    neurons: int | float | None = Field(default=None, gt=0)
    heads: float | None = Field(default=None, gt=0, le=1)
    kv_heads: int | None = Field(default=None, ge=1)
    queries: int | None = Field(default=None, ge=1)
    layers: int | None = Field(default=None, ge=1)
    drop: tuple[int, ...] = ()
    width: int | float | None = Field(default=None, gt=0)
    rotate: bool = False
    by: By = "damage"
    repair: bool = True
    multiple: int = Field(default=32, ge=1)
    fisher: bool = False
    trials: int = Field(default=16, ge=1)
    seed: int = 0

    @model_validator(mode="after")
    def _sensible(self) -> Shrink:
        for word in ("parameters", "neurons", "width"):
            value = getattr(self, word)
            if isinstance(value, float) and value > 1 and value != int(value):
                raise ValueError(f"{word}: a share in (0, 1] or a whole number, not {value:g}")
        if self.heads is not None and (self.kv_heads or self.queries):
            raise ValueError("give heads, or kv_heads and queries, not both")
        if self.layers is not None and self.drop:
            raise ValueError("give layers or drop, not both")
        if len(set(self.drop)) != len(self.drop):
            raise ValueError("drop names a layer twice")
        if (self.cost is None) != (self.prices is None):
            raise ValueError("give cost and prices together")
        if self.cost is not None and (self.parameters is not None or self.width is not None):
            raise ValueError("with a cost give neither parameters nor width")
        if self.parameters is None and self.cost is None and not self.explicit:
            raise ValueError("give parameters, a cost, neurons, heads, layers, drop or width")
        if self.rotate and self.width is None:
            raise ValueError("rotate needs a width")
        return self

    @property
    def explicit(self) -> bool:
        """Whether parts are named, so that there is no mix to choose."""
        parts = (self.neurons, self.heads, self.kv_heads, self.queries, self.layers, self.width)
        return any(p is not None for p in parts) or bool(self.drop)

    def apply(
        self,
        model: Model,
        calibration: NDArray[np.int32],
        progress: Tick = silent,
        keep: Path | None = None,
    ) -> StepRecord:
        """As `shrink`, which also tells what was decided."""
        done = self.shrink(model, calibration, progress, keep)
        return StepRecord(self.name, notes=done.notes(), shrunk=done)

    def shrink(
        self,
        model: Model,
        calibration: NDArray[np.int32],
        progress: Tick = silent,
        keep: Path | None = None,
    ) -> Shrunk:
        """Choose, repair, cut. calibration: int32 (n, length), n of 2 or more; one in eight, at
        most 8, judge and are not fitted on. keep: as `Resumable.apply`; it holds which layers go
        and what shapes were tried.

        Raises `JoulesmithError` for shapes and budgets that cannot be, NaN or infinity in
        weights and activations; the model is then as it was.
        """
        from joulesmith.compress.prune.choose import Chooser

        check_weights(model)
        with tempfile.TemporaryDirectory(prefix="shrink-") as folder:
            return Chooser(self, model, calibration, Path(folder), progress, keep).run()

    def shape(self, before: Shape) -> Shape:
        """The shape that is asked for in parts. Raises `JoulesmithError` where it cannot be."""
        from joulesmith.compress.prune.drop import check_count
        from joulesmith.compress.prune.heads import check_counts, of_share

        kv, queries = self.kv_heads or before.kv, self.queries or before.queries
        if self.heads is not None:
            kv, queries = of_share(before.layout, self.heads)
        check_counts(before.layout, kv, queries)
        layers = before.layers - len(self.drop) if self.layers is None else self.layers
        check_count(before.layers, before.layers - layers)
        if unknown := [i for i in self.drop if not 0 <= i < before.layers]:
            raise JoulesmithError(f"there is no layer {unknown[0]} in {before.layers}")
        return replace(
            before,
            layers=layers,
            kv=kv,
            queries=queries,
            neurons=_part("neurons", self.neurons, before.neurons, self.multiple),
            hidden=_part("width", self.width, before.hidden, self.multiple),
            tied=before.tied and not self.rotate,
        )

    def budget(self, now: int) -> int:
        """Most parameters. Raises `JoulesmithError` above the ``now`` that the model has."""
        wanted = now if self.parameters is None else self.parameters
        count = int(wanted * now) if wanted <= 1 else int(wanted)
        if count > now:
            raise JoulesmithError(f"{count} parameters are more than the {now} that the model has")
        return count


def _part(word: str, wanted: float | None, now: int, multiple: int) -> int:
    """A share, down to a multiple, or a count."""
    if wanted is None or (wanted == 1 and isinstance(wanted, float)):
        return now
    if wanted <= 1:
        found = int(wanted * now + 1e-9) // multiple * multiple
        if not found:
            raise JoulesmithError(
                f"{word}: {wanted:g} of {now} is less than {multiple}, the multiple"
            )
        return found
    if wanted > now or (int(wanted) % multiple and int(wanted) != now):
        raise JoulesmithError(
            f"{word}: {int(wanted)} is not a multiple of {multiple} up to the {now} there are"
        )
    return int(wanted)


def check_weights(model: Model) -> None:
    """Raises `JoulesmithError` naming a parameter with NaN or infinity, or not float32."""
    import torch

    for name, p in model.module.named_parameters():
        if p.dtype not in (torch.float32, torch.float64):
            raise JoulesmithError(f"{name} is {p.dtype}: load the model as float32 to shrink it")
        if not bool(torch.isfinite(p).all()):
            raise JoulesmithError(f"{name} holds NaN or infinity: nothing was changed")


def layer_decisions(order: Sequence[int], scores: Sequence[float], unit: str) -> list[Decision]:
    """Of layers."""
    return [Decision(i, "layer", s, unit) for i, s in zip(order, scores, strict=True)]
