"""Where the joules of a training run go.

The total is watts times hours. Of a device's watts, those that it draws without work are `idle`; of
the rest, bytes moved and bytes sent are priced by the byte and what remains is `compute`. Parts are
a reading of the total, not measurements: their constants are published or assumed. Knows no hours.
"""

from __future__ import annotations

from dataclasses import dataclass

from joulesmith.estimate.answer import Constant
from joulesmith.estimate.devices import Device, memory_kinds
from joulesmith.estimate.model.peak import activation_bytes
from joulesmith.estimate.model.shape import Shape
from joulesmith.estimate.model.work import Recompute, weight_bytes
from joulesmith.estimate.training.constants import shipped, value
from joulesmith.estimate.training.parallel import Plan, Volumes
from joulesmith.estimate.training.plans import Settings
from joulesmith.estimate.training.power_model import Draw

PICO = 1e-12
OTHER_MEMORY = 30.0
"""pJ a byte of a memory whose kind is not known."""


@dataclass(frozen=True)
class Parts:
    """Joules. communication: links and the network. host: processors, memory, network cards and
    fans beside the devices. idle: what devices draw without work, over all hours. overhead: of the
    building, (PUE - 1) of the rest."""

    compute: float
    memory: float
    communication: float
    storage: float
    host: float
    idle: float
    overhead: float

    @property
    def total(self) -> float:
        return sum(
            (self.compute, self.memory, self.communication, self.storage, self.host, self.idle,
             self.overhead)
        )  # fmt: skip


def split(
    shape: Shape,
    device: Device,
    plan: Plan,
    settings: Settings,
    recompute: Recompute,
    draw: Draw,
    device_hours: float,
    devices: int,
    sent: Volumes,
    batch_tokens: float,
    tokens: float,
    trained: float | None,
    pue: float,
) -> Parts:
    """Joules of ``device_hours`` at ``draw``, in parts. sent: by a device, in a step."""
    seconds = 3600 * device_hours
    steps = tokens / batch_tokens
    idle = seconds * draw.idle
    work = max(0.0, seconds * (draw.device - draw.idle))
    host = seconds * draw.host
    link = devices * steps * (sent.total - sent.network) * value("energy of a link") * PICO
    network = devices * steps * sent.network * value("energy of the network") * PICO
    link, network = min(link, work), min(network, host)  # cards and switches: the host's watts
    kind = memory_kinds().get(device.memory_kind)
    each = (kind.pj_per_byte if kind and kind.pj_per_byte else OTHER_MEMORY) * PICO
    moved = _moved(shape, plan, settings, recompute, steps, tokens, trained)
    memory = min(moved * each * value("way to memory"), work - link)
    stored = _stored(shape, settings, recompute, tokens)
    storage = stored / 1e12 * value("draw of flash storage") * seconds / devices
    rest = work - link - memory
    inside = idle + work + host + storage
    return Parts(
        compute=rest,
        memory=memory,
        communication=link + network,
        storage=storage,
        host=host - network,
        idle=idle,
        overhead=(pue - 1) * inside,
    )


def _moved(
    shape: Shape,
    plan: Plan,
    settings: Settings,
    recompute: Recompute,
    steps: float,
    tokens: float,
    trained: float | None,
) -> float:
    """Bytes between devices and their memory: all weights in each pass over a sequence (an expert's
    once for those of all ranks that share it), states in each step, activations of each token."""
    passes = 3 if recompute == "full" else 2
    spread = shape.expert_weights / shape.parameters
    once = weight_bytes(shape, 16) * (1 - spread + spread / plan.expert)
    weights = passes * once * tokens / settings.sequence
    copies = plan.data if plan.sharding == "none" else 1
    states = value("state read and written") * (trained or shape.parameters) * copies * steps
    kept = activation_bytes(shape, sequence=settings.sequence, recompute="selective")
    activations = value("passes over activations") * kept / settings.sequence * tokens
    return weights + states + activations


def _stored(shape: Shape, settings: Settings, recompute: Recompute, tokens: float) -> float:
    """Bytes on disk: checkpoints that are kept, and the text."""
    m = settings.memory(shape, recompute)
    checkpoints = value("checkpoints kept") * (m.weights + m.optimizer)
    return value("copies on disk") * (checkpoints + value("bytes of a token on disk") * tokens)


def constants() -> tuple[Constant, ...]:
    names = (
        "energy of a link", "energy of the network", "way to memory", "passes over activations",
        "state read and written", "checkpoints kept", "bytes of a token on disk", "copies on disk",
        "draw of flash storage",
    )  # fmt: skip
    return tuple(shipped()[n] for n in names)
