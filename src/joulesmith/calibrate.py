"""What a model does on text, layer by layer: input moments and output gradients.

One forward sweep and one backward sweep over the decoder blocks. Only one block's
activations, gradients and moments are in memory at a time; the inputs of the
blocks wait on disk. Knows nothing of what the moments are used for: each block is
handed to a visitor as soon as it is complete, last block first.

Gradients are those of -log p(y) with y drawn from the model itself, so that their
second moments are the Fisher information (Martens 2020, "New insights and
perspectives on the natural gradient method", section 5), which is the curvature of
the KL divergence to the unchanged model.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from joulesmith.errors import JoulesmithError
from joulesmith.progress import Tick, silent

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Moments:
    """Second moments at one linear layer, means over ``tokens`` calibration tokens.

    hessian: (columns, columns) E[s x x^T] of the layer's inputs x, float32, with s of mean 1:
             half of it the same for all tokens, half the token's mean squared output
             gradient (GuidedQuant, Kim et al. 2025, eq. 7, one group), so that tokens count
             as the end loss depends on them, and yet no few of them decide
    squares: (columns,) E[x^2], unweighted: llama.cpp's importance matrix
    fisher:  (rows,) E[g^2] of the output gradients, float32
    sample:  some tokens as they came, for what second moments cannot tell
    outputs: (rows, rows) E[g g^T], float32, where it was asked for; None elsewhere
    ends:    (2, columns) least and largest input of each column over all tokens; None for
             the head
    """

    hessian: torch.Tensor
    squares: torch.Tensor
    fisher: torch.Tensor
    tokens: int
    sample: Sample | None = None
    outputs: torch.Tensor | None = None
    ends: torch.Tensor | None = None


@dataclass(frozen=True)
class Sample:
    """Inputs and output gradients of one linear layer on whole windows spread over the text.

    x:    (n, columns) inputs, float32
    g:    (n, rows) gradients of -log p(drawn) at the outputs; None for the head, whose rows
          are too many
    pull: (n, columns) g W, the gradients at the inputs through this layer alone, where g is
          None
    """

    x: torch.Tensor
    g: torch.Tensor | None
    pull: torch.Tensor | None = None


@dataclass(frozen=True)
class HeadMoments:
    """Moments of the embedding and of the output head.

    head:            inputs are the final norm's outputs; ``fisher`` is exact, E[p (1 - p)]
    input_fisher:    (hidden,) E[g^2] of the gradients at the embedding's output
    token_share:     (vocab,) share of calibration tokens that are each token
    """

    head: Moments
    input_fisher: torch.Tensor
    token_share: torch.Tensor


Visit = Callable[[int, Mapping[str, Moments]], None]
"""Called with a block's index and the moments of its linear layers by parameter name."""


SAMPLE = 2048
"""Tokens that are kept as they came, for one block at a time."""


class _Accumulator:
    """Streams one linear layer's inputs and output gradients into moments."""

    def __init__(self, rows: int, columns: int, outputs: bool = False) -> None:
        import torch

        self.outputs = torch.zeros(rows, rows) if outputs else None
        self.squares = torch.zeros(columns)
        self.weighted = torch.zeros(columns, columns)
        self.fisher = torch.zeros(rows)
        self.kept: list[tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]] = []
        self.weight = 0.0
        self.tokens = 0
        self.ends: torch.Tensor | None = None

    def add(self, x: torch.Tensor, g: torch.Tensor) -> None:
        """x (tokens, columns), g (tokens, rows)."""
        import torch

        g2 = g.square()
        s = g2.mean(dim=1)
        # Gradients have heavy tails: without the 1, a few tokens are most of the sum.
        self.fold(x, s / s.mean().clamp_min(1e-30) + 1, g2.sum(dim=0))
        if self.outputs is not None:
            self.outputs.addmm_(g.T, g)
        low, high = torch.aminmax(x, dim=0)
        if self.ends is not None:
            low, high = torch.minimum(low, self.ends[0]), torch.maximum(high, self.ends[1])
        self.ends = torch.stack([low, high])

    def fold(self, x: torch.Tensor, s: torch.Tensor, fisher: torch.Tensor) -> None:
        """x (tokens, columns), s (tokens,) their weights, fisher (rows,) sums to add."""
        root = x * s.sqrt()[:, None]
        self.weighted.addmm_(root.T, root)
        self.squares += x.square().sum(dim=0)
        self.fisher += fisher
        self.weight += float(s.sum())
        self.tokens += x.shape[0]

    def keep(
        self, x: torch.Tensor, g: torch.Tensor | None, pull: torch.Tensor | None = None
    ) -> None:
        """Put some tokens by, as `Sample` has them."""
        self.kept.append((x, g, pull))

    def sample(self) -> Sample | None:
        """The tokens that were kept."""
        import torch

        if not self.kept:
            return None
        x, g, pull = zip(*self.kept, strict=True)
        return Sample(
            torch.cat(x),
            None if g[0] is None else torch.cat(g),
            None if pull[0] is None else torch.cat(pull),
        )

    def done(self) -> Moments:
        n = max(self.tokens, 1)
        weight = self.weight if self.weight > 0 else 1.0
        return Moments(
            self.weighted / weight,
            self.squares / n,
            self.fisher / n,
            self.tokens,
            self.sample(),
            None if self.outputs is None else self.outputs / n,
            self.ends,
        )


def calibrate(
    module: torch.nn.Module,
    windows: NDArray[np.int32],
    visit: Visit,
    *,
    batch: int = 4,
    seed: int = 0,
    scratch: Path | None = None,
    outputs: bool = False,
    progress: Tick = silent,
) -> HeadMoments:
    """Stream moments of every linear layer in every decoder block to ``visit``.

    module:  a `transformers` causal language model with ``model.layers``, ``model.norm``
             and ``lm_head`` (Llama and its relatives), float32
    windows: int32 (n, length)
    scratch: folder for the blocks' inputs, (n x length x hidden) float32 a block
    outputs: whether `Moments.outputs` are wanted

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
        return _calibrate(module, windows, exactly, batch, seed, scratch, outputs, progress)


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
    starts = list(range(0, len(tokens), batch))
    kept = _spread(len(tokens), max(1, SAMPLE // tokens.shape[1]))
    generator = torch.Generator().manual_seed(seed)
    depth = len(layers)
    # One block of one batch forward is the unit; backward with its moments, and the
    # visitor's work shared out over the batches, is about ten.
    steps = len(starts) * (11 * depth + 12)
    with tempfile.TemporaryDirectory(prefix="calibrate-", dir=scratch) as folder:
        store = _BlockInputs(Path(folder))
        taken = 0

        def tick(units: int = 1) -> None:
            nonlocal taken
            taken += units
            progress(taken / steps)

        # Forward: each block's inputs to disk. The keyword arguments of a block
        # (positions, mask) depend on the batch's shape only.
        calls: dict[int, dict[str, Any]] = {}
        with torch.no_grad():
            for b, start in enumerate(starts):
                hidden, kwargs = enter(inner, layers[0], tokens[start : start + batch])
                calls.setdefault(hidden.shape[0], kwargs)
                for i, layer in enumerate(layers):
                    store.put(i, b, hidden)
                    hidden = first(layer(hidden, **calls[hidden.shape[0]]))
                    tick()
                if not torch.isfinite(hidden).all():
                    raise JoulesmithError(
                        "the model's activations are not finite on the calibration text"
                    )
                store.put(depth, b, hidden)

        # The head and the gradient that enters the last block.
        head_sums = _HeadSums(head.weight.shape[0], head.weight.shape[1])
        for b in range(len(starts)):
            hidden = store.get(depth, b).requires_grad_(True)
            with torch.enable_grad():
                normed = norm(hidden)
            x = normed.detach().reshape(-1, normed.shape[-1])
            gx = head_sums.add(x, head, generator)
            length = hidden.shape[1]
            for w in (w - starts[b] for w in kept if starts[b] <= w < starts[b] + batch):
                cut = slice(w * length, (w + 1) * length)
                head_sums.sums.keep(x[cut].clone(), None, gx[cut].clone())
            torch.autograd.backward(normed, gx.reshape(normed.shape))
            assert hidden.grad is not None
            store.put(depth, b, hidden.grad)
            tick(11)

        # Backward: last block first; its gradient at the input replaces its input.
        for i in reversed(range(depth)):
            sums = {
                name: _Accumulator(m.weight.shape[0], m.weight.shape[1], outputs)
                for name, m in layers[i].named_modules()
                if isinstance(m, torch.nn.Linear)
            }
            for b in range(len(starts)):
                hidden = store.get(i, b).requires_grad_(True)
                gradient = store.get(i + 1, b)
                with ExitStack() as stack, torch.enable_grad():
                    taps = {
                        name: stack.enter_context(_Tap(layers[i].get_submodule(name)))
                        for name in sums
                    }
                    out = first(layers[i](hidden, **calls[hidden.shape[0]]))
                    torch.autograd.backward(out, gradient)
                for name, tap in taps.items():
                    if tap.x is not None and tap.g is not None:
                        sums[name].add(tap.x.flatten(0, -2), tap.g.flatten(0, -2))
                        for w in kept:
                            if starts[b] <= w < starts[b] + batch:
                                at = w - starts[b]
                                sums[name].keep(tap.x[at].clone(), tap.g[at].clone())
                assert hidden.grad is not None
                store.put(i, b, hidden.grad)
                tick(10)
            store.drop(i + 1)
            # Each layer's sums go as its moments come: both at once are twice the memory.
            visit(i, {name: sums.pop(name).done() for name in list(sums)})

        input_fisher = torch.zeros(inner.embed_tokens.weight.shape[1])
        for b in range(len(starts)):
            g = store.get(0, b)
            input_fisher += g.square().sum(dim=(0, 1))
            tick()
    counts = torch.bincount(tokens.flatten(), minlength=head.weight.shape[0]).float()
    return HeadMoments(head_sums.done(), input_fisher / tokens.numel(), counts / tokens.numel())


def _spread(n: int, wanted: int) -> list[int]:
    """At most ``wanted`` of n windows, evenly spread."""
    return sorted({i * n // wanted for i in range(wanted)}) if wanted < n else list(range(n))


class _BlockInputs:
    """Hidden states on disk, one file a (block, batch)."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def put(self, block: int, batch: int, value: torch.Tensor) -> None:
        try:
            np.save(self.folder / f"{block}.{batch}.npy", value.detach().numpy())
        except OSError as e:
            raise JoulesmithError(
                f"cannot keep activations in {self.folder.parent}: {e.strerror or e}; "
                "free some space or choose another --out"
            ) from e

    def get(self, block: int, batch: int) -> torch.Tensor:
        import torch

        return torch.from_numpy(np.load(self.folder / f"{block}.{batch}.npy", allow_pickle=False))

    def drop(self, block: int) -> None:
        for path in self.folder.glob(f"{block}.*.npy"):
            path.unlink()


class _HeadSums:
    """Moments of the head, in slices of tokens: logits of a whole batch never stand at once."""

    def __init__(self, vocab: int, hidden: int) -> None:
        self.sums = _Accumulator(vocab, hidden)

    def add(
        self, x: torch.Tensor, head: torch.nn.Module, generator: torch.Generator, rows: int = 256
    ) -> torch.Tensor:
        """x (tokens, hidden) -> gradient of -log p(sampled) with respect to x, same shape."""
        import torch

        out = torch.empty_like(x)
        weight: torch.Tensor = head.weight  # type: ignore[assignment]
        for start in range(0, len(x), rows):
            part = x[start : start + rows]
            p = torch.softmax(head(part).float(), dim=-1)
            drawn, spare = drawn_from(p, generator)
            square = torch.mul(p, p, out=spare)
            # The sums of p (1 - p), over words and over tokens.
            spread = (1 - square.sum(dim=1)) / p.shape[1]
            self.sums.fold(part, spread.clamp_min_(0), p.sum(dim=0) - square.sum(dim=0))
            p.scatter_add_(1, drawn, torch.full_like(drawn, -1, dtype=p.dtype))
            out[start : start + rows] = p @ weight
        return out

    def done(self) -> Moments:
        return self.sums.done()


def drawn_from(p: torch.Tensor, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """p (n, words), rows of probabilities -> a word drawn from each, (n, 1); and p's sums so far.

    By the inverse of the distribution, which takes one random number a row:
    ``torch.multinomial`` takes one a word, and with 49,000 words that is most of the time.
    """
    import torch

    below = p.cumsum(dim=-1)
    at = torch.rand(len(p), 1, generator=generator) * below[:, -1:]
    # right: a random number of 0 does not draw a word of probability 0.
    return torch.searchsorted(below, at, right=True).clamp_(max=p.shape[1] - 1), below


class _Tap:
    """Keeps one linear layer's input and the gradient at its output during a pass."""

    def __init__(self, layer: torch.nn.Module) -> None:
        self.layer = layer
        self.x: torch.Tensor | None = None
        self.g: torch.Tensor | None = None

    def __enter__(self) -> _Tap:
        def forward(_: object, args: tuple[Any, ...], out: torch.Tensor) -> None:
            self.x = args[0].detach()
            out.register_hook(self._keep)  # type: ignore[no-untyped-call]

        self.handle = self.layer.register_forward_hook(forward)
        return self

    def _keep(self, gradient: torch.Tensor) -> None:
        self.g = gradient.detach()

    def __exit__(self, *exc: object) -> None:
        self.handle.remove()


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
