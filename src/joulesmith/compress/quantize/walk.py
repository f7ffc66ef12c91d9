"""Walk a model once, rounding every matrix onto block grids as its moments arrive.

Knows models and rounding; not what is done with the packed tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from joulesmith.calibrate import calibrate
from joulesmith.compress.quantize.grids import Format, grid
from joulesmith.compress.quantize.rounding import GRADED, round_weight, shared_curvature
from joulesmith.errors import JoulesmithError
from joulesmith.memory import trim_heap
from joulesmith.moments import HeadMoments, Moments
from joulesmith.progress import Tick, silent

if TYPE_CHECKING:
    import torch

    from joulesmith.compress.quantize.gptq import Curvature
    from joulesmith.models import Model, TensorRef


@dataclass(frozen=True)
class Rounded:
    """One matrix on one grid.

    packed: uint8 (rows, bytes a row). weight: float32 (rows, columns), the original.
    moments: of the linear layer (None for an embedding that is not the head).
    head: of the embedding, for token_embd only.
    """

    ref: TensorRef
    grid: Format
    packed: NDArray[np.uint8]
    weight: torch.Tensor
    moments: Moments | None
    head: HeadMoments | None

    @property
    def type(self) -> str:
        """The type's name."""
        return self.grid.name

    def change(self, start: int, stop: int) -> torch.Tensor:
        """Rounded - original of some rows, float32; made anew at each call to save memory."""
        import torch

        restored = self.grid.unpack(self.packed[start:stop], self.weight.shape[1])
        return torch.as_tensor(np.asarray(restored)) - self.weight[start:stop]


def walk(
    model: Model,
    windows: NDArray[np.int32],
    types: Callable[[TensorRef], Sequence[str]],
    emit: Callable[[str, list[Rounded]], None],
    *,
    effort: str = "default",
    ranges: str | None = None,
    skip: Callable[[Sequence[str]], bool] = lambda _: False,
    split_head: bool = False,
    seed: int = 0,
    scratch: Path | None = None,
    progress: Tick = silent,
) -> None:
    """Calibrate on ``windows`` (n, length) and round each matrix onto ``types(ref)``.

    types: an empty answer leaves a matrix out. effort, ranges: as `round_weight`.
    emit: called with a block's name and its rounded tensors, last block first, the
    embedding and the head ("ends") at the end. skip: whether a block, given its tensor
    names, is done already. split_head: round a tied head and the embedding apart, as
    ``output.weight`` and ``token_embd.weight``. Raises `JoulesmithError` when no asked type
    fits a tensor.
    """
    layers: dict[int, dict[str, TensorRef]] = {}
    ends: list[TensorRef] = []
    matrices = model.matrices(split_head=split_head)
    tied = not any(r.role == "output" for r in matrices)
    for ref in matrices:
        if not types(ref):
            continue
        if ref.layer is None:
            ends.append(ref)
        else:
            layers.setdefault(ref.layer, {})[ref.parameter] = ref

    def visit(index: int, moments: Mapping[str, Moments]) -> None:
        refs = layers.get(index, {})
        if not refs or skip([r.name for r in refs.values()]):
            return
        tasks = []
        for parameter, ref in refs.items():
            module_name = parameter.split(f".{index}.", 1)[-1].removesuffix(".weight")
            tasks.append((ref, moments.get(module_name), None))
        trim_heap()  # of the backward pass, before rounding asks for as much
        emit(str(index), _round_all(model, types, tasks, effort, ranges))
        trim_heap()

    head = calibrate(
        model.module, windows, visit,
        seed=seed, scratch=scratch, graded=effort in GRADED, progress=progress,
    )  # fmt: skip
    if not ends or skip([r.name for r in ends]):
        return
    tasks = []
    for ref in ends:
        is_head = ref.role == "output" or (tied and ref.role == "token_embd")
        embedding = head if ref.role == "token_embd" else None
        tasks.append((ref, head.head if is_head else None, embedding))
    emit("ends", _round_all(model, types, tasks, effort, ranges))


EMBEDDING_SHARE = 0.3
"""Weight of the embedding's moments beside the head's; measured best of 0, 0.3 and 1."""


def _both_ends(moments: Moments, head: HeadMoments) -> torch.Tensor:
    """The Hessian of a matrix that is both the head and the embedding (tied weights).

    The head's inputs and the gradients at the embedding's output, each at mean diagonal 1.
    """
    import torch

    as_head = moments.hessian / moments.hessian.diagonal().mean().clamp_min(1e-30)
    as_embedding = head.input_fisher / head.input_fisher.mean().clamp_min(1e-30)
    return as_head + EMBEDDING_SHARE * torch.diag(as_embedding)


ROWS = 4096
"""Rows of one piece of work; rows are rounded independently of each other."""


@dataclass(frozen=True)
class _Task:
    """One matrix and what it is rounded with. weight, moments: in the file's order of rows."""

    ref: TensorRef
    weight: torch.Tensor
    moments: Moments | None
    head: HeadMoments | None
    grids: list[Format]
    curve: Curvature | None


def _round_all(
    model: Model,
    types: Callable[[TensorRef], Sequence[str]],
    matrices: Sequence[tuple[TensorRef, Moments | None, HeadMoments | None]],
    effort: str,
    ranges: str | None,
) -> list[Rounded]:
    """Round several matrices side by side: many small operations, one thread a matrix.

    Hessians are factored before, each once and one at a time: that takes the most memory.
    """
    import torch

    curves: dict[torch.Tensor | None, Curvature | None] = {}
    tasks = [_task(model, *m, types(m[0]), effort, curves) for m in matrices]
    threads = torch.get_num_threads()
    found = []
    try:
        with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            for task in tasks:
                found += [
                    (task, g, [
                        pool.submit(
                            round_weight, task.weight[start : start + ROWS], task.curve, g,
                            effort=effort, ranges=ranges,
                        )
                        for start in range(0, len(task.weight), ROWS)
                    ])
                    for g in task.grids
                ]  # fmt: skip
            packed = [np.concatenate([p.result() for p in pieces]) for _, _, pieces in found]
    finally:
        # A thread that sets its number of threads sets that of the maths library for all.
        torch.set_num_threads(threads)
    return [
        Rounded(t.ref, g, rows, t.weight, t.moments, t.head)
        for (t, g, _), rows in zip(found, packed, strict=True)
    ]


def _task(
    model: Model,
    ref: TensorRef,
    moments: Moments | None,
    head: HeadMoments | None,
    types: Sequence[str],
    effort: str,
    curves: dict[torch.Tensor | None, Curvature | None],
) -> _Task:
    """curves: of each Hessian, which layers with the same inputs may share."""
    import torch

    from joulesmith.models import gguf_view

    weight = gguf_view(model, ref.name)
    if moments is not None and ref.rows is not None:
        # Moments follow torch's row order, the file another one.
        order = torch.from_numpy(ref.rows)
        sample = moments.sample
        if sample is not None and sample.g is not None:
            sample = replace(sample, g=sample.g[:, order])
        moments = replace(moments, fisher=moments.fisher[order], sample=sample)
    fitting = [grid(t).bind(weight) for t in types if grid(t).fits(weight.shape[1])]
    if not fitting:
        raise JoulesmithError(
            f"none of {', '.join(types)} can hold {ref.name}: its rows have "
            f"{weight.shape[1]} weights, no whole number of blocks"
        )
    fitted = moments
    if moments is not None and head is not None:
        fitted = replace(moments, hessian=_both_ends(moments, head))
    hessian = None if fitted is None else fitted.hessian
    if hessian not in curves:
        curves[hessian] = shared_curvature(fitted, effort)
    return _Task(ref, weight, moments, head, fitting, curves[hessian])
