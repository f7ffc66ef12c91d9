"""An ordered list of steps that reads and writes YAML. Knows no files of models."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from pydantic import ValidationError

from joulesmith.atomic import atomic_path
from joulesmith.compress.step import REGISTRY, Step, StepRecord, find, to_plain
from joulesmith.errors import JoulesmithError, MissingExtraError
from joulesmith.progress import Tick, silent

if TYPE_CHECKING:
    from joulesmith.models import Model


_MAX_BYTES = 1 << 20


@dataclass(frozen=True)
class Recipe:
    """Steps, and where they came from.

    model: the reference the recipe was made for (a name, for people).
    calibration: how the calibration windows were made ("self-samples, seed 0 ...").
    """

    steps: tuple[Step, ...]
    model: str = ""
    calibration: dict[str, Any] = field(default_factory=dict)

    def apply(
        self, model: Model, calibration: NDArray[np.int32], progress: Tick = silent
    ) -> list[StepRecord]:
        """Run the steps in order on ``model``. The same recipe and tokens give the same bytes."""
        records = []
        for i, step in enumerate(self.steps):

            def tick(share: float, before: int = i) -> None:
                progress((before + share) / len(self.steps))

            records.append(step.apply(model, calibration, tick))
        return records

    def to_plain(self) -> dict[str, Any]:
        """As a file has it."""
        return {
            "joulesmith_recipe": 1,
            "model": self.model,
            "calibration": self.calibration,
            "steps": [to_plain(s) for s in self.steps],
        }

    def save(self, path: Path) -> None:
        """Write YAML, whole or not at all."""
        with atomic_path(path) as temporary:
            temporary.write_text(_yaml().safe_dump(self.to_plain(), sort_keys=False, width=100))


def read_recipe(path: Path) -> Recipe:
    """Read a recipe. Raises `JoulesmithError` in one line for anything that is not one."""
    yaml = _yaml()
    try:
        if path.is_file() and path.stat().st_size > _MAX_BYTES:
            raise JoulesmithError(f"absurdly large for a recipe: {path}")
        text = path.read_text(encoding="utf-8")
        # An alias costs a few bytes and may stand for gigabytes; recipes need none.
        if any(isinstance(t, yaml.AliasToken) for t in yaml.scan(text)):
            raise JoulesmithError(f"a recipe has no anchors and aliases: {path}: write them out")
        plain = yaml.safe_load(text)
    except OSError as e:
        raise JoulesmithError(f"cannot read {path}: {e.strerror or e}") from e
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as e:
        mark = getattr(e, "problem_mark", None)
        place = "" if mark is None else f", line {mark.line + 1}, column {mark.column + 1}"
        why = getattr(e, "problem", None) or str(e).splitlines()[0]
        raise JoulesmithError(f"not YAML: {path}{place}: {why}") from e
    if not isinstance(plain, dict) or plain.get("joulesmith_recipe") != 1:
        raise JoulesmithError(f"not a joulesmith recipe (joulesmith_recipe: 1 is missing): {path}")
    known = ("joulesmith_recipe", "model", "calibration", "steps")
    if foreign := [str(k) for k in plain if k not in known]:
        raise JoulesmithError(
            f"unknown key {foreign[0][:40]!r}: {path}: a recipe has {', '.join(known)}"
        )
    calibration = plain.get("calibration") or {}
    if not isinstance(calibration, dict):
        raise JoulesmithError(f"calibration must be a table: {path}")
    return Recipe(
        steps=tuple(_step(s, i, path) for i, s in enumerate(_list(plain.get("steps"), path))),
        model=str(plain.get("model", "")),
        calibration=calibration,
    )


def _list(value: Any, path: Path) -> Sequence[Any]:
    if not isinstance(value, list):
        raise JoulesmithError(f"steps must be a list: {path}")
    return value


def _step(plain: Any, index: int, path: Path) -> Step:
    where = f"{path}: step {index + 1}"
    if not isinstance(plain, dict) or "step" not in plain:
        raise JoulesmithError(f"a step needs a name (step: quantize): {where}")
    settings = {k: v for k, v in plain.items() if k != "step"}
    try:
        return find(str(plain["step"]))(**settings)
    except KeyError as e:
        known, name = ", ".join(sorted(REGISTRY)), str(plain["step"])[:40]
        raise JoulesmithError(f"unknown step {name!r}: {where}: known are {known}") from e
    except (ValidationError, TypeError) as e:
        text = first_error(e) if isinstance(e, ValidationError) else str(e)
        raise JoulesmithError(f"bad settings of {plain['step']}: {where}: {text}") from e


def first_error(e: ValidationError) -> str:
    """The first thing wrong, with the setting that it is about."""
    found = e.errors()[0]
    name = ".".join(str(part)[:40] for part in found["loc"])
    if found["type"] == "extra_forbidden":
        return f"it has no setting {name!r}"
    if found["type"] == "missing":
        return f"{name} is missing"
    words = found["msg"].removeprefix("Value error, ")
    return f"{name}: {words}" if name else words


def _yaml() -> Any:
    try:
        import yaml
    except ImportError as e:
        raise MissingExtraError("pyyaml") from e
    return yaml
