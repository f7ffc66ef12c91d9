"""A narrower residual stream: by one rotation, or by leaving channels out.

By rotation: SliceGPT (Ashkboos et al. 2024, section 3) turns the stream into its principal
directions and cuts the last ones. There each block has a rotation of its own, and a matrix on each
residual connection; with one rotation for the whole stream the result is a plain model. A
tied head must then part from the embedding, since the final norm's weight goes into the head alone:
one more (vocabulary x width) matrix to store, though not to read per token.

By channels: those of least importance are left out everywhere (Muralidharan et al. 2024,
"Minitron", section 2.2); the tie stays.

Maths first, on tensors; then what it does to a block. What is lost is made up for by
`aligned`, for which a `Narrow` says what the new stream is of the old one.
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from joulesmith.calibrate import enter, first, products
from joulesmith.compress.prune.aligned import BATCH, Narrow
from joulesmith.errors import JoulesmithError

if TYPE_CHECKING:
    from joulesmith.models import Model


@dataclass(frozen=True)
class Ends:
    """What stands around the blocks: embed (vocab, width), norm (width,), head (vocab, width)
    or None where it is the embedding. Float64."""

    embed: Tensor
    norm: Tensor
    head: Tensor | None


def principal(moments: Tensor, width: int) -> Tensor:
    """The ``width`` directions of most energy: (hidden, width) with orthonormal columns, float64.

    moments: (hidden, hidden) E[x x^T] of the stream. Signs are such that the largest element of
    each is positive. Raises `JoulesmithError` for a width that cannot be, NaN and infinity.
    """
    check_width(len(moments), width)
    if not bool(torch.isfinite(moments).all()):
        raise JoulesmithError("stream moments hold NaN or infinity")
    m = moments.double()
    _, vectors = torch.linalg.eigh((m + m.T) / 2)
    found = vectors.flip(1)[:, :width]
    largest = found.abs().argmax(dim=0)
    signed: Tensor = found * found[largest, torch.arange(width)].sign()
    return signed


def channels(importance: Tensor, width: int) -> Tensor:
    """The most important channels, rising; of equal ones the first."""
    check_width(len(importance), width)
    order = importance.double().argsort(descending=True, stable=True)
    return order[:width].sort().values


def selection(kept: Tensor, hidden: int) -> Tensor:
    """(hidden, width) of zeros and ones that picks channels."""
    into = torch.zeros(hidden, len(kept), dtype=torch.float64)
    into[kept, torch.arange(len(kept))] = 1.0
    return into


def norm_factor(moments: Tensor, into: Tensor) -> float:
    """What an RMS norm over the narrow stream must be multiplied with.

    ``x / rms(x)`` has the mean over ``hidden`` channels in it and the narrow one that over
    ``width``: sqrt(hidden / width) if all energy is kept, less by the root of its share.
    """
    hidden, width = into.shape
    whole = float(moments.double().trace())
    kept = float((into.T @ moments.double() @ into).trace())
    share = kept / whole if whole > 0 else 1.0
    return math.sqrt(hidden / width * max(share, 1e-12))


def check_width(hidden: int, width: int) -> None:
    """Raises `JoulesmithError` for a width that is not in 1 to hidden."""
    if not 1 <= width <= hidden:
        raise JoulesmithError(f"a width of {width} cannot be cut from {hidden} channels")


def stream_moments(model: Model, windows: NDArray[np.int32]) -> Tensor:
    """(hidden, hidden) E[x x^T] of the stream where norms read it, each token scaled to a mean
    square of 1 so that all layers count alike; float64. A batch is in memory at a time."""
    inner = model.module.model
    total = torch.zeros(model.module.config.hidden_size, model.module.config.hidden_size).double()
    count = 0

    def add(x: Tensor) -> None:
        nonlocal count
        flat = x.flatten(0, 1)
        flat = flat * flat.square().mean(dim=1, keepdim=True).clamp_min(1e-20).rsqrt()
        total.add_(flat.T @ flat)
        count += len(flat)

    mids = [layer.post_attention_layernorm for layer in inner.layers]
    handles = [m.register_forward_pre_hook(lambda _, args: add(args[0])) for m in mids]
    try:
        with products("medium"), torch.no_grad():
            for part in torch.split(torch.from_numpy(np.ascontiguousarray(windows)).long(), BATCH):
                hidden, kwargs = enter(inner, inner.layers[0], part)
                for layer in inner.layers:
                    add(hidden)
                    hidden = first(layer(hidden, **kwargs))
                add(hidden)
    finally:
        for handle in handles:
            handle.remove()
    return total / count


def narrow(model: Model, into: Tensor, factor: float, rotated: bool) -> tuple[Narrow, Ends]:
    """What a stream of ``x into`` makes of a model's blocks and ends.

    into: (hidden, width), orthonormal columns. factor: of `norm_factor`. rotated: whether norm
    weights go into the layers that read them, as they must where ``into`` mixes channels;
    else each channel keeps its own.
    """
    inner = model.module.model
    layers, embedding = inner.layers, inner.embed_tokens.weight.detach().double()

    def block(i: int) -> nn.Module:
        out: Any = copy.deepcopy(layers[i])
        attention, mlp = out.self_attn, out.mlp
        readers = (
            (out.input_layernorm, (attention.q_proj, attention.k_proj, attention.v_proj)),
            (out.post_attention_layernorm, (mlp.gate_proj, mlp.up_proj)),
        )
        for norm, linears in readers:
            weight = norm.weight.detach().double()
            for linear in linears:
                w = linear.weight.detach().double()
                _put(linear, "weight", (w * weight if rotated else w) @ into)
            _put(norm, "weight", _norm(weight, into, factor, rotated))
            _set_eps(norm, model, into)
        for linear in (attention.o_proj, mlp.down_proj):
            _put(linear, "weight", into.T @ linear.weight.detach().double())
            if linear.bias is not None:
                _put(linear, "bias", into.T @ linear.bias.detach().double())
        made: nn.Module = out
        return made

    last = copy.deepcopy(inner.norm)
    final = last.weight.detach().double()
    head = None
    if rotated or not model.tied:
        whole = model.module.lm_head.weight.detach().double()
        head = (whole * final if rotated else whole) @ into
    ends = Ends(embedding @ into, _norm(final, into, factor, rotated), head)
    _put(last, "weight", ends.norm)
    _set_eps(last, model, into)
    # behind a norm with its weight w, a rotated stream stands for (x / w) into
    reads = final[:, None] * into if rotated else into
    dtype = inner.embed_tokens.weight.dtype
    return Narrow(into, block, ends.embed.to(dtype), last, reads), ends


def _norm(weight: Tensor, into: Tensor, factor: float, rotated: bool) -> Tensor:
    own = torch.ones(into.shape[1], dtype=torch.float64) if rotated else weight @ into
    return own * factor


def _set_eps(norm: Any, model: Model, into: Tensor) -> None:
    """As `shrink.config_for` writes it."""
    if model.module.config.model_type != "qwen3":
        norm.variance_epsilon *= into.shape[0] / into.shape[1]


def _put(owner: nn.Module, name: str, value: Tensor) -> None:
    old = getattr(owner, name)
    setattr(owner, name, nn.Parameter(value.to(old.dtype), requires_grad=old.requires_grad))
    if isinstance(owner, nn.Linear) and name == "weight":
        owner.out_features, owner.in_features = value.shape
