"""Chooses, draws and cuts for the step `shrink`. Knows the model and the windows."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn

from joulesmith.calibrate import calibrate, products
from joulesmith.compress.prune import drop, neurons, width
from joulesmith.compress.prune.aligned import Drawing, Fit, Hints, Narrow, draw
from joulesmith.compress.prune.damage import Judge, split
from joulesmith.compress.prune.shapes import Trial, neurons_for, search
from joulesmith.compress.prune.shrink import (
    Shape,
    block_of,
    config_for,
    count,
    gguf_refusal,
    possible,
    read_per_token,
    rebuild,
    shape_of,
)
from joulesmith.compress.prune.structured import Decision, Shrunk, layer_decisions
from joulesmith.compress.prune.tried import Tried
from joulesmith.errors import JoulesmithError
from joulesmith.progress import Tick

if TYPE_CHECKING:
    from collections.abc import Iterator

    from joulesmith.compress.prune.structured import Shrink
    from joulesmith.models import Model

TRIED = 24
"""Windows on which shapes are tried; the final fit has all of them."""


class Chooser:
    """One application of the step."""

    def __init__(
        self,
        step: Shrink,
        model: Model,
        windows: NDArray[np.int32],
        scratch: Path,
        progress: Tick,
        keep: Path | None = None,
    ) -> None:
        self.step, self.model, self.scratch, self.progress = step, model, scratch, progress
        self.before = shape_of(model)
        self.fitted, held = split(windows)
        # What the budget is of: parameters, or what the prices say.
        self.cost: Callable[[Shape], float] = (
            self._parameters if step.prices is None else step.prices.of
        )
        self.unit = "parameters" if step.prices is None else "a token"
        self.budget: float = step.cost or step.budget(self._parameters(self.before))
        self.wanted = step.shape(self.before) if step.explicit else self.before
        self._possible()
        self.tried = Tried(keep, step.model_dump_json(), model.module, windows)
        (scratch / "judge").mkdir()
        with products("medium"):
            self.judge = Judge(model.module, held, scratch / "judge")
        self.hints = Hints({})
        self.layers, self.attempts = drop.Drops((), ()), 0
        self.fit = Fit() if step.repair else None

    def run(self) -> Shrunk:
        """All of it; the model changes in the last line but one."""
        if self.step.by in ("magnitude", "taylor"):
            self.hints = Hints({}, self._scores())
        elif self.step.fisher and self.step.by == "damage":
            self.hints = Hints(self._fisher())
        self.progress(0.1)
        trials: list[Trial] = []
        shape = self.wanted
        if self.step.explicit:
            self.layers = self.tried.order(lambda: self._order(self.before.layers - shape.layers))
        elif self.budget < self.cost(self.before):
            trials = self._search()
            shape = trials[0].shape
        kept = self._kept(shape)
        self.progress(0.7)
        folder = self.scratch / "final"
        folder.mkdir()
        drawing, ends, damage = self._draw(shape, kept, self.fitted, folder, self.fit)
        unrepaired = damage
        repaired = self.fit is not None
        if repaired and shape != self.before:
            plain = self.scratch / "plain"
            plain.mkdir()
            other, other_ends, unrepaired = self._draw(
                shape, kept, self._some(self.fitted), plain, None
            )
            if not damage < unrepaired:
                drawing, ends, repaired = other, other_ends, False
        self.progress(0.95)
        decisions = self._decisions(drawing, shape)
        found = Shrunk(
            self.before,
            shape,
            (self._parameters(self.before), self._parameters(shape)),
            (read_per_token(self.model, self.before), read_per_token(self.model, shape)),
            decisions,
            tuple(trials),
            repaired,
            damage if repaired else unrepaired,
            unrepaired,
            kept,
            gguf_refusal(self.model, shape),
            None if self.step.prices is None else (self.cost(self.before), self.cost(shape)),
        )
        rebuild(self.model, shape, kept, drawing.state, ends)
        return found

    def _possible(self) -> None:
        """Whether the shape that was asked for can be and meets the budget, before any work."""
        config_for(self.model, self.wanted, range(self.wanted.layers))
        least, bound = self.cost(self.wanted), self.step.parameters or self.step.cost
        if bound is not None and self.step.explicit and least > self.budget:
            raise JoulesmithError(
                f"{self.wanted.words()}: {least:.6g} {self.unit}, more than the {self.budget:.6g} "
                "wanted"
            )

    def _parameters(self, shape: Shape) -> int:
        return count(self.model, shape)

    # -- choosing ---------------------------------------------------------------

    def _order(self, most: int) -> drop.Drops:
        """Which layers go, ``most`` of them, by the rule."""
        step, total = self.step, self.before.layers
        if step.drop:
            return drop.Drops(tuple(step.drop), (0.0,) * len(step.drop))
        if not most:
            return drop.Drops((), ())
        if step.by == "damage":
            return drop.by_damage(total, most, self._without)
        if step.by == "block-influence":
            return drop.by_score(self._influence(), most)
        assert self.hints.scores is not None
        norms = [float(self.hints.scores[i][1].square().sum().sqrt()) for i in range(total)]
        return drop.by_score(norms, most)

    def _without(self, gone: frozenset[int], tried: Sequence[int]) -> list[float]:
        """Damage of leaving out ``gone`` and each of ``tried`` (rising); one stream is shared.

        On one batch of the held-out windows: layers differ by far more than its noise.
        """
        layers, out = self.model.module.model.layers, []
        states, at = self.judge.start[:1], 0
        with products("medium"):
            for i in tried:
                ahead = [layers[k] for k in range(at, i) if k not in gone]
                states, at = self.judge.run(ahead, states), i
                rest = [layers[k] for k in range(i + 1, len(layers)) if k not in gone]
                out.append(self.judge.of(rest, states))
        return out

    def _influence(self) -> list[float]:
        """Block influence on the windows that are not held out."""
        found: list[float] = []
        folder = self.scratch / "influence"
        folder.mkdir()
        with products("medium"):
            stream = Judge(self.model.module, self._some(self.fitted), folder)
            states = stream.start
            for layer in self.model.module.model.layers:
                after = stream.run([layer], states)
                found.append(drop.influence_of(states, after))
                states = after
        return found

    def _scores(self) -> dict[int, tuple[Tensor, Tensor]]:
        """Plain scores of columns of o and of neurons, for each layer."""
        found: dict[int, tuple[Tensor, Tensor]] = {}
        layers = self.model.module.model.layers
        if self.step.by == "magnitude":
            for i, layer in enumerate(layers):
                m, o = layer.mlp, layer.self_attn.o_proj.weight.detach().double()
                mlp = neurons.magnitude(m.gate_proj.weight, m.up_proj.weight, m.down_proj.weight)
                found[i] = o.square().sum(dim=0).sqrt(), mlp
            return found

        def visit(i: int, moments: Any) -> None:
            parts = []
            for name in ("self_attn.o_proj", "mlp.down_proj"):
                sample = moments[name].sample
                assert sample is not None and sample.g is not None
                weight = layers[i].get_submodule(name).weight
                parts.append(neurons.taylor(sample.x, sample.g, weight))
            found[i] = parts[0], parts[1]

        calibrate(self.model.module, self._some(self.fitted), visit, seed=self.step.seed)
        return found

    def _fisher(self) -> dict[int, tuple[Tensor, Tensor]]:
        """Fisher information of the rows of o and of down, for each layer."""
        found: dict[int, tuple[Tensor, Tensor]] = {}

        def visit(i: int, moments: Any) -> None:
            found[i] = moments["self_attn.o_proj"].fisher, moments["mlp.down_proj"].fisher

        calibrate(
            self.model.module, self._some(self.fitted), visit, seed=self.step.seed, graded=False
        )
        return found

    def _search(self) -> list[Trial]:
        """Shapes that meet the budget, best first; the order of layers is known then."""
        total, by = self.before.layers, self.step.by
        if by in ("magnitude", "taylor"):
            shape = neurons_for(self.before, self.budget, self.cost, self.step.multiple)
            if shape is None:
                raise JoulesmithError(
                    f"{self.budget:.6g} {self.unit} cannot be reached by neurons alone"
                )
            return [self._trial(shape, self._attempt(shape))]
        now = self.cost(self.before)
        block = now - self.cost(replace(self.before, layers=total - 1))
        need = total if block <= 0 else math.ceil((now - self.budget) / block)
        if by == "block-influence" and need >= total:
            raise JoulesmithError(
                f"{self.budget:.6g} {self.unit} cannot be reached by dropping layers"
            )
        deepest = min(need, total - 1)
        self.layers = self.tried.order(lambda: self._order(deepest))
        self.progress(0.3)
        if by == "block-influence":
            shape = replace(self.before, layers=total - deepest)
            return [self._trial(shape, self._attempt(shape))]
        return search(
            self.before,
            self.budget,
            self.cost,
            self._attempt,
            multiple=self.step.multiple,
            trials=self.step.trials,
            read=lambda s: read_per_token(self.model, s),
            parameters=self._parameters,
            unit=self.unit,
            deepest=deepest,
            allowed=lambda s: possible(self.model, s),
        )

    def _trial(self, shape: Shape, damage: float) -> Trial:
        return Trial(shape, self._parameters(shape), read_per_token(self.model, shape), damage)

    def _attempt(self, shape: Shape) -> float:
        """Held-out damage of a shape, drawn on part of the windows or known."""
        found = self.tried.damage(shape, self._draft)
        self.attempts += 1
        self.progress(0.3 + 0.4 * min(1.0, self.attempts / self.step.trials))
        return found

    def _draft(self, shape: Shape) -> float:
        with self._folder() as folder:
            some = self._some(self.fitted)
            rough = None if self.fit is None else replace(self.fit, rounds=16)
            return self._draw(shape, self._kept(shape), some, folder, rough)[2]

    def _kept(self, shape: Shape) -> tuple[int, ...]:
        gone = set(self.layers.order[: self.before.layers - shape.layers])
        return tuple(i for i in range(self.before.layers) if i not in gone)

    # -- drawing ----------------------------------------------------------------

    def _draw(
        self,
        shape: Shape,
        kept: Sequence[int],
        windows: NDArray[np.int32],
        folder: Path,
        fit: Fit | None,
    ) -> tuple[Drawing, dict[str, Tensor] | None, float]:
        """Blocks, ends, and the damage of both."""
        narrow, ends = self._narrow(shape, windows)
        drawing = draw(self.model, shape, kept, windows, folder, self.hints, fit, narrow)
        if narrow is None:
            return drawing, None, self._damage(drawing, shape, kept, None)
        assert ends is not None
        parts = {"embed": ends.embed, "norm": ends.norm}
        if ends.head is not None:
            parts["head"] = ends.head
            if drawing.head is not None:
                parts["head"] = self.model.module.lm_head.weight.detach().double() @ drawing.head
        dtype = self.model.module.model.embed_tokens.weight.dtype
        parts = {n: t.to(dtype) for n, t in parts.items()}
        return drawing, parts, self._damage(drawing, shape, kept, parts)

    def _narrow(
        self, shape: Shape, windows: NDArray[np.int32]
    ) -> tuple[Narrow | None, width.Ends | None]:
        if shape.hidden == self.before.hidden and not self.step.rotate:
            return None, None
        moments = width.stream_moments(self.model, self._some(windows))
        if self.step.rotate:
            into = width.principal(moments, shape.hidden)
        else:
            into = width.selection(self._channels(moments, shape.hidden), self.before.hidden)
        factor = width.norm_factor(moments, into)
        return width.narrow(self.model, into, factor, self.step.rotate)

    def _channels(self, moments: Tensor, hidden: int) -> Tensor:
        return width.channels(moments.diagonal(), hidden)

    def _damage(
        self,
        drawing: Drawing,
        shape: Shape,
        kept: Sequence[int],
        ends: dict[str, Tensor] | None,
    ) -> float:
        config = config_for(self.model, shape, kept)
        like = self.model.module.model.layers[0]
        blocks = (block_of(drawing.state(j), like, config, j) for j in range(len(kept)))
        with products("medium"):
            if ends is None:
                return self.judge.of(blocks)
            norm = type(self.model.module.model.norm)(shape.hidden, eps=config.rms_norm_eps)
            head = nn.Linear(1, 1, bias=False)
            norm.weight = nn.Parameter(ends["norm"])
            head.weight = nn.Parameter(ends.get("head", ends["embed"]))
            start = self.judge.entered(ends["embed"])
            return self.judge.of(blocks, start, norm, head)

    def _decisions(self, drawing: Drawing, shape: Shape) -> tuple[Decision, ...]:
        by = self.step.by
        unit = {"damage": "nats a token", "block-influence": "1 - cosine"}.get(by, by)
        unit = "as asked" if self.step.drop else unit
        gone = self.before.layers - shape.layers
        found = layer_decisions(self.layers.order[:gone], self.layers.damage[:gone], unit)
        if by not in ("magnitude", "taylor"):
            unit = "nats a token" if self.step.fisher else "mean squared error / 2"
        else:
            unit = by
        for block in drawing.blocks:
            for part, cost in zip(block.heads.gone, block.heads.costs.tolist(), strict=True):
                found.append(Decision(block.layer, part, cost, unit))
            for at, cost in zip(block.gone.tolist(), block.costs.tolist(), strict=True):
                found.append(Decision(block.layer, f"neuron {at}", cost, unit))
        return tuple(found)

    # -- help -------------------------------------------------------------------

    def _some(self, windows: NDArray[np.int32]) -> NDArray[np.int32]:
        """At most `TRIED` of them, evenly spread."""
        at = np.unique(np.linspace(0, len(windows) - 1, TRIED).round().astype(int))
        found: NDArray[np.int32] = windows[at]
        return found

    @contextmanager
    def _folder(self) -> Iterator[Path]:
        with tempfile.TemporaryDirectory(dir=self.scratch) as folder:
            yield Path(folder)


__all__ = ["TRIED", "Chooser"]
