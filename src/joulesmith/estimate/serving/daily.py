"""What serving comes to over days: requests as kWh, grams and money, and a battery as tokens.

Knows answers of `serving`, grids and prices; no models and no devices.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from joulesmith.energy.carbon import GridRow, PriceRow, bill, footprint
from joulesmith.errors import JoulesmithError
from joulesmith.estimate.answer import Figure
from joulesmith.estimate.serving.serve import Served
from joulesmith.units import JOULES_PER_KWH, JOULES_PER_WATT_HOUR

DAYS = 365.0
SECONDS_A_DAY = 86400.0


@dataclass(frozen=True)
class Fleet:
    """Requests of a day, with hosts and PUE. carbon_kg, money: of a day; money None where the price
    is unknown. setups: so many of the setup are busy all day; what they draw between requests is
    not counted."""

    requests_per_day: float
    kwh_per_day: Figure
    kgco2e_per_day: Figure
    money_per_day: Figure | None
    currency: str
    setups: float
    grid: str
    price: str
    notes: tuple[str, ...]


def fleet(
    served: Served, requests_per_day: float, grid: GridRow, price: PriceRow | None = None
) -> Fleet:
    """Of a day of that many requests at the batch of the answer."""
    if not 0 < requests_per_day <= 1e15:
        raise JoulesmithError(f"{requests_per_day:g} requests a day: give a number above 0")
    tokens = requests_per_day * served.traffic.output
    joules = served.joules_per_token_whole.times(tokens)
    carbon = footprint(joules.value, grid)
    money = None if price is None else bill(joules.value, price)
    rate = None if price is None else price.price_per_kwh
    kwh = joules.per(JOULES_PER_KWH)
    return Fleet(
        requests_per_day=requests_per_day,
        kwh_per_day=kwh,
        kgco2e_per_day=kwh.times(grid.gco2e_per_kwh / 1000),
        money_per_day=None if rate is None else kwh.times(rate),
        currency="" if price is None else price.currency,
        setups=tokens / served.tokens_per_second.value / SECONDS_A_DAY,
        grid=_grid(grid),
        price="" if money is None else money.source,
        notes=(*carbon.notes, *(() if money is None else money.notes)),
    )


@dataclass(frozen=True)
class Charge:
    """Of one charge of a battery, with what draws beside the device."""

    watt_hours: float
    tokens: Figure
    requests: Figure
    hours: Figure


def charge(served: Served, watt_hours: float) -> Charge:
    """What a battery of that many watt-hours writes, when nothing else draws on it."""
    if not (math.isfinite(watt_hours) and 0 < watt_hours <= 1e9):
        raise JoulesmithError(f"a battery of {watt_hours:g} Wh: give watt-hours above 0")
    joules, each = watt_hours * JOULES_PER_WATT_HOUR, served.joules_per_token_whole
    tokens = Figure(joules / each.value, joules / each.high, joules / each.low)
    watts = each.value * served.tokens_per_second.value
    wide = each.high / each.value
    return Charge(
        watt_hours, tokens, tokens.per(served.traffic.output),
        Figure.within(joules / watts / 3600, wide),
    )  # fmt: skip


def _grid(row: GridRow) -> str:
    amount = f"{row.gco2e_per_kwh:g} gCO2e/kWh"
    return amount if row.check == "given" else f"{row.name}, {amount}"
