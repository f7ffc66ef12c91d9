"""Joules per decoded token of a model file, predicted without running the model.

Decoding one token multiplies by every matrix once. Each distinct (shape, type) is
multiplied on the engine's own kernels here, and the sum is the prediction: of the matrices alone,
which is most of a token. What llama.cpp does not run stays unknown.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from joulesmith.energy.reading import worst
from joulesmith.engines.matmul import MatmulCost
from joulesmith.errors import EngineError, MissingExtraError
from joulesmith.inspection import DecodeCost, Inspection, TensorLine

MAX_CELLS = 64
"""Distinct (shape, type); a real model has about ten."""
MAX_SIDE = 1 << 20
_EMBEDDINGS = ("token_embd", "embed_tokens", "tok_embeddings", "wte")


def decode_cost(
    found: Inspection,
    progress: Callable[[float], None] | None = None,
    *,
    engine: Any = None,
    cache_dir: Path | None = None,
    repeats: int = 5,
) -> DecodeCost:
    """Price the matrices of ``found`` on this machine; measured cells are kept and used again.

    engine: default llama.cpp. A model that it cannot run, or no engine, gives joules of
    None and says why in ``how``.
    """
    from joulesmith.engines import get_engine
    from joulesmith.gguf_file import type_table
    from joulesmith.plan.space import stream_weights
    from joulesmith.plan.table import JouleTable

    def unknown(why: str) -> DecodeCost:
        return DecodeCost(None, None, None, None, None, why)

    if found.format.startswith("llama2.c"):
        return unknown("llama2.c files are not run by an engine here")
    wanted: Counter[tuple[int, int, str]] = Counter()
    for t in _multiplied(found):
        if t.type not in type_table():
            return unknown(f"llama.cpp, whose kernels are measured, does not run {t.type}")
        rows, columns = t.shape
        if not (0 < rows <= MAX_SIDE and 0 < columns <= MAX_SIDE):
            return unknown(f"a matrix of {rows} x {columns} is too large to try")
        wanted[rows, columns, t.type] += 1
    if not wanted or len(wanted) > MAX_CELLS:
        return unknown(f"{len(wanted)} kinds of matrices: none, or too many to measure")
    costs: dict[tuple[int, int, str], MatmulCost] = {}
    try:
        chosen = get_engine() if engine is None else engine
        by_type: dict[str, list[tuple[int, int]]] = {}
        for rows, columns, kind in wanted:
            by_type.setdefault(kind, []).append((rows, columns))
        for i, (kind, shapes) in enumerate(by_type.items()):

            def part(x: float, at: int = i) -> None:
                if progress is not None:
                    progress((at + x) / len(by_type))

            table = JouleTable.measure(
                chosen, shapes, [kind], progress=part, cache_dir=cache_dir,
                stream_weights=stream_weights(found.parameters), repeats=repeats,
            )  # fmt: skip
            costs.update({(r, c, kind): table.decode(r, c, kind) for r, c in shapes})
        how = f"matrices on the kernels of {chosen.version}, {chosen.threads} threads"
    except (EngineError, MissingExtraError) as e:
        return unknown(" ".join(str(e).split()))
    return DecodeCost(
        joules=_total(wanted, costs, "joules"),
        low=_total(wanted, costs, "low"),
        high=_total(wanted, costs, "high"),
        seconds=_total(wanted, costs, "seconds"),
        pedigree=worst(c.pedigree for c in costs.values()),
        how=how,
    )


def _multiplied(found: Inspection) -> list[TensorLine]:
    """The matrices that one token is multiplied by: an embedding only where it is the head."""
    out = []
    for t in found.tensors:
        looked_up = any(e in t.name for e in _EMBEDDINGS)
        if len(t.shape) == 2 and t.bits_per_weight is not None and min(t.shape) > 1:
            if looked_up and found.tied_head is not True:
                continue
            out.append(t)
    return out


def _total(
    wanted: Counter[tuple[int, int, str]],
    costs: dict[tuple[int, int, str], MatmulCost],
    what: str,
) -> float | None:
    """Sum over matrices; None where one is unknown. Ends add up, as one meter errs alike."""
    total = 0.0
    for cell, n in wanted.items():
        value = getattr(costs[cell], what)
        if value is None:
            return None
        total += n * value
    return total
