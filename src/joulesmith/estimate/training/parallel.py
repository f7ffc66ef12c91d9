"""Plans of training in parallel: bytes that each device sends in a step, the time they take, what
is left of the speed, and what twice the machines cost in joules.

Bytes are what a device sends, in 16 bits where nothing else is said. b tokens of a replica, h the
width, L layers, W bytes of weights that a device computes with:

    data        all-reduce of gradients 2 (d-1)/d W; fully sharded 3 (d-1)/d W: gathered for the
                forward and the backward pass, gradients scattered (ZeRO, arXiv 1910.02054, 7)
    tensor      4 all-reduces of b h a layer, 2 forward and 2 backward (arXiv 1909.08053, 3)
    pipeline    activations to the next stage and gradients back; (p-1)/m of the time is a bubble
                (arXiv 2104.04473, 2.2)
    expert      4 all-to-alls of a token's chosen copies a layer of experts (arXiv 2101.03961)

Tensor ranks lie side by side, then those of data and experts, then the stages. Communication of
data parallelism hides behind the backward pass; the other kinds are waited for. No latencies and no
stragglers. Knows no utilisation.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from joulesmith.errors import JoulesmithError
from joulesmith.estimate.answer import Constant
from joulesmith.estimate.devices import Device
from joulesmith.estimate.model.shape import Shape
from joulesmith.estimate.training.constants import shipped, value

Sharding = Literal["none", "optimizer", "full"]
POD = 1 << 14
"""Devices of a "node" of chips that are wired to one another (ICI)."""
BACKWARD = 2 / 3
"""Of a step's compute."""
BYTES = 2.0


@dataclass(frozen=True)
class Plan:
    """Ranks of each kind; data x tensor x pipeline devices. expert: ranks over which experts are
    spread, a divisor of data. sharding: what data ranks hold a part of: nothing, optimizer states,
    or everything (FSDP, ZeRO-3). microbatches: of a replica and step, in a pipeline; None: one a
    sequence. Raises `JoulesmithError` for ranks that make no plan."""

    data: int = 1
    tensor: int = 1
    pipeline: int = 1
    expert: int = 1
    sharding: Sharding = "full"
    microbatches: int | None = None

    def __post_init__(self) -> None:
        for word in ("data", "tensor", "pipeline", "expert", "microbatches"):
            ranks = getattr(self, word)
            if ranks is None and word == "microbatches":
                continue
            if type(ranks) is not int or not 1 <= ranks <= 1 << 24:
                raise JoulesmithError(f"plan: {word} is {str(ranks)[:40]}: give a whole number")
        if self.data % self.expert:
            raise JoulesmithError(
                f"plan: {self.expert} expert ranks do not divide {self.data} data ranks: "
                "give a divisor"
            )
        if self.sharding not in get_args(Sharding):
            raise JoulesmithError(f"plan: sharding {self.sharding!r}: give none, optimizer or full")

    @property
    def devices(self) -> int:
        return self.data * self.tensor * self.pipeline


@dataclass(frozen=True)
class Links:
    """node: devices that are wired to one another. inside, between: bytes a second that a device
    sends to others in its node, and through the network, as collectives reach them."""

    node: int
    inside: float
    between: float


@dataclass(frozen=True)
class Volumes:
    """Bytes that a device sends in a step. network: of them, through the network."""

    data: float
    tensor: float
    pipeline: float
    expert: float
    network: float

    @property
    def total(self) -> float:
        return self.data + self.tensor + self.pipeline + self.expert


@dataclass(frozen=True)
class Step:
    """Seconds of a step: compute, and beside it what is waited for. bubble: of the pipeline."""

    compute: float
    data: float
    tensor: float
    pipeline: float
    expert: float
    bubble: float
    volumes: Volumes

    @property
    def seconds(self) -> float:
        waits = self.data + self.tensor + self.pipeline + self.expert + self.bubble
        return self.compute + waits

    @property
    def efficiency(self) -> float:
        """Share of the time that is compute."""
        return self.compute / self.seconds


def links_of(device: Device, node: int | None = None, network_gb_s: float | None = None) -> Links:
    """A device's links: of a node of 8, or of a pod of chips with ICI, and a network by its year.
    node, network_gb_s: as they are; GB/s a device, in one direction."""
    share = value("share of a link's rate")
    between = 1e9 * (network_gb_s or _network(device))
    inside = device.link_bandwidth or between
    if device.link_kind == "ICI":
        return Links(node or POD, share * inside, share * min(between, inside))
    return Links(
        node or int(value("devices of a node")), share * inside, share * min(between, inside)
    )


def _network(device: Device) -> float:
    year = device.year or 2022
    if year < 2019:
        return value("network before 2019")
    return value("network before 2022" if year < 2022 else "network since 2022")


def check(shape: Shape, plan: Plan) -> None:
    """Raise `JoulesmithError` where the model has less than the plan divides."""
    has = {
        "tensor": ("heads", max(shape.heads, 1)),
        "pipeline": ("layers", shape.layers),
        "expert": ("experts", max(shape.experts, 1)),
    }
    for word, (what, most) in has.items():
        if getattr(plan, word) > most:
            raise JoulesmithError(
                f"plan: {getattr(plan, word)} {word} ranks: {shape.name} has {most} {what}: "
                f"give at most {most}"
            )


def volumes(
    shape: Shape,
    plan: Plan,
    batch_tokens: float,
    links: Links,
    *,
    trained: float | None = None,
) -> Volumes:
    """Bytes that a device sends in a step of ``batch_tokens`` tokens of all replicas.

    trained: weights that get gradients, None for all.
    """
    d, t, p, e = plan.data, plan.tensor, plan.pipeline, plan.expert
    tokens = batch_tokens / d
    learns = 1.0 if trained is None else min(1.0, trained / shape.parameters)
    experts = BYTES * shape.expert_weights / (t * p * e)
    dense = BYTES * (shape.parameters - shape.expert_weights) / (t * p)
    passes = 2 + learns if plan.sharding == "full" else 2 * learns
    data = passes * (_part(d) * dense + _part(d // e) * experts)
    layer = BYTES * tokens * shape.hidden
    tensor = 4 * 2 * _part(t) * layer * shape.layers / p
    pipeline = 2 * _part(p) * layer / t
    expert = 4 * _part(e) * layer * shape.chosen * shape.expert_layers / p / t
    rings = ((data, t, d), (tensor, 1, t), (pipeline, t * d, p))
    network = sum(v * _crossing(inner, n, links.node) for v, inner, n in rings)
    network += expert * _away(t, e, links.node)
    return Volumes(data, tensor, pipeline, expert, network)


def step(
    shape: Shape,
    plan: Plan,
    batch_tokens: float,
    compute: float,
    links: Links,
    *,
    sequence: float = 4096,
    trained: float | None = None,
) -> Step:
    """Seconds of a step whose products take ``compute`` device-seconds, all devices together."""
    v = volumes(shape, plan, batch_tokens, links, trained=trained)
    own = compute / plan.devices
    d, t, p, e = plan.data, plan.tensor, plan.pipeline, plan.expert
    hidden = value("overlap of data parallelism") * BACKWARD * own
    return Step(
        compute=own,
        data=max(0.0, _ring(v.data, t, d, links) - hidden),
        tensor=_ring(v.tensor, 1, t, links),
        pipeline=v.pipeline / (links.inside if plan.devices <= links.node else links.between),
        expert=_all_to_all(v.expert, t, e, links),
        bubble=own * (p - 1) / microbatches(plan, batch_tokens, sequence),
        volumes=v,
    )


def microbatches(plan: Plan, batch_tokens: float, sequence: float) -> float:
    """Of a replica in a step: as the plan says, but no more than it has sequences; at least 1."""
    most = batch_tokens / sequence / plan.data
    return max(1.0, most if plan.microbatches is None else min(plan.microbatches, most))


def constants() -> tuple[Constant, ...]:
    names = (
        "devices of a node", "network before 2019", "network before 2022", "network since 2022",
        "share of a link's rate", "overlap of data parallelism",
    )  # fmt: skip
    return tuple(shipped()[n] for n in names)


def _part(n: int) -> float:
    """Share of a buffer that each of n ranks sends in a ring."""
    return (n - 1) / n


def _local(inner: int, n: int, node: int) -> int:
    """Ranks of a group that share a node, where ``inner`` devices lie between neighbours."""
    return max(1, min(n, node // inner))


def _crossing(inner: int, n: int, node: int) -> float:
    """Share of a ring's hops that leave the node."""
    local = _local(inner, n, node)
    return 0.0 if local >= n else 1.0 / local


def _away(inner: int, n: int, node: int) -> float:
    """Share of the other ranks that are in other nodes."""
    return 0.0 if n == 1 else (n - _local(inner, n, node)) / (n - 1)


def _ring(sent: float, inner: int, n: int, links: Links) -> float:
    """Seconds of a ring over n ranks: across nodes, those that share one use all their cards."""
    local = _local(inner, n, links.node)
    rate = links.inside if local >= n else min(links.inside, local * links.between)
    return sent / rate


def _all_to_all(sent: float, inner: int, n: int, links: Links) -> float:
    away = _away(inner, n, links.node)
    return sent * (away / links.between + (1 - away) / links.inside)
