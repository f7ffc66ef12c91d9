"""`joulesmith compress`: a model made smaller, its weights pruned, and quantized where asked.

    model + text -> reference -> shrink -> prune -> quantize -> judged -> written

The same run as `quantize`, whose recipe begins with steps that take weights away.
"""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from joulesmith.compress.prune.prices import Prices
from joulesmith.compress.prune.step import Prune
from joulesmith.compress.prune.structured import Shrink
from joulesmith.compress.quantize.choice import check_type
from joulesmith.compress.quantize.input_types import SCHEMES
from joulesmith.compress.recipe import Recipe, first_error
from joulesmith.errors import JoulesmithError
from joulesmith.export import forms
from joulesmith.job import recipes
from joulesmith.job.quantize import Made, run_recipe
from joulesmith.progress import Progress

if TYPE_CHECKING:
    from joulesmith.compress.step import Step
    from joulesmith.models import Model

_UNITS = {"": 1, "k": 10**3, "m": 10**6, "b": 10**9, "g": 10**9}
_PARTS = ("parameters", "joules", "neurons", "heads", "kv_heads", "queries", "layers", "width")
_PRICED = "F16"
"""Type at which shapes are priced where none is asked for."""


def compress(
    model: str,
    out: Path,
    *,
    prune: str | None = None,
    shrink: str | None = None,
    kind: str | None = None,
    form: str | None = None,
    settings: dict[str, Any] | None = None,
    calib: str | None = None,
    evaluation: str | None = None,
    seed: int | None = None,
    progress: Progress | None = None,
) -> Made:
    """Compress ``model`` and write it to ``out``: a new folder, or for GGUF a new file.

    prune: as `prune_step`; shrink: as `shrink_parts`; kind: type of all matrices in blocks
    afterwards (after pruning to nearest, which keeps zeros where they are). form: one of
    `forms.FORMATS`; by default a GGUF where ``out`` ends so, for pruned weights "sparse", with a
    type "compressed-tensors", else "transformers". settings: of the `Prune` step beside its
    target. The other arguments, files and errors as `quantize`.
    """
    number = 0 if seed is None else seed
    if prune is None and shrink is None:
        raise JoulesmithError("say what shall go: --prune, --shrink or both")
    if settings and prune is None:
        raise JoulesmithError(f"--{next(iter(settings))} is about --prune: give that too")
    steps: list[Step] = []
    given = None if shrink is None else shrink_parts(shrink)
    if given is not None:
        shrink_step(given, number, _UNPRICED)  # told before any work
    if prune is not None:
        steps.append(prune_step(prune, {**(settings or {}), "seed": number}))
    if prune is not None and kind in SCHEMES:
        raise JoulesmithError(
            f"--type {kind} rounds with error feedback, which fills the zeros of --prune: leave "
            "one of them out"
        )
    if kind is not None and kind not in SCHEMES:
        check_type(kind)  # told before any work
    if form is None:
        form = _form(out, prune, kind)

    show = progress or Progress({})

    def recipe_for(loaded: Model) -> Recipe:
        made: list[Step] = []
        if given is not None:
            prices = _prices(loaded, kind, show) if "joules" in given else None
            made.append(shrink_step(given, number, prices))
        made += steps
        if kind is not None:
            effort = "default" if prune is None else "nearest"
            made += recipes.recipe_of(loaded, form, kind, effort=effort, seed=number).steps
        return Recipe(tuple(made), loaded.name)

    found = run_recipe(
        model, out, form, recipe_for,
        calib=calib, evaluation=evaluation, seed=number, progress=show,
    )  # fmt: skip
    return replace(found, type=kind or "", effort="default" if prune is None else "nearest")


def _form(out: Path, prune: str | None, kind: str | None) -> str:
    if out.suffix.lower() == ".gguf":
        return forms.GGUF
    if prune is not None:
        return forms.SPARSE
    return forms.PLAIN if kind is None else "compressed-tensors"


def prune_step(text: str, settings: dict[str, Any]) -> Prune:
    """ "0.5" (share of zeros), "2:4", "60M" (parameters left other than zero) -> `Prune`.

    Raises `JoulesmithError` in one line.
    """
    target: dict[str, Any] = {}
    if ":" in text:
        if "pattern" in settings:
            raise JoulesmithError(f"--prune {text} is a pattern: leave --pattern out")
        target["pattern"] = text
    else:
        value = _number(text, "--prune")
        target["sparsity" if isinstance(value, float) else "parameters"] = value
    try:
        return Prune(**target, **settings)
    except ValidationError as e:
        raise JoulesmithError(f"--prune {text}: {first_error(e)}") from e


def shrink_parts(text: str) -> dict[str, Any]:
    """ "0.8" or "90M" (of the whole model), "joules=0.8" (of a decoded token's), or
    "layers=24,neurons=0.8,width=512" -> part to number.

    Raises `JoulesmithError` in one line.
    """
    given: dict[str, Any] = {}
    for part in text.split(","):
        name, sign, value = part.strip().rpartition("=")
        name = name if sign else "parameters"
        if name not in _PARTS or name in given:
            why = "is there twice" if name in given else "is no part of a model"
            raise JoulesmithError(f"--shrink: {name[:40]!r} {why}: give {', '.join(_PARTS)}")
        given[name] = _number(value, "--shrink")
    if not 0 < given.get("joules", 0.5) < 1:
        raise JoulesmithError(
            f"--shrink joules={given['joules']:g}: give a share below 1 of the joules that a "
            "decoded token costs now, such as 0.8"
        )
    return given


def shrink_step(
    given: dict[str, Any], seed: int = 0, prices: tuple[Prices, float] | None = None
) -> Shrink:
    """Parts as `shrink_parts` gives them -> `Shrink`. prices: of "joules", and what a decoded
    token costs by them now. Raises `JoulesmithError` in one line."""
    parts = {k: v for k, v in given.items() if k != "joules"}
    if "joules" in given and prices is not None:
        parts |= {"prices": prices[0], "cost": given["joules"] * prices[1]}
    try:
        return Shrink(**parts, seed=seed)
    except ValidationError as e:
        told = ",".join(f"{k}={v:g}" for k, v in given.items())
        raise JoulesmithError(f"--shrink {told}: {first_error(e)}") from e


_UNPRICED = (Prices(layer=0, neuron=0, query=0, kv=0, rest=1), 1.0)
"""To see whether parts go together."""


def _prices(model: Model, kind: str | None, show: Progress) -> tuple[Prices, float]:
    """By the joule table of this machine: of parts of the model, and of a decoded token now.

    The type is the one that will be written, F16 where llama.cpp does not run that.
    """
    from joulesmith.compress.prune.shrink import shape_of
    from joulesmith.engines import get_engine
    from joulesmith.gguf_file import type_table
    from joulesmith.plan.shape_prices import cells, shape_prices
    from joulesmith.plan.space import stream_weights
    from joulesmith.plan.table import JouleTable

    kind = kind if kind in type_table() else _PRICED
    shape, vocabulary = shape_of(model), int(model.module.config.vocab_size)
    with show.stage("prices") as tick:
        table = JouleTable.measure(
            get_engine("llama.cpp"), cells(shape, vocabulary, kind), [kind], batch=2,
            stream_weights=stream_weights(model.parameters), progress=tick,
        )  # fmt: skip
    found = shape_prices(shape, vocabulary, kind, lambda *cell: table.price(*cell)[0])
    return found, found.of(shape)


def _number(text: str, option: str) -> int | float:
    """ "0.5" and "1.0" are shares, "90M" and "24" counts."""
    match = re.fullmatch(r"([0-9]{1,12})(\.[0-9]{1,12})?\s*([kKmMbBgG]?)", text.strip())
    if match is None:
        raise JoulesmithError(
            f"{option} {text[:40]!r}: give a share such as 0.5 or a count such as 90M"
        )
    if match[3]:
        return round(float(match[1] + (match[2] or "")) * _UNITS[match[3].lower()])
    return float(match[1] + match[2]) if match[2] else int(match[1])
