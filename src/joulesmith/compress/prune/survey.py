"""What is known before anything changes: gradients, predicted damages, scores; and from them how
many zeros each layer gets."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from joulesmith.calibrate import products
from joulesmith.compress.calls import Batch
from joulesmith.compress.gradients import backward
from joulesmith.compress.input_stats import InputStats
from joulesmith.compress.layers import Linear
from joulesmith.compress.prune import admm, allocate
from joulesmith.compress.prune.magnitude import magnitude
from joulesmith.compress.prune.movement import movement, update_size
from joulesmith.compress.prune.task import GRADIENTS, Task
from joulesmith.compress.prune.taylor import fisher, taylor
from joulesmith.compress.prune.wanda import wanda
from joulesmith.compress.stream import Streams
from joulesmith.errors import JoulesmithError
from joulesmith.memory import trim_heap
from joulesmith.progress import Tick

SURVEYED = 4
"""Batches at most that moments of the survey are taken of; shares need less than weights do."""
GRADED, PLACES = 6, 64
"""Batches at most that gradients are taken of for predicted damages, and places in each."""
STEP = 0.1
"""Damages are predicted at the wanted sparsity less and more this."""
DAMPING = 0.1
"""Of the default solver. Measured on stories260K (MLPs padded to 192): 0.01, 0.03 and 0.1 give KL
0.558, 0.547, 0.531 at half the weights; correlations of a sample are larger than those of other
text."""


@dataclass
class Survey:
    """curves: `allocate.Curve` of layers. rows: (outputs,) mean squared gradients. slopes: E[g]
    or E[g^2] of weights."""

    thresholds: allocate.Thresholds = field(default_factory=allocate.Thresholds)
    curves: dict[str, allocate.Curve] = field(default_factory=dict)
    rows: dict[str, Tensor] = field(default_factory=dict)
    slopes: dict[str, Tensor] = field(default_factory=dict)


def survey(task: Task, batches: list[Batch] | None, progress: Tick) -> Survey:
    """Look at all layers. Raises `JoulesmithError` for those that gradients do not reach."""
    told = Survey()
    if batches is not None and task.method in GRADIENTS:
        _weight_gradients(task, batches, told)
        if missing := [n for n in task.chosen if n not in told.slopes]:
            raise JoulesmithError(f"gradients never reached the layer {missing[0]}: leave it out")
    if task.allocation == "damage":
        assert batches is not None
        _row_gradients(task, _spread(batches, GRADED, single=True), told)
        progress(0.4)
        low = max(task.share - STEP, task.share / 2)
        high = min(task.share + STEP, (1 + task.share) / 2)

        def curve(layer: Linear, name: str, stats: InputStats) -> None:
            p = admm.problem(layer.matrix, stats.gram, damping=DAMPING)
            cost = told.rows.get(name)
            ends = []
            for s in (low, high):
                mask = task.kind.mask(p.best.square(), kept(layer, s))
                with products("medium"):
                    lost = admm.loss(p, admm.refitted(p, mask, 4) / p.scale)
                ends.append((s, float((lost * cost if cost is not None else lost).sum()) / 2))
            told.curves[name] = allocate.Curve(layer.matrix.numel(), *ends)

        _look(task, _spread(batches, SURVEYED), curve, progress)
    elif task.allocation == "threshold" and task.threshold is None:
        if task.method == "wanda":
            assert batches is not None

            def add(layer: Linear, name: str, stats: InputStats) -> None:
                told.thresholds.add(name, wanda(layer.matrix.float(), stats.squares))

            _look(task, _spread(batches, SURVEYED), add, progress)
        else:
            for name, layer in task.chosen.items():
                told.thresholds.add(name, score(task, told, name, layer, None))
    return told


def shares(task: Task, told: Survey) -> dict[str, float]:
    """Layer -> its share of zeros."""
    sizes = {n: x.matrix.numel() for n, x in task.chosen.items()}
    if task.threshold is not None:
        return dict.fromkeys(sizes, 0.0)
    if task.allocation == "damage":
        if missing := [n for n in task.chosen if n not in told.curves]:
            raise JoulesmithError(
                f"calibration never reached the layer {missing[0]}: give more data"
            )
        return allocate.by_damage({n: told.curves[n] for n in task.chosen}, task.share)
    if task.allocation == "threshold":
        return told.thresholds.shares(task.share)
    return allocate.uniform(sizes, task.share)


def kept(layer: Linear, sparsity: float) -> int:
    """Weights that stay."""
    return round((1 - sparsity) * layer.matrix.numel())


def score(task: Task, told: Survey, name: str, layer: Linear, stats: InputStats | None) -> Tensor:
    """The method's score of each weight, (outputs, inputs). stats: where it needs data."""
    w = layer.matrix.float()
    if task.method == "magnitude":
        return magnitude(w)
    if task.method == "wanda":
        assert stats is not None
        return wanda(w, stats.squares)
    if task.method in GRADIENTS:
        slope = told.slopes[name]
        return taylor(w, slope) if task.method == "taylor" else fisher(w, slope)
    assert task.before is not None
    compare = movement if task.method == "movement" else update_size
    return compare(w, task.before[name].to(w))


def _look(
    task: Task,
    batches: list[Batch],
    visit: Callable[[Linear, str, InputStats], None],
    progress: Tick,
) -> None:
    """Every layer with the moments of its inputs, nothing changed."""
    with Streams(task.module, batches, targets=False, scratch=task.scratch) as streams:
        for block in streams.blocks():
            for group in block.groups(fixed=True, wanted=set(task.chosen)):
                for name, layer in group.layers.items():
                    visit(layer, name, group.stats)
            trim_heap()
            progress(0.4 + 0.6 * (block.index + 1) / len(streams.names))


def _row_gradients(task: Task, batches: list[Batch], told: Survey) -> None:
    counts: dict[str, int] = {}

    def add(name: str, layer: Linear, x: Tensor, g: Tensor) -> None:
        if name in task.chosen:
            had = told.rows.get(name)
            new = g.float().square().sum(0)
            told.rows[name] = new if had is None else had + new
            counts[name] = counts.get(name, 0) + len(g)

    backward(
        task.module,
        batches,
        add,
        labels="drawn",
        seed=task.seed,
        places=PLACES,
        scratch=task.scratch,
    )
    # A token: what few of them reach, such as an expert, does less damage to each.
    tokens = max(counts.values(), default=1)
    for name in told.rows:
        told.rows[name] /= tokens
        if not bool(torch.isfinite(told.rows[name]).all()):
            raise JoulesmithError(f"the gradients of {name} are not finite")
    # An expert that none of them reached is worth as much as the one that is worth least.
    least = min((float(r.mean()) for r in told.rows.values()), default=1.0)
    for name, layer in task.chosen.items():
        if name not in told.rows and layer.expert is not None:
            told.rows[name] = torch.full((layer.shape[0],), least)


def _weight_gradients(task: Task, batches: list[Batch], told: Survey) -> None:
    """E[g] over tokens for "taylor", E[g^2] for "fisher", of each weight.

    The latter from sums over batches, whose tokens count as independent.
    """
    counts: dict[str, int] = {}

    def add(name: str, layer: Linear, x: Tensor, g: Tensor) -> None:
        if name in task.chosen:
            d = g.float().T @ x.float()
            d = d.square() if task.method == "fisher" else d
            told.slopes[name] = told.slopes[name] + d if name in told.slopes else d
            counts[name] = counts.get(name, 0) + len(x)

    backward(task.module, batches, add, labels=task.labels, seed=task.seed, scratch=task.scratch)
    tokens = max(counts.values(), default=1)
    for name, layer in task.chosen.items():
        if name in told.slopes:
            told.slopes[name] /= tokens
        elif layer.expert is not None:  # no token went there
            told.slopes[name] = torch.zeros(layer.shape)


def _spread(batches: list[Batch], most: int, *, single: bool = False) -> list[Batch]:
    """At most so many of the batches, evenly; single: one window of each."""
    step = max(1, len(batches) // most)
    found = batches[::step][:most]
    if not single:
        return found

    def one(v: object) -> object:
        return v[:1] if isinstance(v, Tensor) and v.ndim > 1 and len(v) > 1 else v

    plain = all(isinstance(b, Mapping) and set(b) == {"input_ids"} for b in found)
    return [{k: one(v) for k, v in b.items()} for b in found] if plain else found  # type: ignore[union-attr]
