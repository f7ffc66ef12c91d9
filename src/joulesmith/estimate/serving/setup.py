"""What a model is served on and what is asked of it, and the constants of passes that follow.

Constants are those fitted on published measurements of the device, or, where there are none, the
mean of its generation's, or of all generations that were measured. Knows neither models nor joules.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field, replace
from functools import lru_cache
from importlib import resources
from typing import Any

from joulesmith.errors import JoulesmithError
from joulesmith.estimate.answer import Constant
from joulesmith.estimate.devices import Device, precision_name
from joulesmith.estimate.model import work
from joulesmith.estimate.model.shape import Shape
from joulesmith.estimate.serving.roofline import Constants

FILE = "fitted.json"
SERVED = "vLLM 0.11"
"""The engine whose overheads stand for a server's, of the measurements."""
OLD = "vLLM 2024"
YEAR = 2022
"""Devices that came out before it were measured with `OLD` or older."""
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
    the weights are, by name, those of the checkpoint where the weights are as given, else bf16.
    cache_bits: of an element of keys and values. engine: whose
    overheads; None: as `engine_of` says.
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

    def of(self, shape: Shape) -> Setup:
        """With the products of the model's own quantization, where nobody told others."""
        if self.weights is not None or self.products is not None or shape.products is None:
            return self
        return replace(self, products=shape.products)

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


@lru_cache(maxsize=1)
def fitted() -> dict[str, Any]:
    """The constants that were fitted, as benchmarks/estimate_serving.py wrote them."""
    text = resources.files("joulesmith.estimate.serving").joinpath(FILE).read_text("utf-8")
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
    near = f["generations"].get(setup.device.generation, f["pooled"])
    engine = f["engines"].get(engine_of(setup))
    if engine is None:
        raise JoulesmithError(f"no engine {setup.engine!r}: known are {', '.join(engines())}")
    return Constants(**(own or near), **engine, **f["shared"]), own is not None


def measured_like(device: Device) -> str:
    """What the constants of a device that nobody measured are the mean of."""
    of = device.generation if device.generation in fitted()["generations"] else "all"
    return f"{of} devices that were measured"


def engine_of(setup: Setup) -> str:
    """The one that is asked for; or of accelerators of servers the newest that was measured on
    their generation, of others the newest on what came out in the same years."""
    if setup.engine is not None:
        return setup.engine
    d, f = setup.device, fitted()
    if not in_server(d):
        return BARE
    return str(f["newest"].get(d.generation, OLD if (d.year or YEAR) < YEAR else SERVED))


def in_server(device: Device) -> bool:
    """Whether it is an accelerator that stands in a server."""
    return device.kind in ("gpu", "tpu", "fpga") and device.tdp_covers in ("module", "card")


def factors(setup: Setup, own: bool, experts: bool) -> tuple[float, float]:
    """Of joules' and of seconds' 90 % intervals."""
    f = fitted()["intervals"]
    kind = "measured" if own else "other"
    kind += " experts" if experts else ""
    more = 1.0 if own or in_server(setup.device) else ELSEWHERE
    return f[kind]["joules"] * more, f[kind]["seconds"] * more


def constants(
    setup: Setup, c: Constants, own: bool, host: float, assumed: bool, factor: float
) -> tuple[Constant, ...]:
    """All that the answer rests on."""
    f, d, engine = fitted(), setup.device, engine_of(setup)
    source = f["source"] if own else f"mean of {measured_like(d)}"
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
    if not own and not in_server(d):
        out.append(
            Constant(
                "interval elsewhere", ELSEWHERE, "factor in it", "assumed", "not a server's GPU"
            )
        )
    return tuple(out)
