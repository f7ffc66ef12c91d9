"""Prune the linear layers of any module: survey, share out the zeros, then layer by layer.

Scores and solvers are in files of their own; this one brings data to them. Blocks are pruned
in the order in which data passes them, each layer for the inputs that it has by then. In memory
there are one block twice and one batch; hidden states wait on disk.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from joulesmith.calibrate import products
from joulesmith.compress.gradients import Labels, backward
from joulesmith.compress.layers import (
    Linear,
    Undo,
    blocks_of,
    check_weights,
    linears_of,
    select,
)
from joulesmith.compress.prune import admm, allocate
from joulesmith.compress.prune.magnitude import magnitude
from joulesmith.compress.prune.movement import movement, update_size
from joulesmith.compress.prune.patterns import Pattern, parse_pattern
from joulesmith.compress.prune.sparsegpt import sparsegpt
from joulesmith.compress.prune.taylor import fisher, taylor
from joulesmith.compress.prune.wanda import wanda
from joulesmith.compress.stream import Batch, Group, InputStats, Streams, as_batches
from joulesmith.errors import JoulesmithError
from joulesmith.progress import Tick, silent

Method = Literal[
    "admm", "sparsegpt", "wanda", "magnitude", "taylor", "fisher", "movement", "update"
]
Allocation = Literal["damage", "threshold", "uniform"]
METHODS: tuple[str, ...] = get_args(Method)
SOLVERS = ("admm", "sparsegpt")
_NO_DATA = ("magnitude", "movement", "update")
_GRADED = ("taylor", "fisher")
_COMPARED = ("movement", "update")

SURVEYED = 8
"""Batches at most that moments of the survey are taken of; shares need less than weights do."""
GRADED = 4
"""Batches at most that gradients are taken of for predicted damages."""
STEP = 0.1
"""Damages are predicted at the wanted sparsity less and more this."""
DAMPING = 0.1
"""Of the default solver. Measured on stories260K: 0.01, 0.03 and 0.1 give KL 0.558, 0.547, 0.531
at half the weights; correlations of a sample are larger than those of other text."""


@dataclass(frozen=True)
class Pruned:
    """One layer. sparsity: its share of zeros. damage: predicted, nats a token, None where no
    gradients were taken. error: squared change of its outputs on the calibration data, as a share
    of their squares, None without data."""

    name: str
    shape: tuple[int, int]
    sparsity: float
    damage: float | None = None
    error: float | None = None


@dataclass
class _Survey:
    """What is known before anything changes. curves: `allocate.Curve` of layers. rows: (outputs,)
    mean squared gradients. slopes: E[g], E[g^2] of weights."""

    thresholds: allocate.Thresholds = field(default_factory=allocate.Thresholds)
    curves: dict[str, allocate.Curve] = field(default_factory=dict)
    rows: dict[str, Tensor] = field(default_factory=dict)
    slopes: dict[str, Tensor] = field(default_factory=dict)


def prunable(module: nn.Module, layers: Sequence[str] = ("*",)) -> dict[str, Linear]:
    """Linear layers inside the module's blocks (all of them where it has none), by name.

    layers: names or patterns of those that are wanted. Raises `JoulesmithError` for one that
    matches nothing, and where there are none.
    """
    blocks = blocks_of(module) or {"": module}
    found = {n: x for name, b in blocks.items() for n, x in linears_of(b, name).items()}
    shared = set(linears_of(module))
    found = {n: x for n, x in found.items() if n in shared}  # not one tied to an embedding
    if not found:
        raise JoulesmithError(f"{type(module).__name__} has no linear layers to prune")
    chosen = select(found, tuple(layers), "layers")
    return {n: x for n, x in found.items() if n in chosen}


def prune_module(
    module: nn.Module,
    data: NDArray[np.int32] | Sequence[Batch] | None,
    *,
    sparsity: float | None = None,
    pattern: str | Pattern = "unstructured",
    method: Method = "admm",
    allocation: Allocation | None = None,
    threshold: float | None = None,
    repair: bool = False,
    layers: Sequence[str] = ("*",),
    before: Mapping[str, Tensor] | None = None,
    labels: Labels = "given",
    seed: int = 0,
    scratch: Path | None = None,
    progress: Tick = silent,
) -> list[Pruned]:
    """Set weights of ``module`` to zero, in place; what is left makes up for them.

    data: token windows (n, length) of a causal language model, or batches as the module takes
    them (tensors, or tables of named arguments); None where the method needs none.
    sparsity: share of all chosen layers' weights that shall be zero; N:M has its own.
    threshold: instead, scores below it go. method: "admm" (default) and "sparsegpt" choose zeros
    and change weights; the others are scores alone. allocation: "damage" (default of admm: least
    predicted loss), "threshold" (default of scores: one for all layers) or "uniform" (default of
    sparsegpt and of Wanda, which compares within a row as its authors do).
    repair: least squares for what a score leaves. before: name -> weights before training, for
    "movement" and "update". labels: of "taylor" and "fisher"; predicted damages draw theirs.

    Raises `JoulesmithError` in one line, the module unchanged, for settings that contradict each
    other, a pattern that does not divide a layer, weights or activations that are not finite,
    layers that the data does not reach, and a module that has more zeros already.
    """
    kind = parse_pattern(pattern) if isinstance(pattern, str) else pattern
    chosen = prunable(module, layers)
    share = check(chosen, sparsity, threshold, kind, method, allocation, repair)
    _check_weights(chosen, share if threshold is None else None, method, before)
    if allocation is None:
        allocation = (
            "damage" if method == "admm" else "uniform" if method in ("wanda", "sparsegpt")
            else "threshold"
        )  # fmt: skip
    if kind.sparsity is not None:
        allocation = "uniform"  # the pattern says how many
    if method == "wanda" and allocation == "uniform" and kind.name == "unstructured":
        kind = Pattern(by_row=True)
    batches = None if data is None else as_batches(data)
    if batches is None and (method not in _NO_DATA or repair or allocation == "damage"):
        raise JoulesmithError(f"{method} needs calibration data: give some text")
    told = _survey(
        module, chosen, batches, share, kind, method, allocation, before, labels, seed, scratch,
        lambda x: progress(0.35 * x),
    )  # fmt: skip
    shares = _shares(chosen, share, threshold, allocation, told)

    def rest(x: float) -> None:
        progress(0.35 + 0.65 * x)

    if batches is None or (method not in SOLVERS and not repair and method != "wanda"):
        return _by_score(chosen, shares, threshold, kind, method, told, before, rest)
    return _walk(
        module, chosen, batches, shares, threshold, kind, method, told, before, repair, scratch,
        rest,
    )  # fmt: skip


# -- before anything changes ------------------------------------------------------------


def check(
    chosen: Mapping[str, Linear],
    sparsity: float | None,
    threshold: float | None,
    kind: Pattern,
    method: str,
    allocation: str | None = None,
    repair: bool = False,
) -> float:
    """The share of zeros (0 with a threshold), from settings and shapes alone.

    Raises `JoulesmithError` as `prune_module` does for them.
    """
    for word, value, known in (
        ("method", method, METHODS), ("allocation", allocation, get_args(Allocation)),
    ):  # fmt: skip
        if value is not None and value not in known:
            raise JoulesmithError(f"unknown {word} {value[:40]!r}: give one of {', '.join(known)}")
    if kind.sparsity is not None:
        if threshold is not None or (sparsity is not None and sparsity != kind.sparsity):
            raise JoulesmithError(
                f"the pattern {kind.name} makes {kind.sparsity:.4g} of the weights zero: leave the "
                "sparsity out"
            )
        sparsity = kind.sparsity
    elif threshold is not None:
        if sparsity is not None:
            raise JoulesmithError("give a sparsity or a threshold, not both")
        if method in SOLVERS:
            raise JoulesmithError(f"{method} has no scores to hold against a threshold")
        if not 0 < threshold < math.inf:
            raise JoulesmithError(f"a threshold is above 0 and finite, not {threshold:g}")
        if allocation not in (None, "threshold"):
            raise JoulesmithError(
                f"a threshold settles how many zeros a layer gets: leave allocation {allocation} "
                "out"
            )
    elif sparsity is None:
        raise JoulesmithError("say how much shall go: a sparsity, a threshold or a pattern N:M")
    elif not 0 < sparsity < 1:
        raise JoulesmithError(
            f"a sparsity is above 0 and below 1, not {sparsity:g}: 0.5 makes half the weights zero"
        )
    if repair and method in SOLVERS:
        raise JoulesmithError(f"{method} repairs by itself: leave repair out")
    if method in SOLVERS and allocation == "threshold":
        raise JoulesmithError(f"{method} has no scores to compare layers by: allocate by damage")
    if kind.sparsity is not None and allocation not in (None, "uniform"):
        raise JoulesmithError(
            f"the pattern {kind.name} makes equally many zeros everywhere: leave allocation "
            f"{allocation} out"
        )
    for name, layer in chosen.items():
        kind.check(name, layer.shape)
    return sparsity or 0.0


def _check_weights(
    chosen: Mapping[str, Linear],
    share: float | None,
    method: str,
    before: Mapping[str, Tensor] | None,
) -> None:
    """share: of zeros, None with a threshold. Raises `JoulesmithError`."""
    if (before is not None) != (method in _COMPARED):
        raise JoulesmithError(
            f"{method} compares with the weights before training: give them"
            if before is None
            else f"{method} does not look at weights before training: leave them out"
        )
    for name, layer in chosen.items():
        if before is not None and (name not in before or before[name].shape != layer.shape):
            raise JoulesmithError(f"the weights before training have no {name} of that shape")
    check_weights(dict(chosen))
    size = sum(x.matrix.numel() for x in chosen.values())
    zeros = sum(int((x.matrix == 0).sum()) for x in chosen.values()) / size
    if share is not None and zeros > share + 1e-6:
        raise JoulesmithError(
            f"the model is pruned already: {zeros:.1%} of these weights are zero, more than the "
            f"{share:.1%} asked for"
        )


def _survey(
    module: nn.Module,
    chosen: Mapping[str, Linear],
    batches: list[Batch] | None,
    share: float,
    kind: Pattern,
    method: str,
    allocation: str,
    before: Mapping[str, Tensor] | None,
    labels: Labels,
    seed: int,
    scratch: Path | None,
    progress: Tick,
) -> _Survey:
    told = _Survey()
    if batches is not None and (allocation == "damage" or method in _GRADED):
        few = _spread(batches, GRADED, single=True)
        if method in _GRADED:
            _weight_gradients(module, chosen, batches, method, labels, seed, scratch, told)
            missing = [n for n in chosen if n not in told.slopes]
            if missing:
                raise JoulesmithError(
                    f"gradients never reached the layer {missing[0]}: leave it out"
                )
        if allocation == "damage":
            _row_gradients(module, chosen, few, seed, scratch, told)
        progress(0.4)
    if allocation == "damage":
        assert batches is not None
        low, high = max(share - STEP, share / 2), min(share + STEP, (1 + share) / 2)

        def curve(layer: Linear, name: str, stats: InputStats) -> None:
            p = admm.problem(layer.matrix, stats.gram, damping=DAMPING)
            cost = told.rows.get(name)
            ends = []
            for s in (low, high):
                mask = kind.mask(p.best.square(), _kept(layer, s))
                with products("medium"):
                    lost = admm.loss(p, admm.refitted(p, mask, 4) / p.scale)
                ends.append((s, float((lost * cost if cost is not None else lost).sum()) / 2))
            told.curves[name] = allocate.Curve(layer.matrix.numel(), *ends)

        _look(module, chosen, _spread(batches, SURVEYED), curve, scratch, progress)
    elif allocation == "threshold":
        if method == "wanda":
            assert batches is not None

            def score(layer: Linear, name: str, stats: InputStats) -> None:
                told.thresholds.add(name, wanda(layer.matrix.float(), stats.squares))

            _look(module, chosen, _spread(batches, SURVEYED), score, scratch, progress)
        else:
            for name, layer in chosen.items():
                told.thresholds.add(name, _score(layer, name, method, told, before, None))
    return told


def _look(
    module: nn.Module,
    chosen: Mapping[str, Linear],
    batches: list[Batch],
    visit: Callable[[Linear, str, InputStats], None],
    scratch: Path | None,
    progress: Tick,
) -> None:
    """Every layer with the moments of its inputs, nothing changed."""
    with Streams(module, batches, targets=False, scratch=scratch) as streams:
        for block in streams.blocks():
            for group in block.groups(at_once=True, wanted=set(chosen)):
                for name, layer in group.layers.items():
                    visit(layer, name, group.stats)
            progress(0.4 + 0.6 * (block.index + 1) / len(streams.names))


def _row_gradients(
    module: nn.Module,
    chosen: Mapping[str, Linear],
    batches: list[Batch],
    seed: int,
    scratch: Path | None,
    told: _Survey,
) -> None:
    counts: dict[str, int] = {}

    def add(name: str, layer: Linear, x: Tensor, g: Tensor) -> None:
        if name in chosen:
            had = told.rows.get(name)
            new = g.float().square().sum(0)
            told.rows[name] = new if had is None else had + new
            counts[name] = counts.get(name, 0) + len(g)

    backward(module, batches, add, labels="drawn", seed=seed, scratch=scratch)
    # A token: what few of them reach, such as an expert, does less damage to each.
    tokens = max(counts.values(), default=1)
    for name in told.rows:
        told.rows[name] /= tokens
        if not bool(torch.isfinite(told.rows[name]).all()):
            raise JoulesmithError(f"the gradients of {name} are not finite")
    # An expert that none of them reached is worth as much as the one that is worth least.
    least = min((float(r.mean()) for r in told.rows.values()), default=1.0)
    for name, layer in chosen.items():
        if name not in told.rows and layer.expert is not None:
            told.rows[name] = torch.full((layer.shape[0],), least)


def _weight_gradients(
    module: nn.Module,
    chosen: Mapping[str, Linear],
    batches: list[Batch],
    method: str,
    labels: Labels,
    seed: int,
    scratch: Path | None,
    told: _Survey,
) -> None:
    """E[g] over tokens for "taylor", E[g^2] for "fisher", of each weight.

    The latter from sums over batches, whose tokens count as independent.
    """
    counts: dict[str, int] = {}

    def add(name: str, layer: Linear, x: Tensor, g: Tensor) -> None:
        if name in chosen:
            d = g.float().T @ x.float()
            d = d.square() if method == "fisher" else d
            told.slopes[name] = told.slopes[name] + d if name in told.slopes else d
            counts[name] = counts.get(name, 0) + len(x)

    backward(module, batches, add, labels=labels, seed=seed, scratch=scratch)
    tokens = max(counts.values(), default=1)
    for name, layer in chosen.items():
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


def _shares(
    chosen: Mapping[str, Linear],
    share: float,
    threshold: float | None,
    allocation: str,
    told: _Survey,
) -> dict[str, float]:
    sizes = {n: x.matrix.numel() for n, x in chosen.items()}
    if threshold is not None:
        return dict.fromkeys(sizes, 0.0)
    if allocation == "damage":
        missing = [n for n in chosen if n not in told.curves]
        if missing:
            raise JoulesmithError(
                f"calibration never reached the layer {missing[0]}: give more data"
            )
        return allocate.by_damage({n: told.curves[n] for n in chosen}, share)
    if allocation == "threshold":
        return told.thresholds.shares(share)
    return allocate.uniform(sizes, share)


# -- layer by layer ---------------------------------------------------------------------


def _kept(layer: Linear, sparsity: float) -> int:
    return round((1 - sparsity) * layer.matrix.numel())


def _score(
    layer: Linear,
    name: str,
    method: str,
    told: _Survey,
    before: Mapping[str, Tensor] | None,
    stats: InputStats | None,
) -> Tensor:
    w = layer.matrix.float()
    if method == "magnitude":
        return magnitude(w)
    if method == "wanda":
        assert stats is not None
        return wanda(w, stats.squares)
    if method in _GRADED:
        slope = told.slopes[name]
        return taylor(w, slope) if method == "taylor" else fisher(w, slope)
    assert before is not None
    compare = movement if method == "movement" else update_size
    return compare(w, before[name].to(w))


def _mask(
    score: Tensor, layer: Linear, share: float, threshold: float | None, kind: Pattern
) -> Tensor:
    if threshold is None:
        return kind.mask(score, _kept(layer, share))
    if kind.tile == (1, 1) and not kind.by_row:
        return score >= threshold
    return kind.mask(score, int((score >= threshold).sum()))


def _by_score(
    chosen: Mapping[str, Linear],
    shares: Mapping[str, float],
    threshold: float | None,
    kind: Pattern,
    method: str,
    told: _Survey,
    before: Mapping[str, Tensor] | None,
    progress: Tick,
) -> list[Pruned]:
    """Zeros where scores are least, and nothing else."""
    found = []
    for i, (name, layer) in enumerate(chosen.items()):
        score = _score(layer, name, method, told, before, None)
        layer.write(layer.matrix * _mask(score, layer, shares[name], threshold, kind))
        found.append(_report(name, layer, told, None))
        progress((i + 1) / len(chosen))
    return found


def _walk(
    module: nn.Module,
    chosen: Mapping[str, Linear],
    batches: list[Batch],
    shares: Mapping[str, float],
    threshold: float | None,
    kind: Pattern,
    method: str,
    told: _Survey,
    before: Mapping[str, Tensor] | None,
    repair: bool,
    scratch: Path | None,
    progress: Tick,
) -> list[Pruned]:
    found: dict[str, Pruned] = {}
    # What published methods look at: a block's inputs as they are by now, its layers all dense.
    plain = method in ("sparsegpt", "wanda") and not repair
    with (
        Undo(scratch) as undo,
        Streams(module, batches, targets=not plain, scratch=scratch) as streams,
    ):
        for block in streams.blocks():
            for group in block.groups(at_once=plain, wanted=set(chosen)):
                for name, layer in group.layers.items():
                    old = layer.matrix.float().clone()
                    stats = _centred(group, layer)
                    if method == "sparsegpt":
                        new = sparsegpt(old, stats.gram, kind, shares[name])
                    else:
                        p = admm.problem(old, stats.gram, stats.cross, damping=DAMPING)
                        if method == "admm":
                            rows = told.rows.get(name)
                            new = admm.prune(
                                p, kind, _kept(layer, shares[name]),
                                rows=None if rows is None else rows.sqrt(),
                            )  # fmt: skip
                        else:
                            score = _score(layer, name, method, told, before, group.stats)
                            mask = _mask(score, layer, shares[name], threshold, kind)
                            new = admm.refitted(p, mask) / p.scale if repair else old * mask
                    undo.keep(layer)
                    layer.write(new)
                    if not plain:
                        _mend_bias(layer, old, group.stats)
                    found[name] = _report(name, layer, told, _error(old, new, group.stats))
            progress((block.index + 1) / len(streams.names))
    return [found[n] for n in chosen]


def _centred(group: Group, layer: Linear) -> InputStats:
    """Moments about the means where a bias can take up the rest."""
    s = group.stats
    if layer.bias is None or s.cross is None:
        return s
    return InputStats(
        s.gram - torch.outer(s.mean, s.mean),
        s.cross - torch.outer(s.dense_mean, s.mean),
        s.mean, s.dense_mean, s.count,
    )  # fmt: skip


def _mend_bias(layer: Linear, old: Tensor, s: InputStats) -> None:
    """The bias takes up the change of the mean output (Nagel et al. 2019, "Data-free
    quantization through weight equalization and bias correction", section 4.2)."""
    if layer.bias is not None:
        with torch.no_grad():
            layer.bias.add_(old @ s.dense_mean - layer.matrix.float() @ s.mean)


def _error(old: Tensor, new: Tensor, s: InputStats) -> float:
    """Squared change of the outputs as a share of their squares, for inputs as they are now."""
    d = new - old
    whole = float(((old @ s.gram) * old).sum())
    return float(((d @ s.gram) * d).sum()) / max(whole, 1e-30)


def _report(name: str, layer: Linear, told: _Survey, error: float | None) -> Pruned:
    zeros = float((layer.matrix == 0).float().mean())
    curve = told.curves.get(name)
    return Pruned(name, layer.shape, zeros, curve.damage(zeros) if curve else None, error)
