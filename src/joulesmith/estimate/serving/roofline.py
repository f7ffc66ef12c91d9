"""Seconds and joules of one pass over a model's weights, by a roofline with four kinds of cost.

With n devices that draw D watts at most, move b bytes and compute f FLOPs a second at their peaks:

    t = ((W / n b u_b)^4 + (F / n f u_f)^4)^(1/4) + K / n b u_b + S + X
    E = n s D t + e_b (D / b) (W + K) + e_f (D / f) F

W are weights read once a pass, under which their products hide; K the sequences' caches, read in
turn; F the FLOPs; S what is neither: launches a layer, waits between devices, the engine's work a
step and a sequence; X the time of bytes exchanged over links. Where E / t were beyond the n D
watts that devices may draw, their clocks fall and t grows until it is not.

So a device has five constants, all shares of its data sheet's figures and thus of one order on any
device: s (drawn while a step runs, whatever it does), e_b and e_f (of all bytes and all FLOPs at
full rate), u_b and u_f (reached of the peaks). It is Choi et al. 2013 ("A roofline model of
energy", equations 3 and 6) with overheads and a power limit. Works on floats and on arrays of
numpy alike. Knows neither models nor devices; `serving` does, benchmarks/estimate_serving.py fits.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

POWER = 4
"""How sharply the roofline bends: of the norm that joins weights and FLOPs."""
LIMIT_POWER = 12
"""The same where power limits."""
MOST = 0.97
"""Share of the power limit that is reached for long."""


@dataclass(frozen=True)
class Constants:
    """static, per_byte, per_flop, bandwidth, compute: a device's s, e_b, e_f, u_b, u_f.

    layer_s, sync_s: seconds a layer, and more where devices must agree in it. step_s, sequence_s:
    seconds of the engine a step, and a sequence in it. expert_*: in a mixture of experts, seconds
    more a layer of experts, and factors on the rates reached. narrow_*: with 8 bits or fewer in the
    products, factors on the rate reached and on joules a FLOP at the 16-bit rate.
    """

    static: Any
    per_byte: Any
    per_flop: Any
    bandwidth: Any
    compute: Any
    layer_s: Any
    sync_s: Any
    step_s: Any
    sequence_s: Any
    expert_layer_s: Any = 0.0
    expert_bandwidth: Any = 1.0
    expert_compute: Any = 1.0
    narrow_compute: Any = 1.0
    narrow_per_flop: Any = 1.0


@dataclass(frozen=True)
class Pass:
    """One pass. devices, tdp_w, bandwidth (bytes/s), peak (FLOP/s at the precision of the products)
    and peak_16 (at 16 bits), link (bytes/s, one direction), each of one device. narrow, experts: 1
    where products are of 8 bits or fewer, where there are experts; else 0. sequences: in the pass.
    exchanged: bytes that one device sends."""

    devices: Any
    tdp_w: Any
    bandwidth: Any
    peak: Any
    peak_16: Any
    link: Any
    narrow: Any
    experts: Any
    layers: Any
    expert_layers: Any
    sequences: Any
    weight_bytes: Any
    cache_bytes: Any
    flops: Any
    exchanged: Any


@dataclass(frozen=True)
class Cost:
    """seconds, and joules by what they went into; of all devices."""

    seconds: Any
    static: Any
    bytes: Any
    flops: Any
    weights_s: Any
    compute_s: Any
    cache_s: Any
    overhead_s: Any
    link_s: Any
    power_s: Any

    @property
    def joules(self) -> Any:
        return self.static + self.bytes + self.flops

    @property
    def limit(self) -> str:
        """What takes most of the time, in a word."""
        named = {
            "memory": self.weights_s + self.cache_s, "compute": self.compute_s,
            "overhead": self.overhead_s, "links": self.link_s,
        }  # fmt: skip
        if self.power_s >= 0.999 * self.seconds:
            return "power"
        return max(named, key=lambda k: float(named[k]))


def cost(p: Pass, c: Constants) -> Cost:
    """Of the pass with the constants; see the module. All of ``p`` and ``c`` broadcast."""
    n, many = p.devices, np.where(np.asarray(p.devices) > 1, 1.0, 0.0)
    reached_b = n * p.bandwidth * c.bandwidth * _where(p.experts, c.expert_bandwidth)
    weights_s, compute_s = p.weight_bytes / reached_b, p.flops / reached_flops(p, c)
    products = (weights_s**POWER + compute_s**POWER) ** (1 / POWER)
    cache_s = p.cache_bytes / (n * p.bandwidth * c.bandwidth)
    overhead_s = p.layers * (c.layer_s + many * c.sync_s) + p.expert_layers * c.expert_layer_s
    overhead_s = overhead_s + c.step_s + p.sequences * c.sequence_s
    link_s = p.exchanged / p.link
    by_bytes = c.per_byte * p.tdp_w / p.bandwidth * (p.weight_bytes + p.cache_bytes)
    by_flops = c.per_flop * p.tdp_w / p.peak_16 * _where(p.narrow, c.narrow_per_flop) * p.flops
    room = np.maximum(MOST - c.static, 0.05)
    power_s = (by_bytes + by_flops) / (n * p.tdp_w * room)
    free = products + cache_s + overhead_s + link_s
    seconds = (free**LIMIT_POWER + power_s**LIMIT_POWER) ** (1 / LIMIT_POWER)
    static = n * c.static * p.tdp_w * seconds
    return Cost(
        seconds, static, by_bytes, by_flops, weights_s, compute_s, cache_s, overhead_s, link_s,
        power_s,
    )  # fmt: skip


def reached_flops(p: Pass, c: Constants) -> Any:
    """FLOP/s that all devices reach. Narrow products are no slower than those of 16 bits, to which
    an engine widens them where that is faster."""
    peak = np.maximum(p.peak * _where(p.narrow, c.narrow_compute), p.narrow * p.peak_16)
    return p.devices * peak * c.compute * _where(p.experts, c.expert_compute)


def _where(flag: Any, factor: Any) -> Any:
    """``factor`` where the flag is 1, 1 where it is 0."""
    return 1 + flag * (factor - 1)
