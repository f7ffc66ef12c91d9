"""Tuning what rounding leaves in float: the steps of groups, and the norms.

The whole quantized model runs on calibration text, and the KL divergence to the float
model's predictions is made smaller by gradient; codes stay as they are. Chen et al.
2024, "EfficientQAT", section 3.3 (end-to-end training of quantization parameters), with
the float model as teacher (Hinton et al. 2015) in the place of labels, and with norms.

Some windows are held out: the parameters that are best on them win, and those of the
start are among the candidates, so that tuning which only fits its text changes nothing.
Knows no engine and no file.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.functional import log_softmax

from joulesmith.calibrate import frozen, products
from joulesmith.compress.quantize.grids import Bytes, Grid, Lattice, grid
from joulesmith.compress.quantize.integers import IntGrid
from joulesmith.errors import JoulesmithError
from joulesmith.progress import Tick, silent

if TYPE_CHECKING:
    from joulesmith.models import Model

RATE = 1e-3
"""Adam's rate, relative to each step: 3e-4 gains less, and more fits the calibration text."""
EPOCHS = 2
BATCH = 4
"""Windows a step of the optimizer, one at a time in memory."""
HELD_OUT = 8
"""One window of so many is held out, and at least one."""


@dataclass(frozen=True)
class Tuned:
    """What tuning gave.

    packed: as it was given, with new scales. before, after: mean KL to the float model on
    the held-out windows, nats a token; equal where nothing better was found.
    """

    packed: dict[str, tuple[str, Bytes]]
    before: float
    after: float


def last_hidden(model: Model, windows: NDArray[np.int32]) -> Tensor:
    """What the head sees: (n, length, hidden) float32, of the model as it is now."""
    rows = [_hidden(model, w) for w in _tokens(windows)]
    return torch.stack(rows)


def teacher_of(model: Model, windows: NDArray[np.int32]) -> Tensor:
    """`last_hidden` by products in bfloat16 where those are faster: about 1e-4 nats from exact,
    where rounding to four bits and fewer costs hundreds of times as much."""
    with products("medium"):
        return last_hidden(model, windows)


def tune(
    model: Model,
    packed: Mapping[str, tuple[str, Bytes]],
    windows: NDArray[np.int32],
    teacher: Tensor,
    *,
    epochs: int = EPOCHS,
    rate: float = RATE,
    seed: int = 0,
    progress: Tick = silent,
) -> Tuned:
    """Better scales and norms for matrices that are already rounded.

    model: its matrices are set to what ``packed`` holds, and at the end to the tuned
    values; norms (and other vectors) are changed in place, too. packed: GGUF name ->
    (type, packed rows). Steps move only in types whose groups own their scale
    (``Grid.free_scales``) and on the integer grids, inside blocks. windows: (n, length)
    tokens, n >= 2. teacher: `last_hidden` on them of the float model, whose head the model
    still has.

    The same seed gives the same bytes. Raises `JoulesmithError` for fewer than two windows
    and where the divergence is not finite.
    """
    if len(windows) < 2 or len(windows) != len(teacher):
        raise JoulesmithError("tuning needs two windows of calibration text or more")
    tokens = _tokens(windows)
    held = range(0, len(tokens), max(2, min(HELD_OUT, len(tokens) // 2)))
    fitted = [i for i in range(len(tokens)) if i not in set(held)]
    float_head = model.module.lm_head.weight.detach()
    if any(model.ref(name).layer is None for name in packed):
        float_head = float_head.clone()
    generator = torch.Generator().manual_seed(seed)
    steps = epochs * math.ceil(len(fitted) / BATCH)
    units = steps * BATCH * 3 + (epochs + 1) * len(held)

    done = 0

    def tick(n: int) -> None:
        nonlocal done
        done += n
        progress(min(1.0, done / units))

    with _trainable(model, packed) as layers:
        heads = float_head, model.module.lm_head.weight.detach()
        vectors = [p for p in model.module.parameters() if p.ndim == 1]
        for v in vectors:
            v.requires_grad_(True)
        steps_of = [p for layer in layers.values() for p in layer.parameters()]
        optimizer = torch.optim.Adam([*steps_of, *vectors], lr=rate, betas=(0.9, 0.95))
        every = [*steps_of, *vectors]

        def judged() -> float:
            with torch.no_grad():
                found = [_loss(model, tokens[i], teacher[i], heads, back=False) for i in held]
            tick(len(held))
            return sum(found) / len(found)

        before = best = judged()
        kept = [p.detach().clone() for p in every]
        at = 0
        for _ in range(epochs):
            order = torch.randperm(len(fitted), generator=generator).tolist()
            for start in range(0, len(order), BATCH):
                part = order[start : start + BATCH]
                # Warm up over four steps, then half a cosine down.
                share = min(1.0, (at + 1) / 4) * 0.5 * (1 + math.cos(math.pi * at / steps))
                optimizer.param_groups[0]["lr"] = rate * share
                for i in part:
                    at_i = fitted[i]
                    _loss(model, tokens[at_i], teacher[at_i], heads, share=1 / len(part))
                    tick(3)
                optimizer.step()
                optimizer.zero_grad()
                for layer in layers.values():
                    layer.refresh()
                at += 1
            now = judged()
            if not math.isfinite(now):
                raise JoulesmithError("tuning diverged: the quantized model is not finite")
            if now < best:
                best = now
                kept = [p.detach().clone() for p in every]
        with torch.no_grad():
            for p, value in zip(every, kept, strict=True):
                p.copy_(value)
        for v in vectors:
            v.requires_grad_(False)
        found = {name: layer.packed() for name, layer in layers.items()}
    for name, layer in layers.items():
        _set(model, name, layer.grid, found[name])
    return Tuned(
        {**packed, **{n: (layers[n].grid.name, b) for n, b in found.items()}}, before, best
    )


def _tokens(windows: NDArray[np.int32]) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(windows)).long()


def _hidden(model: Model, tokens: Tensor) -> Tensor:
    with torch.no_grad():
        return _run(model, tokens)


def _run(model: Model, tokens: Tensor) -> Tensor:
    """(length,) -> (length, hidden), after the final norm."""
    out: Tensor = model.module.model(tokens[None], use_cache=False).last_hidden_state[0]
    return out


def _loss(
    model: Model, tokens: Tensor, teacher: Tensor, heads: tuple[Tensor, Tensor], *,
    share: float = 1.0, back: bool = True, rows: int = 128,
) -> float:  # fmt: skip
    """Mean KL(teacher || model) of one window; adds its gradient times ``share``.

    heads: the teacher's and the model's. Logits stand for ``rows`` tokens at a time.
    """
    hidden = _run(model, tokens)
    leaf = hidden.detach().requires_grad_(back)
    total = 0.0
    for start in range(0, len(leaf), rows):
        cut = slice(start, start + rows)
        with torch.no_grad():
            wanted = log_softmax(teacher[cut] @ heads[0].T, dim=-1)
        got = log_softmax(leaf[cut] @ heads[1].T, dim=-1)
        kl = (wanted.exp() * (wanted - got)).sum() / len(leaf)
        if back:
            (kl * share).backward()  # type: ignore[no-untyped-call]
        total += float(kl.detach())
    if back:
        assert leaf.grad is not None
        hidden.backward(leaf.grad)  # type: ignore[no-untyped-call]
    return total


class _Product(torch.autograd.Function):
    """``x W^T`` for ``W = step * level + offset``; the gradient of W is summed by group at once."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, step: Tensor, offset: Tensor | None, w: Tensor, level: Tensor
    ) -> Tensor:
        ctx.save_for_backward(x, w, level)
        ctx.affine, ctx.groups = offset is not None, step.shape[1]
        return x @ w.T

    @staticmethod
    def backward(ctx: Any, *upstream: Any) -> Any:
        (g,) = upstream
        x, w, level = ctx.saved_tensors
        full = (g.flatten(0, -2).T @ x.flatten(0, -2)).view(len(w), ctx.groups, -1)
        along = (full * level.view(full.shape)).sum(-1)
        return g @ w, along, full.sum(-1) if ctx.affine else None, None, None


class _Layer(nn.Module):
    """A linear layer whose steps are trained, as relative changes of those it was given."""

    def __init__(self, linear: nn.Linear, g: Grid, packed: Bytes, order: Tensor | None) -> None:
        super().__init__()
        self.grid, self.order = g, order
        self.bias = linear.bias
        self.codes, self.lattice = g.read(packed, linear.in_features)
        level, offset = g.values(self.codes, _ones(self.lattice)), self.lattice.offset
        self.zero: Tensor | None = None
        if isinstance(g, IntGrid) and offset is not None:
            # A whole zero stays: the offset moves with the step.
            self.zero, offset = self.lattice.stored[1], None
            level = (level.view(len(level), -1, g.group) - self.zero[:, :, None]).view(level.shape)
        small = level.to(torch.int8)
        self.level = self._torch(small if torch.equal(small.float(), level) else level)
        self.step = nn.Parameter(torch.zeros_like(self.lattice.step))
        self.offset = None if offset is None else nn.Parameter(torch.zeros_like(offset))
        self.w = linear.weight.data
        self.refresh()

    def _torch(self, rows: Tensor) -> Tensor:
        """Rows from GGUF's order to torch's."""
        return rows if self.order is None else rows[self.order]

    def scales(self) -> tuple[Tensor, Tensor | None]:
        """Steps and offsets in torch's row order, differentiable."""
        step = self._torch(self.lattice.step * (1 + self.step))
        if self.offset is None or self.lattice.offset is None:
            return step, None
        return step, self._torch(self.lattice.offset + self.lattice.step * self.offset)

    @torch.no_grad()
    def refresh(self) -> None:
        """Bring the dense weights to the present scales."""
        step, offset = self.scales()
        w = self.w.view(len(step), step.shape[1], -1)
        torch.mul(self.level.view(w.shape), step[:, :, None], out=w)
        if offset is not None:
            w.add_(offset[:, :, None])

    def forward(self, x: Tensor) -> Tensor:
        step, offset = self.scales()
        y: Tensor = _Product.apply(x, step, offset, self.w, self.level)  # type: ignore[no-untyped-call]
        return y if self.bias is None else y + self.bias

    def packed(self) -> Bytes:
        """The tensor with its new scales, as near as the type stores them."""
        step = self.lattice.step * (1 + self.step.detach())
        offset = None
        if self.zero is not None:
            offset = -self.zero * step
        elif self.offset is not None and self.lattice.offset is not None:
            offset = self.lattice.offset + self.lattice.step * self.offset.detach()
        return self.grid.write(self.codes, self.grid.snap(step, offset))


def _ones(lattice: Lattice) -> Lattice:
    return Lattice(torch.ones_like(lattice.step), None, ())


def _free(kind: str) -> Grid | None:
    g = grid(kind)
    return g if isinstance(g, Grid) and (g.free_scales or isinstance(g, IntGrid)) else None


@contextmanager
def _trainable(
    model: Model, packed: Mapping[str, tuple[str, Bytes]]
) -> Iterator[dict[str, _Layer]]:
    """Put `_Layer`s in the place of the linear layers whose steps may move; undo at the end."""
    linears: dict[str, nn.Linear] = {}
    layers: dict[str, _Layer] = {}
    # Gradients are averages over many tokens, whose own noise is far larger than bfloat16's.
    with frozen(model.module), products("medium"):
        try:
            for name, (kind, raw) in packed.items():
                g, ref = _free(kind), model.ref(name)
                _set(model, name, grid(kind), raw)
                if g is None or ref.layer is None:
                    continue
                path = ref.parameter.removesuffix(".weight")
                linear = model.module.get_submodule(path)
                order = None if ref.rows is None else torch.from_numpy(np.argsort(ref.rows))
                linears[path] = linear
                layers[name] = _Layer(linear, g, raw, order)
                model.module.set_submodule(path, layers[name])
            yield layers
        finally:
            for path, linear in linears.items():
                model.module.set_submodule(path, linear)


def _set(model: Model, name: str, g: Any, raw: Bytes) -> None:
    from joulesmith.models import set_gguf_weight

    ref = model.ref(name)
    set_gguf_weight(model, name, torch.as_tensor(g.unpack(raw, ref.shape[1])))
