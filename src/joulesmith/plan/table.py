"""The joule table: what one multiplication by each matrix shape and type costs on this machine.

Measured on the engine's own kernels and kept in the user's cache folder, by machine,
thread count and engine build; only what is missing is measured again. Knows shapes and
types; no models, no damage.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol

from joulesmith.atomic import atomic_path
from joulesmith.energy.reading import worst
from joulesmith.engines.matmul import MatmulCell, MatmulCost
from joulesmith.errors import JoulesmithError

SCHEMA = 1
STREAM_WEIGHTS = 2**27
"""Parameters of a model whose size is not given: more than caches hold in any type."""
_LARGEST_BATCH = 512  # the engine cuts longer prompts into pieces of this many tokens
_LEAST_BATCH = 2  # below, prefill is decode

Progress = Callable[[float], None]


class TableEngine(Protocol):
    """What the table needs of an engine."""

    @property
    def version(self) -> str: ...

    @property
    def threads(self) -> int: ...

    def matmul_table(
        self,
        cells: Sequence[MatmulCell],
        *,
        batches: Sequence[int],
        stream_weights: int,
        repeats: int,
        threads: int | None,
        progress: Progress | None,
    ) -> list[MatmulCost]: ...


class JouleTable:
    """Costs by (rows, columns, type). ``batch``: tokens at once in prefill."""

    def __init__(self, batch: int, costs: Iterable[MatmulCost]) -> None:
        self.batch = batch
        self._costs = {(c.cell, c.batch): c for c in costs}
        # one unit for the whole table, or sums over it would mean nothing
        self.in_joules = bool(self._costs) and all(
            c.joules is not None for c in self._costs.values()
        )

    @classmethod
    def measure(
        cls,
        engine: Any,
        shapes: Iterable[tuple[int, int]],
        types: Iterable[str],
        batch: int = 64,
        progress: Progress | None = None,
        *,
        cache_dir: Path | None = None,
        stream_weights: int = STREAM_WEIGHTS,
        repeats: int = 5,
        threads: int | None = None,
    ) -> JouleTable:
        """Measure what the cache lacks and return the whole.

        engine: a `TableEngine`. shapes: (rows, columns) of the matrices. types: names as in
        GGUF ("Q4_0"); a type whose blocks do not divide a shape's columns is left out there.
        batch: tokens of a prompt. stream_weights: parameters of the model. cache_dir: default
        ``$XDG_CACHE_HOME/joulesmith``; a damaged or foreign cache is measured anew, an
        unwritable one is done without.
        Raises `EngineError` when the engine cannot run, `JoulesmithError` for an unknown type.
        """
        if not hasattr(engine, "matmul_table"):
            raise JoulesmithError(f"engine {engine.name} cannot measure single multiplications")
        batch = min(_LARGEST_BATCH, max(_LEAST_BATCH, batch))
        key = _key(engine, threads, stream_weights, repeats)
        path = _folder(cache_dir) / f"matmul-{_digest(key)}.json"
        wanted = _cells(shapes, types)
        known = _read(path, key)
        batches = (1, batch)
        missing = [c for c in wanted if any((c, b) not in known for b in batches)]
        if missing:
            fresh = engine.matmul_table(
                missing,
                batches=batches,
                stream_weights=stream_weights,
                repeats=repeats,
                threads=threads,
                progress=progress,
            )
            # another process may have added to the file meanwhile
            known = {**_read(path, key), **known, **{(c.cell, c.batch): c for c in fresh}}
            with contextlib.suppress(JoulesmithError, OSError):
                _write(path, key, known)
        if progress is not None:
            progress(1.0)
        return cls(batch, [known[c, b] for c in wanted for b in batches])

    def decode(self, rows: int, columns: int, type: str) -> MatmulCost:
        """One token. Raises `KeyError` for a cell that was not measured."""
        return self._costs[MatmulCell(rows, columns, type), 1]

    def prefill(self, rows: int, columns: int, type: str) -> MatmulCost:
        """A whole batch of ``batch`` tokens. Raises `KeyError` for a cell not measured."""
        return self._costs[MatmulCell(rows, columns, type), self.batch]

    def price(self, rows: int, columns: int, type: str) -> tuple[float, float]:
        """(decode, prefill) joules per token; seconds per token where energy is unknown."""
        one, many = self.decode(rows, columns, type), self.prefill(rows, columns, type)
        if self.in_joules and one.joules is not None and many.joules is not None:
            return one.joules, many.joules / self.batch
        return one.seconds, many.seconds / self.batch

    def cells(self) -> list[dict[str, Any]]:
        """One dict a cell, per token: the fields of a report's table. Empty without joules."""
        if not self.in_joules:
            return []
        out = []
        for cell in dict.fromkeys(cell for cell, _ in self._costs):
            one, many = self._costs[cell, 1], self._costs[cell, self.batch]
            decode_joules, prefill_joules = self.price(cell.rows, cell.columns, cell.type)
            out.append(
                {
                    "rows": cell.rows,
                    "columns": cell.columns,
                    "type": cell.type,
                    "decode_joules": decode_joules,
                    "prefill_joules": prefill_joules,
                    "decode_seconds": one.seconds,
                    "prefill_seconds": many.seconds / self.batch,
                    "pedigree": worst((one.pedigree, many.pedigree)),
                }
            )
        return out


def _cells(shapes: Iterable[tuple[int, int]], types: Iterable[str]) -> list[MatmulCell]:
    from joulesmith.gguf_file import type_table

    blocks = type_table()
    types = list(dict.fromkeys(types))
    for t in types:
        if t not in blocks:
            raise JoulesmithError(f"unknown ggml type {t!r}")
    return [
        MatmulCell(rows, columns, t)
        for rows, columns in dict.fromkeys(shapes)
        for t in types
        if columns % blocks[t][1] == 0
    ]


def _folder(cache_dir: Path | None) -> Path:
    if cache_dir is not None:
        return Path(cache_dir)
    base = os.environ.get("XDG_CACHE_HOME")
    # the specification says that a relative path is to be ignored
    root = Path(base) if base and Path(base).is_absolute() else Path.home() / ".cache"
    return root / "joulesmith"


def _key(engine: Any, threads: int | None, stream_weights: int, repeats: int) -> dict[str, Any]:
    """What a cost depends on besides its cell and batch."""
    from joulesmith.energy import EnergyMeter
    from joulesmith.energy.cpus import identify

    meter = EnergyMeter()
    try:
        source = meter.source
    finally:
        meter.close()
    return {
        "schema": SCHEMA,
        "cpu": identify().name,
        "cores": os.cpu_count() or 1,
        "threads": threads or engine.threads,
        "engine": engine.version,
        "energy": source,
        "stream_weights": stream_weights,
        "repeats": repeats,
    }


def _digest(key: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]


def _read(path: Path, key: dict[str, Any]) -> dict[tuple[MatmulCell, int], MatmulCost]:
    """Costs in a cache file; none when it is absent, damaged or of another key."""
    try:
        stored = json.loads(path.read_bytes())
        if stored["key"] != key:
            return {}
        costs = [MatmulCost(**{**c, "cell": MatmulCell(**c["cell"])}) for c in stored["costs"]]
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        return {}
    return {(c.cell, c.batch): c for c in costs if _sound(c)}


def _sound(cost: MatmulCost) -> bool:
    def positive(x: Any) -> bool:
        return isinstance(x, int | float) and math.isfinite(x) and x > 0

    cell = cost.cell
    return (
        all(isinstance(n, int) and n > 0 for n in (cell.rows, cell.columns, cost.batch))
        and isinstance(cell.type, str)
        and positive(cost.seconds)
        and all(x is None or positive(x) for x in (cost.joules, cost.high))
        and (cost.low is None or (isinstance(cost.low, int | float) and cost.low >= 0))
        and cost.pedigree in (None, "measured", "modelled", "assumed")
    )


def _write(
    path: Path, key: dict[str, Any], costs: dict[tuple[MatmulCell, int], MatmulCost]
) -> None:
    text = json.dumps({"key": key, "costs": [asdict(c) for c in costs.values()]}, indent=1)
    with atomic_path(path) as temporary:
        temporary.write_text(text)
