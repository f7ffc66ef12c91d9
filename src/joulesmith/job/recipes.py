"""The recipe of a `joulesmith quantize` run: made from its options or read, and proven to fit.

Everything that would fail is told here, from names and shapes alone, before work begins.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from joulesmith.compress.lowrank.absorb_step import Absorb
from joulesmith.compress.lowrank.step import LowRank
from joulesmith.compress.prune.step import Prune
from joulesmith.compress.prune.structured import Shrink
from joulesmith.compress.quantize.choice import HEAD, ROW, choose
from joulesmith.compress.quantize.fold_steps import Awq, Rotate
from joulesmith.compress.quantize.grids import grid
from joulesmith.compress.quantize.input_step import RoundInputs
from joulesmith.compress.quantize.input_types import SCHEMES, row_type
from joulesmith.compress.quantize.kv_step import QuantizeCache
from joulesmith.compress.quantize.smooth_step import Smooth
from joulesmith.compress.quantize.step import Quantize
from joulesmith.compress.recipe import Recipe
from joulesmith.errors import JoulesmithError
from joulesmith.export import forms
from joulesmith.job.inputs import CALIBRATION, LENGTH, digest_of
from joulesmith.job.refine import EFFORTS
from joulesmith.models import EMBEDDING
from joulesmith.train.steps import Lesson

if TYPE_CHECKING:
    from joulesmith.compress.quantize.activations import Scheme
    from joulesmith.compress.step import Step
    from joulesmith.models import Model

DEFAULT = {forms.GGUF: "Q4_K"}
"""Types where none is asked for; all other formats: INT4-G64."""
ENDS = "Q6_K"
"""Least type of embedding and head in a GGUF, as llama.cpp's own quantizer has it for heads."""

_CALIBRATION = ("calib", "sha256", "text", "seed", "windows")
_CHANGING = (Rotate, Awq, Smooth, LowRank, Prune, Shrink, Lesson)


def recipe_of(
    model: Model,
    form: str,
    kind: str,
    *,
    effort: str = "default",
    rotate: bool = False,
    kv_cache: int | None = None,
    embedding: str | None = None,
    seed: int = 0,
) -> Recipe:
    """The recipe that the options of `joulesmith quantize` stand for.

    kind: the type of all matrices in blocks. embedding: of the embedding and the head; None for
    F16, and in GGUF for the type of `ends_of`. The other arguments as `job.quantize.quantize`.
    """
    from joulesmith.compress.quantize.kv_cache import DEFAULTS

    if form == forms.GGUF and kind.endswith(ROW):
        raise JoulesmithError(
            f"--type {kind}: a GGUF has no scale for a whole row: give a type such as Q8_0"
        )
    steps: list[Step] = []
    if rotate:
        steps.append(Rotate(seed=seed))
    if kind in SCHEMES:
        if rotate or effort != "default" or embedding is not None:
            raise JoulesmithError(
                f"--type {kind} takes no --rotate, --effort or --embedding: leave them out"
            )
        steps.append(Quantize(default=kind, seed=seed))
    else:
        if embedding is None and form == forms.GGUF:
            embedding = ends_of(kind)
        ends = [EMBEDDING] if model.tied and not rotate else [EMBEDDING, HEAD]
        steps.append(
            Quantize(
                types={} if embedding is None else dict.fromkeys(ends, embedding),
                default=kind,
                effort=EFFORTS[effort].rounding,
                learn_steps=EFFORTS[effort].learn_steps,
                tune_epochs=EFFORTS[effort].tune_epochs,
                seed=seed,
            )
        )
    if kv_cache is not None:
        s = DEFAULTS[kv_cache]
        steps.append(QuantizeCache(**{k: getattr(s, k) for k in QuantizeCache.model_fields}))
    return Recipe(tuple(steps), model.name)


def ends_of(kind: str) -> str:
    """The type of embedding and head in a GGUF whose blocks are ``kind``."""
    from joulesmith.export.gguf_packed import stored_type

    own = stored_type(kind)
    if own is None or grid(own).bits_per_weight <= grid(ENDS).bits_per_weight:
        return ENDS
    return own


@dataclass
class Fitted:
    """What a recipe will do to a model, as far as names and shapes tell.

    types: GGUF name -> type as it will be written. by_step: the same as each step chooses
    it, by the step's place. scheme: of rounded inputs. notes: what fell back, in words.
    """

    types: dict[str, str] = field(default_factory=dict)
    by_step: dict[int, dict[str, str]] = field(default_factory=dict)
    scheme: Scheme | None = None
    notes: tuple[str, ...] = ()


def parted(recipe: Recipe) -> tuple[Recipe, Recipe]:
    """The steps up to the last that changes shapes, and those after it.

    Raises `JoulesmithError` for steps before it whose work it would undo.
    """
    steps = recipe.steps
    last = max((i + 1 for i, s in enumerate(steps) if isinstance(s, Shrink)), default=0)
    for i, step in enumerate(steps[:last]):
        if isinstance(step, (Prune, Quantize, Absorb)):
            raise JoulesmithError(
                f"step {i + 1} of the recipe ({step.name}) would be undone by step {last} "
                "(shrink): put shrink before it"
            )
    return replace(recipe, steps=steps[:last]), replace(recipe, steps=steps[last:])


def check_shrink(first: Recipe, model: Model) -> None:
    """What shapes alone tell of steps that shrink. Raises `JoulesmithError` as they do."""
    from joulesmith.compress.prune.shrink import shape_of

    for step in first.steps:
        if isinstance(step, Shrink):
            step.shape(shape_of(model))
            step.budget(model.parameters)  # raises
            return  # the others see other shapes


def fit(recipe: Recipe, model: Model, form: str) -> Fitted:
    """Check a recipe against a model and a format.

    Raises `JoulesmithError`, naming tensor, type and format, for anything that the format
    cannot hold, steps in an order that loses work, and matrices that two steps quantize.
    """
    from joulesmith.compress.quantize.kv_cache import KVScheme
    from joulesmith.compress.quantize.kv_layers import PackedCache

    found = Fitted()
    untied = caches = False
    pruned: int | None = None
    for i, step in enumerate(recipe.steps):
        if isinstance(step, _CHANGING) and found.types:
            raise JoulesmithError(
                f"step {i + 1} of the recipe ({step.name}) changes weights that are quantized "
                "before it: put it before quantize"
            )
        if isinstance(step, Rotate) and step.what != "values":
            untied = True
        elif isinstance(step, Awq):
            step.grid()
        elif isinstance(step, LowRank) and step.kept is not False:
            raise JoulesmithError(
                f"step {i + 1} of the recipe (lowrank) keeps factors, which {form} cannot hold: "
                "set  kept: false  to merge them"
            )
        elif isinstance(step, LowRank):
            step.shapes(model)
        elif isinstance(step, Prune):
            step.check(model)
            pruned = i + 1
        elif isinstance(step, Lesson):
            _lesson(found, step, i, model, pruned)
        elif isinstance(step, RoundInputs):
            _schemed(found, step.scheme, i)
        elif isinstance(step, QuantizeCache):
            if caches:
                raise JoulesmithError(
                    f"step {i + 1} of the recipe quantizes the cache a second time: keep one"
                )
            caches = True
            settings = {k: getattr(step, k) for k in QuantizeCache.model_fields}
            PackedCache(model.module.config, KVScheme(**settings))  # do heads fit it?
        elif pruned is not None and _fills(step):
            raise JoulesmithError(
                f"step {i + 1} of the recipe ({step.name}) would fill the zeros of step {pruned}: "
                "after prune, quantize with  effort: nearest  and neither learn_steps nor "
                "tune_epochs"
            )
        elif isinstance(step, Absorb):
            if form not in forms.ADAPTERS:
                raise JoulesmithError(
                    f"step {i + 1} of the recipe (absorb) writes an adapter, for which {form} has "
                    f"no place: write {' or '.join(forms.ADAPTERS)}"
                )
            choice = choose(model, step.types, step.default, untied=untied)
            step.chosen_ranks(model, choice.types)
            found.notes += choice.notes
            _typed(found, choice.types, i)
        elif isinstance(step, Quantize):
            _quantized(found, step, i, model, untied)
            if pruned is not None:
                _check_zeros(found.by_step[i], model, pruned)
    settled = settle_types(model, found.types, untied)
    refs = {r.name: r for r in model.matrices(split_head=untied or HEAD in settled)}
    for name, ref in refs.items():
        inside = ref.layer is not None
        if found.scheme is not None and inside and name not in settled:
            raise JoulesmithError(
                f"{name} has rounded inputs but no quantized weights: give it a type too"
            )
        if name in settled:
            forms.check(form, ref, settled[name], found.scheme if inside else None)
    if form == "compressed-tensors" and set(settled.values()) <= {forms.UNTOUCHED}:
        raise JoulesmithError(
            "nothing is quantized: compressed-tensors wants a matrix of another type than F16"
        )
    found.types = settled
    return found


def _fills(step: Step) -> bool:
    """Whether a step may give a weight that is zero another value."""
    if isinstance(step, Quantize):
        rounded = step.effort == "nearest" and not step.learn_steps and not step.tune_epochs
        return not rounded or (step.default or "") in SCHEMES
    return isinstance(step, Absorb)


def _check_zeros(types: Mapping[str, str], model: Model, pruned: int) -> None:
    """Raises `JoulesmithError` for a type whose codes have no zero: rounding would fill them."""
    columns = {r.name: r.shape[1] for r in model.matrices() if r.layer is not None}
    holds: dict[tuple[str, int], bool] = {}
    for name, kind in types.items():
        if name in columns and (key := (kind, columns[name])) not in holds:
            probe = np.random.default_rng(0).normal(size=(4, columns[name])).astype(np.float32)
            probe[:, ::2] = 0
            g = grid(kind)
            holds[key] = not g.unpack(g.pack(probe), columns[name])[:, ::2].any()
            if not holds[key]:
                raise JoulesmithError(
                    f"{name} is {kind}, which has no exact zero and would fill those of step "
                    f"{pruned} of the recipe: give Q8_0, Q6_K, Q5_0, Q4_0, INT8-G64, INT4-G32 ..."
                )


def _lesson(found: Fitted, step: Lesson, i: int, model: Model, pruned: int | None) -> None:
    """A training that rounds settles types as `Quantize` does."""
    how = step.lesson.how
    if pruned is not None and (step.lesson.sparse is not None or not how.keep_zeros):
        raise JoulesmithError(
            f"step {i + 1} of the recipe ({step.name}) would fill the zeros of step {pruned}: "
            "leave out  sparse  and  keep_zeros: false"
        )
    if how.mode != "quantized":
        return
    if not isinstance(how.types, str):
        raise JoulesmithError(
            f"step {i + 1} of the recipe ({step.name}): give one type for all matrices"
        )
    _typed(found, {r.name: how.types for r in model.matrices() if r.layer is not None}, i)


def _quantized(found: Fitted, step: Quantize, i: int, model: Model, untied: bool) -> None:
    scheme = SCHEMES.get(step.default or "")
    if scheme is None:
        choice = choose(model, step.types, step.default, untied=untied)
        types, notes = choice.types, choice.notes
        step.check_ranges(types)
    else:
        if step.types or step.learn_steps or step.tune_epochs or step.effort != "default":
            raise JoulesmithError(
                f"{step.default} is one type for all: give neither types nor effort, learn_steps "
                "and tune_epochs"
            )
        types = {
            r.name: row_type(scheme, r.shape[1]) for r in model.matrices() if r.layer is not None
        }
        notes = ()
        _schemed(found, scheme, i)
    found.by_step[i] = types
    found.notes += notes
    _typed(found, types, i)


def _typed(found: Fitted, types: Mapping[str, str], i: int) -> None:
    if not types:
        raise JoulesmithError(
            f"step {i + 1} of the recipe quantizes nothing: give it  types  or a  default"
        )
    if twice := sorted(set(types) & set(found.types)):
        raise JoulesmithError(f"{twice[0]} is quantized by two steps of the recipe: keep one")
    found.types.update(types)


def _schemed(found: Fitted, scheme: Scheme, i: int) -> None:
    if found.scheme is not None:
        raise JoulesmithError(f"step {i + 1} of the recipe rounds inputs a second time")
    found.scheme = scheme


def settle_types(model: Model, types: dict[str, str], untied: bool = False) -> dict[str, str]:
    """``types`` as a file has them: a head that is the embedding parts from it only where it
    is smaller; else both are ``token_embd.weight``, of the head's type."""
    found = dict(types)
    if untied or not model.tied or HEAD not in found:
        return found
    columns = model.ref(EMBEDDING).shape[1]
    head, embedding = found[HEAD], found.get(EMBEDDING, forms.UNTOUCHED)
    if grid(head).row_bytes(columns) >= grid(embedding).row_bytes(columns):
        found[EMBEDDING] = found.pop(HEAD)
    return found


def calibration_of(
    given: Recipe, calib: str | None, seed: int | None
) -> tuple[str | None, int, float]:
    """The text and seed of a recipe, where the command does not say otherwise, and the share of
    the usual number of windows that it was made with."""
    told = given.calibration
    if foreign := [str(k) for k in told if k not in _CALIBRATION]:
        raise JoulesmithError(
            f"the recipe's calibration has an unknown key {foreign[0][:40]!r}: known are "
            f"{', '.join(_CALIBRATION)}"
        )
    theirs, number = told.get("calib"), told.get("seed", 0)
    if theirs is not None and not isinstance(theirs, str):
        raise JoulesmithError("the recipe's calibration: calib is no path")
    if isinstance(number, bool) or not isinstance(number, int):
        raise JoulesmithError("the recipe's calibration: seed is no whole number")
    if calib is None and theirs is not None:
        if not theirs.startswith("hf:") and not Path(theirs).is_file():
            raise JoulesmithError(
                f"no such text file: {theirs}, on which the recipe calibrates: give --calib"
            )
        calib = theirs
        if "sha256" in told and digest_of(calib).get("sha256") != told["sha256"]:
            raise JoulesmithError(
                f"{calib} is not the text that the recipe was made with: give --calib to use it, "
                "or another, all the same"
            )
    windows = told.get("windows", [CALIBRATION, LENGTH])
    count: Any = windows[0] if isinstance(windows, list) and windows else None
    whole = isinstance(count, int) and not isinstance(count, bool)
    if not whole or windows != [count, LENGTH] or not 16 <= count <= 4096:
        raise JoulesmithError(f"the recipe's calibration: windows is not [16 to 4096, {LENGTH}]")
    return calib, number if seed is None else seed, count / CALIBRATION
