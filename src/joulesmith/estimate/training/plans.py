"""Whether a training run fits its devices, and the plan that one would take.

Bytes of one device, from the whole model's (`peak`) and a plan. Knows no seconds and no joules.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from joulesmith.errors import JoulesmithError
from joulesmith.estimate.devices import Device
from joulesmith.estimate.model.peak import TrainingMemory, training_memory
from joulesmith.estimate.model.shape import Shape
from joulesmith.estimate.model.work import Recompute, weight_bytes
from joulesmith.estimate.training.parallel import Links, Plan, check, step

USABLE = 0.9
"""Share of a device's memory; the rest is the framework's, buffers' and fragments'."""
FULLY = 4 / 3
"""What recomputing all activations costs: a forward pass more."""


@dataclass(frozen=True)
class Settings:
    """What sets memory beside the shape. One sequence at a time. recompute None: "selective", and
    "full" where that does not fit. teacher: of a distillation; only its weights count."""

    sequence: int
    bits: float = 16
    recompute: Recompute | None = None
    optimizer: str = "adamw"
    lora_rank: int | None = None
    teacher: Shape | None = None

    @property
    def ways(self) -> tuple[Recompute, ...]:
        """Of recomputation that may be tried, the cheapest first."""
        return ("selective", "full") if self.recompute is None else (self.recompute,)

    def memory(self, shape: Shape, recompute: Recompute) -> TrainingMemory:
        return training_memory(
            shape, sequence=self.sequence, recompute=recompute, optimizer=self.optimizer,
            bits=self.bits, lora_rank=self.lora_rank,
        )  # fmt: skip


def device_bytes(
    shape: Shape,
    plan: Plan,
    settings: Settings,
    recompute: Recompute,
    memory: TrainingMemory | None = None,
) -> float:
    """Bytes at the peak on one device. memory: `Settings.memory`, where it is there already.

    Stages of a pipeline keep as many microbatches as there are stages, so that only tensor ranks
    divide activations; a fully sharded model gathers two layers at a time.
    """
    m = memory or settings.memory(shape, recompute)
    ranks = plan.tensor * plan.pipeline
    spread = shape.expert_weights / shape.parameters
    kept = (1 - spread) + spread / plan.expert
    part = 1 / plan.data if plan.sharding == "full" else kept
    states = 1 / plan.data if plan.sharding != "none" else kept
    held = ((m.weights + m.gradients) * part + m.optimizer * states) / ranks
    if plan.sharding == "full" and plan.data > 1:
        layer = m.weights / shape.layers / plan.tensor
        held += min(2 * layer * kept, m.weights / ranks)
    if settings.teacher is not None:
        held += weight_bytes(settings.teacher, 16) * (part if plan.data > 1 else 1) / ranks
    return held + (m.activations + m.logits) / plan.tensor


def fitting(
    shape: Shape, plan: Plan, device: Device, settings: Settings
) -> tuple[Recompute, float] | None:
    """How activations are recomputed and the bytes of a device, or None where it does not fit.
    A device whose memory is unknown fits everything."""
    for way in settings.ways:
        size = device_bytes(shape, plan, settings, way)
        if size <= room(device):
            return way, size
    return None


def room(device: Device) -> float:
    """Bytes that a run may use."""
    return math.inf if device.memory_bytes is None else USABLE * device.memory_bytes


def usual_plan(
    shape: Shape,
    devices: int,
    device: Device,
    settings: Settings,
    links: Links,
    batch_tokens: float,
    compute: float,
) -> Plan:
    """Of plans of powers of two that fit, the one with the shortest step; the simplest where others
    gain less than a hundredth. compute: device-seconds of a step's products.

    Plans with more replicas than the batch has sequences come last: they need a larger batch.
    Raises `JoulesmithError` where none fits, and says what would.
    """
    found: tuple[bool, float, Plan] | None = None
    least = math.inf
    sizes = {way: settings.memory(shape, way) for way in settings.ways}
    for plan in _plans(shape, devices, links):
        ways = {way: device_bytes(shape, plan, settings, way, m) for way, m in sizes.items()}
        way = next((w for w, size in ways.items() if size <= room(device)), None)
        least = min(least, *ways.values())
        if way is None:
            continue
        wide = plan.data * settings.sequence > batch_tokens
        work = compute * (FULLY if way == "full" and settings.recompute is None else 1)
        batch = max(batch_tokens, float(plan.data * settings.sequence))
        seconds = step(shape, plan, batch, work, links, sequence=settings.sequence).seconds
        if found is None or wide < found[0] or (wide == found[0] and seconds < 0.99 * found[1]):
            found = wide, seconds, plan
    if found is None:
        raise JoulesmithError(_too_large(shape, device, devices, least, settings))
    return found[2]


def _plans(shape: Shape, devices: int, links: Links) -> Iterator[Plan]:
    """From simple to involved."""
    for p in _divisors(devices, min(shape.layers, 64)):
        for t in _divisors(devices // p, min(8, links.node, max(shape.heads, 1))):
            data = devices // (p * t)
            for e in _divisors(data, max(shape.experts, 1)):
                if not shape.experts or shape.experts % e == 0:
                    yield Plan(data, t, p, e, "full")
                    if data > 1:
                        yield Plan(data, t, p, e, "optimizer")


def refuse(shape: Shape, plan: Plan, device: Device, settings: Settings) -> None:
    """Raise `JoulesmithError` where the plan does not suit the model or does not fit the device."""
    check(shape, plan)
    if fitting(shape, plan, device, settings) is None:
        size = device_bytes(shape, plan, settings, settings.ways[-1])
        raise JoulesmithError(
            _too_large(shape, device, plan.devices, size, settings, plan.sharding != "full")
        )


def _too_large(
    shape: Shape,
    device: Device,
    devices: int,
    size: float,
    settings: Settings,
    whole: bool = False,
) -> str:
    ways = ["more devices"]
    if whole:
        ways.append('sharding="full"')
    if settings.recompute not in (None, "full"):
        ways.append('recompute="full"')
    if settings.lora_rank is None:
        ways.append("a LoRA")
    if settings.optimizer == "adamw":
        ways.append("adamw8bit")
    if settings.sequence > 4096:
        ways.append("a shorter sequence")
    advice = " or ".join([", ".join(ways[:-1]), ways[-1]] if len(ways) > 1 else ways)
    return (
        f"{shape.name} does not fit: {size / 2**30:.0f} GiB each on {devices} x {device.name}, of "
        f"{room(device) / 2**30:.0f} GiB that are usable: give {advice}"
    )


def _divisors(n: int, most: int) -> list[int]:
    """Of n, up to ``most``, that are powers of two."""
    return [k for i in range(25) if (k := 1 << i) <= most and n % k == 0]
