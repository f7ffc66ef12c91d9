"""The token windows of one run: calibration, search and final, never shared.

Kept in the run's folder, so that a resumed run sees the same tokens.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from joulesmith.atomic import atomic_path
from joulesmith.progress import Tick, silent

if TYPE_CHECKING:
    from joulesmith.models import Model

LENGTH = 256
"""Tokens a window: long enough for context, short enough for many independent windows."""


CALIBRATION = 64
"""Windows that are calibrated on, at a share of 1."""


@dataclass(frozen=True)
class Inputs:
    """Windows of int32 tokens, each (n, LENGTH), and in words where they come from."""

    calibration: NDArray[np.int32]
    search: NDArray[np.int32]
    final: NDArray[np.int32]
    calibration_text: str
    evaluation_text: str


def gather(
    model: Model,
    calib: str | None,
    evaluation: str | None,
    folder: Path,
    seed: int,
    share: float = 1.0,
    progress: Tick = silent,
) -> Inputs:
    """Read or sample all windows of a run, or load those of an interrupted one.

    share: of the usual amount of text (64 calibration, 32 search, 32 final windows);
    the final windows are never fewer. Raises `JoulesmithError` for text that is
    missing, empty or too short.
    """
    from joulesmith import text

    path = folder / "windows.npz"
    if path.exists():
        with np.load(path, allow_pickle=False) as z:
            words = json.loads(str(z["words"]))
            return Inputs(z["calibration"], z["search"], z["final"], *words)
    counts = {"search": max(8, round(32 * share)), "final": 32}
    wanted = {"calibration": max(16, round(CALIBRATION * share))}
    judged = text.english() if evaluation is None else text.read(evaluation)
    fitted = None if calib is None else text.read(calib)
    # One text for both is split three ways, so that no window is shared.
    same = fitted is not None and fitted.sha256 == judged.sha256
    split = text.windows(model, judged, LENGTH, counts | (wanted if same else {}), seed)
    if same:
        calibration = split["calibration"]
    elif fitted is not None:
        calibration = text.windows(model, fitted, LENGTH, wanted, seed)["calibration"]
    else:
        calibration = text.self_samples(model, wanted["calibration"], LENGTH, seed, progress)
    found = Inputs(
        calibration.tokens,
        split["search"].tokens,
        split["final"].tokens,
        calibration.source,
        split["final"].source,
    )
    with atomic_path(path) as temporary, temporary.open("wb") as f:
        np.savez(
            f,
            calibration=found.calibration,
            search=found.search,
            final=found.final,
            words=json.dumps([found.calibration_text, found.evaluation_text]),
        )
    return found


def digest_of(calib: str | None) -> dict[str, str]:
    """What tells a calibration text from another of the same name; nothing for those of a hub."""
    from joulesmith import text

    if calib is None or calib.startswith("hf:"):
        return {}
    return {"sha256": text.read(calib).sha256}
