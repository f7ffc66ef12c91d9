"""Write a choice of types as a GGUF, run it on the engine, and say what quality is kept.

The meeting point of a plan's types, the packed tensors, the writer and the engine.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from joulesmith.export.gguf import extra_entries, float_entry, write_gguf
from joulesmith.gguf_file import type_bytes
from joulesmith.models import EMBEDDING, HEAD
from joulesmith.quality import Quality, Reference, judge
from joulesmith.workspace import Workspace, fingerprint

if TYPE_CHECKING:
    from joulesmith.engines.base import Engine
    from joulesmith.models import Model
    from joulesmith.plan.candidates import Candidates

FLOAT = "BF16"
"""The type that stands for "left as it is": no damage, most joules."""


def write_choice(
    model: Model,
    packed: Callable[[str, str], NDArray[np.uint8]],
    types: Mapping[str, str],
    path: Path,
    provenance: Mapping[str, str] | None = None,
) -> int:
    """Write ``model`` with each matrix at its type; returns the file's bytes.

    packed(tensor, type) -> stored bytes, for every type but `FLOAT`. A tied head that
    ``types`` names is stored as `stored_types` says.
    """
    stored = stored_types(model, types)
    shared = HEAD in types and HEAD not in stored
    names = [*model.tensors, *([HEAD] if model.tied and HEAD in stored else [])]
    entries: list[Any] = []
    for name in names:
        ref, kind = model.ref(name), stored.get(name, FLOAT)
        if kind == FLOAT or len(ref.shape) != 2:
            entries.append(float_entry(model, name, FLOAT))
        else:
            use = HEAD if shared and name == EMBEDDING else name
            entries.append((name, kind, ref.shape, lambda n=use, k=kind: packed(n, k)))
    return write_gguf(path, model.metadata, entries + extra_entries(model), provenance=provenance)


def stored_types(model: Model, types: Mapping[str, str]) -> dict[str, str]:
    """``types`` as the file has them: a tied head is stored apart only where it is smaller
    than the embedding; otherwise both are ``token_embd.weight``, of the head's type and bytes.
    """
    found = dict(types)
    if model.tied and HEAD in found:
        shape, head = model.ref(HEAD).shape, found[HEAD]
        if type_bytes(head, shape) >= type_bytes(found.get(EMBEDDING, FLOAT), shape):
            found[EMBEDDING] = found.pop(HEAD)
    return found


def bits_per_weight(model: Model, types: Mapping[str, str]) -> float:
    """Stored bits per weight of the model, scales counted; a head stored twice counts twice."""
    types = stored_types(model, types)
    matrices = model.matrices(split_head=HEAD in types)
    stored = sum(type_bytes(types.get(r.name, FLOAT), r.shape) for r in matrices)
    return 8 * stored / sum(r.shape[0] * r.shape[1] for r in model.matrices())


def score_file(
    engine: Engine, path: Path, reference: Reference, adapter: Path | None = None
) -> Quality:
    """Load a model file, and in llama.cpp an adapter, and judge it against ``reference``."""
    more: Any = {} if adapter is None else {"adapter": adapter}
    with engine.load(path, context=reference.windows.shape[1], **more) as session:
        return judge(session.score(reference.windows, reference.path), reference)


class Judge:
    """types -> `Quality` on one set of windows; each answer is kept in the workspace."""

    def __init__(
        self,
        model: Model,
        engine: Engine,
        candidates: Candidates,
        reference: Reference,
        workspace: Workspace,
        label: str,
    ) -> None:
        self.model = model
        self.engine = engine
        self.candidates = candidates
        self.reference = reference
        self.workspace = workspace
        self.label = label

    def __call__(self, types: Mapping[str, str]) -> Quality:
        key = f"quality-{self.label}-{fingerprint(dict(types))}"
        found = self.workspace.get(key)
        if found is not None:
            return Quality(**found)
        path = self.workspace.work / f"{self.label}.gguf"
        try:
            write_choice(self.model, self.candidates.packed, types, path)
            quality = score_file(self.engine, path, self.reference)
        finally:
            path.unlink(missing_ok=True)
        self.workspace.put(key, quality.to_dict())
        return quality
