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

from joulesmith.compress.prune.step import Prune
from joulesmith.compress.prune.structured import Shrink
from joulesmith.compress.quantize.choice import ROW
from joulesmith.compress.quantize.grids import grid
from joulesmith.compress.quantize.input_types import SCHEMES
from joulesmith.compress.recipe import Recipe, first_error
from joulesmith.errors import JoulesmithError
from joulesmith.export import forms
from joulesmith.job import recipes
from joulesmith.job.quantize import Made, run_recipe

if TYPE_CHECKING:
    from joulesmith.compress.step import Step
    from joulesmith.models import Model
    from joulesmith.progress import Progress

_UNITS = {"": 1, "k": 10**3, "m": 10**6, "b": 10**9, "g": 10**9}
_PARTS = ("parameters", "neurons", "heads", "kv_heads", "queries", "layers", "width")


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

    prune: as `prune_step`; shrink: as `shrink_step`; kind: type of all matrices in blocks
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
    if shrink is not None:
        steps.append(shrink_step(shrink, number))
    if prune is not None:
        steps.append(prune_step(prune, {**(settings or {}), "seed": number}))
    if prune is not None and kind in SCHEMES:
        raise JoulesmithError(
            f"--type {kind} rounds with error feedback, which fills the zeros of --prune: leave "
            "one of them out"
        )
    if kind is not None and kind not in SCHEMES and not kind.endswith(ROW):
        grid(kind)  # told before any work
    if form is None:
        form = _form(out, prune, kind)

    def recipe_for(loaded: Model) -> Recipe:
        if kind is None:
            return Recipe(tuple(steps), loaded.name)
        effort = "default" if prune is None else "nearest"
        rounded = recipes.recipe_of(loaded, form, kind, effort=effort, seed=number)
        return Recipe((*steps, *rounded.steps), loaded.name)

    found = run_recipe(
        model, out, form, recipe_for,
        calib=calib, evaluation=evaluation, seed=number, progress=progress,
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


def shrink_step(text: str, seed: int = 0) -> Shrink:
    """ "0.8" or "90M" (of the whole model), "layers=24,neurons=0.8,width=512" -> `Shrink`.

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
    try:
        return Shrink(**given, seed=seed)
    except ValidationError as e:
        raise JoulesmithError(f"--shrink {text}: {first_error(e)}") from e


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
