"""The windows of a training: those trained on, those of the curve, those of the last judgement; no
window is in two of them. Kept in the run's folder, so that a resumed run sees the same."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from joulesmith.atomic import atomic_path
from joulesmith.errors import JoulesmithError
from joulesmith.progress import Tick, silent

if TYPE_CHECKING:
    from joulesmith.models import Model
    from joulesmith.text import Text

CURVE, FINAL = 32, 32
"""Most windows that judge on the way, and at the end."""
LEAST = 4
"""Fewest of each."""
SAMPLES = 256
"""Windows that a teacher writes where no text is given."""


@dataclass(frozen=True)
class Windows:
    """int32 (n, length) each, and in words where they come from."""

    train: NDArray[np.int32]
    held: NDArray[np.int32]
    final: NDArray[np.int32]
    text: str
    judged: str


def gather(
    model: Model,
    device: Any,
    text_ref: str | None,
    evaluation: str | None,
    folder: Path,
    *,
    length: int,
    most: int | None = None,
    samples: int = 0,
    seed: int = 0,
    progress: Tick = silent,
) -> Windows:
    """Read the texts, or load the windows of an interrupted run.

    device: torch's, where the model writes, and is left.
    text_ref: trained on; None for what ``model`` writes itself. samples: windows that it writes
    beside the text; without one `SAMPLES`, unless told. evaluation: judged on; None for a part of
    the text that is trained on, or without one the English that Python ships. length: tokens of a
    window. most: windows to train on. Raises `JoulesmithError` for text that is missing, empty or
    too short.
    """
    from joulesmith import text

    path = folder / "lesson.npz"
    if path.exists():
        with np.load(path, allow_pickle=False) as z:
            return Windows(z["train"], z["held"], z["final"], *json.loads(str(z["words"])))
    if text_ref is None or samples:
        model.module.to(device)
    drawing = (seed, progress, folder / "samples.npz")
    read = None if text_ref is None else text.read(text_ref)
    judged = read or text.english() if evaluation is None else text.read(evaluation)
    if read is None:
        drawn = text.self_samples(model, samples or most or SAMPLES, length, *drawing)
        mine, source, samples = drawn.tokens, drawn.source, 0
        rest = _cut(model, judged, length, seed, {"held": CURVE, "final": FINAL})
    elif read.sha256 == judged.sha256:
        count = _count(model, read, length)
        each = max(LEAST, min(CURVE, count // 16))
        if count < 2 * each + 1:
            raise JoulesmithError(
                f"too little text: {read.source}: {count} windows of {length} tokens, "
                f"{2 * LEAST} of which judge: give a longer text, or shorter windows (--length)"
            )
        left = count - 2 * each
        parts = {"held": each, "final": each, "train": left if most is None else min(most, left)}
        rest = text.windows(model, read, length, parts, seed)
        mine, source = rest["train"].tokens, read.source
    else:
        count = _count(model, read, length)
        if not count:
            raise JoulesmithError(
                f"too little text: {read.source} is shorter than a window of {length} tokens: give "
                "a longer text, or shorter windows (--length)"
            )
        count = count if most is None else min(count, most)
        mine = text.windows(model, read, length, {"all": count}, seed)["all"].tokens
        source = read.source
        rest = _cut(model, judged, length, seed, {"held": CURVE, "final": FINAL})
    if samples:
        drawn = text.self_samples(model, samples, length, *drawing)
        mine = np.concatenate([mine, drawn.tokens])
        source = f"{source} and {samples} windows of {drawn.source}"
    found = Windows(mine, rest["held"].tokens, rest["final"].tokens, source, judged.source)
    with atomic_path(path) as temporary, temporary.open("wb") as f:
        np.savez(
            f, train=found.train, held=found.held, final=found.final,
            words=json.dumps([found.text, found.judged]),
        )  # fmt: skip
    return found


def _cut(model: Model, read: Text, length: int, seed: int, most: dict[str, int]) -> dict[str, Any]:
    """As many of each as there are, at least `LEAST`."""
    from joulesmith import text

    count = _count(model, read, length)
    if count < LEAST * len(most):
        raise JoulesmithError(
            f"too little text: {read.source}: {count} windows of {length} tokens, and "
            f"{LEAST * len(most)} are judged on: give a longer text, or shorter windows (--length)"
        )
    counts = {n: min(m, count // len(most)) for n, m in most.items()}
    return text.windows(model, read, length, counts, seed)


def _count(model: Model, read: Text, length: int) -> int:
    """Windows that a text makes."""
    t = model.tokenizer
    body = length - (t.add_bos and t.bos is not None)
    return len(t.encode(read.text)) // max(1, body)
