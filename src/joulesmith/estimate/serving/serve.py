"""Joules of serving a model on a device that need not be here: per token, per request, by batch.

A shape and a device become passes (`roofline`), whose constants are those fitted on published
measurements of the device, or, where there are none, the mean of devices that were measured
(`setup`). Joules are the devices'; what the host draws is a constant that is assumed. Knows neither
files of models nor the machine at hand.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from joulesmith.errors import JoulesmithError
from joulesmith.estimate.answer import Constant, Figure
from joulesmith.estimate.model import work
from joulesmith.estimate.model.peak import serving_memory
from joulesmith.estimate.model.shape import Shape
from joulesmith.estimate.serving.roofline import Cost, Pass, cost
from joulesmith.estimate.serving.setup import (
    BARE,
    FULL,
    HOST_W,
    LINK,
    NARROW,
    SERVED,
    Setup,
    Traffic,
    constants,
    constants_of,
    engine_of,
    factors,
    in_server,
    measured_like,
)


@dataclass(frozen=True)
class Served:
    """The answer, of devices alone but for ``joules_per_token_whole``, which has host and PUE.

    joules_per_token: per output token, prompts included. decode and prefill: joules of a token
    written without prompts, and of a token of a prompt read. seconds: of a step. limit: what takes
    most of it. split: joules a token by static draw, bytes, FLOPs. memory_bytes, fits: of all
    devices. fitted: whether the device's own constants are.
    """

    setup: Setup
    traffic: Traffic
    joules_per_token: Figure
    joules_per_request: Figure
    decode: Figure
    prefill: Figure | None
    joules_per_token_whole: Figure
    joules_per_token_and_parameter: Figure
    tokens_per_second: Figure
    seconds: Figure
    watts: Figure
    limit: str
    split: dict[str, float]
    memory_bytes: float
    room_bytes: float | None
    fitted: bool
    constants: tuple[Constant, ...]
    notes: tuple[str, ...]

    @property
    def fits(self) -> bool | None:
        """Whether memory suffices; None where the device's is unknown."""
        return None if self.room_bytes is None else self.memory_bytes <= self.room_bytes


def steady(shape: Shape, setup: Setup, traffic: Traffic, *, prompts: bool = True) -> Pass:
    """One step of continuous batching: a token for each sequence, and its share of the prompts that
    take the places of those that ended (Yu et al. 2022, "Orca")."""
    b, p = traffic.batch, traffic.prompt
    read = b / traffic.output * p if prompts else 0.0
    flops = b * work.decode_flops(shape, traffic.context)
    if read:
        flops += b / traffic.output * work.prefill_flops(shape, p)
    return _pass(
        shape, setup, b, flops,
        weights=work.step_bytes(shape, b, setup.bits),
        cache=b * work.cache_bytes(shape, traffic.context, setup.cache_bits),
        tokens=b + read,
    )  # fmt: skip


def reading(shape: Shape, setup: Setup, batch: float, prompt: float) -> Pass:
    """One pass over ``batch`` whole prompts."""
    return _pass(
        shape, setup, batch, batch * work.prefill_flops(shape, prompt),
        weights=work.step_bytes(shape, batch * prompt, setup.bits),
        cache=batch * work.cache_bytes(shape, prompt, setup.cache_bits),
        tokens=batch * prompt,
    )  # fmt: skip


def _pass(
    shape: Shape, setup: Setup, sequences: float, flops: float, *, weights: float, cache: float,
    tokens: float,
) -> Pass:  # fmt: skip
    setup = setup.of(shape)
    d, n = setup.device, setup.devices
    peak, peak_16 = d.peak(setup.precision), d.peak("bf16")
    if d.tdp_w is None or d.bandwidth is None or peak is None or peak_16 is None:
        missing = [
            word for word, x in (("tdp_w", d.tdp_w), ("bandwidth_gb_s", d.bandwidth),
            (f"{setup.precision}_tflops", peak), ("bf16_tflops", peak_16)) if x is None
        ]  # fmt: skip
        raise JoulesmithError(
            f"{d.name} has no {' and no '.join(dict.fromkeys(missing))}: add a row with it to a "
            "file of your own"
        )
    # two all-reduces a layer (Shoeybi et al. 2019, section 3), a ring's 2 (n - 1) / n each
    sent = 2 * shape.layers * tokens * shape.hidden * 2 * 2 * (n - 1) / n
    return Pass(
        devices=n, tdp_w=d.tdp_w, bandwidth=d.bandwidth, peak=peak, peak_16=peak_16,
        link=d.link_bandwidth or LINK,
        narrow=float(d.runs_as(setup.precision) in NARROW), experts=float(shape.experts > 0),
        layers=shape.layers, expert_layers=shape.expert_layers, sequences=sequences,
        weight_bytes=weights, cache_bytes=cache, flops=flops, exchanged=sent,
    )  # fmt: skip


def serve(
    shape: Shape,
    setup: Setup,
    traffic: Traffic,
    *,
    pue: float = 1.0,
    host_w: float | None = None,
    check: bool = True,
) -> Served:
    """What serving takes.

    host_w: watts beside each device; None: `HOST_W` beside accelerators of servers, 0 beside
    others. check: raise `JoulesmithError` where the model does not fit in the devices' memory.
    """
    if not 1 <= pue <= 5:
        raise JoulesmithError(f"a PUE of {pue:g}: give a number from 1 to 5")
    if host_w is not None and not 0 <= host_w <= 1e5:
        raise JoulesmithError(f"a host of {host_w:g} W: give watts from 0")
    setup = setup.of(shape)
    c, own = constants_of(setup)
    needed, room = memory(shape, setup, traffic), _room(setup)
    if check and room is not None and needed > room:
        raise _too_big(shape, setup, traffic, needed, room)
    step = cost(steady(shape, setup, traffic), c)
    alone = cost(steady(shape, setup, traffic, prompts=False), c)
    b = traffic.batch
    wide, slow = factors(setup, own, shape.experts > 0)

    def figure(x: float, factor: float = wide) -> Figure:
        return Figure.within(float(x), factor)

    each = float(step.joules) / b
    host = _host(setup) if host_w is None else host_w
    beside = host * setup.devices * float(step.seconds) / b
    prefill = None
    if traffic.prompt:
        read = cost(reading(shape, setup, 1, traffic.prompt), replace(c, sequence_s=0.0))
        prefill = figure(float(read.joules) / traffic.prompt)
    notes = list(shape.notes)
    if not own:
        notes.append(
            f"nobody's measurements of {setup.device.name} were fitted: constants are the mean of "
            f"{measured_like(setup.device)}"
        )
    if setup.engine is None and engine_of(setup) not in (SERVED, BARE):
        today, _ = constants_of(replace(setup, engine=SERVED))
        other = float(cost(steady(shape, setup, traffic), today).joules) / b
        notes.append(
            f"overheads of {engine_of(setup)}, the newest engine measured on such devices; with "
            f"those of {SERVED} (--engine) {other / each:.2f} times the joules"
        )
    return Served(
        setup=setup, traffic=traffic,
        joules_per_token=figure(each),
        joules_per_request=figure(each * traffic.output),
        decode=figure(float(alone.joules) / b),
        prefill=prefill,
        joules_per_token_whole=figure((each + beside) * pue),
        joules_per_token_and_parameter=figure(each / shape.parameters),
        tokens_per_second=figure(b / float(step.seconds), slow),
        seconds=figure(float(step.seconds), slow),
        watts=_watts(step, setup, wide),
        limit=step.limit,
        split={
            "static": float(step.static) / b, "bytes": float(step.bytes) / b,
            "flops": float(step.flops) / b,
        },
        memory_bytes=needed, room_bytes=room, fitted=own,
        constants=constants(setup, c, own, host, host_w is None, wide),
        notes=tuple(notes),
    )  # fmt: skip


def memory(shape: Shape, setup: Setup, traffic: Traffic) -> float:
    """Bytes on all devices when every sequence is as long as it gets on average."""
    return serving_memory(
        shape, batch=traffic.batch, context=max(1.0, traffic.context), bits=setup.bits,
        cache_bits=setup.cache_bits,
    ).total  # fmt: skip


def most_sequences(shape: Shape, setup: Setup, traffic: Traffic) -> int | None:
    """The largest batch that memory holds; 0 where not even one fits, None where the device's
    memory is unknown."""
    room = _room(setup)
    if room is None:
        return None

    def fits(b: int) -> bool:
        return memory(shape, setup, replace(traffic, batch=b)) <= room

    if not fits(1):
        return 0
    low, high = 1, 2
    while high < 1 << 20 and fits(high):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def fewest_devices(shape: Shape, setup: Setup, traffic: Traffic) -> int:
    """The fewest, as a power of two, whose memory holds the traffic; up to 1024.

    Raises `JoulesmithError` where no number does, or the device's memory is unknown.
    """
    for k in range(11):
        trial = replace(setup, devices=1 << k)
        room = _room(trial)
        if room is None:
            raise JoulesmithError(
                f"{setup.device.name} has no memory in the table: give the number of devices"
            )
        if memory(shape, trial, traffic) <= room:
            return 1 << k
    assert room is not None
    raise _too_big(shape, trial, traffic, memory(shape, trial, traffic), room)


def batches(most: int) -> list[int]:
    """1, 2, 3, 4, 6, 8, 12 and so on up to ``most``, which is the last."""
    found = {1, most, *(2**k for k in range(21)), *(3 * 2**k for k in range(20))}
    return sorted(b for b in found if b <= most)


def curve(
    shape: Shape, setup: Setup, traffic: Traffic, sizes: Sequence[int] | None = None, **given: Any
) -> list[Served]:
    """The answer at each batch that fits; default `batches` up to what memory holds, or 512."""
    if sizes is None:
        most = most_sequences(shape, setup, traffic)
        sizes = batches(512 if most is None else min(most, 4096))
    return [serve(shape, setup, replace(traffic, batch=b), **given) for b in sizes]


def best_batch(
    shape: Shape, setup: Setup, traffic: Traffic, latency_s: float | None = None, **given: Any
) -> Served | None:
    """The batch of the fewest joules a token whose steps take at most ``latency_s``; None where
    none is so fast or nothing fits. Joules a token never rise with the batch, and seconds a step
    never fall, so that it is the largest."""
    most = most_sequences(shape, setup, traffic)
    low, high = 0, (512 if most is None else min(most, 1 << 16)) + 1
    c, _ = constants_of(setup)
    while high - low > 1:
        middle = (low + high) // 2
        step = cost(steady(shape, setup, replace(traffic, batch=middle)), c)
        ok = latency_s is None or float(step.seconds) <= latency_s
        low, high = (middle, high) if ok else (low, middle)
    return serve(shape, setup, replace(traffic, batch=low), **given) if low else None


def _host(setup: Setup) -> float:
    return HOST_W if in_server(setup.device) else 0.0


def _room(setup: Setup) -> float | None:
    each = setup.device.memory_bytes
    return None if each is None else FULL * each * setup.devices


def _watts(step: Cost, setup: Setup, factor: float) -> Figure:
    found = float(step.joules) / float(step.seconds)
    most = setup.devices * float(setup.device.tdp_w or math.inf)
    return Figure(min(found, most), found / factor, max(found, min(most, found * factor)))


def _too_big(
    shape: Shape, setup: Setup, traffic: Traffic, needed: float, room: float
) -> JoulesmithError:
    d = setup.device
    weights = work.weight_bytes(shape, setup.bits)
    most = most_sequences(shape, setup, traffic)
    advice = f"give a batch of at most {most}, more devices"
    if not most:
        more = (replace(setup, devices=setup.devices << k) for k in range(1, 11))
        least = next((x.devices for x in more if most_sequences(shape, x, traffic)), None)
        advice = "give more devices" if least is None else f"give {least} devices"
    return JoulesmithError(
        f"{shape.name} needs {needed / 2**30:.4g} GiB ({weights / 2**30:.4g} of weights) for a "
        f"batch of {traffic.batch:g}, of {room / 2**30:.4g} GiB that {setup.devices} x {d.name} "
        f"have: {advice} or fewer bits per weight"
    )
