"""What a user asks in one go, answered: the parts that a table, a page and JSON are made of.

Calls `serving`, `comparing`, `mixes`, `daily`; adds no physics. Knows no files.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from joulesmith.energy.carbon import GridRow, PriceRow
from joulesmith.errors import JoulesmithError
from joulesmith.estimate.answer import Constant
from joulesmith.estimate.model import work
from joulesmith.estimate.model.shape import Shape
from joulesmith.estimate.serving.comparing import Compared, compare
from joulesmith.estimate.serving.daily import Charge, Fleet, charge, fleet
from joulesmith.estimate.serving.mixes import NETWORK, Mixed, mix
from joulesmith.estimate.serving.roof import Roof, roof
from joulesmith.estimate.serving.serve import (
    Served,
    batches,
    best_batch,
    curve,
    most_sequences,
    serve,
)
from joulesmith.estimate.serving.setup import Setup, Traffic

UNKNOWN_MEMORY = 512
"""The largest batch that is told where a device's memory is unknown."""
CURVE_END = 4096


@dataclass(frozen=True)
class Work:
    """What the model has to do, from its shape alone."""

    weight_bytes: float
    bits_per_weight: float
    cache_bytes_per_token: float
    state_bytes: float
    decode_flops: float
    prefill_flops: float | None


@dataclass(frozen=True)
class ServeAnswer:
    """served: at the batch that was given, or the best one. curve: over batches up to what memory
    holds. most: sequences that memory holds, None where that is unknown."""

    shape: Shape
    work: Work
    served: Served
    curve: tuple[Served, ...]
    roof: Roof
    chosen: bool
    latency_s: float | None
    most: int | None
    pue: float
    mixed: Mixed | None = None
    fleet: Fleet | None = None
    charge: Charge | None = None

    @property
    def constants(self) -> tuple[Constant, ...]:
        return self.served.constants if self.mixed is None else self.mixed.constants

    @property
    def notes(self) -> tuple[str, ...]:
        more = () if self.fleet is None else self.fleet.notes
        own = self.served.notes if self.mixed is None else self.mixed.notes
        return tuple(dict.fromkeys((*own, *more)))


@dataclass(frozen=True)
class CompareAnswer:
    """fleets: of each row that works, in order, where requests were given."""

    shape: Shape
    work: Work
    rows: tuple[Compared, ...]
    traffic: Traffic
    latency_s: float | None
    pue: float
    fleets: tuple[Fleet | None, ...] = ()

    @property
    def constants(self) -> tuple[Constant, ...]:
        many = sum(r.served is not None for r in self.rows) > 1
        return tuple(
            replace(c, name=f"{r.name}: {c.name}") if many else c
            for r in self.rows if r.served is not None for c in r.served.constants
        )  # fmt: skip

    @property
    def notes(self) -> tuple[str, ...]:
        found = [n for r in self.rows if r.served is not None for n in r.served.notes]
        found += [n for f in self.fleets if f is not None for n in f.notes]
        return tuple(dict.fromkeys(found))


def work_of(shape: Shape, setup: Setup, traffic: Traffic) -> Work:
    """Per token, at the context that a step reaches."""
    stored = work.weight_bytes(shape, setup.bits)
    p = traffic.prompt
    return Work(
        weight_bytes=stored,
        bits_per_weight=8 * stored / shape.parameters,
        cache_bytes_per_token=work.cache_bytes_per_token(shape, setup.cache_bits),
        state_bytes=work.state_bytes(shape),
        decode_flops=work.decode_flops(shape, traffic.context),
        prefill_flops=work.prefill_flops(shape, p) / p if p >= 1 else None,
    )


def answer_serve(
    shape: Shape,
    setup: Setup,
    traffic: Traffic,
    *,
    batch: int | None = None,
    latency_s: float | None = None,
    prefill: Setup | None = None,
    link: float = NETWORK,
    pue: float = 1.0,
    host_w: float | None = None,
    requests_per_day: float | None = None,
    grid: GridRow | None = None,
    price: PriceRow | None = None,
    battery_wh: float | None = None,
) -> ServeAnswer:
    """All about one setup.

    batch: None for the one of the fewest joules a token whose steps take at most ``latency_s``.
    prefill: what reads the prompts, None the setup itself. requests_per_day needs a grid.
    Raises `JoulesmithError` where the model does not fit or no batch is as fast as asked.
    """
    most = most_sequences(shape, setup, traffic)
    if batch is not None:
        found = serve(shape, setup, replace(traffic, batch=batch), pue=pue, host_w=host_w)
    else:
        best = best_batch(shape, setup, traffic, latency_s, pue=pue, host_w=host_w)
        if best is None:
            one = serve(shape, setup, replace(traffic, batch=1), pue=pue, host_w=host_w)
            raise JoulesmithError(
                f"a step takes {one.seconds.value * 1e3:.3g} ms on {setup.devices} x "
                f"{setup.device.name} with one sequence, more than {(latency_s or 0) * 1e3:.3g} ms:"
                " give a higher latency, more devices or fewer bits per weight"
            )
        found = best
    traffic = found.traffic
    end = UNKNOWN_MEMORY if most is None else min(most, CURVE_END)
    sizes = sorted({*batches(end), int(traffic.batch)})
    return ServeAnswer(
        shape=shape,
        work=work_of(shape, setup, traffic),
        served=found,
        curve=tuple(curve(shape, setup, traffic, sizes, pue=pue, host_w=host_w)),
        roof=roof(
            shape, setup, traffic, [b for b in sizes if b & (b - 1) == 0 or b == traffic.batch]
        ),
        chosen=batch is None,
        latency_s=latency_s,
        most=most,
        pue=pue,
        mixed=None if prefill is None else mix(
            shape, prefill, setup, traffic, link=link, pue=pue, host_w=host_w
        ),
        fleet=_fleet(found, requests_per_day, grid, price),
        charge=None if battery_wh is None else charge(found, battery_wh),
    )  # fmt: skip


def answer_compare(
    shape: Shape,
    setups: Sequence[Setup],
    traffic: Traffic,
    *,
    batch: int | None = None,
    latency_s: float | None = None,
    devices: int | None = None,
    pue: float = 1.0,
    host_w: float | None = None,
    requests_per_day: float | None = None,
    grid: GridRow | None = None,
    price: PriceRow | None = None,
) -> CompareAnswer:
    """Each of ``setups`` at its best, as `compare` does."""
    rows = compare(
        shape, setups, traffic, latency_s=latency_s, devices=devices, batch=batch, pue=pue,
        host_w=host_w,
    )  # fmt: skip
    fleets = tuple(
        None if r.served is None else _fleet(r.served, requests_per_day, grid, price) for r in rows
    )
    return CompareAnswer(
        shape, work_of(shape, setups[0], traffic), rows, traffic, latency_s, pue, fleets
    )


def _fleet(
    served: Served, requests: float | None, grid: GridRow | None, price: PriceRow | None
) -> Fleet | None:
    return None if requests is None or grid is None else fleet(served, requests, grid, price)
