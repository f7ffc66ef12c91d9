"""Blocks of another shape, drawn up in the order in which text passes them, repaired at once.

Two streams of hidden states go through the model, the dense one and that of the blocks as
they are drawn. Each linear layer is fitted by least squares to what the dense model has at its
place, on the inputs that it has by now: layers that read the stream to the dense
pre-activations, layers that write to it (output and down projections) to the dense *stream*
behind them. So each block makes up for what was lost before it, and one before a gap for
the layers that are gone. The targets are those of `lowrank.refit`, after MPIFA (Zhao et al. 2025,
section 4); choosing and fitting columns is `columns`.

The new blocks wait on disk; the model is only read. In memory: one block twice, its moments,
and one batch.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from joulesmith.calibrate import enter, first, products
from joulesmith.compress.lowrank.walk import write_array
from joulesmith.compress.prune import heads as heads_of
from joulesmith.compress.prune import neurons as neurons_of
from joulesmith.compress.prune.columns import RIDGE, damp, refit, targets
from joulesmith.compress.prune.shrink import Shape, State, cut_block, shape_of
from joulesmith.errors import JoulesmithError
from joulesmith.progress import Tick, silent

if TYPE_CHECKING:
    from joulesmith.models import Model

BATCH = 4
QKV = tuple(f"self_attn.{n}_proj" for n in "qkv")
GATES = ("mlp.gate_proj", "mlp.up_proj")
O, DOWN = "self_attn.o_proj", "mlp.down_proj"  # noqa: E741 - its name


@dataclass(frozen=True)
class Fit:
    """How layers are fitted. readers, writers: share of the dense model's values in what layers
    that read and that write the stream are fitted to (`columns.targets`). ridge: as there.
    weigh: tokens count by the inverse of their mean square, as behind an RMS norm. rounds: in
    how many neurons would go, if all went."""

    readers: float = 0.5
    writers: float = 0.5
    ridge: float = RIDGE
    weigh: bool = True
    rounds: int = 64


@dataclass(frozen=True)
class Hints:
    """rows: layer -> Fisher information of the rows of o and of down. scores: layer -> scores of
    the columns of o and of neurons, which choose instead of damage."""

    rows: Mapping[int, tuple[Tensor, Tensor]]
    scores: Mapping[int, tuple[Tensor, Tensor]] | None = None


@dataclass(frozen=True)
class Narrow:
    """A change of the stream's width, made before all else.

    into: (hidden, width), what the new stream is of the dense one. block: old layer -> a copy
    that reads and writes the new stream. embed: (vocab, width). norm: the final norm on the new
    stream. reads: (hidden, width), what stands for ``into`` behind the final norms.
    """

    into: Tensor
    block: Callable[[int], nn.Module]
    embed: Tensor
    norm: nn.Module
    reads: Tensor


@dataclass(frozen=True)
class Drawn:
    """One block: its old layer, what went, in the order of going, and its cost in nats a token
    (or the score, where scores choose). error: mean square of what is missing in the stream
    behind it, as a share of the stream's."""

    layer: int
    heads: heads_of.Heads
    neurons: Tensor
    gone: Tensor
    costs: Tensor
    error: float


class Drawing:
    """Blocks on disk. head: (hidden, width), by which a head of its own is to be multiplied to
    read the new stream best; None where the width is as it was or nothing is fitted."""

    def __init__(self, folder: Path, dim: int) -> None:
        self.folder, self.dim = folder, dim
        self.blocks: list[Drawn] = []
        self.head: Tensor | None = None

    def add(self, drawn: Drawn, draft: nn.Module) -> None:
        """Keep a block, cut."""
        from safetensors.torch import save_file

        state = cut_block(draft, drawn.heads, drawn.neurons, self.dim)
        if bad := [n for n, t in state.items() if not bool(torch.isfinite(t).all())]:
            raise JoulesmithError(f"layer {drawn.layer}: {bad[0]} became NaN or infinite")
        try:
            save_file(state, self.folder / f"block-{len(self.blocks)}.safetensors")
        except Exception as e:  # SafetensorError has no class to import in all versions
            raise JoulesmithError(f"cannot keep blocks in {self.folder.parent}: {e}") from e
        self.blocks.append(drawn)

    def state(self, index: int) -> State:
        """The parameters of a new block."""
        from safetensors.torch import load_file

        found: State = load_file(self.folder / f"block-{index}.safetensors")
        return found


def draw(
    model: Model,
    shape: Shape,
    kept: Sequence[int],
    windows: NDArray[np.int32],
    scratch: Path,
    hints: Hints,
    fit: Fit | None,
    narrow: Narrow | None = None,
    progress: Tick = silent,
) -> Drawing:
    """Draw up the blocks of a model of that shape.

    kept: old layers that are left, rising. windows: int32 (n, length). scratch: an existing,
    empty folder, for three times the hidden states of all windows, one block's inputs of o or
    down, and the new blocks. fit: None leaves what is kept as it was.
    """
    walk = _Walk(model, shape, kept, windows, scratch, hints, fit, narrow)
    with products("medium"), torch.no_grad():
        return walk.run(progress)


class _Walk:
    def __init__(
        self,
        model: Model,
        shape: Shape,
        kept: Sequence[int],
        windows: NDArray[np.int32],
        scratch: Path,
        hints: Hints,
        fit: Fit | None,
        narrow: Narrow | None,
    ) -> None:
        self.inner: Any = model.module.model
        self.shape, self.kept = shape, list(kept)
        self.before = shape_of(model)
        self.scratch, self.hints, self.fit, self.narrow = scratch, hints, fit, narrow
        self.tokens = torch.from_numpy(np.ascontiguousarray(windows)).long()
        self.batches = range(-(-len(windows) // BATCH))
        self.calls: dict[int, dict[str, Any]] = {}
        same = replace(shape, layers=self.before.layers, hidden=self.before.hidden, tied=True)
        cut = same != replace(self.before, tied=True)
        # where plain scores choose, or nothing is to choose, and nothing is fitted, text is no use
        self.streams = fit is not None or (cut and hints.scores is None)

    def run(self, progress: Tick) -> Drawing:
        out = Drawing(self.scratch, self.shape.dim)
        if not self.streams:
            self.batches = range(0)
        for b in self.batches:
            tokens = self.tokens[b * BATCH : (b + 1) * BATCH]
            hidden, kwargs = enter(self.inner, self.inner.layers[0], tokens)
            self.calls.setdefault(len(hidden), kwargs)
            self.put("dense", b, hidden)
            thin = hidden if self.narrow is None else self.narrow.embed[tokens].to(hidden.dtype)
            self.put("thin", b, thin)
        self.advance(range(self.kept[0]))
        for place, i in enumerate(self.kept):
            after = self.kept[place + 1] if place + 1 < len(self.kept) else self.before.layers
            out.add(*self.block(i, range(i + 1, after)))
            progress((place + 1) / len(self.kept))
        if self.narrow is not None and self.fit is not None:
            gram, cross = self.pairs((self.inner.norm, self.narrow.norm), "dense")
            out.head = refit(*targets(self.narrow.reads, gram, cross, 1.0, self.fit.ridge))
        return out

    def advance(self, layers: range) -> None:
        """The dense stream, through layers that are dropped."""
        for b in self.batches if self.fit else ():
            x = self.get("dense", b)
            for i in layers:
                x = first(self.inner.layers[i](x, **self.calls[len(x)]))
            self.put("dense", b, x)

    def block(self, i: int, gap: range) -> tuple[Drawn, nn.Module]:
        """Draw layer i; ``gap``: the layers behind it that are dropped."""
        dense: Any = self.inner.layers[i]
        draft: Any = copy.deepcopy(dense) if self.narrow is None else self.narrow.block(i)
        norms = dense.input_layernorm, draft.input_layernorm
        self.read(dense, draft, norms, QKV, "dense")
        for b in self.batches:
            if self.fit:
                self.through(dense, b)
            x = self.get("thin", b)
            normed = draft.input_layernorm(x)
            call = {"hidden_states": normed, **self.calls[len(x)]}
            self.put("x", b, _input(draft.self_attn, draft.get_submodule(O), call))
        rows, scores = self.hints.rows.get(i), (self.hints.scores or {}).get(i)
        heads, columns = heads_of.whole(self.before.layout), None
        gram, cross = self.sums("mid", draft.get_submodule(O))
        wanted = self.shape.kv, self.shape.queries
        if wanted != (self.before.kv, self.before.queries):
            if scores is not None:
                heads = heads_of.by_columns(scores[0], self.before.layout, *wanted)
            else:
                w, c = self.whole(draft.get_submodule(O).weight, gram, cross)
                f = None if rows is None else rows[0]
                heads = heads_of.by_damage(w, c, self.before.layout, *wanted, rows=f)
            columns = heads_of.columns_of(heads.query, self.shape.dim)
        self.write(draft.get_submodule(O), gram, cross, columns)
        norms = dense.post_attention_layernorm, draft.post_attention_layernorm
        self.read(dense, draft, norms, GATES, "mid")
        self.advance(gap)
        for b in self.batches:
            call = {"x": draft.post_attention_layernorm(self.get("thin", b))}
            self.put("x", b, _input(draft.mlp, draft.get_submodule(DOWN), call))
        gram, cross = self.sums("dense", draft.get_submodule(DOWN))
        total = self.before.neurons
        chosen = neurons_of.by_score(torch.ones(total), total)
        if self.shape.neurons != total:
            if scores is not None:
                chosen = neurons_of.by_score(scores[1], self.shape.neurons)
            else:
                w, c = self.whole(draft.get_submodule(DOWN).weight, gram, cross)
                f = None if rows is None else rows[1]
                each = max(1, total // (self.fit.rounds if self.fit else 64))
                chosen = neurons_of.by_damage(w, c, self.shape.neurons, f, each)
        self.write(draft.get_submodule(DOWN), gram, cross, chosen.kept)
        error = self.error()
        return Drawn(i, heads, chosen.kept, chosen.gone, chosen.costs, error), draft

    def through(self, dense: nn.Module, b: int) -> None:
        """The dense stream through a block: at its middle, and behind it."""
        x = self.get("dense", b)
        mid: list[Tensor] = []
        norm = dense.get_submodule("post_attention_layernorm")
        handle = norm.register_forward_pre_hook(lambda _, args: mid.append(args[0]))
        try:
            self.put("dense", b, first(dense(x, **self.calls[len(x)])))
        finally:
            handle.remove()
        self.put("mid", b, mid[0])

    def read(
        self,
        dense: Any,
        draft: Any,
        norms: tuple[nn.Module, nn.Module],
        names: Sequence[str],
        stream: str,
    ) -> None:
        """Fit layers that read the stream to the dense model's pre-activations."""
        if self.fit is None or not (self.fit.readers or self.narrow):
            return
        old = torch.cat([dense.get_submodule(n).weight for n in names])
        parts = [draft.get_submodule(n).weight for n in names]
        new = torch.cat(parts)
        gram, cross = self.pairs(norms, stream)
        mix = self.fit.readers if self.narrow is None else 1.0
        fitted = refit(*targets(new, gram, old.double() @ cross, mix, self.fit.ridge))
        for weight, value in zip(parts, torch.split(fitted, [len(p) for p in parts]), strict=True):
            weight.copy_(value)

    def pairs(self, norms: tuple[nn.Module, nn.Module], stream: str) -> tuple[Tensor, Tensor]:
        """E[y y^T] and E[x y^T] of dense (x) and new (y) streams behind their norms, float64."""
        width, hidden = self.shape.hidden, self.before.hidden
        gram = torch.zeros(width, width, dtype=torch.float64)
        cross = torch.zeros(hidden, width, dtype=torch.float64)
        count = 0
        for b in self.batches:
            x = norms[0](self.get(stream, b)).flatten(0, 1)
            y = norms[1](self.get("thin", b)).flatten(0, 1)
            gram += y.T @ y
            cross += x.T @ y
            count += len(x)
        return gram / count, cross / count

    def sums(self, stream: str, layer: Any) -> tuple[Tensor, Tensor | None]:
        """E[s x x^T] of the inputs that are kept, and E[s t x^T] of what is to be written."""
        gram: Tensor | None = None
        cross: Tensor | None = None
        weight = 0.0
        if not self.streams:
            return torch.zeros(layer.in_features, layer.in_features), None
        for b in self.batches:
            x = self.get("x", b).flatten(0, 1)
            if not bool(torch.isfinite(x).all()):
                raise JoulesmithError("activations are not finite on the calibration text")
            sx, t, s = x, None, float(len(x))
            if self.fit is not None:
                goal = self.goal(stream, b)
                t = goal - self.get("thin", b).flatten(0, 1)
                if getattr(layer, "bias", None) is not None:
                    t = t - layer.bias
                if self.fit.weigh:
                    share = 1 / goal.square().mean(dim=1, keepdim=True).clamp_min(1e-20)
                    sx, s = x * share, float(share.sum())
            if gram is None:
                gram = torch.zeros(x.shape[1], x.shape[1], dtype=torch.float64)
                cross = None if t is None else torch.zeros(t.shape[1], x.shape[1]).double()
            gram += sx.T @ x
            if cross is not None and t is not None:
                cross += t.T @ sx
            weight += s
        assert gram is not None
        return gram / weight, None if cross is None else cross / weight

    def goal(self, stream: str, b: int) -> Tensor:
        """(tokens, width): the dense stream in the new one's coordinates."""
        x = self.get(stream, b).flatten(0, 1)
        return x if self.narrow is None else x @ self.narrow.into.to(x.dtype)

    def whole(self, w: Tensor, gram: Tensor, cross: Tensor | None) -> tuple[Tensor, Tensor]:
        """Weights and damped moments from which columns are taken: the best of full size."""
        if self.fit is None:
            return w, damp(gram)
        target, c = targets(w, gram, cross, self.fit.writers, self.fit.ridge)
        return refit(target, c), c

    def write(self, layer: Any, gram: Tensor, cross: Tensor | None, columns: Tensor | None) -> None:
        """Fit what is left of a layer that writes to the stream, and let it write."""
        weight: Tensor = layer.weight
        columns = torch.arange(weight.shape[1]) if columns is None else columns
        if self.fit is not None:
            both = targets(weight, gram, cross, self.fit.writers, self.fit.ridge)
            weight[:, columns] = refit(*both, columns).to(weight.dtype)
        left: Tensor = weight[:, columns]
        bias: Any = getattr(layer, "bias", None)
        for b in self.batches:
            y = nn.functional.linear(self.get("x", b)[..., columns], left, bias)
            self.put("thin", b, self.get("thin", b) + y)

    def error(self) -> float:
        """Share of the stream's mean square that is missing."""
        if self.fit is None:
            return float("nan")
        wrong = whole = 0.0
        for b in self.batches:
            goal = self.goal("dense", b)
            scale = goal.square().mean(dim=1)
            gap = (goal - self.get("thin", b).flatten(0, 1)).square().mean(dim=1)
            wrong, whole = wrong + float((gap / scale).sum()), whole + len(goal)
        return wrong / whole

    def put(self, stream: str, b: int, x: Tensor) -> None:
        write_array(self.scratch / f"{stream}.{b}.npy", x)

    def get(self, stream: str, b: int) -> Tensor:
        path = self.scratch / f"{stream}.{b}.npy"
        return torch.from_numpy(np.load(path, allow_pickle=False))


class _ReachedError(Exception):
    """Ends a pass at the layer whose input is wanted."""


def _input(module: nn.Module, layer: nn.Module, call: Mapping[str, Any]) -> Tensor:
    """What ``layer`` reads when ``module`` is called so."""
    caught: list[Tensor] = []

    def catch(_: nn.Module, args: tuple[Any, ...]) -> None:
        caught.append(args[0].detach())
        raise _ReachedError

    handle = layer.register_forward_pre_hook(catch)
    try:
        module(*[call["x"]] if "x" in call else (), **({} if "x" in call else call))
    except _ReachedError:
        pass
    finally:
        handle.remove()
    return caught[0]
