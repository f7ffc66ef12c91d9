"""Where a model stands under a device's roof: FLOP/s reached against FLOPs a byte (Williams et al.
2009, "Roofline"). Numbers for a chart; knows no charts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from joulesmith.estimate.model.shape import Shape
from joulesmith.estimate.serving import roofline
from joulesmith.estimate.serving.serve import reading, steady
from joulesmith.estimate.serving.setup import Setup, Traffic, constants_of


@dataclass(frozen=True)
class Point:
    """phase: "decode" or "prefill". batch: sequences or prompts in the pass."""

    phase: str
    batch: float
    flops_per_byte: float
    flops_per_second: float
    limit: str


@dataclass(frozen=True)
class Roof:
    """Of all devices of the setup: bytes and FLOPs a second, by the data sheet and as reached."""

    bandwidth: float
    peak: float
    reached_bandwidth: float
    reached_peak: float
    points: tuple[Point, ...]

    @property
    def ridge(self) -> float:
        """FLOPs a byte from which on the peak limits."""
        return self.peak / self.bandwidth


def roof(shape: Shape, setup: Setup, traffic: Traffic, batches: Sequence[int]) -> Roof:
    """Decode without prompts at each of ``batches``, and the reading of one prompt."""
    c, _ = constants_of(setup)
    points = []
    p = None
    for b in batches:
        p = steady(shape, setup, replace(traffic, batch=b), prompts=False)
        points.append(_point("decode", b, p, roofline.cost(p, c)))
    if traffic.prompt >= 1:
        p = reading(shape, setup, 1, traffic.prompt)
        points.append(_point("prefill", 1, p, roofline.cost(p, c)))
    if p is None:
        p = steady(shape, setup, traffic, prompts=False)
    n = setup.devices
    reads = c.bandwidth * (c.expert_bandwidth if p.experts else 1)
    return Roof(
        bandwidth=n * float(p.bandwidth), peak=n * float(p.peak),
        reached_bandwidth=n * float(p.bandwidth * min(1.0, reads)),
        reached_peak=float(roofline.reached_flops(p, c)), points=tuple(points),
    )  # fmt: skip


def _point(phase: str, batch: float, p: roofline.Pass, found: roofline.Cost) -> Point:
    moved = float(p.weight_bytes) + float(p.cache_bytes)
    return Point(
        phase, batch, float(p.flops) / moved, float(p.flops) / float(found.seconds), found.limit
    )
