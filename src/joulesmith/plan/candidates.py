"""Every (tensor, type) that a plan may choose: packed bytes on disk, and predicted damage.

Complete a block at a time: a run that was killed goes on with the next block.
Knows no joules and no solver.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from joulesmith.atomic import atomic_path
from joulesmith.errors import JoulesmithError
from joulesmith.gguf_file import type_table
from joulesmith.plan.damage import activation_damage, embedding_damage, linear_damage
from joulesmith.progress import Tick, silent

if TYPE_CHECKING:
    from joulesmith.compress.quantize.walk import Rounded
    from joulesmith.models import Model, TensorRef


class Candidates:
    """Packed tensors in ``folder``: one file a (tensor, type), one damage file a block.

    damage: tensor -> type -> predicted KL of the rounded weights, nats per token.
    activation: the same of the inputs, which the engine rounds for block types.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.damage: dict[str, dict[str, float]] = {}
        self.activation: dict[str, dict[str, float]] = {}
        for path in sorted(folder.glob("damage-*.json")):
            self._learn(json.loads(path.read_text()))

    def _learn(self, found: dict[str, dict[str, list[float]]]) -> None:
        for tensor, kinds in found.items():
            self.damage[tensor] = {k: v[0] for k, v in kinds.items()}
            self.activation[tensor] = {k: v[1] for k, v in kinds.items()}

    def path(self, tensor: str, type_name: str) -> Path:
        """Where one packed tensor lies."""
        return self.folder / type_name / f"{tensor}.npy"

    def packed(self, tensor: str, type_name: str) -> NDArray[np.uint8]:
        """The stored bytes, uint8 (rows, bytes a row)."""
        found: NDArray[np.uint8] = np.load(self.path(tensor, type_name), allow_pickle=False)
        return found

    def has(self, tensors: Sequence[str]) -> bool:
        """Whether all of ``tensors`` are rounded and judged."""
        return all(t in self.damage for t in tensors)

    def importance(self, tensor: str) -> NDArray[np.float32] | None:
        """Mean squared inputs (columns,) of a linear layer, None for a plain embedding."""
        path = self.path(tensor, "importance")
        return np.load(path, allow_pickle=False) if path.exists() else None

    def put(self, tensor: str, kind: str, packed: NDArray[np.uint8], damage: float) -> None:
        """Offer one more packed tensor, for this run only."""
        if not self.path(tensor, kind).exists() or damage < self.damage[tensor].get(kind, 1.0):
            _save(self.path(tensor, kind), packed)
        same = [
            a
            for k, a in self.activation[tensor].items()
            if activation_block(k) == activation_block(kind)
        ]
        self.damage[tensor][kind] = damage
        self.activation[tensor][kind] = same[0] if same else 0.0

    def keep(self, block: str, rounded: Sequence[Rounded]) -> None:
        """Store a block's tensors, then mark the block as done."""
        damage: dict[str, dict[str, list[float]]] = {}
        for r in rounded:
            weights = inputs = 0.0
            if r.head is not None:
                weights += embedding_damage(r.change, len(r.weight), r.head)
            if r.moments is not None:
                weights += linear_damage(r.change, len(r.weight), r.moments)
                inputs = activation_damage(r.weight, r.moments, activation_block(r.type))
            damage.setdefault(r.ref.name, {})[r.type] = [weights, inputs]
            path = self.path(r.ref.name, r.type)
            _save(path, r.packed)
            if r.moments is not None:
                _save(self.path(r.ref.name, "importance"), r.moments.squares.numpy())
        with atomic_path(self.folder / f"damage-{block}.json") as temporary:
            temporary.write_text(json.dumps(damage))
        self._learn(damage)


def activation_block(kind: str) -> int:
    """How many inputs share a scale when the engine multiplies by this type; 0: floats.

    Integer grids run on engines that leave inputs as they are, the rest on llama.cpp.
    """
    if kind in ("F32", "F16", "BF16") or "-G" in kind:
        return 0
    # ggml pairs super-blocks of weights (Q4_K, IQ4_XS, TQ2_0 ...) with Q8_K, others with Q8_0
    return 256 if type_table()[kind][1] == 256 else 32


def _save(path: Path, array: NDArray[Any]) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_path(path, needed=array.nbytes) as temporary, temporary.open("wb") as f:
            np.save(f, array, allow_pickle=False)
    except OSError as e:
        raise JoulesmithError(f"cannot write {path}: {e.strerror or e}") from e


def make(
    model: Model,
    windows: NDArray[np.int32],
    types: Sequence[str] | Callable[[TensorRef], Sequence[str]],
    folder: Path,
    *,
    effort: str = "default",
    seed: int = 0,
    progress: Tick = silent,
) -> Candidates:
    """Round every matrix of ``model`` onto each of ``types`` (of its own) that its rows fit.

    windows: calibration tokens, int32 (n, length). A second call with the same folder
    does only what is missing.
    """
    from joulesmith.compress.quantize.walk import walk

    folder.mkdir(parents=True, exist_ok=True)
    store = Candidates(folder)
    if not store.has([r.name for r in model.matrices(split_head=True)]):
        walk(
            model,
            windows,
            types if callable(types) else lambda _: types,
            store.keep,
            effort=effort,
            skip=store.has,
            split_head=True,
            seed=seed,
            scratch=folder,
            progress=progress,
        )
    return store
