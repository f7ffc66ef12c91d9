"""Scales moved between a layer and those that read it, without changing what the model says.

Where one module makes channels and linear layers read them, with nothing in between but
what commutes with a factor for each channel, the factor may sit on either side:

    (W diag(1/s)) (diag(s) x) = W x

That is how SmoothQuant moves outliers from inputs into weights, how AWQ protects weights,
and how a rotation's norm weights are cleared. Which modules stand so is said by the caller
as a `Fold`; this module knows tensors and parameters, and no architecture.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from joulesmith.errors import JoulesmithError


@dataclass(frozen=True)
class Fold:
    """Channels, who makes them, and who reads them.

    producer: dotted name of a module whose ``weight`` is a vector over channels (a norm) or a
    matrix whose rows are channels (a linear layer); a ``bias`` over channels goes along.
    consumers: dotted names of linear layers; they must be all that reads the channels.
    source: the channel that each column of a consumer reads, where that is not simply the
    column's own number: with grouped-query attention one value channel is read by several
    columns.
    """

    producer: str
    consumers: tuple[str, ...]
    source: tuple[int, ...] | None = None

    def columns(self, scale: Tensor) -> Tensor:
        """scale (channels,) -> the factor of each consumer's column, (columns,)."""
        return scale if self.source is None else scale[torch.tensor(self.source)]

    def channels(self, peak: Tensor) -> Tensor:
        """peak (columns,) >= 0, say largest magnitudes -> the largest of each channel."""
        if self.source is None:
            return peak
        index = torch.tensor(self.source)
        out = peak.new_zeros(int(index.max()) + 1)
        return out.scatter_reduce_(0, index, peak, "amax")


def scale_channels(module: torch.nn.Module, fold: Fold, scale: Tensor) -> None:
    """Multiply the producer's channels by ``scale`` and divide the consumers' columns by it.

    scale: (channels,), finite and above 0. In place; products are taken in float64 and
    rounded once. Raises `JoulesmithError` (and changes nothing) for a scale that is not, for
    shapes that do not fit, and where a weight would be beyond its dtype.
    """
    s = scale.detach().double().cpu()
    if s.ndim != 1 or not bool((torch.isfinite(s) & (s > 0)).all()):
        raise JoulesmithError(f"{fold.producer}: scales to fold must be finite and above 0")
    changed: list[tuple[Tensor, Tensor]] = []
    producer = module.get_submodule(fold.producer)
    for name in ("weight", "bias"):
        p = getattr(producer, name, None)
        if p is None:
            continue
        _fits(p.shape[0], len(s), f"{fold.producer}.{name}")
        factor = s if p.ndim == 1 else s[:, None]
        changed.append((p, p.detach().double().cpu() * factor))
    columns = fold.columns(s)
    for consumer in fold.consumers:
        w = module.get_submodule(consumer).weight
        assert isinstance(w, Tensor)
        _fits(w.shape[1], len(columns), f"{consumer}.weight")
        changed.append((w, w.detach().double().cpu() / columns))
    rounded = [(p, new.to(p.dtype)) for p, new in changed]
    if not all(bool(torch.isfinite(new).all()) for _, new in rounded):
        raise JoulesmithError(f"{fold.producer}: folding leads beyond what its dtype holds")
    with torch.no_grad():
        for p, new in rounded:
            p.copy_(new)


def _fits(have: int, want: int, where: str) -> None:
    if have != want:
        raise JoulesmithError(f"{where} has {have} channels, and the scales have {want}")
