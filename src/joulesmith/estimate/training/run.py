"""Hours, joules, carbon and money of training that has not begun.

    hours  = 6 N D x work / (devices x peak x MFU)
    joules = device-hours x (watts of device and host) + storage, x PUE

`work` is what a mode, a sequence or recomputation asks for, in FLOPs (`work`), over what plain
training at the usual sequence does; published utilisation is told for that. Utilisation is
`utilisation.predict`, times how much better or worse a plan of the user's is than the usual one
(`parallel`). Watts are averages of whole runs (`power_model`), so that stragglers and restarts
are inside both. Knows neither files of models nor the machine at hand.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

from joulesmith.energy import carbon
from joulesmith.energy.carbon import GridRow, PriceRow
from joulesmith.errors import JoulesmithError
from joulesmith.estimate.answer import Constant, Figure
from joulesmith.estimate.devices import Device, precision_name
from joulesmith.estimate.model import work
from joulesmith.estimate.model.shape import Shape
from joulesmith.estimate.training import parallel, plans, power_model, split
from joulesmith.estimate.training import utilisation as mfu
from joulesmith.estimate.training.constants import shipped, value
from joulesmith.estimate.training.parallel import Plan, Step
from joulesmith.estimate.training.split import Parts
from joulesmith.units import JOULES_PER_KWH

Mode = Literal["full", "finetune", "lora", "distil"]
BITS = {"fp32": 32.0, "tf32": 32.0}
"""Of weights as they are multiplied; 16 otherwise, fp8 too: it keeps weights of 16."""
MOST_DOUBLED = 1024
"""Devices up to which a number that nobody gave is doubled until they hold the model."""


@dataclass(frozen=True)
class TrainingEstimate:
    """hours: by the clock. flops: that are computed, attention and recomputation included.
    device_bytes: at the peak of one device. step: of ``batch_tokens`` tokens, the time that is
    predicted and what of it is waited for. watts: of a device with its share of the host. joules:
    with the PUE; None where no power is known, as is what follows from them. parts: of the joules.
    rent_usd: of the devices, None where no price is known. notes: what was taken for granted.
    """

    model: str
    mode: Mode
    device: str
    devices: int
    plan: Plan
    sequence: int
    batch_tokens: float
    recompute: str
    tokens: float
    flops: float
    utilisation: Figure
    hours: Figure
    device_hours: Figure
    device_bytes: float
    step: Step
    watts: Figure | None
    parts: Parts | None
    joules: Figure | None
    joules_per_token: Figure | None
    joules_per_parameter: Figure | None
    grid: GridRow
    kg_co2e: Figure | None
    price: PriceRow
    energy_cost: Figure | None
    rent_usd: Figure | None
    constants: tuple[Constant, ...]
    notes: tuple[str, ...]

    @property
    def kwh(self) -> Figure | None:
        return None if self.joules is None else self.joules.per(JOULES_PER_KWH)


def estimate_training(
    shape: Shape,
    tokens: float,
    device: Device,
    devices: int | None = None,
    *,
    mode: Mode = "full",
    plan: Plan | None = None,
    sequence: int | None = None,
    batch_tokens: float | None = None,
    precision: str = "bf16",
    recompute: work.Recompute | None = None,
    optimizer: str = "adamw",
    lora_rank: int = 16,
    teacher: Shape | None = None,
    utilisation: float | None = None,
    power: float | None = None,
    pue: float | None = None,
    grid: GridRow | str | float = carbon.DEFAULT,
    price: PriceRow | str | float = carbon.DEFAULT,
    links: parallel.Links | None = None,
) -> TrainingEstimate:
    """What training ``shape`` on ``tokens`` tokens takes on ``devices`` of a kind.

    devices None: of the plan, or as many as train it in a month, and twice as many until they hold
    it. mode: "full" (from scratch) and
    "finetune" compute the same; "lora" trains adapters of ``lora_rank``; "distil" runs ``teacher``
    forward beside it. plan None: `plans.usual_plan`. recompute None: what fits, and as much
    of it as is usual; a word costs what it computes again. utilisation: a share of the 16-bit peak
    instead of the model's; power: watts a device, host included. grid, price: as
    `joulesmith.energy.carbon.grid` and `price` take them.

    Raises `JoulesmithError`, one line, for sizes that are none, for a plan that does not suit the
    model, and where it does not fit.
    """
    _check(shape, tokens, device, devices, mode, teacher, plan, pue)
    usual = int(value("usual sequence"))
    if sequence is None:
        sequence = min(shape.context or usual, usual)
    work.check_number(sequence, "sequence")
    peak = mfu.peak_of(device, precision)
    load = _work(shape, tokens, sequence, usual, mode, recompute, lora_rank, teacher)
    told = devices is not None
    if devices is None:
        devices = plan.devices if plan else _usual_count(load, peak, device)
    settings = plans.Settings(
        sequence=sequence, bits=BITS.get(precision_name(precision), 16), recompute=recompute,
        optimizer=optimizer, lora_rank=lora_rank if mode == "lora" else None,
        teacher=teacher if mode == "distil" else None,
    )  # fmt: skip
    links = links or parallel.links_of(device)
    ordinary = None
    wanted = _wanted(shape, tokens, sequence, batch_tokens)
    seconds = load.base / tokens * wanted / (peak * value("usual utilisation of a run"))
    if plan is None:
        most = devices if told else MOST_DOUBLED
        while plan is None:
            try:
                plan = plans.usual_plan(shape, devices, device, settings, links, wanted, seconds)
            except JoulesmithError:
                if devices >= most:
                    raise
                devices *= 2
        ordinary = plan
    else:
        plans.refuse(shape, plan, device, settings)
    fitted = plans.fitting(shape, plan, device, settings)
    assert fitted is not None  # refused or planned above
    way, size = fitted

    batch = _batch(wanted, sequence, batch_tokens is not None, plan)
    trained = _trained(shape, mode, lora_rank)
    if utilisation is not None:
        share = mfu.given(utilisation)
    else:
        share = mfu.predict(
            device, shape.active, devices, precision=precision, mixture=shape.experts > 0
        )
        count = min(devices, _usual_count(load, peak, device))
        if ordinary is None or count < devices:
            share = _by_plan(
                shape, device, plan, count, settings, links, wanted, seconds, trained, share
            )
    whole = load.base / (peak * 3600)  # device-hours at the peak
    device_hours = Figure(whole / share.value, whole / share.high, whole / share.low)
    one = _step(
        shape, plan, batch, load.base / tokens * batch / (peak * share.value * devices), links,
        sequence, trained,
    )  # fmt: skip

    notes = list(shape.notes)
    if power is not None:
        power_model.given(power, device)  # watts that are none are refused, not unknown
    try:
        draws = [_draw(device, u, power) for u in (share.value, share.low, share.high)]
    except JoulesmithError as unknown:
        notes.append(f"energy is unknown: {unknown}")
        draws = []
    pue = value("usual PUE") if pue is None else pue
    parts = joules = None
    if draws:
        parts = split.split(
            shape, device, plan, settings, way, draws[0], device_hours.value, devices,
            one.volumes, batch, tokens, trained, pue,
        )  # fmt: skip
        joules = _joules(parts, device_hours, draws)
    kwh = None if joules is None else joules.per(JOULES_PER_KWH)
    place = grid if isinstance(grid, GridRow) else carbon.grid(grid)
    tariff = price if isinstance(price, PriceRow) else carbon.price(price)
    rent = device.price_usd_per_hour
    return TrainingEstimate(
        model=shape.name,
        mode=mode,
        device=device.name,
        devices=devices,
        plan=plan,
        sequence=sequence,
        batch_tokens=batch,
        recompute=way,
        tokens=tokens,
        flops=load.flops,
        utilisation=share,
        hours=device_hours.per(devices),
        device_hours=device_hours,
        device_bytes=size,
        step=one,
        watts=draws[0].total if draws else None,
        parts=parts,
        joules=joules,
        joules_per_token=None if joules is None else joules.per(tokens),
        joules_per_parameter=None if joules is None else joules.per(shape.parameters),
        grid=place,
        kg_co2e=None if kwh is None else kwh.times(place.gco2e_per_kwh / 1000),
        price=tariff,
        energy_cost=None if kwh is None else kwh.times(tariff.price_per_kwh),
        rent_usd=None if rent is None else device_hours.times(rent),
        constants=_constants(device, utilisation, power, draws),
        notes=tuple(notes),
    )


# ---- work


@dataclass(frozen=True)
class _Load:
    """flops: computed. base: those that utilisation is a share of: 6 N D, for longer or shorter
    sequences, recomputation and modes in proportion to what they compute."""

    flops: float
    base: float


def _work(
    shape: Shape,
    tokens: float,
    sequence: int,
    usual: int,
    mode: Mode,
    recompute: work.Recompute | None,
    rank: int,
    teacher: Shape | None,
) -> _Load:
    again = recompute or "none"
    plain = work.training_flops(shape, tokens, usual)
    if mode == "lora":
        own = work.lora_flops(shape, tokens, sequence, rank=rank, recompute=again)
    else:
        own = work.training_flops(shape, tokens, sequence, recompute=again)
    base = 6 * shape.active * tokens * own / plain
    if mode != "distil" or teacher is None:
        return _Load(own, base)
    beside = work.forward_flops(teacher, tokens, sequence)
    ratio = beside / work.forward_flops(teacher, tokens, usual)
    return _Load(own + beside, base + 2 * teacher.active * tokens * ratio)


def _usual_count(load: _Load, peak: float, device: Device) -> int:
    """Devices of a month's run: whole nodes above one, and a power of two below."""
    n = mfu.usual_devices(load.base, peak)
    node = int(value("devices of a node"))
    if n >= node:
        return node * round(n / node)
    return min(node, 1 << math.ceil(math.log2(n)))


def _wanted(shape: Shape, tokens: float, sequence: int, given: float | None) -> float:
    """Tokens of a step, before a plan: as given, or the usual ones, no more than there are."""
    if given is None:
        size: float = (shape.active / 1e9) ** (1 / 3)
        return min(value("usual batch") * size, tokens)
    if not (sequence <= given < math.inf):
        raise JoulesmithError(f"batch of {given:g} tokens: give at least one sequence, {sequence}")
    return given


def _batch(wanted: float, sequence: int, given: bool, plan: Plan) -> float:
    """Tokens of a step: a sequence for each replica at least."""
    least = float(plan.data * sequence)
    if given and wanted < least:
        raise JoulesmithError(
            f"batch of {wanted:g} tokens: {plan.data} replicas need a sequence of {sequence} each: "
            "give a larger batch or fewer devices"
        )
    return max(wanted, least)


def _trained(shape: Shape, mode: Mode, rank: int) -> float | None:
    return float(work.adapter_weights(shape, rank)) if mode == "lora" else None


def _by_plan(
    shape: Shape,
    device: Device,
    plan: Plan,
    count: int,
    settings: plans.Settings,
    links: parallel.Links,
    wanted: float,
    compute: float,
    trained: float | None,
    share: Figure,
) -> Figure:
    """``share``, which the usual plan on ``count`` devices has, for another plan, or one on more
    devices than published runs of this size had: as the steps compare.

    compute: device-seconds of a step of ``wanted`` tokens."""
    try:
        usual = plans.usual_plan(shape, count, device, settings, links, wanted, compute)
    except JoulesmithError:  # of plans of powers of two none fits: nothing to compare with
        return share

    def efficiency(p: Plan) -> float:
        batch = max(wanted, float(p.data * settings.sequence))
        return parallel.step(
            shape, p, batch, compute * batch / wanted, links, sequence=settings.sequence,
            trained=trained,
        ).efficiency  # fmt: skip

    ratio = efficiency(plan) / efficiency(usual)
    return Figure(*(min(mfu.MOST, x * ratio) for x in (share.value, share.low, share.high)))


def _step(
    shape: Shape,
    plan: Plan,
    batch: float,
    seconds: float,
    links: parallel.Links,
    sequence: int,
    trained: float | None,
) -> Step:
    """A step of ``seconds``: as much compute as leaves time for what the plan waits for; none
    where it would wait longer than that."""

    def of(compute: float) -> Step:
        work = compute * plan.devices
        return parallel.step(shape, plan, batch, work, links, sequence=sequence, trained=trained)

    low, high = 0.0, seconds
    for _ in range(40):  # waits grow more slowly than compute does
        middle = (low + high) / 2
        low, high = (middle, high) if of(middle).seconds < seconds else (low, middle)
    return of(low)


# ---- joules


def _draw(device: Device, share: float, watts: float | None) -> power_model.Draw:
    return power_model.draw(device, share) if watts is None else power_model.given(watts, device)


def _joules(parts: Parts, device_hours: Figure, draws: list[power_model.Draw]) -> Figure:
    """Lower utilisation takes longer at fewer watts; the power model's own error is independent of
    that, so that the two factors add as squares of logarithms."""
    middle, slow, fast = (d.device + d.host for d in draws)
    spent = device_hours.value * middle
    up = math.log(max(1.0, device_hours.high * slow / spent))
    down = math.log(max(1.0, spent / (device_hours.low * fast)))
    own = math.log(draws[0].factor)
    total = parts.total
    return Figure(
        total, total / math.exp(math.hypot(down, own)), total * math.exp(math.hypot(up, own))
    )


def _constants(
    device: Device, share: float | None, power: float | None, draws: list[power_model.Draw]
) -> tuple[Constant, ...]:
    names = ("usual PUE", "usual sequence", "usual batch")
    found = [*(shipped()[n] for n in names), *parallel.constants()]
    if share is None:
        found += mfu.constants(device)
    if draws:
        found += split.constants()
        if power is None:
            found += power_model.constants(device)
    return tuple(found)


def _check(
    shape: Shape,
    tokens: float,
    device: Device,
    devices: int | None,
    mode: Mode,
    teacher: Shape | None,
    plan: Plan | None,
    pue: float | None,
) -> None:
    if mode not in get_args(Mode):
        raise JoulesmithError(f"mode {str(mode)[:40]!r}: give {', '.join(get_args(Mode))}")
    if isinstance(tokens, bool) or not 1 <= tokens <= 1e18:
        raise JoulesmithError(f"tokens are {str(tokens)[:40]}: give a number such as 1e12")
    if devices is not None and (type(devices) is not int or not 1 <= devices <= 1 << 24):
        raise JoulesmithError(f"devices are {str(devices)[:40]}: give a whole number from 1")
    if plan is not None and devices not in (None, plan.devices):
        raise JoulesmithError(
            f"plan: data x tensor x pipeline is {plan.devices}, not {devices} devices: "
            "give the same number"
        )
    if mode == "distil" and teacher is None:
        raise JoulesmithError("distillation without a teacher: give a teacher's shape")
    if pue is not None and not 1 <= pue <= 10:
        raise JoulesmithError(f"PUE is {pue:g}: give a number from 1, such as 1.2")
