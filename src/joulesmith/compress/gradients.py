"""Gradients at the linear layers of any module, block by block.

In memory are what autograd keeps of one block, and one batch's hidden states between blocks.
What lies behind the last block runs once a batch and gives the gradient that goes back through
the blocks. Knows no models by name.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from joulesmith.compress.calls import Batch, call, hidden_of
from joulesmith.compress.layers import Linear, linears_of
from joulesmith.compress.stream import Streams
from joulesmith.compress.taps import tapped
from joulesmith.errors import JoulesmithError
from joulesmith.memory import trim_heap
from joulesmith.moments import drawn_from

Labels = Literal["drawn", "given"]
"""Whose loss: labels drawn from what the module says (the Fisher information), or those of
the data (next tokens; ``labels`` in the batch)."""

Visit = Callable[[str, Linear, Tensor, Tensor], None]
"""Called with a layer's name, the layer, its inputs (n, columns) and gradients (n, rows)."""


def backward(
    module: nn.Module,
    batches: Sequence[Batch],
    visit: Visit,
    *,
    labels: Labels = "drawn",
    seed: int = 0,
    places: int | None = None,
    scratch: Path | None = None,
) -> None:
    """Call ``visit`` for every linear layer inside the module's blocks and every batch.

    The loss is -log p(label), summed over places, where the module gives logits; for other
    outputs half the squared distance to the output itself, of unit variance. Given labels are
    ``labels`` of the batch (-100 for none), shifted by one where the module generates text, else
    the next tokens of ``input_ids``. places: of a batch at most, drawn at random, that a language
    model's head is run for where labels are drawn: logits of all take most of the memory.
    Gradients are scaled so that their squares are as large on average. Raises
    `JoulesmithError` where there is nothing to differentiate, labels are missing, or outputs
    are not finite.
    """
    generator = torch.Generator().manual_seed(seed)
    wanted = [(p, p.requires_grad) for p in module.parameters()]
    try:
        for p, _ in wanted:
            p.requires_grad_(False)
        with Streams(module, batches, targets=False, scratch=scratch) as s:
            blocks = list(s.names.values())
            for b in range(len(batches)):
                _one(s, blocks, b, visit, labels, generator, places)
                trim_heap()
    finally:
        for p, was in wanted:
            p.requires_grad_(was)


def _one(
    s: Streams,
    blocks: list[nn.Module],
    b: int,
    visit: Visit,
    labels: Labels,
    generator: torch.Generator,
    places: int | None,
) -> None:
    if "" in s.names:
        with _Outputs(linears_of(s.module)) as taps, torch.enable_grad():
            # Something must want gradients for any to be kept: the first layers' outputs do.
            out = s.run(s.module, b, None)
            loss = _loss(s.module, out, s.batches[b], labels, generator)
            _back(loss, None)
        taps.told(visit)
        return
    hidden = [s.get(0, b)]
    for block in blocks[:-1]:
        hidden.append(hidden_of(s.run(block, b, _own(hidden[-1]))))
    grad: Tensor | None = _behind(s, blocks, b, hidden[-1], labels, generator, places)
    for i in reversed(range(len(blocks))):
        x = hidden.pop()
        assert x is not None
        x = x.detach().requires_grad_(x.is_floating_point())
        name = list(s.names)[i]
        with _Outputs(linears_of(blocks[i], name)) as taps, torch.enable_grad():
            out = hidden_of(s.run(blocks[i], b, _own(x)))
            if not out.requires_grad:  # an embedding of whole numbers: nothing lies before it
                break
            _back(out, grad)
        taps.told(visit)
        if x.grad is None:
            break
        grad = x.grad


def _own(x: Tensor | None) -> Tensor | None:
    """A copy for a block that may work in place."""
    return None if x is None else x.clone()


def _behind(
    s: Streams,
    blocks: list[nn.Module],
    b: int,
    hidden: Tensor | None,
    labels: Labels,
    generator: torch.Generator,
    places: int | None,
) -> Tensor:
    """Gradient of the loss at the last block's output: the module runs with that put in."""
    leaf = hidden_of(s.run(blocks[-1], b, _own(hidden))).detach().requires_grad_(True)

    def put(_: nn.Module, args: Any, out: Any) -> Any:
        return (leaf.clone(), *out[1:]) if isinstance(out, tuple) else leaf.clone()

    handle = blocks[-1].register_forward_hook(put)
    try:
        with torch.enable_grad():
            batch, scale = s.batches[b], 1.0
            if labels == "drawn" and places is not None:
                batch, scale = _few(s.module, batch, places, generator)
            loss = _loss(s.module, call(s.module, batch), batch, labels, generator)
            _back(scale * loss, None)
    finally:
        handle.remove()
    assert leaf.grad is not None
    return leaf.grad


def _few(
    module: nn.Module, batch: Batch, places: int, generator: torch.Generator
) -> tuple[Batch, float]:
    """The batch with fewer places to predict at, and what to multiply the loss with for it."""
    if isinstance(batch, Tensor):
        return batch, 1.0
    ids = batch.get("input_ids")
    if ids is None or "logits_to_keep" not in inspect.signature(module.forward).parameters:
        return batch, 1.0
    length = ids.shape[-1]
    if length <= places:
        return batch, 1.0
    chosen = torch.randperm(length, generator=generator)[:places].sort().values
    return {**batch, "logits_to_keep": chosen}, math.sqrt(length / places)


def _back(out: Tensor, grad: Tensor | None) -> None:
    if not out.requires_grad:
        raise JoulesmithError("the module's output does not depend on its linear layers")
    torch.autograd.backward(out, grad)


def _loss(
    module: nn.Module, out: Any, batch: Batch, labels: Labels, generator: torch.Generator
) -> Tensor:
    logits = getattr(out, "logits", None)
    plain = out if isinstance(out, Tensor) else None
    if logits is None and plain is not None and plain.ndim == 2 and plain.shape[1] > 1:
        logits = plain  # a classifier
    if logits is not None and logits.shape[-1] > 1:
        _check_finite(logits)
        logp = torch.log_softmax(logits.float(), -1).flatten(0, -2)
        if labels == "given":
            return _given(module, logits, logp, batch)
        drawn, _ = drawn_from(logp.detach().exp(), generator)
        return -logp.gather(1, drawn).sum()
    y = plain if plain is not None else logits
    if y is None:
        parts = out.values() if isinstance(out, Mapping) else out if isinstance(out, tuple) else ()
        y = next((v for v in parts if isinstance(v, Tensor) and v.is_floating_point()), None)
    if y is None:
        raise JoulesmithError(f"the module gives no tensor of floats, but {type(out).__name__}")
    _check_finite(y)
    # E over unit noise e of the gradient of |y - (y + e)|^2 / 2.
    return (y.float() * torch.randn(y.shape, generator=generator)).sum()


def _check_finite(out: Tensor) -> None:
    if not bool(torch.isfinite(out).all()):
        raise JoulesmithError("the module's outputs are not finite on the calibration data")


def _given(module: nn.Module, logits: Tensor, logp: Tensor, batch: Batch) -> Tensor:
    own = batch.get("labels") if isinstance(batch, Mapping) else None
    given = batch.get("input_ids") if own is None and isinstance(batch, Mapping) else own
    if given is None or given.shape != logits.shape[:-1]:
        raise JoulesmithError(
            "the data has no labels to take gradients of: give token windows, or batches with "
            "labels"
        )
    if given.ndim > 1 and (own is None or hasattr(module, "generate")):
        logp, given = logp.view(logits.shape)[:, :-1].flatten(0, -2), given[:, 1:]
    return nn.functional.nll_loss(logp, given.reshape(-1), ignore_index=-100, reduction="sum")


class _Outputs:
    """Keeps inputs of linear layers and the gradients at their outputs during a pass."""

    def __init__(self, layers: dict[str, Linear]) -> None:
        self.layers = layers
        self.x: dict[str, list[Tensor]] = {}
        self.g: dict[str, list[Tensor]] = {}

    def __enter__(self) -> _Outputs:
        self.stack = ExitStack()
        self.stack.enter_context(tapped(self.layers, after=self._note))
        return self

    def _note(self, name: str, x: Tensor, out: Tensor) -> Tensor:
        if not out.requires_grad:
            out = out.detach().requires_grad_(True).clone()  # what follows may work in place
        self.x.setdefault(name, []).append(x.detach())
        kept = self.g.setdefault(name, [])
        out.register_hook(kept.append)  # type: ignore[no-untyped-call]
        return out

    def __exit__(self, *exc: object) -> None:
        self.stack.close()

    def told(self, visit: Visit) -> None:
        """Hand over what was caught; a layer that is called twice is one with all its calls."""
        for name, gradients in self.g.items():
            if not gradients:
                continue
            x = torch.cat([v.flatten(0, -2) for v in self.x[name]])
            g = torch.cat([v.flatten(0, -2) for v in reversed(gradients)])
            visit(name, self.layers[name], x, g)
