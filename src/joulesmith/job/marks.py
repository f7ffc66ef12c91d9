"""Reference points: the files that people would use today, made by the engine's own quantizer.

A plan is worth something only beside these: the float file, the file that was given,
and the mixtures that everybody downloads, with an importance matrix from the same
calibration text.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from joulesmith.engines.llama_quantize import LlamaQuantizer
from joulesmith.export.mixtures import mixture
from joulesmith.job.judge import FLOAT, score_file, write_choice
from joulesmith.models import EMBEDDING, HEAD, gguf_view
from joulesmith.progress import Tick, silent
from joulesmith.quality import Quality, Reference
from joulesmith.workspace import Workspace, fingerprint

if TYPE_CHECKING:
    from joulesmith.engines.base import Engine
    from joulesmith.models import Model
    from joulesmith.plan.candidates import Candidates

_FLOATS = ("F32", "F16", "BF16")


@dataclass(frozen=True)
class Mark:
    """One reference file: its types and its quality on the search windows."""

    name: str
    types: dict[str, str]
    quality: Quality


def given_types(model: Model) -> dict[str, str]:
    """Tensor -> block type of the file that was given; empty for a float checkpoint."""
    if model.given is None:
        return {}
    return {
        t.name: t.type
        for t in model.given.tensors
        if t.type not in _FLOATS and t.name in model.tensors
    }


def main_type(types: Mapping[str, str], model: Model) -> str | None:
    """The type that holds most weights, None when there is none."""
    counts: Counter[str] = Counter()
    for name, kind in types.items():
        counts[kind] += int(np.prod(model.tensors[name].shape))
    return counts.most_common(1)[0][0] if counts else None


def write_float(model: Model, workspace: Workspace) -> Path:
    """The model unquantized as a GGUF in the workspace, written once."""
    path = rival_path({}, workspace)
    if not path.exists():
        write_choice(model, _nothing, {}, path)
    return path


PROBE = "Q8_0"
"""Type of the file that tells what a token costs beside the matrices."""


def write_probe(
    model: Model, workspace: Workspace, library: str | None = None
) -> tuple[Path, dict[str, str]]:
    """The model in `PROBE` as a GGUF in the workspace, written once, and its types."""
    types = mixture(PROBE, model.matrices(), layers_of(model))
    path = rival_path(types, workspace)
    if not path.exists():
        quantizer = LlamaQuantizer(library)

        def pack(tensor: str, kind: str) -> NDArray[np.uint8]:
            return quantizer.pack(gguf_view(model, tensor).numpy(), kind)

        write_choice(model, pack, types, path)
    return path, types


def layers_of(model: Model) -> int:
    """How many decoder blocks it has."""
    return 1 + max((r.layer for r in model.matrices() if r.layer is not None), default=0)


def rival_path(types: Mapping[str, str], workspace: Workspace) -> Path:
    """Where the reference file of these types lies."""
    return workspace.work / f"rival-{fingerprint(dict(types))}.gguf"


def _nothing(tensor: str, kind: str) -> NDArray[np.uint8]:
    raise KeyError((tensor, kind))


def keep_given(model: Model, store: Candidates) -> None:
    """Offer each tensor of a given quantized file as it is: its own bytes, no damage."""
    assert model.given is not None
    for tensor in model.given.tensors:
        if tensor.name in store.damage and tensor.type not in _FLOATS:
            rows = np.asarray(model.given.data(tensor)).reshape(tensor.shape[0], -1)
            store.put(tensor.name, tensor.type, rows, 0.0)
            if model.tied and tensor.name == EMBEDDING:
                store.put(HEAD, tensor.type, rows, 0.0)


class Peer:
    """Packs tensors as llama.cpp's quantizer does, with the calibration's importance matrix."""

    def __init__(self, model: Model, store: Candidates, library: str | None = None) -> None:
        self.model = model
        self.store = store
        self.quantizer = LlamaQuantizer(library)

    def __call__(self, tensor: str, kind: str) -> NDArray[np.uint8]:
        weight = gguf_view(self.model, tensor).numpy()
        use = HEAD if self.model.tied and tensor == EMBEDDING else tensor
        return self.quantizer.pack(weight, kind, self.store.importance(use))


def uniform_marks(
    peer: Peer,
    names: Sequence[str],
    engine: Engine,
    reference: Reference,
    workspace: Workspace,
    wanted: Callable[[Mark], bool],
    progress: Tick = silent,
) -> list[Mark]:
    """Each mixture written and judged on ``reference``'s windows; kept in the workspace.

    wanted: which files to leave where `write_rivals` finds them.
    """
    model = peer.model
    layers = layers_of(model)
    found: list[Mark] = []
    seen: dict[str, str] = {}
    for i, name in enumerate(names):
        types = mixture(name, model.matrices(), layers)
        key = fingerprint(types)
        if key in seen:
            continue
        seen[key] = name
        quality = judge_mark(peer, types, engine, reference, workspace)
        mark = Mark(name, types, quality)
        if not wanted(mark):
            rival_path(types, workspace).unlink(missing_ok=True)
        found.append(mark)
        progress((i + 1) / len(names))
    return found


def judge_mark(
    peer: Peer,
    types: Mapping[str, str],
    engine: Engine,
    reference: Reference,
    workspace: Workspace,
) -> Quality:
    """Quality of one mixture on ``reference``'s windows; both stay in the workspace."""
    key = _key(reference, types)
    stored = workspace.get(key)
    if stored is not None:
        return Quality(**stored)
    path = rival_path(types, workspace)
    if not path.exists():
        write_choice(peer.model, peer, types, path)
    quality = score_file(engine, path, reference)
    workspace.put(key, quality.to_dict())
    return quality


def _key(reference: Reference, types: Mapping[str, str]) -> str:
    """Where one file's quality on one set of windows is kept."""
    return f"mark-{reference.path.stem}-{len(reference.windows)}-{fingerprint(dict(types))}"


@dataclass(frozen=True)
class Rival:
    """A file that the plan is measured against, judged on the final windows."""

    name: str
    kind: str
    path: Path
    quality: Quality
    types: dict[str, str]
    note: str = ""


def write_rivals(
    peer: Peer,
    marks: Sequence[Mark],
    given: Mapping[str, str],
    engine: Engine,
    final: Reference,
    workspace: Workspace,
    *,
    given_is_baseline: bool,
    progress: Tick = silent,
) -> list[Rival]:
    """The float file, the given file and ``marks``, written and judged on the final windows."""
    model = peer.model
    todo: list[tuple[str, str, dict[str, str], str]] = []
    if given_is_baseline and model.given is not None:
        todo.append((model.given.path.name, "baseline", dict(given), "the file that was given"))
        todo.append((f"{FLOAT} GGUF", "uniform", {}, "the same weights, unquantized"))
    else:
        todo.append((f"{FLOAT} GGUF", "baseline", {}, "the float checkpoint on this engine"))
        if given:
            note = "the file inside the package, as it is; its weights are this run's reference"
            todo.append((f"given {main_type(given, model)} file", "given", dict(given), note))
    for mark in marks:
        note = "llama.cpp's own quantizer, importance matrix from the calibration text"
        todo.append((mark.name, "uniform", mark.types, note))
    found = []
    for i, (name, kind, types, note) in enumerate(todo):
        is_given = model.given is not None and types == dict(given) and bool(given)
        path = rival_path(types, workspace)
        if is_given and model.given is not None:
            path = model.given.path
        elif not path.exists():
            write_choice(model, peer, types, path)
        key = _key(final, types)
        stored = workspace.get(key)
        quality = Quality(**stored) if stored else score_file(engine, path, final)
        workspace.put(key, quality.to_dict())
        found.append(Rival(name, kind, path, quality, types, note))
        progress((i + 1) / len(todo))
    return found
