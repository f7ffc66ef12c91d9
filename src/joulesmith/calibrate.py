"""What a model does on text, layer by layer: input moments and output gradients.

One forward sweep and one backward sweep over the decoder blocks. Only one block's
activations, gradients and moments are in memory at a time; the inputs of the
blocks, or sums over them, wait on disk. Gradients may be those of a part of the
text, which is faster. Knows nothing of what the moments are used for: each block is
handed to a visitor as soon as it is complete, last block first.

Gradients are those of -log p(y) with y drawn from the model itself, so that their
second moments are the Fisher information (Martens 2020, "New insights and
perspectives on the natural gradient method", section 5), which is the curvature of
the KL divergence to the unchanged model.
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from joulesmith.errors import JoulesmithError
from joulesmith.memory import trim_heap
from joulesmith.moments import Accumulator, HeadMoments, HeadSums, InputSums, Moments
from joulesmith.progress import Tick, silent

if TYPE_CHECKING:
    import torch


Visit = Callable[[int, Mapping[str, Moments]], None]
"""Called with a block's index and the moments of its linear layers by parameter name."""


SAMPLE = 2048
"""Tokens that are kept as they came, for one block at a time; half where they alone have
gradients."""


def calibrate(
    module: torch.nn.Module,
    windows: NDArray[np.int32],
    visit: Visit,
    *,
    batch: int = 4,
    seed: int = 0,
    scratch: Path | None = None,
    outputs: bool = False,
    graded: bool = True,
    progress: Tick = silent,
) -> HeadMoments:
    """Stream moments of every linear layer in every decoder block to ``visit``.

    module:  a `transformers` causal language model with ``model.layers``, ``model.norm``
             and ``lm_head`` (Llama and its relatives), float32
    windows: int32 (n, length)
    scratch: folder for the blocks' inputs, (n x length x hidden) float32 a block; without
             gradients for a single block, and each block's distinct sums, (columns x columns)
    outputs: whether `Moments.outputs` are wanted
    graded:  whether all tokens get gradients, or those of the sample alone; then no token
             weighs more than another, and with tens of thousands of tokens it takes a third of
             the time

    Matrix products may run in bfloat16 with float32 sums where the processor is faster
    at it: moments are averages over thousands of tokens, whose own noise is far larger.

    Raises `JoulesmithError` when the model has another structure, or its activations
    are not finite.
    """
    import torch

    precision = torch.get_float32_matmul_precision()

    def exactly(index: int, moments: Mapping[str, Moments]) -> None:
        # What the visitor multiplies is no average: it gets full precision.
        with products(precision):
            visit(index, moments)

    with products("medium"), frozen(module):
        return _calibrate(module, windows, exactly, batch, seed, scratch, outputs, graded, progress)


@contextmanager
def products(precision: str) -> Iterator[None]:
    """The precision of float32 matrix products ("highest", "medium"); put back at the end.

    "medium" multiplies in bfloat16 and sums in float32 where the processor is faster at it.
    """
    import torch

    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


@contextmanager
def frozen(module: torch.nn.Module) -> Iterator[None]:
    """No parameter of the module wants gradients; at the end those do that did."""
    before = [(p, p.requires_grad) for p in module.parameters()]
    for p, _ in before:
        p.requires_grad_(False)
    try:
        yield
    finally:
        for p, wanted in before:
            p.requires_grad_(wanted)


def _calibrate(
    module: torch.nn.Module,
    windows: NDArray[np.int32],
    visit: Visit,
    batch: int,
    seed: int,
    scratch: Path | None,
    outputs: bool,
    graded: bool,
    progress: Tick,
) -> HeadMoments:
    import torch

    inner = getattr(module, "model", None)
    layers = getattr(inner, "layers", None)
    norm = getattr(inner, "norm", None)
    head = getattr(module, "lm_head", None)
    if inner is None or layers is None or norm is None or head is None:
        raise JoulesmithError(
            f"calibration does not know the structure of {type(module).__name__}: "
            "decoder models with model.layers, model.norm and lm_head are supported"
        )
    tokens = torch.from_numpy(np.ascontiguousarray(windows)).long()
    with tempfile.TemporaryDirectory(prefix="calibrate-", dir=scratch) as folder:
        sweep = _Sweep(inner, tokens, batch, graded, _Store(Path(folder)), progress)
        sweep.forward()
        generator = torch.Generator().manual_seed(seed)
        moments = sweep.head(head, generator)
        trim_heap()
        sweep.backward(visit, outputs)
        counts = torch.bincount(tokens.flatten(), minlength=head.weight.shape[0]).float()
        return HeadMoments(moments, sweep.input_fisher(), counts / tokens.numel())


class _Sweep:
    """Forward through all blocks, then backward, over batches that wait on disk."""

    def __init__(
        self,
        inner: Any,
        tokens: torch.Tensor,
        batch: int,
        graded: bool,
        store: _Store,
        progress: Tick,
    ) -> None:
        self.inner, self.tokens, self.store, self.grade_all = inner, tokens, store, graded
        self.layers = inner.layers
        wanted = SAMPLE if graded else SAMPLE // 2
        self.batches = _batches(len(tokens), max(1, wanted // tokens.shape[1]), batch, graded)
        self.graded = [b for b in self.batches if b.graded]
        # The keyword arguments of a block (positions, mask) depend on the batch's shape only.
        self.calls: dict[int, dict[str, Any]] = {}
        # A block of a batch forward is the unit, three where its inputs are summed as well,
        # and six backward; the visitor's work on a block is about three a batch.
        self.ahead = 1 if graded else 3
        each = self.ahead * len(self.batches) + 6 * len(self.graded) + 3 * len(self.batches)
        self.steps, self.taken = each * len(self.layers) + 8 * len(self.graded), 0
        self.progress = progress

    def _tick(self, units: int) -> None:
        self.taken += units
        self.progress(self.taken / self.steps)

    def _block(self, index: int, hidden: torch.Tensor) -> torch.Tensor:
        return first(self.layers[index](hidden, **self.calls[hidden.shape[0]]))

    def forward(self) -> None:
        """The inputs of blocks to disk, where gradients are wanted; elsewhere their sums."""
        import torch

        with torch.no_grad():
            for b in self.batches:
                hidden, kwargs = enter(self.inner, self.layers[0], self.tokens[b.windows])
                self.calls.setdefault(hidden.shape[0], kwargs)
                self.store.put(0, b.number, hidden)
            for i, layer in enumerate(self.layers):
                sums = _SharedSums()
                for b in self.batches:
                    with _tapped(layer, not self.grade_all) as taps:
                        hidden = self._block(i, self.store.get(i, b.number))
                    sums.add(taps)
                    taps.clear()  # or the next batch runs beside this one's inputs
                    if not torch.isfinite(hidden).all():
                        raise JoulesmithError(
                            "the model's activations are not finite on the calibration text"
                        )
                    self.store.put(i + 1, b.number, hidden)
                    if not b.graded:
                        self.store.remove(i, b.number)
                    self._tick(self.ahead)
                if not self.grade_all:
                    self.store.put_sums(i, sums)

    def head(self, head: Any, generator: torch.Generator) -> Moments:
        """The head's moments; the gradients that enter the last block take its outputs' place."""
        import torch

        depth = len(self.layers)
        sums = HeadSums(head.weight.shape[0], head.weight.shape[1], self.grade_all)
        for b in self.batches:
            hidden = self.store.get(depth, b.number).requires_grad_(b.graded)
            with torch.set_grad_enabled(b.graded):
                normed = self.inner.norm(hidden)
            x = normed.detach()
            if not self.grade_all:
                sums.sums.inputs.add(x.flatten(0, 1), None)
            if not b.graded:
                continue
            gx = sums.add(x.flatten(0, 1), head, generator).reshape(x.shape)
            if b.sampled:
                sums.sums.inputs.kept.append(x[b.sampled].flatten(0, 1))
                sums.sums.keep(None, gx[b.sampled].flatten(0, 1))
            torch.autograd.backward(normed, gx)
            assert hidden.grad is not None
            self.store.put(depth, b.number, hidden.grad)
            self._tick(8)
        return sums.sums.done()

    def backward(self, visit: Visit, outputs: bool) -> None:
        """Last block first; its gradient at the input replaces its input."""
        for i in reversed(range(len(self.layers))):
            known = {} if self.grade_all else self.store.get_sums(i)
            sums = {
                name: Accumulator(m.out_features, m.in_features, outputs, known.get(name))
                for name, m in _linears(self.layers[i]).items()
            }
            for b in self.graded:
                self._back(i, b, sums)
                self._tick(6)
            self.store.drop(i + 1)
            # Each layer's sums go as its moments come: both at once are twice the memory.
            visit(i, {name: sums.pop(name).done() for name in list(sums)})
            self._tick(3 * len(self.batches))

    def _back(self, i: int, b: _Batch, sums: Mapping[str, Accumulator]) -> None:
        """One batch through a block; what it held is gone when the block's visitor is called."""
        import torch

        hidden = self.store.get(i, b.number).requires_grad_(True)
        with _tapped(self.layers[i]) as taps, torch.enable_grad():
            out = self._block(i, hidden)
            torch.autograd.backward(out, self.store.get(i + 1, b.number))
        kept = set()
        for name, tap in taps.items():
            if tap.x is None or tap.g is None:
                continue
            sums[name].add(tap.x.flatten(0, -2), tap.g.flatten(0, -2))
            if not b.sampled:
                continue
            sums[name].keep(tap.g[b.sampled].flatten(0, -2))
            inputs = sums[name].inputs
            if inputs not in kept:  # once for all layers that share them
                inputs.kept.append(tap.x[b.sampled].flatten(0, -2))
                kept.add(inputs)
        assert hidden.grad is not None
        self.store.put(i, b.number, hidden.grad)

    def input_fisher(self) -> torch.Tensor:
        """(hidden,) E[g^2] where the blocks begin."""
        import torch

        total, seen = torch.zeros(self.inner.embed_tokens.weight.shape[1]), 0
        for b in self.graded:
            g = self.store.get(0, b.number)
            total += g.square().sum(dim=(0, 1))
            seen += g.shape[0] * g.shape[1]
        return total / seen


@dataclass(frozen=True)
class _Batch:
    """windows: which. sampled: places of those of them that are kept as they came."""

    number: int
    windows: list[int]
    sampled: list[int]
    graded: bool


def _batches(count: int, wanted: int, size: int, graded: bool) -> list[_Batch]:
    """Batches of ``count`` windows, ``wanted`` of which, evenly spread, are the sample.

    graded: whether all get gradients; else the sample alone, which comes first, a window at a
    time to save memory.
    """
    if wanted < count:
        kept = sorted({i * count // wanted for i in range(wanted)})
    else:
        kept = list(range(count))
    if graded:
        parts = [(list(range(count)), True, size)]
    else:
        parts = [(kept, True, 1), (sorted(set(range(count)) - set(kept)), False, size)]
    found: list[_Batch] = []
    for windows, grade, size in parts:
        for start in range(0, len(windows), size):
            cut = windows[start : start + size]
            sampled = [i for i, w in enumerate(cut) if w in kept]
            found.append(_Batch(len(found), cut, sampled, grade))
    return found


class _SharedSums(dict[str, InputSums]):
    """Linear layer -> sums over its inputs; those that read the same ones share them.

    Which do is settled by the first batch, as the layers of a block are called in the same way
    in each; where a later one shows otherwise, a layer goes on with sums of its own.
    """

    def add(self, taps: Mapping[str, _Tap]) -> None:
        """One batch."""
        read: dict[str, tuple[Any, ...]] = {}
        groups: dict[tuple[Any, ...], list[str]] = {}
        for name, tap in taps.items():
            if tap.x is not None and tap.x.numel():
                read[name] = (tap.x.data_ptr(), tap.x.shape, tap.x.stride())
                groups.setdefault(read[name], []).append(name)
        self._part(read)
        for names in groups.values():
            x = taps[names[0]].x
            assert x is not None
            fresh = [n for n in names if n not in self]
            if len(fresh) == len(names):
                self |= dict.fromkeys(names, InputSums(x.shape[-1]))
            else:
                self |= {n: InputSums(x.shape[-1]) for n in fresh}
            for sums in _distinct({n: self[n] for n in names}):
                sums.add(x.flatten(0, -2), None)

    def _part(self, read: Mapping[str, tuple[Any, ...]]) -> None:
        """Layers that have shared sums and do not read the same now go on with copies."""
        for sums in _distinct(self):
            parts: dict[object, list[str]] = {}
            for name in (n for n in self if self[n] is sums):
                parts.setdefault(read.get(name), []).append(name)
            for names in list(parts.values())[1:]:
                self |= dict.fromkeys(names, copy.deepcopy(sums))


def _distinct(sums: Mapping[str, InputSums]) -> list[InputSums]:
    return list({id(s): s for s in sums.values()}.values())


class _Store:
    """What waits on disk: hidden states, one file a (block, batch), and sums, one a layer."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.sums: dict[int, dict[str, InputSums]] = {}

    def put(self, block: int, batch: int, value: torch.Tensor) -> None:
        self._save(f"{block}.{batch}", value)

    def get(self, block: int, batch: int) -> torch.Tensor:
        return self._load(f"{block}.{batch}")

    def remove(self, block: int, batch: int) -> None:
        (self.folder / f"{block}.{batch}.npy").unlink()

    def drop(self, block: int) -> None:
        for path in self.folder.glob(f"{block}.*.npy"):
            path.unlink()

    def put_sums(self, block: int, sums: dict[str, InputSums]) -> None:
        """Their matrices go to disk."""
        self.sums[block] = sums
        for i, found in enumerate(_distinct(sums)):
            self._save(f"{block}.sums-{i}", found.weighted)
            found.weighted = found.weighted.new_empty(0)

    def get_sums(self, block: int) -> dict[str, InputSums]:
        """As they were put."""
        sums = self.sums.pop(block)
        for i, found in enumerate(_distinct(sums)):
            found.weighted = self._load(f"{block}.sums-{i}")
        return sums

    def _save(self, name: str, value: torch.Tensor) -> None:
        try:
            np.save(self.folder / f"{name}.npy", value.detach().numpy())
        except OSError as e:
            raise JoulesmithError(
                f"cannot keep activations in {self.folder.parent}: {e.strerror or e}; "
                "free some space or choose another --out"
            ) from e

    def _load(self, name: str) -> torch.Tensor:
        import torch

        return torch.from_numpy(np.load(self.folder / f"{name}.npy", allow_pickle=False))


class _Tap:
    """Keeps one linear layer's input and the gradient at its output during a pass."""

    def __init__(self, layer: torch.nn.Module) -> None:
        self.layer = layer
        self.x: torch.Tensor | None = None
        self.g: torch.Tensor | None = None

    def __enter__(self) -> _Tap:
        def forward(_: object, args: tuple[Any, ...], out: torch.Tensor) -> None:
            self.x = args[0].detach()
            if out.requires_grad:
                out.register_hook(self._keep)  # type: ignore[no-untyped-call]

        self.handle = self.layer.register_forward_hook(forward)
        return self

    def _keep(self, gradient: torch.Tensor) -> None:
        self.g = gradient.detach()

    def __exit__(self, *exc: object) -> None:
        self.handle.remove()


def _linears(layer: torch.nn.Module) -> dict[str, torch.nn.Linear]:
    import torch

    return {n: m for n, m in layer.named_modules() if isinstance(m, torch.nn.Linear)}


@contextmanager
def _tapped(layer: torch.nn.Module, wanted: bool = True) -> Iterator[dict[str, _Tap]]:
    """Taps on a block's linear layers, by name; none where they are not wanted."""
    with ExitStack() as stack:
        linears = _linears(layer) if wanted else {}
        yield {name: stack.enter_context(_Tap(m)) for name, m in linears.items()}


class _EnterError(Exception):
    """Ends the model's forward pass at its first block."""


def enter(
    inner: torch.nn.Module, first: torch.nn.Module, tokens: torch.Tensor
) -> tuple[torch.Tensor, dict[str, Any]]:
    """The hidden states and keyword arguments with which the model calls its first block."""
    caught: dict[str, Any] = {}

    def catch(_: object, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        caught["hidden"] = args[0] if args else kwargs.pop("hidden_states")
        caught["kwargs"] = kwargs
        raise _EnterError

    handle = first.register_forward_pre_hook(catch, with_kwargs=True)
    try:
        inner(input_ids=tokens, use_cache=False)
    except _EnterError:
        pass
    finally:
        handle.remove()
    return caught["hidden"], caught["kwargs"]


def first(out: Any) -> torch.Tensor:
    """A block's hidden states: some versions return a tuple."""
    hidden: torch.Tensor = out[0] if isinstance(out, tuple) else out
    return hidden
