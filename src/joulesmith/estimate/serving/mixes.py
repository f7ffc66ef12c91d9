"""Serving on two kinds of device: prompts are read on one, answers written on the other.

    J/request = prompt on one kind + its cache sent over the link + output tokens on the other

Splitting the two phases is Patel et al. 2024 ("Splitwise", arXiv 2311.18677), which sends the cache
layer by layer while the prompt is still being read. So sending takes joules of its own, and time
only where the link is slower than the prompt is read. Devices of both kinds are taken as busy all
the time: so many of each that neither waits. Knows no files and no machine at hand.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from joulesmith.errors import JoulesmithError
from joulesmith.estimate.answer import Constant, Figure
from joulesmith.estimate.model import work
from joulesmith.estimate.model.shape import Shape
from joulesmith.estimate.serving.roofline import Constants, cost
from joulesmith.estimate.serving.serve import Served, reading, serve, steady
from joulesmith.estimate.serving.setup import Setup, Traffic, constants_of

NETWORK = 50e9
"""Bytes a second between servers: a port of 400 Gb/s, one direction."""
JOULES_PER_BYTE_SENT = 2e-9
"""Network cards of 25 W at both ends, their optics and their share of a switch, at 400 Gb/s."""
SENT_FACTOR = 3.0
"""Of the interval of joules a byte sent."""


@dataclass(frozen=True)
class Mixed:
    """The answer, of devices alone but for ``joules_per_request_whole``, which has hosts and PUE.

    prompt, transfer, output: joules of a request by what they went into, and joules_per_request
    their sum. first_token_s: until a prompt is read and its cache is there. seconds: of a step of
    the second kind. sent_bytes: of a request's cache. prefill_per_decode: devices of the first kind
    beside each of the second, so that both are busy. alone: on the second kind only.
    """

    prefill: Setup
    decode: Setup
    traffic: Traffic
    prompt: Figure
    transfer: Figure
    output: Figure
    joules_per_request: Figure
    joules_per_token: Figure
    joules_per_request_whole: Figure
    first_token_s: Figure
    seconds: Figure
    sent_bytes: float
    prefill_per_decode: float
    alone: Served
    constants: tuple[Constant, ...]
    notes: tuple[str, ...]

    @property
    def ratio(self) -> float:
        """Joules of a request over those on the second kind alone."""
        return self.joules_per_request.value / self.alone.joules_per_request.value


def mix(
    shape: Shape,
    prefill: Setup,
    decode: Setup,
    traffic: Traffic,
    *,
    prompts: int = 1,
    link: float = NETWORK,
    joules_per_byte: float = JOULES_PER_BYTE_SENT,
    pue: float = 1.0,
    host_w: float | None = None,
) -> Mixed:
    """What a request takes where ``prefill`` reads prompts, ``prompts`` at once, and ``decode``
    writes for ``traffic.batch`` sequences side by side.

    link: bytes a second between the two kinds. pue, host_w: as `serve`. Raises `JoulesmithError`
    where the model does not fit on either, or there is no prompt to read.
    """
    if traffic.prompt < 1:
        raise JoulesmithError("a mix of devices without a prompt: give a prompt of 1 token or more")
    if not 1 <= prompts <= 1 << 20:
        raise JoulesmithError(f"{prompts} prompts at once: give a whole number from 1")
    if not (1e3 <= link <= 1e15 and 0 <= joules_per_byte <= 1):
        raise JoulesmithError("a link between the kinds: give bytes a second and joules a byte")
    # both check memory, and know intervals and hosts
    first = serve(
        shape, prefill, Traffic(prompts, traffic.prompt, 1, reach=1), pue=pue, host_w=host_w
    )
    alone = serve(shape, decode, traffic, pue=pue, host_w=host_w)
    c_read, c_write = constants_of(prefill)[0], constants_of(decode)[0]
    read = cost(reading(shape, prefill, prompts, traffic.prompt), c_read)
    step = cost(steady(shape, decode, traffic, prompts=False), c_write)
    read_s = float(read.seconds) / prompts  # of one prompt, as those beside it share the pass
    write_s = float(step.seconds) / traffic.batch * traffic.output
    prompt = _like(first.joules_per_token, float(read.joules) / prompts)
    output = alone.decode.times(traffic.output)
    sent = work.cache_bytes(shape, traffic.prompt, decode.cache_bits)
    by_byte = joules_per_byte + _memory(prefill, c_read) + _memory(decode, c_write)
    transfer = Figure.within(sent * by_byte, SENT_FACTOR)
    total = _sum(prompt, transfer, output)
    beside = _host(first) * prefill.devices * read_s + _host(alone) * decode.devices * write_s
    # the last layer's part goes when all is read; what the link could not keep up with, too
    wait = max(sent / link / shape.layers, sent / link - read_s)
    return Mixed(
        prefill=first.setup, decode=alone.setup, traffic=traffic, prompt=prompt, transfer=transfer,
        output=output, joules_per_request=total, joules_per_token=total.per(traffic.output),
        joules_per_request_whole=_sum(total, Figure.exact(beside)).times(pue),
        first_token_s=_sum(_like(first.seconds, float(read.seconds)), Figure.exact(wait)),
        seconds=_like(alone.seconds, float(step.seconds)), sent_bytes=sent,
        prefill_per_decode=read_s * prefill.devices / (write_s * decode.devices), alone=alone,
        constants=(
            *(replace(x, name=f"prefill {x.name}") for x in first.constants),
            *alone.constants,
            Constant("link", link / 1e9, "GB/s", "assumed", "a port of 400 Gb/s between servers"),
            Constant(
                "joules a byte sent", joules_per_byte, "J", "assumed",
                "network cards of 25 W, optics and a share of a switch at 400 Gb/s",
            ),
            Constant("interval of sending", SENT_FACTOR, "factor either way", "assumed", "a guess"),
        ),
        notes=tuple(dict.fromkeys((*first.notes, *alone.notes))),
    )  # fmt: skip


def _like(known: Figure, value: float) -> Figure:
    """``value`` with the interval of ``known``, as a factor."""
    return known.times(value / known.value)


def _sum(*figures: Figure) -> Figure:
    """As if all were wrong the same way: the widest interval that the parts allow."""
    return Figure(
        sum(f.value for f in figures), sum(f.low for f in figures), sum(f.high for f in figures)
    )


def _memory(setup: Setup, c: Constants) -> float:
    """Joules of a byte that the device reads or writes."""
    d = setup.device
    return float(c.per_byte * (d.tdp_w or 0.0) / (d.bandwidth or 1.0))


def _host(served: Served) -> float:
    """Watts beside each device."""
    return next(c.value for c in served.constants if c.name == "host")
