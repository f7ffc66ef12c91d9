"""Learned rounding: where each weight goes, up or down, by the gradient of a block's output.

Cheng et al. 2023, "Optimize Weight Rounding via Signed Gradient Descent" (AutoRound),
equations 3 to 5: each weight gets an offset within half a step of rounding, each group a
factor of its scale, and both take steps of one size along the sign of the gradient, which
passes through rounding as if it were not there. The best parameters seen are kept. Other
than the paper, the start is what another rounding chose (error feedback, say) instead of
nearest, any grid will do, and a token counts by the inverse of its squared output, since
what follows a block is a norm: otherwise the few massive tokens decide alone.

Blocks go first to last. Each reads what the quantized blocks before it give, and is to
give what the float model gives, so that it makes up for their errors as well.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from joulesmith.calibrate import enter, first, frozen, products
from joulesmith.compress.quantize.grids import Bytes, Grid, Lattice, grid
from joulesmith.compress.quantize.integers import IntGrid
from joulesmith.errors import JoulesmithError
from joulesmith.progress import Tick, silent

if TYPE_CHECKING:
    from joulesmith.models import Model

STEPS = 200
BATCH = 2
"""Windows a step. The paper has 8; at the same number of tokens more steps of fewer are better,
and a quarter of the tokens is as good (stories260K, 3 bits: KL 0.169 with 200 steps of 2, 0.174
with 200 of 8, 0.164 with 400 of 2)."""
PASS = 8
"""Windows that go through a block at a time."""
JUDGED = 32
"""Windows that say which parameters are best; ten times in a block."""
SCALE_SHARE = 0.1
"""Factors of scales move by this share of the offsets' step: they start at a searched optimum."""
PIECE = 1 << 16
"""Weights handled at a time."""
_INSIDE = 0.98
"""Share of half a step within which a weight starts around the level it was given."""


@dataclass(frozen=True)
class Block:
    """One block's matrices, and the mean relative squared error of its output on some of the
    calibration windows before and after."""

    packed: dict[str, tuple[str, Bytes]]
    before: float
    after: float


@dataclass(frozen=True)
class Learned:
    """packed: as given, with other codes and scales. errors: block -> as `Block` has them."""

    packed: dict[str, tuple[str, Bytes]]
    errors: dict[int, tuple[float, float]]


def learn(
    model: Model,
    packed: Mapping[str, tuple[str, Bytes]],
    windows: NDArray[np.int32],
    *,
    steps: int = STEPS,
    batch: int = BATCH,
    seed: int = 0,
    keep: Callable[[int, Block], None] = lambda index, block: None,
    known: Callable[[int], Block | None] = lambda index: None,
    progress: Tick = silent,
) -> Learned:
    """Better codes and scales for matrices of decoder blocks that are already rounded.

    model: the float model; each matrix becomes what ``packed`` has of it in the end.
    packed: GGUF name -> (type, packed rows); steps of groups move only where the type stores
    them freely. windows: (n, length) tokens. keep, known: put by and give back what was found
    for a block, so that an interrupted run goes on. The same seed gives the same bytes.
    Raises `JoulesmithError` without windows, and where outputs are not finite.
    """
    if not len(windows):
        raise JoulesmithError("learned rounding needs calibration text")
    from joulesmith.models import set_gguf_weight

    inner = model.module.model
    tokens = torch.from_numpy(np.ascontiguousarray(windows)).long()
    out = dict(packed)
    errors: dict[int, tuple[float, float]] = {}
    # A step's own noise, a few windows standing for all text, is far larger than bfloat16's.
    with frozen(model.module), products("medium"):
        # One window at a time leads in, so that no batch shape is special.
        entered = [enter(inner, inner.layers[0], tokens[i : i + 1]) for i in range(len(tokens))]
        kwargs = entered[0][1]
        exact = torch.cat([h for h, _ in entered])
        given = exact.clone()
        depth = len(inner.layers)
        for i, block in enumerate(inner.layers):
            target = _through(block, exact, kwargs)
            if not bool(torch.isfinite(target).all()):
                raise JoulesmithError("the model's activations are not finite on this text")
            names = [n for n in packed if model.ref(n).layer == i]

            def tick(share: float, before: int = i) -> None:
                progress((before + share) / depth)

            rounded = {n: packed[n] for n in names}
            found = known(i)
            if found is None:
                # A seed for each block: a run that goes on draws what it would have drawn.
                generator = torch.Generator().manual_seed((seed * 100_003 + i) % 2**63)
                found = _learn_block(
                    model, rounded, i, given, target, kwargs, steps, batch, generator, tick
                )
                keep(i, found)
            for name, (kind, raw) in {**rounded, **found.packed}.items():
                back = grid(kind).unpack(raw, model.ref(name).shape[1])
                set_gguf_weight(model, name, torch.as_tensor(back))
            out.update(found.packed)
            errors[i] = found.before, found.after
            given, exact = _through(block, given, kwargs), target
            tick(1.0)
    return Learned(out, errors)


def _learn_block(
    model: Model,
    rounded: Mapping[str, tuple[str, Bytes]],
    index: int,
    x: Tensor,
    target: Tensor,
    kwargs: dict[str, Any],
    steps: int,
    batch: int,
    generator: torch.Generator,
    progress: Tick,
) -> Block:
    """Better codes for one block."""
    block = model.module.model.layers[index]
    layers: dict[str, _Layer] = {}
    linears: dict[str, nn.Linear] = {}
    prefix = f"model.layers.{index}."
    for name, (kind, raw) in rounded.items():
        ref, g = model.ref(name), grid(kind)
        path = ref.parameter.removeprefix(prefix).removesuffix(".weight")
        linear = block.get_submodule(path)
        if not isinstance(g, Grid):
            linear.weight.copy_(torch.as_tensor(g.unpack(raw, ref.shape[1])))
            continue
        order = torch.arange(len(raw)) if ref.rows is None else torch.from_numpy(ref.rows)
        layers[name], linears[path] = _Layer(linear, g, raw, order), linear
        block.set_submodule(path, layers[name])
    weight = target.square().mean(-1, keepdim=True).clamp_min(1e-12).reciprocal()
    batch = min(batch, len(x))

    some = torch.arange(len(x))[:: max(1, len(x) // JUDGED)]

    def error() -> float:
        with torch.no_grad():
            off = (_through(block, x[some], kwargs) - target[some]).square()
            return float((off * weight[some]).mean())

    before = best = error()
    every = [p for layer in layers.values() for p in layer.parameters()]
    kept = [p.detach().clone() for p in every]
    try:
        for step in range(steps if layers else 0):
            chosen = torch.randperm(len(x), generator=generator)[:batch]
            with torch.enable_grad():
                off = (_through(block, x[chosen], kwargs) - target[chosen]).square()
                loss = (off * weight[chosen]).mean()
                loss.backward()  # type: ignore[no-untyped-call]
            rate = (1 - step / steps) / steps
            with torch.no_grad():
                for layer in layers.values():
                    layer.move(rate)
            if (step + 1) % max(1, steps // 10) == 0:
                now = error()
                if now < best:
                    best, kept = now, [p.detach().clone() for p in every]
            progress((step + 1) / steps)
        with torch.no_grad():
            for p, value in zip(every, kept, strict=True):
                p.copy_(value)
        found = {n: (layer.grid.name, layer.packed()) for n, layer in layers.items()}
    finally:
        for path, linear in linears.items():
            block.set_submodule(path, linear)
    return Block(found, before, best)


class _Product(torch.autograd.Function):
    """``x W^T``; the gradient of W is left with its layer, which moves by no more than its sign."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: Tensor, layer: _Layer) -> Tensor:
        # factor is here so that the pass back reaches layers whose input needs no gradient.
        ctx.save_for_backward(x)
        ctx.layer = layer
        return x @ layer.w.T

    @staticmethod
    def backward(ctx: Any, *upstream: Any) -> Any:
        (g,) = upstream
        (x,) = ctx.saved_tensors
        ctx.layer.gradient = g.flatten(0, -2).T @ x.flatten(0, -2)
        return g @ ctx.layer.w if ctx.needs_input_grad[0] else None, None, None


class _Layer(nn.Module):
    """A linear layer whose weights are rounded anew after each step, gradients passing through.

    ``place``: where on the axis of levels each weight stands before it is rounded; ``factor``: of
    each group's step; both in torch's row order. ``w``: the rounded weights.
    """

    gradient: Tensor | None = None

    def __init__(self, linear: nn.Linear, g: Grid, packed: Bytes, order: Tensor) -> None:
        super().__init__()
        self.grid, self.bias, self.order = g, linear.bias, order
        codes, self.lattice = g.read(packed, linear.in_features)
        back = torch.argsort(order)
        self.step = self.lattice.step[back]
        self.offset = None if self.lattice.offset is None else self.lattice.offset[back]
        level = self._grouped(g.values(codes, _ones(self.lattice))[back])
        w = self._grouped(linear.weight.detach().float())
        if self.offset is not None:
            w = w - self.offset[:, :, None]
        step = self.step[:, :, None]
        exact = torch.where(step == 0, torch.zeros_like(w), w / step)
        reach = self._reach(level)
        start = torch.minimum(
            torch.maximum(exact, level - _INSIDE * reach), level + _INSIDE * reach
        )
        low, high = float(g.levels[g.first]), float(g.levels[g.last])
        self.low, self.high = (start - reach).clamp_(min=low), (start + reach).clamp_(max=high)
        # Where levels are apart by other than one, steps are as long as they are apart.
        self.gap = None if bool((reach == 0.5).all()) else 2 * reach
        # Beyond the ends a weight starts at its level, or it would never come back.
        self.place = nn.Parameter(start.clamp_(low, high))
        self.factor = nn.Parameter(torch.ones_like(step))
        self.free = g.free_scales or isinstance(g, IntGrid)
        # A whole zero stays where it is, so the offset of integers follows the step.
        self.follows = self.offset is None or isinstance(g, IntGrid)
        self.w = torch.empty_like(linear.weight)
        self.refresh()

    def _grouped(self, w: Tensor) -> Tensor:
        return w.view(len(w), -1, self.grid.group)

    def _reach(self, level: Tensor) -> Tensor:
        """Half the distance to the nearest other level."""
        levels = torch.tensor(self.grid.levels[self.grid.first :], dtype=torch.float32)
        if len(levels) < 2:
            return torch.zeros_like(level)
        gaps = levels[1:] - levels[:-1]
        inf = torch.tensor([torch.inf])
        least = torch.minimum(torch.cat([inf, gaps]), torch.cat([gaps, inf]))
        index = torch.searchsorted(levels, level.contiguous()).clamp(max=len(levels) - 1)
        return 0.5 * least[index]

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = _Product.apply(x, self.factor, self)  # type: ignore[no-untyped-call]
        return y if self.bias is None else y + self.bias

    def _pieces(self) -> Iterator[slice]:
        """Runs of rows whose weights stay in a core's cache from one operation to the next."""
        rows, columns = self.w.shape
        size = max(1, PIECE // columns)
        return (slice(at, min(at + size, rows)) for at in range(0, rows, size))

    @torch.no_grad()
    def refresh(self) -> None:
        """Bring ``w`` to the present places and factors."""
        for cut in self._pieces():
            self._refresh(cut)

    def _refresh(self, cut: slice) -> None:
        w = self._grouped(self.w[cut])
        factor = self.factor[cut]
        step = self.step[cut, :, None] * factor
        torch.mul(self.grid.nearest_level(self.place[cut]), step, out=w)
        if self.offset is not None:
            offset = self.offset[cut, :, None]
            w.add_(offset * factor if self.follows else offset)

    @torch.no_grad()
    def move(self, rate: float) -> None:
        """One step along the sign of the gradients, within half a level of the start."""
        assert self.gradient is not None
        for cut in self._pieces():
            g = self._grouped(self.gradient[cut])
            if self.free:
                w = self._grouped(self.w[cut])
                if not self.follows and self.offset is not None:
                    w = w - self.offset[cut, :, None]
                # Up to the (positive) factor, the derivative by it.
                along = (g * w).sum(-1, keepdim=True).sign_()
                self.factor[cut].add_(along, alpha=-rate * SCALE_SHARE)
            g.sign_().mul_(self.step[cut, :, None].sign())
            if self.gap is not None:
                g.mul_(self.gap[cut])
            place = self.place[cut].add_(g, alpha=-rate)
            torch.clamp(place, self.low[cut], self.high[cut], out=place)
            self._refresh(cut)
        self.gradient = None

    def packed(self) -> Bytes:
        """The tensor as it stands, with scales as near as the type stores them."""
        codes = self.grid.nearest_code(self.place.detach()).view(self.w.shape)[self.order]
        if not self.free:
            return self.grid.write(codes, self.lattice)
        factor = self.factor.detach()[self.order, :, 0]
        offset = self.lattice.offset
        if offset is not None and self.follows:
            offset = offset * factor
        return self.grid.write(codes, self.grid.snap(self.lattice.step * factor, offset))


def _ones(lattice: Lattice) -> Lattice:
    return Lattice(torch.ones_like(lattice.step), None, ())


def _through(block: nn.Module, x: Tensor, kwargs: dict[str, Any]) -> Tensor:
    """(n, length, hidden) through one block, a few windows at a time.

    kwargs: as the model gave them for one window; positions and mask are the same for all.
    """
    return torch.cat([first(block(x[i : i + PASS], **kwargs)) for i in range(0, len(x), PASS)])
