"""Processes that work together, and work that is shared among them. Alone where torch has no group.

Knows torch's process group when there is one, and never imports torch itself; not how the group
came about, nor what the work is. What travels is JSON in tensors of bytes: no pickle.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any, TypeVar

from joulesmith.errors import JoulesmithError

T = TypeVar("T")
R = TypeVar("R")
_alone = False
_broken = False


def rank() -> int:
    """Of this process; 0 where it is alone."""
    dist = _group()
    return int(dist.get_rank()) if dist else 0


def world() -> int:
    """How many processes work together."""
    dist = _group()
    return int(dist.get_world_size()) if dist else 1


@contextmanager
def alone() -> Iterator[None]:
    """Inside, this process goes by itself, whatever group it is in."""
    global _alone
    before, _alone = _alone, True
    try:
        yield
    finally:
        _alone = before


def broke() -> None:
    """The group of this process ended before its work: see `leaving`."""
    global _broken
    _broken = True


@contextmanager
def leaving() -> Iterator[None]:
    """Around a program. Where its group broke, the process ends as soon as the program does.

    Python's own end waits for collectives under way, which the others, waiting for this process,
    never join; and gloo's threads, meeting an interpreter that shuts down, abort the process
    (pytorch/pytorch#179291). What was printed is printed, and the exit code is the same (130 of
    Ctrl-C).
    """
    code = 0
    try:
        yield
    except BaseException as e:
        if not _broken:
            raise
        code = 130 if isinstance(e, KeyboardInterrupt) else 1
        if not isinstance(e, SystemExit):
            sys.excepthook(type(e), e, e.__traceback__)
        elif isinstance(e.code, str):
            print(e.code, file=sys.stderr)
        else:
            code = int(e.code or 0)
    if _broken:
        for stream in (sys.stdout, sys.stderr):
            with suppress(Exception):
                stream.flush()
        os._exit(code)


def wait() -> None:
    """For all ranks."""
    if world() > 1:
        added([0.0])


def added(values: Sequence[float]) -> list[float]:
    """Each number's sum over ranks, who all call this."""
    dist = _group()
    if dist is None or world() == 1:
        return [float(v) for v in values]
    import torch

    t = torch.tensor(list(values), dtype=torch.float64, device=_device(dist))
    dist.all_reduce(t)
    return [float(v) for v in t.tolist()]


def gathered(value: Any) -> list[Any]:
    """What each rank gives, JSON, in their order. All call this."""
    dist = _group()
    if dist is None or world() == 1:
        return [value]
    import torch

    raw = json.dumps(value).encode()
    device = _device(dist)
    sizes = [torch.zeros(1, dtype=torch.int64, device=device) for _ in range(world())]
    dist.all_gather(sizes, torch.tensor([len(raw)], dtype=torch.int64, device=device))
    most = max(int(s) for s in sizes)
    mine = torch.zeros(most, dtype=torch.uint8, device=device)
    mine[: len(raw)] = torch.frombuffer(bytearray(raw), dtype=torch.uint8).to(device)
    every = [torch.zeros_like(mine) for _ in sizes]
    dist.all_gather(every, mine)
    return [
        json.loads(bytes(t[: int(s)].cpu().numpy().tobytes()))
        for t, s in zip(every, sizes, strict=True)
    ]


def told(value: Any) -> Any:
    """What the first rank gives, JSON. All call this; what the others give is not looked at."""
    return gathered(value if rank() == 0 else None)[0]


def shared(items: Sequence[T], score: Callable[[Sequence[T]], Sequence[R]]) -> list[R]:
    """The score of each item, in order, on every rank: each rank scores one run of neighbours.

    score: items -> as many results, JSON; not called for none. All ranks call this with the same
    items. Raises what ``score`` raised here, and `JoulesmithError` with its line where another rank
    failed, so that none waits for it.
    """
    if world() == 1:
        return list(score(items)) if len(items) else []
    n, r, w = len(items), rank(), world()
    mine = items[n * r // w : n * (r + 1) // w]
    failed: BaseException | None = None
    part: list[R] = []
    try:
        part = list(score(mine)) if len(mine) else []
        if len(part) != len(mine):
            raise ValueError(f"{len(part)} scores of {len(mine)} items")
    except Exception as e:
        failed = e
    every = gathered([None if failed is None else (str(failed) or type(failed).__name__), part])
    if failed is not None:
        raise failed
    for i, (line, _) in enumerate(every):
        if line is not None:
            raise JoulesmithError(f"rank {i}: {line}")
    return [x for _, found in every for x in found]


def _group() -> Any:
    """torch.distributed where a group is there, else None."""
    if _alone:
        return None
    dist = getattr(sys.modules.get("torch"), "distributed", None)
    return dist if dist is not None and dist.is_available() and dist.is_initialized() else None


def _device(dist: Any) -> str:
    """Where a collective of numbers may be: the processor, but for a group of GPUs alone."""
    told = str(getattr(dist, "get_backend_config", dist.get_backend)())
    return "cpu" if "cpu" in told or "gloo" in told else "cuda"
