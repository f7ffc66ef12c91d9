"""A recipe applied to a model in a run's folder: what is done is kept there and goes on.

The steps are those of `compress`; here they get stages of progress and a place to keep what is
done, so that an interrupted run does not begin anew.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from joulesmith.compress.quantize.choice import HEAD
from joulesmith.compress.quantize.grids import Bytes, grid
from joulesmith.compress.quantize.input_types import SCHEMES
from joulesmith.compress.quantize.step import Quantize
from joulesmith.compress.step import Resumable
from joulesmith.errors import JoulesmithError
from joulesmith.job.refine import refine
from joulesmith.models import EMBEDDING, set_gguf_weight
from joulesmith.progress import Progress, Tick
from joulesmith.train.steps import Lesson

if TYPE_CHECKING:
    from joulesmith.compress.prune.structured import Shrunk
    from joulesmith.compress.prune.walk import Pruned
    from joulesmith.compress.quantize.activations import InputQuantizer
    from joulesmith.compress.quantize.kv_cache import KVScheme
    from joulesmith.compress.recipe import Recipe
    from joulesmith.job.inputs import Inputs
    from joulesmith.job.recipes import Fitted
    from joulesmith.models import Model
    from joulesmith.plan.candidates import Candidates
    from joulesmith.workspace import Workspace

_OTHER = 40  # cost of a stage that is one step of a recipe


@dataclass
class Applied:
    """What a recipe did; the model has it all.

    packed: GGUF name -> (type, packed rows). inputs: module name -> what rounds its inputs.
    damage: GGUF name -> predicted KL of rounding, nats a token. factors: GGUF name -> two
    matrices whose product is added. steps: how many were applied. smoothing: sets of factors
    folded. pruned, shrunk: as `StepRecord` has them.
    """

    packed: dict[str, tuple[str, Bytes]] = field(default_factory=dict)
    inputs: dict[str, InputQuantizer] = field(default_factory=dict)
    cache: KVScheme | None = None
    damage: dict[str, float] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    factors: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)
    smoothing: int = 0
    steps: int = 0
    pruned: tuple[Pruned, ...] = ()
    shrunk: Shrunk | None = None


def apply(
    model: Model,
    recipe: Recipe,
    fitted: Fitted,
    inputs: Inputs,
    workspace: Workspace,
    show: Progress,
    done: Applied | None = None,
) -> Applied:
    """Run all steps, after those of ``done``.

    Pruning, shrinking, rounding and learning go on where an interrupted run stopped; the other
    steps are done again, with the same outcome. Raises `JoulesmithError` as the steps do.
    """
    done = done or Applied()
    done.notes += fitted.notes
    for i, step in enumerate(recipe.steps):
        place, done.steps = done.steps, done.steps + 1
        if isinstance(step, Quantize):
            folder = workspace.work / ("packed" if len(fitted.by_step) == 1 else f"packed-{i}")
            _quantize(model, step, fitted.by_step[i], inputs, workspace, folder, show, done)
            continue
        show.expected.setdefault(step.name, _OTHER)
        with show.stage(step.name) as tick:
            keep = workspace.work / f"{step.name}-{place}"
            if isinstance(step, Lesson):
                judged = np.concatenate([inputs.search, inputs.final])
                record = step.apply(model, inputs.calibration, tick, keep, judged)
            elif isinstance(step, Resumable):
                record = step.apply(model, inputs.calibration, tick, keep)
            else:
                record = step.apply(model, inputs.calibration, tick)
        done.notes += [n for n in record.notes if n not in done.notes]
        done.inputs |= record.inputs
        done.cache = record.cache or done.cache
        done.pruned += record.pruned
        done.shrunk = record.shrunk or done.shrunk
        if record.packed:
            done.packed |= record.packed
            done.factors |= record.factors
            _fill(model, record.packed, record.factors)
    return done


def _fill(
    model: Model,
    packed: Mapping[str, tuple[str, Bytes]],
    factors: Mapping[str, tuple[Tensor, Tensor]],
) -> None:
    """Set matrices to what they are packed as, their factors added."""
    for name, (kind, raw) in packed.items():
        back = torch.as_tensor(grid(kind).unpack(raw, model.ref(name).shape[1]))
        if name in factors:
            outer, inner = factors[name]
            back = back + outer @ inner
        set_gguf_weight(model, name, back)


def _quantize(
    model: Model,
    step: Quantize,
    types: Mapping[str, str],
    inputs: Inputs,
    workspace: Workspace,
    folder: Path,
    show: Progress,
    done: Applied,
) -> None:
    from joulesmith.job.quantize import input_quantizers, round_rows

    scheme = SCHEMES.get(step.default or "")
    folder.mkdir(parents=True, exist_ok=True)
    if scheme is None:
        with show.stage("round") as tick:
            store = _round(model, step, types, inputs, folder, tick)
        packed = {n: (k, store.packed(n, k)) for n, k in types.items()}
    else:
        with show.stage("round") as tick:
            store, smoothed = round_rows(model, scheme, inputs, workspace, step.seed, tick)
        packed = {n: (k, store.packed(n, k)) for n, k in types.items()}
        done.smoothing = sum(len(s.scales) for s in smoothed.values())
    done.damage |= {n: store.damage[n][k] for n, (k, _) in packed.items()}
    settle_head(model, packed)
    packed = refine(
        model,
        packed,
        inputs.calibration,
        folder,  # learned blocks are kept beside rounded ones
        step.seed,
        show,
        learn_steps=step.learn_steps,
        tune_epochs=step.tune_epochs,
    )
    done.packed |= packed
    if scheme is not None:
        inside = [r for r in model.matrices() if r.layer is not None]
        done.inputs |= input_quantizers(model, inside, scheme, smoothed, inputs, show)


def _round(
    model: Model,
    step: Quantize,
    types: Mapping[str, str],
    inputs: Inputs,
    folder: Path,
    tick: Tick,
) -> Candidates:
    from joulesmith.compress.quantize.walk import walk
    from joulesmith.plan.candidates import Candidates

    store = Candidates(folder)
    if not store.has(list(types)):
        walk(
            model,
            inputs.calibration,
            lambda ref: [types[ref.name]] if ref.name in types else [],
            store.keep,
            effort=step.effort,
            ranges=step.ranges,
            skip=store.has,
            split_head=HEAD in types,
            seed=step.seed,
            scratch=folder,
            progress=tick,
        )
    return store


def settle_head(model: Model, packed: dict[str, tuple[str, Bytes]]) -> None:
    """Bring a head that was packed apart from a tied embedding to what files can hold.

    It parts from the embedding where it takes fewer bytes; else both are the head's bytes. In
    place: of ``packed``, and of the model where the head parts.
    """
    from joulesmith.compress.quantize.rotate import untie

    if not model.tied or HEAD not in packed:
        return
    rows, columns = model.ref(EMBEDDING).shape
    other = packed[EMBEDDING][1].nbytes if EMBEDDING in packed else 2 * rows * columns
    if packed[HEAD][1].nbytes >= other:
        packed[EMBEDDING] = packed.pop(HEAD)
    else:
        untie(model)


def as_stored(model: Model, packed: Mapping[str, object], *, vectors: bool) -> None:
    """Round what is not packed to float16, in which all formats store it; in place.

    vectors: norms and biases too. Raises `JoulesmithError` for weights beyond float16.
    """
    kept = {model.ref(n).parameter for n in packed}
    with torch.no_grad():
        for name, p in model.module.named_parameters():
            if name in kept or (p.ndim == 1 and not vectors):
                continue
            half = p.half()
            if not bool(torch.isfinite(half).all()):
                raise JoulesmithError(f"{name} is beyond float16, which matrices are stored in")
            p.copy_(half)
