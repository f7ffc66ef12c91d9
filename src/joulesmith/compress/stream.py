"""Data through a module block by block, twice: as the module was, and as it is by now.

Two streams of hidden states wait on disk between blocks, so that in memory there are one
block twice and the activations of one batch. Any module whose blocks feed each other; one
whose blocks do not is a single block. Knows no models by name, and not what is done to them.
"""

from __future__ import annotations

import contextlib
import copy
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from joulesmith.compress.calls import (
    Batch,
    ExactAttention,
    ReachedError,
    call,
    caught,
    coarse,
    hidden_of,
    same,
)
from joulesmith.compress.input_stats import InputStats, Sums
from joulesmith.compress.layers import Linear, blocks_of, linears_of
from joulesmith.compress.taps import experts_one_by_one, tapped
from joulesmith.errors import JoulesmithError
from joulesmith.memory import trim_heap

BATCH = 4
"""Windows that go through a block together."""


@dataclass
class Group:
    """Layers that read the same tensor, by name in the whole module."""

    layers: dict[str, Linear]
    stats: InputStats


def as_batches(data: NDArray[np.int32] | Sequence[Batch], size: int = BATCH) -> list[Batch]:
    """Token windows (n, length) -> named arguments, ``size`` windows each; batches as they are.

    Raises `JoulesmithError` where there are none.
    """
    if isinstance(data, np.ndarray):
        tokens = torch.from_numpy(np.ascontiguousarray(data)).long()
        parts = [tokens[i : i + size] for i in range(0, len(tokens), size)]
        found: list[Batch] = [{"input_ids": p} for p in parts]
    else:
        found = list(data)
    if not found:
        raise JoulesmithError("no calibration data: give at least one batch")
    return found


class Streams:
    """Walks a module's blocks; use as a context manager.

    >>> with Streams(module, batches) as streams:
    ...     for block in streams.blocks():
    ...         for group in block.groups():
    ...             ...  # change the group's layers

    targets: whether the module as it was goes beside it, so that `InputStats.cross` is known.
    Raises `JoulesmithError` for a module that does not take the batches.
    """

    def __init__(
        self,
        module: nn.Module,
        batches: Sequence[Batch],
        *,
        targets: bool = True,
        scratch: Path | None = None,
    ) -> None:
        self.module, self.batches, self.targets, self._place = module, batches, targets, scratch
        self.names: dict[str, nn.Module] = {}
        self._calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
        self._types: dict[tuple[int, int], torch.dtype] = {}
        self._float = all(p.dtype != torch.bfloat16 for p in module.parameters())

    def __enter__(self) -> Streams:
        self._stack = ExitStack()
        folder = self._stack.enter_context(
            tempfile.TemporaryDirectory(prefix="streams-", dir=self._place)
        )
        self.folder = Path(folder)
        self._stack.enter_context(torch.no_grad())
        self._stack.enter_context(experts_one_by_one(self.module))
        training = self.module.training
        self._stack.callback(self.module.train, training)
        self.module.eval()
        try:
            self._start()
        except BaseException:
            self._stack.close()
            raise
        return self

    def __exit__(self, *exc: object) -> None:
        self._stack.close()

    def blocks(self) -> Iterator[Block]:
        """Each block in turn; what was done to one is felt by the next."""
        for i, (name, block) in enumerate(self.names.items()):
            yield Block(self, i, name, block)

    # -- hidden states ---------------------------------------------------------------

    def _start(self) -> None:
        found = blocks_of(self.module)
        self.names = found if len(found) > 1 and self._chained(found) else {"": self.module}
        if "" in self.names:
            return
        first = next(iter(self.names.values()))
        for b, batch in enumerate(self.batches):
            args, kwargs = caught(self.module, first, batch)
            hidden, rest = args[0], args[1:]
            self._calls.append(self._shared((rest, kwargs)))
            self.put(0, b, hidden)
            if self.targets:
                self.put(1, b, hidden)

    def _chained(self, blocks: dict[str, nn.Module]) -> bool:
        """Whether each block takes what the one before gave, and else the same for all."""
        seen: list[tuple[Any, ...]] = []
        outs: list[Tensor] = []
        with ExitStack() as stack:
            for block in blocks.values():

                def before(_: nn.Module, args: Any, kwargs: Any) -> None:
                    seen.append((args, kwargs))

                def after(_: nn.Module, args: Any, out: Any) -> None:
                    outs.append(hidden_of(out))
                    if len(outs) == len(blocks):  # what comes after, such as a head, costs much
                        raise ReachedError

                stack.callback(block.register_forward_pre_hook(before, with_kwargs=True).remove)
                stack.callback(block.register_forward_hook(after).remove)
            with contextlib.suppress(ReachedError):
                call(self.module, self.batches[0])
        if len(seen) != len(blocks) or not all(a and isinstance(a[0], Tensor) for a, _ in seen):
            return False
        alike = all(same((a[1:], k), (seen[0][0][1:], seen[0][1])) for a, k in seen[1:])
        return alike and all(same(a[0], out) for (a, _), out in zip(seen[1:], outs, strict=False))

    def _shared(self, given: tuple[Any, Any]) -> tuple[Any, Any]:
        """The call, or an equal one that is kept already."""
        for other in self._calls[:1]:
            if same(given, other):
                return other
        return given

    def run(self, block: nn.Module, b: int, hidden: Tensor | None) -> Any:
        """A batch through a block."""
        if "" in self.names:
            return call(block, self.batches[b])
        args, kwargs = self._calls[b]
        if torch.is_grad_enabled():
            return block(hidden, *args, **kwargs)
        with ExactAttention():  # type: ignore[no-untyped-call]
            return block(hidden, *args, **kwargs)

    def put(self, stream: int, b: int, x: Tensor) -> None:
        """Keep hidden states. stream: 0 as the module is by now, 1 as it was."""
        x = x.detach()
        if x.dtype == torch.bfloat16 and self._float:
            x = x.float()  # a product of `coarse`
        self._types[stream, b] = x.dtype
        try:  # numpy has no bfloat16
            kept = x.contiguous().view(torch.int16) if x.dtype == torch.bfloat16 else x
            np.save(self.folder / f"{stream}.{b}.npy", kept.numpy())
        except OSError as e:
            raise JoulesmithError(
                f"cannot keep activations in {self.folder.parent}: {e.strerror or e}; "
                "free some space"
            ) from e

    def get(self, stream: int, b: int) -> Tensor | None:
        """As they were put."""
        if "" in self.names:
            return None
        found = np.load(self.folder / f"{stream}.{b}.npy", allow_pickle=False)
        return torch.from_numpy(found).view(self._types[stream, b])


class Block:
    """One block of a walk."""

    def __init__(self, streams: Streams, index: int, name: str, module: nn.Module) -> None:
        self.streams, self.index, self.name, self.module = streams, index, name, module
        self.layers = linears_of(module, name)
        hidden = streams.get(0, 0)
        self.width = 0 if hidden is None else hidden.shape[-1]
        """Of the stream between blocks."""

    def groups(
        self, *, at_once: bool = False, fixed: bool = False, wanted: set[str] | None = None
    ) -> Iterator[Group]:
        """Layers by shared input, in order of use, each with moments of what reaches it by now.

        at_once: moments of all groups are taken before any layer changes, in one pass; else in
        one for each group, or two that hardly touch each other. fixed: at once, and no layer will
        change. wanted: names of layers; others are left out. Hidden states go on to the next
        block when the iterator ends.
        """
        s = self.streams
        chosen = {n: x for n, x in self.layers.items() if wanted is None or n in wanted}
        before = copy.deepcopy(self.module) if s.targets and chosen else None
        if chosen:
            order = self._order(chosen)
            passes = [order] if at_once or fixed else self._passes(order)
            for i, groups in enumerate(passes):
                last = i + 1 == len(passes)
                stats = self._stats(groups, before, last=last, fixed=fixed)
                yield from (Group(o, st) for o, st in zip(groups, stats, strict=True))
        if not (chosen and fixed):
            self._advance(*((0, 1) if s.targets and before is None else (0,)))

    @contextmanager
    def changing(self) -> Iterator[None]:
        """Around a change that needs no moments, instead of `groups`: hidden states go on."""
        if self.streams.targets:
            self._advance(1)
        yield
        self._advance(0)

    def _order(self, chosen: dict[str, Linear]) -> list[dict[str, Linear]]:
        seen: list[tuple[str, Tensor]] = []
        with tapped(chosen, before=lambda name, x: seen.append((name, x))):
            self.streams.run(self.module, 0, self.streams.get(0, 0))
        self._check_experts(chosen, {name for name, _ in seen})
        seen += [(n, chosen[n].matrix) for n in chosen if n not in {m for m, _ in seen}]
        groups: list[tuple[Any, dict[str, Linear]]] = []
        for name, x in seen:
            key = (x.data_ptr(), x.shape, x.stride())
            if groups and groups[-1][0] == key:
                groups[-1][1][name] = chosen[name]
            elif not any(name in g for _, g in groups):
                groups.append((key, {name: chosen[name]}))
        return [g for _, g in groups]

    def _check_experts(self, chosen: dict[str, Linear], seen: set[str]) -> None:
        """Some expert gets every token; where none was seen, they are multiplied unheard."""
        heard = {id(chosen[n].stored) for n in seen if chosen[n].expert is not None}
        for name, layer in chosen.items():
            if layer.expert is not None and id(layer.stored) not in heard:
                whole = name.rpartition(".")[0]
                raise JoulesmithError(
                    f"the experts {whole} are not multiplied one by one: leave them out"
                )

    def _passes(self, order: list[dict[str, Linear]]) -> list[list[dict[str, Linear]]]:
        """Groups whose moments are taken in one pass: each by itself, but for a layer that only
        adds to the stream (as wide as it, alone in its group). What reads the stream next reads
        mostly what was there before: on stories260K that pass makes no difference."""
        found: list[list[dict[str, Linear]]] = []
        joins = False
        for group in order:
            if joins:
                found[-1].append(group)
            else:
                found.append([group])
            first = next(iter(group.values()))
            alone = len(group) == 1 and first.expert is None
            joins = alone and len(found) > 1 and first.shape[0] == self.width
        return found

    def _stats(
        self,
        groups: list[dict[str, Linear]],
        before: nn.Module | None,
        *,
        last: bool,
        fixed: bool,
    ) -> list[InputStats]:
        """last: the block as it was is not needed again, and its stream goes on; fixed: so does
        the other."""
        with coarse():
            found = self._sums(groups, before, last, fixed)
        trim_heap()
        return self._means(groups, found)

    def _sums(
        self, groups: list[dict[str, Linear]], before: nn.Module | None, last: bool, fixed: bool
    ) -> dict[str, InputStats]:
        s, heads = self.streams, [next(iter(g)) for g in groups]
        found: dict[str, Sums] = {}
        # An expert is sent other tokens by now than it was: there is no pair of inputs.
        paired = [n for n in heads if before is not None and self.layers[n].expert is None]
        originals = linears_of(before, self.name) if before is not None else {}
        for b in range(len(s.batches)):
            now = self._inputs(self.module, {n: self.layers[n] for n in heads}, 0, b, whole=fixed)
            was = {}
            if before is not None and (paired or last):
                was = self._inputs(before, {n: originals[n] for n in paired}, 1, b, whole=last)
            for name in heads:
                if name not in now:
                    continue
                if name not in found:
                    found[name] = Sums()
                found[name].add(now[name], was.get(name))
        return {name: sums.done() for name, sums in found.items()}

    def _means(
        self, groups: list[dict[str, Linear]], found: dict[str, InputStats]
    ) -> list[InputStats]:
        heads = [next(iter(g)) for g in groups]
        for name in heads:
            if name not in found and self.layers[name].expert is not None:
                # No token went to that expert: all of its inputs count the same.
                n = self.layers[name].shape[1]
                found[name] = InputStats(torch.eye(n), None, torch.zeros(n), torch.zeros(n), 1)
            if name not in found:
                raise JoulesmithError(
                    f"calibration never reached the layer {name}: give more of it"
                )
            t = found[name]
            if not all(
                bool(torch.isfinite(part).all()) for part in (t.gram, t.cross) if part is not None
            ):
                raise JoulesmithError(
                    f"the inputs of {name} are not finite on the calibration data"
                )
        return [found[n] for n in heads]

    def _inputs(
        self,
        block: nn.Module,
        layers: dict[str, Linear],
        stream: int,
        b: int,
        *,
        whole: bool = False,
    ) -> dict[str, Tensor]:
        """Name -> (vectors, columns) that reach each layer; ends as soon as all are known.

        whole: to the block's end, and what it gives is what its stream goes on with.
        """
        whole = whole and "" not in self.streams.names
        inputs: dict[str, Tensor] = {}
        single = len(layers) == 1 and all(x.expert is None for x in layers.values())

        def note(name: str, x: Tensor) -> None:
            flat = x.detach().reshape(-1, x.shape[-1]).float()
            inputs[name] = torch.cat([inputs[name], flat]) if name in inputs else flat
            if single and not whole:
                raise ReachedError

        with tapped(layers, before=note), contextlib.suppress(ReachedError):
            out = self.streams.run(block, b, self.streams.get(stream, b))
            if whole:
                self.streams.put(stream, b, hidden_of(out))
        return inputs

    def _advance(self, *streams: int) -> None:
        """Hidden states of these streams, through the block as it is, to the next."""
        s = self.streams
        if "" in s.names or self.index + 1 == len(s.names):
            return
        with coarse():
            for stream in streams:
                for b in range(len(s.batches)):
                    s.put(stream, b, hidden_of(s.run(self.module, b, s.get(stream, b))))
