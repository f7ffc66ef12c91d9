"""Joules of serving a model on a device that need not be here: per token, per request, by batch.

A shape and a device become passes (`roofline`), whose constants are those fitted on published
measurements of the device, or, where there are none, the mean of those of all devices that were
measured. Joules are the devices'; what the host draws is a constant that is assumed. Knows neither
files of models nor the machine at hand.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from importlib import resources
from typing import Any

from joulesmith.errors import JoulesmithError
from joulesmith.estimate import work
from joulesmith.estimate.answer import Constant, Figure
from joulesmith.estimate.devices import Device, precision_name
from joulesmith.estimate.peak import serving_memory
from joulesmith.estimate.roofline import Constants, Cost, Pass, cost
from joulesmith.estimate.shape import Shape

FILE = "serving.json"
SERVED = "vLLM 0.11"
"""The engine whose overheads stand for a server's, of the measurements."""
BARE = "no engine"
"""Kernels alone: one user's program on a device of his own."""
FULL = 0.9
"""Share of a device's memory that is used; the rest is the engine's and the framework's."""
LINK = 64e9
"""Bytes a second of a device whose links are not known: PCIe 5.0 x16."""
ELSEWHERE = 1.5
"""What an interval is wider by, either way, on devices of a kind of which none was measured."""
HOST_W = 150.0
"""Watts of the server beside each accelerator."""
NARROW = ("fp8", "int8", "fp4")


@dataclass(frozen=True)
class Setup:
    """On what and how a model is served.

    devices: of one kind, over which each layer is spread. weights: precision or bits per weight,
    None as the model is given. products: precision of the products; None: fp8, int8 or fp4 where
    the weights are, by name, else bf16. cache_bits: of an element of keys and values. engine: whose
    overheads; None: `SERVED` on accelerators of servers, else `BARE`.
    """

    device: Device
    devices: int = 1
    weights: str | float | None = None
    products: str | None = None
    cache_bits: float = 16
    engine: str | None = None

    def __post_init__(self) -> None:
        if type(self.devices) is not int or not 1 <= self.devices <= 1 << 20:
            raise JoulesmithError(f"{self.devices!r} devices: give a whole number from 1")
        if self.weights is not None:
            work.bits_of(self.weights)
        if self.cache_bits not in (4, 8, 16, 32):
            raise JoulesmithError(f"a cache of {self.cache_bits!r} bits: give 4, 8, 16 or 32")

    @property
    def bits(self) -> float | None:
        """Per weight."""
        return None if self.weights is None else work.bits_of(self.weights)

    @property
    def precision(self) -> str:
        """Of the products."""
        if self.products is not None:
            return precision_name(self.products)
        named = str(self.weights).strip().lower()
        return named if named in NARROW else "bf16"


@dataclass(frozen=True)
class Traffic:
    """What is asked: ``batch`` sequences side by side, each of ``prompt`` tokens read and
    ``output`` written; where they are not told, those of chats. reach: of the output, what a
    sequence that is being written has behind it on average: half of it where all are of one length;
    of chats, long ones are there longer."""

    batch: float = 1
    prompt: float = field(default_factory=lambda: _chat())
    output: float = 512
    reach: float | None = None

    def __post_init__(self) -> None:
        for word, least in (("batch", 1), ("prompt", 0), ("output", 1)):
            x = getattr(self, word)
            number = isinstance(x, int | float) and not isinstance(x, bool)
            if not number or not least <= x <= 1e9:  # false for NaN too
                raise JoulesmithError(f"{word} is {str(x)[:40]}: give a number from {least}")
        if self.reach is not None and not 0 < self.reach <= 2:
            raise JoulesmithError(f"reach is {self.reach}: give a number up to 2")

    @property
    def context(self) -> float:
        """Tokens that a step of a sequence reaches, on average."""
        share = fitted()["reach"] if self.reach is None else self.reach
        return max(1.0, self.prompt + share * self.output)

    @property
    def longest(self) -> float:
        """Tokens of a sequence at its end."""
        return self.prompt + self.output


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


@lru_cache(maxsize=1)
def fitted() -> dict[str, Any]:
    """The constants that were fitted, as benchmarks/estimate_serving.py wrote them."""
    text = resources.files("joulesmith.estimate").joinpath(FILE).read_text("utf-8")
    found: dict[str, Any] = json.loads(text)
    return found


def _chat() -> float:
    """Tokens of a chat's prompt, where nobody tells."""
    return float(fitted()["prompt"])


def engines() -> tuple[str, ...]:
    """Whose overheads are known."""
    return tuple(fitted()["engines"])


def constants_of(setup: Setup) -> tuple[Constants, bool]:
    """Those of the setup's device and engine, and whether the device was measured."""
    f = fitted()
    name = setup.device.name
    own = f["devices"].get(name)
    engine = f["engines"].get(_engine(setup))
    if engine is None:
        raise JoulesmithError(f"no engine {setup.engine!r}: known are {', '.join(engines())}")
    return Constants(**(own or f["pooled"]), **engine, **f["shared"]), own is not None


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
    d, n = setup.device, setup.devices
    peak, peak_16 = d.peak(setup.precision), d.peak("bf16")
    if d.tdp_w is None or d.bandwidth is None or peak is None or peak_16 is None:
        missing = [
            word for word, x in (("tdp_w", d.tdp_w), ("bandwidth_gb_s", d.bandwidth),
            (f"{setup.precision}_tflops", peak)) if x is None
        ]  # fmt: skip
        raise JoulesmithError(
            f"{d.name} has no {' and no '.join(missing)}: add a row with it to a file of your own"
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
    c, own = constants_of(setup)
    needed, room = memory(shape, setup, traffic), _room(setup)
    if check and room is not None and needed > room:
        raise _too_big(shape, setup, traffic, needed, room)
    step = cost(steady(shape, setup, traffic), c)
    alone = cost(steady(shape, setup, traffic, prompts=False), c)
    b = traffic.batch
    wide, slow = _factors(shape, setup, own)

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
            "devices that were measured"
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
        constants=_constants(setup, c, own, host, host_w is None, wide),
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


def _engine(setup: Setup) -> str:
    if setup.engine is not None:
        return setup.engine
    return SERVED if _server(setup.device) else BARE


def _server(device: Device) -> bool:
    """Whether it is an accelerator that stands in a server."""
    return device.kind in ("gpu", "tpu", "fpga") and device.tdp_covers in ("module", "card")


def _host(setup: Setup) -> float:
    return HOST_W if _server(setup.device) else 0.0


def _room(setup: Setup) -> float | None:
    each = setup.device.memory_bytes
    return None if each is None else FULL * each * setup.devices


def _factors(shape: Shape, setup: Setup, own: bool) -> tuple[float, float]:
    """Of joules' and of seconds' 90 % intervals."""
    f = fitted()["intervals"]
    kind = "measured" if own else "other"
    kind += " experts" if shape.experts else ""
    more = 1.0 if own or _server(setup.device) else ELSEWHERE
    return f[kind]["joules"] * more, f[kind]["seconds"] * more


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


def _constants(
    setup: Setup, c: Constants, own: bool, host: float, assumed: bool, factor: float
) -> tuple[Constant, ...]:
    """All that the answer rests on."""
    f, d, engine = fitted(), setup.device, _engine(setup)
    source = f["source"] if own else f"mean of {', '.join(f['devices'])}"
    basis = "fitted" if own else "assumed"
    out = [
        Constant(word, float(value), unit, "published", d.source)
        for word, value, unit in (
            ("tdp", d.tdp_w or 0, "W"), ("bandwidth", (d.bandwidth or 0) / 1e9, "GB/s"),
            (f"peak {d.runs_as(setup.precision)}", (d.peak(setup.precision) or 0) / 1e12,
             "TFLOP/s"),
        )
    ]  # fmt: skip
    words = {
        "static": "share of tdp", "per_byte": "share of tdp at full bandwidth",
        "per_flop": "share of tdp at full rate", "bandwidth": "share of bandwidth",
        "compute": "share of peak",
    }  # fmt: skip
    out += [
        Constant(f"device.{k}", float(getattr(c, k)), u, basis, source) for k, u in words.items()
    ]
    out += [
        Constant(f"engine.{k}", float(v), "s", "fitted", f"{engine}, {f['source']}")
        for k, v in f["engines"][engine].items()
    ]
    out += [
        Constant(f"shared.{k}", float(v), "s" if k.endswith("_s") else "factor", "fitted",
                 f["source"])
        for k, v in f["shared"].items()
    ]  # fmt: skip
    out.append(Constant("reach", f["reach"], "share of output", "fitted", f["source"]))
    out.append(Constant("memory used", FULL, "share", "assumed", "as vLLM's default"))
    where = "1.2 kW beside 8 GPUs, BoaviztAPI's p5.48xlarge" if assumed else "as given"
    out.append(Constant("host", host, "W per device", "assumed", where))
    left = "family" if own else "device"
    out.append(
        Constant("interval", factor, "factor either way", "fitted", f"a {left} left out, 90 %")
    )
    if not own and not _server(d):
        out.append(
            Constant(
                "interval elsewhere", ELSEWHERE, "factor in it", "assumed", "not a server's GPU"
            )
        )
    return tuple(out)
