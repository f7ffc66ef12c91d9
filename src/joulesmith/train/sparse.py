"""Sparse training: a hook of the loop that chooses which weights live, and when that changes.

What a checkpoint needs of it are masks and optimizer states; all else follows from the step.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from joulesmith.compress.layers import Linear
from joulesmith.compress.prune.patterns import parse_pattern
from joulesmith.compress.prune.task import prunable
from joulesmith.errors import JoulesmithError
from joulesmith.train import masks
from joulesmith.train.live import Live
from joulesmith.train.live_rows import LiveRows
from joulesmith.train.settings import TrainSettings
from joulesmith.train.sparse_settings import EXCHANGE, GRADUAL, OPTIMIZERS, SparseSettings


class SparseTraining:
    """The hook. One instance serves one call of `train`.

    Raises `JoulesmithError` for layers that are none or frozen, a pattern that does not divide
    one, too few live weights, ``until`` beyond the steps and an optimizer whose states are not
    of single weights.
    """

    def __init__(self, module: nn.Module, settings: SparseSettings, train: TrainSettings) -> None:
        self.settings, self.pattern = settings, parse_pattern(settings.pattern)
        self.until = settings.last(train.steps)
        if train.optimizer not in OPTIMIZERS:
            raise JoulesmithError(
                f"{train.optimizer} has no states of single weights: sparse training goes with "
                f"{', '.join(OPTIMIZERS)}"
            )
        self.layers = prunable(module, settings.layers)
        self.names = {p: n for n, p in module.named_parameters()}
        self.places: dict[nn.Parameter, list[str]] = {}
        for name, layer in self.layers.items():
            self.pattern.check(name, layer.shape)
            if not layer.stored.requires_grad:
                raise JoulesmithError(f"{name} is frozen: leave it out of layers")
            self.places.setdefault(layer.stored, []).append(name)
        self.counts = self._counts()
        self._live: Live | None = None
        self._rows = LiveRows()

    @property
    def live(self) -> Live:
        """The optimizer. Raises `JoulesmithError` before the training begins."""
        if self._live is None:
            raise JoulesmithError("masks are there when a training has begun")
        return self._live

    @property
    def sparsity(self) -> float:
        """Share of dead weights in the layers, now: less than was asked for where a budget ended
        the training before ``until``."""
        dead = sum(int((~m).sum()) for m in self.layer_masks().values())
        return dead / sum(x.matrix.numel() for x in self.layers.values())

    def layer_masks(self) -> dict[str, Tensor]:
        """Layer -> bool (outputs, inputs)."""
        every = {p: self.live.mask(p) for p in self.places}
        return {n: _part(x, every[x.stored]) for n, x in self.layers.items()}

    @property
    def identity(self) -> Any:
        """What tells it from another."""
        return self.settings.model_dump(mode="json")

    def wrap(self, optimizer: Optimizer) -> Optimizer:
        """The one that keeps states of live weights; dead weights become zero now."""
        every = {p: torch.ones_like(p, dtype=torch.bool) for p in self.places}
        if self.settings.method not in GRADUAL:
            for name, layer in self.layers.items():
                part = _part(layer, every[layer.stored])
                part.copy_(self.pattern.mask(self._first(name, layer), self.counts[name]))
        self._live = Live(optimizer, every, movement=self.settings.method == "movement")
        self._leave_out()
        return self._live

    def before(self, step: int) -> None:
        """Gradients are whole here: RigL looks at those of dead weights, then they are zero."""
        s = self.settings
        if s.method == "rigl" and self._exchanges(step):
            self._change(self._rigl, lambda p: p.grad, step)
        self.live.mask_gradients()

    def after(self, step: int) -> None:
        """Weights have moved ``step`` + 1 times."""
        s, done = self.settings, step + 1
        if s.method == "set" and self._exchanges(done):
            self._change(self._set, lambda p: p.data, done)
        since = done - s.begin
        due = since >= 0 and done <= self.until and (since % s.every == 0 or done == self.until)
        if s.method in GRADUAL and due:
            scores = self.live.scores if s.method == "movement" else _magnitudes
            self._change(self._gradual, scores, done)

    def state(self) -> dict[str, Any]:
        """Nothing: all is in the tensors."""
        return {}

    def load(self, state: dict[str, Any]) -> None:
        """Masks are there."""
        self._leave_out()

    def end(self) -> None:
        """Layers compute whole again."""
        self._rows.end()

    def tensors(self) -> dict[str, Tensor]:
        """The masks' bits by parameter; a checkpoint is loaded into them."""
        return {self.names[p]: bits for p, bits in self.live.beside.items()}

    def _counts(self) -> dict[str, int]:
        """Layer -> live weights at the end."""
        s = self.settings
        if s.start == "pruned":
            return {n: int(x.matrix.count_nonzero()) or 1 for n, x in self.layers.items()}
        shapes = {n: x.shape for n, x in self.layers.items()}
        share = self.pattern.sparsity or s.sparsity or 0.0
        spread = s.method in EXCHANGE and not self.pattern.of
        by = s.allocation or ("erk" if spread else "uniform")
        return masks.erk(shapes, share) if by == "erk" else masks.uniform(shapes, share)

    def _first(self, name: str, layer: Linear) -> Tensor:
        """Scores of the weights that live at first."""
        if self.settings.start == "random":
            return self._random(name, 0)
        return layer.matrix.abs().float().cpu()

    def _random(self, name: str, step: int) -> Tensor:
        """(outputs, inputs) from 0 to 1: the same on every rank, and after a resume."""
        place = list(self.layers).index(name)
        seed = (self.settings.seed * 1_000_003 + step) * len(self.layers) + place
        generator = torch.Generator().manual_seed(seed % 2**63)
        return torch.rand(self.layers[name].shape, generator=generator)

    def _exchanges(self, step: int) -> bool:
        return 0 < step < self.until and step % self.settings.every == 0

    def _change(
        self,
        choose: Callable[[str, Tensor, Tensor, int], Tensor],
        told: Callable[[nn.Parameter], Tensor | None],
        step: int,
    ) -> None:
        """choose: layer, its mask, its part of what is ``told`` of the parameter, step -> its new
        mask. Where nothing is told, as of a gradient that is not there, masks stay."""
        for p, names in self.places.items():
            if (whole := told(p)) is None:
                continue
            mask = self.live.mask(p)
            for name in names:
                layer = self.layers[name]
                part = _part(layer, mask)
                part.copy_(choose(name, part.cpu(), _part(layer, whole).float().cpu(), step))
            self.live.move(p, mask)
        self._leave_out()

    def _leave_out(self) -> None:
        """Rows and columns that are dead. RigL looks at the gradients of all."""
        if self.settings.method != "rigl":
            for name, mask in self.layer_masks().items():
                self._rows.update(self.layers[name], mask)

    def _rigl(self, name: str, mask: Tensor, grad: Tensor, step: int) -> Tensor:
        share = masks.cosine(step, self.until, self.settings.drop)
        dropped = masks.smallest(self.layers[name].matrix.float().cpu(), mask, share)
        return masks.exchanged(mask, dropped, grad.abs(), self.pattern)

    def _set(self, name: str, mask: Tensor, weight: Tensor, step: int) -> Tensor:
        dropped = masks.smallest_by_sign(weight, mask, self.settings.drop)
        return masks.exchanged(mask, dropped, self._random(name, step), self.pattern)

    def _gradual(self, name: str, mask: Tensor, score: Tensor, step: int) -> Tensor:
        share = masks.cubic(step, self.settings.begin, self.until)
        live = mask.numel() - round((mask.numel() - self.counts[name]) * share)
        pattern = masks.at_share(self.pattern, share) if self.pattern.of else self.pattern
        return masks.thinned(score, mask, pattern, live)


def _magnitudes(p: nn.Parameter) -> Tensor:
    return p.data.abs()


def _part(layer: Linear, whole: Tensor) -> Tensor:
    """The layer's (outputs, inputs) of a tensor in the shape of the parameter that holds it."""
    part = whole if layer.expert is None else whole[layer.expert]
    return part.T if layer.transposed else part
