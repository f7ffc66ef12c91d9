"""The group of ranks that torchrun starts: how it is joined, and what is said when one is lost.

Knows processes and torch's process group; not what they train. A rank that dies, or fails with an
error of its own, ends the others: one of all ranks says one line, the others are silent, and all
leave with exit code 2. None waits for ever: collectives time out, and a thread looks after the
processes of this machine, since a GPU's collectives cannot be left by an exception.
"""

from __future__ import annotations

import os
import platform
import re
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import psutil
import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d as c10d
from torch.distributed.rendezvous import rendezvous

from joulesmith.errors import JoulesmithError
from joulesmith.ranks import broke, gathered, wait

TIMEOUT = 7200.0
"""Seconds that ranks wait in a collective for one that is alive and does not come. That a process
of this machine ended is seen at once; for what the first does alone they `meet`."""
_LOOK, _GRACE, _PATIENCE = 0.5, 5.0, 2.0
"""Seconds between looks at the others; that the program has to leave by itself; until a process
that closed its connections has ended."""
_BEAT, _SILENCE = 10.0, 300.0
"""Seconds between signs of life; without one, after which a rank of another machine is lost."""
_OF_GROUP = re.compile(
    r"gloo/|NCCL|ProcessGroup|(closed|reset) by peer|Broken pipe|process group|TCPStore"
)
_KINDS = tuple(getattr(dist, n) for n in ("DistError", "DistBackendError") if hasattr(dist, n))


@dataclass(frozen=True)
class Ranks:
    """rank: of ``world`` processes; local_rank: of ``local_world`` on this machine. device: of this
    rank."""

    rank: int = 0
    world: int = 1
    local_rank: int = 0
    local_world: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    @property
    def first(self) -> bool:
        """Whether this one writes files and talks."""
        return self.rank == 0


class _StoppedError(BaseException):
    """SIGTERM. No `Exception`: what catches errors of any kind must not keep it."""


class _LostError(Exception):
    """A rank ended before it was done."""


@contextmanager
def ranks(device: str | torch.device = "auto", timeout: float = TIMEOUT) -> Iterator[Ranks]:
    """Joins the group that torchrun's environment describes, and leaves it; alone without one.

    device: "cpu", or "cuda" for a GPU of each rank's own; "auto": GPUs where there are any.
    Collectives go over gloo on processors and NCCL on GPUs. Processor cores are shared out among
    the ranks of a machine as threads. timeout: see `TIMEOUT`, seconds.

    A program around it is best inside `joulesmith.ranks.leaving`, so that a rank that fails leaves;
    after a failure SIGTERM, which torchrun then sends, is ignored.

    Raises `JoulesmithError` where a rank has no GPU of its own and where the others do not come;
    inside, for whatever ends the group, on one rank, and `SystemExit` (2) on the others.
    """
    if dist.is_available() and dist.is_initialized():  # somebody else's
        yield Ranks(
            dist.get_rank(), dist.get_world_size(), _number("LOCAL_RANK", 0),
            _number("LOCAL_WORLD_SIZE", 1), _device(device, _number("LOCAL_RANK", 0)),
        )  # fmt: skip
        return
    world = _number("WORLD_SIZE", 1)
    if world == 1 or "RANK" not in os.environ:
        yield Ranks(device=_device(device, 0))
        return
    if not dist.is_available():
        raise JoulesmithError("this torch has no torch.distributed: run without torchrun")
    local, local_world = _number("LOCAL_RANK", 0), _number("LOCAL_WORLD_SIZE", world)
    me = Ranks(_number("RANK", 0), world, local, local_world, _device(device, local))
    threads = torch.get_num_threads()
    torch.set_num_threads(max(1, cores() // local_world))
    group = _Group(me, timeout)
    try:
        with group.watched():
            yield me
    finally:
        torch.set_num_threads(threads)


def cores() -> int:
    """Processors that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def goes_on_from(newest: Callable[[], object]) -> None:
    """Tells how to find the checkpoint that the run goes on from, None for none, for the line that
    is said when a rank is lost."""
    if _Group.current is not None:
        _Group.current.newest = newest


def meet() -> None:
    """Waits for all ranks, however long one of them still works; collectives would end after
    `TIMEOUT`. All call it."""
    if _Group.current is None:
        wait()
    else:
        _Group.current.meet()


class _Group:
    """This process's part in it."""

    current: _Group | None = None

    def __init__(self, me: Ranks, timeout: float) -> None:
        self.me, self.timeout = me, timeout
        self.newest: Callable[[], object] = lambda: None
        self.peers: dict[int, psutil.Process] = {}
        self._met = self._beats = 0
        self._over = threading.Event()
        self._key = "run"
        self.store: Any = None
        self._join()

    def _join(self) -> None:
        me, limit = self.me, timedelta(seconds=self.timeout)
        where = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
        try:
            given = rendezvous("env://", me.rank, me.world, timeout=limit)
            store, rank, world = next(iter(given))
            store.set_timeout(limit)
            # a connection of its own: one that waits in a collective's would hold up the watch
            self.store = c10d.PrefixStore("joulesmith", store.clone())
            self.store.set_timeout(limit)
            backend = "gloo"
            if me.device.type == "cuda":
                torch.cuda.set_device(me.device)
                backend = "cpu:gloo,cuda:nccl"
            dist.init_process_group(
                backend, store=c10d.PrefixStore("group", store), rank=rank, world_size=world,
                timeout=limit,
            )  # fmt: skip
            host = platform.node()
            every = gathered([host, os.getpid(), os.environ.get("TORCHELASTIC_RESTART_COUNT", "")])
            self._key = f"run{every[0][2]}"  # machines may count restarts otherwise
            for i, (name, pid, _) in enumerate(every):
                if name == host and i != me.rank:
                    with suppress(psutil.Error):  # of a container that looks like this machine
                        self.peers[i] = psutil.Process(pid)
        except (RuntimeError, ValueError, OSError) as e:
            raise JoulesmithError(
                f"rank {me.rank} of {me.world} does not meet the others at {where}: {_short(e)}: "
                "start all of them with one torchrun"
            ) from e

    @contextmanager
    def watched(self) -> Iterator[None]:
        """The body of `ranks`."""
        _Group.current = self
        before: Any = None
        with suppress(ValueError):  # not in the main thread
            before = signal.signal(signal.SIGTERM, _stop)
        watch = threading.Thread(target=self._watch, name="joulesmith-ranks", daemon=True)
        watch.start()
        try:
            yield
            self._over.set()
            self._leave()
        except BaseException as e:
            with suppress(ValueError):  # torchrun ends those that are left: not amid the last words
                signal.signal(signal.SIGTERM, signal.SIG_IGN)
            before = None
            self._over.set()
            broke()
            with suppress(Exception):  # the store may have gone with the first
                self.store.set(f"{self._key}/broke", "1")
            found = self._ended(e)
            # No words with those that are gone; work that is under way cannot be waited for.
            with suppress(Exception):
                if self.me.device.type == "cuda":
                    c10d._abort_process_group()  # type: ignore[attr-defined]
            raise found from (None if found is not e else e.__cause__)
        else:
            dist.destroy_process_group()
        finally:
            self._over.set()
            _Group.current = None
            if before is not None:
                signal.signal(signal.SIGTERM, before)

    def meet(self) -> None:
        """See `meet`."""
        self._met += 1
        key = f"{self._key}/met/{self._met}"
        self.store.set(f"{key}/{self.me.rank}", "1")
        late = [r for r in range(self.me.world) if r != self.me.rank]
        heard: dict[int, tuple[bytes, float]] = {}
        looked = time.monotonic()
        while late and not self.store.check([f"{key}/{r}" for r in late]):
            if (passed := time.monotonic() - looked) >= _LOOK:
                gone = set(self.dead())  # before the rest: who leaves has met first
                late = [r for r in late if not self.store.check([f"{key}/{r}"])]
                if gone & set(late) or self.store.check([f"{self._key}/broke"]):
                    raise _LostError
                self._listen(late, heard, min(passed, 2 * _LOOK))  # more: stood still itself
                looked = time.monotonic()
            time.sleep(_LOOK / 5)

    def _listen(
        self, late: list[int], heard: dict[int, tuple[bytes, float]], passed: float
    ) -> None:
        """Raises `_LostError` where one of another machine is silent. heard: last sign of life of
        each, and seconds without another. passed: since this was called last."""
        for r in set(late) - self.peers.keys():
            key = f"{self._key}/alive/{r}"
            sign = self.store.get(key) if self.store.check([key]) else b""
            before, silent = heard.get(r, (b"", 0.0))
            heard[r] = sign, silent + passed if sign == before else 0.0
            if heard[r][1] > _SILENCE:
                raise _LostError(f"rank {r} of {self.me.world} gives no sign of life")

    def _leave(self) -> None:
        """When all ranks are done; the first, which may keep the store, last."""
        self.meet()
        me, every = self.me, range(self.me.world)
        if not me.first:
            self.store.set(f"{self._key}/left/{me.rank}", "1")
            return
        until = time.monotonic() + _GRACE
        while time.monotonic() < until and not self.store.check(
            [f"{self._key}/left/{r}" for r in every if r]
        ):
            time.sleep(_LOOK / 50)

    def _ended(self, e: BaseException) -> BaseException:
        """What is raised in its place, on this rank."""
        if isinstance(e, KeyboardInterrupt | SystemExit | GeneratorExit):
            return e
        lost = isinstance(e, _StoppedError | _LostError) or _of_group(e)
        if lost:
            line = self._line(e)
            return JoulesmithError(line) if self._claim() else SystemExit(2)
        spoke = self._claim()
        if isinstance(e, JoulesmithError):  # the same on all ranks, or of this one alone
            return e if spoke else SystemExit(e.exit_code)
        return e  # a fault of the program: its traceback

    def _line(self, e: BaseException | None) -> str:
        until = time.monotonic() + _PATIENCE
        while not (dead := self.dead()) and time.monotonic() < until:
            time.sleep(0.05)
        me = self.me
        if dead:
            names = ", ".join(f"{r} (process {self.peers[r].pid})" for r in dead)
            what = f"rank{'s' * (len(dead) > 1)} {names} of {me.world} ended unexpectedly"
        elif isinstance(e, _LostError):
            what = str(e) or f"another rank of {me.world} ended before the work did"
        elif isinstance(e, _StoppedError) or e is None:
            what = f"rank {me.rank} of {me.world} was asked to stop"
        else:
            what = f"rank {me.rank} of {me.world} lost the others: {_short(e)}"
        if (kept := self.newest()) is None:
            return f"{what}: all ranks stop; no checkpoint was written yet: run the command again"
        return f"{what}: all ranks stop; the same command goes on from {kept}"

    def _claim(self) -> bool:
        """Whether this rank is the one that speaks."""
        try:
            self.store.set_timeout(timedelta(seconds=_GRACE))
            return bool(self.store.add(f"{self._key}/told", 1) == 1)
        except Exception:  # it went with the rank that kept it
            return True

    def dead(self) -> list[int]:
        """Ranks of this machine whose process is gone."""
        return [r for r, process in self.peers.items() if ended(process)]

    def _beat(self) -> None:
        """A sign of life."""
        self._beats += 1
        self.store.set(f"{self._key}/alive/{self.me.rank}", str(self._beats))

    def _watch(self) -> None:
        last = time.monotonic()
        while not self._over.wait(_LOOK):
            if time.monotonic() - last >= _BEAT:
                with suppress(Exception):  # the store may have gone with the first
                    self._beat()
                last = time.monotonic()
            if not self.dead():
                continue
            if self._over.wait(_GRACE):  # the program noticed itself
                return
            if not self.dead():
                continue
            line = self._line(None)
            if self._claim():
                print(f"joulesmith: {line}", file=sys.stderr, flush=True)
            os._exit(2)  # the main thread waits in a collective that never ends


def _stop(*_: object) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    raise _StoppedError


def ended(process: psutil.Process) -> bool:
    """Whether it is over, collected by its parent or not. The machine's clock may be set meanwhile:
    times of birth, which psutil counts from it, would not tell."""
    try:
        return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE
    except psutil.Error:
        return True


def _of_group(e: BaseException) -> bool:
    """Whether it, or what it came from, is a collective's."""
    seen: set[int] = set()
    todo: list[BaseException] = [e]
    while todo:
        x = todo.pop()
        if id(x) in seen:
            continue
        seen.add(id(x))
        if isinstance(x, _KINDS) or (isinstance(x, RuntimeError) and _OF_GROUP.search(str(x))):
            return True
        failures = getattr(x, "failures", None)  # of ranks, as torch's checkpoints gather them
        if isinstance(failures, dict):
            todo += [f[0] for f in failures.values()]
        todo += [c for c in (x.__cause__, x.__context__) if c is not None]
    return False


def _short(e: BaseException) -> str:
    lines = str(e).strip().splitlines() or [type(e).__name__]
    return re.sub(r"^\[[^\]]*gloo[^\]]*\]\s*", "", lines[0])[:200]


def _number(name: str, otherwise: int) -> int:
    text = os.environ.get(name, str(otherwise))
    try:
        return int(text)
    except ValueError:
        raise JoulesmithError(
            f"{name}={text[:40]} is no number: start ranks with torchrun"
        ) from None


def _device(name: str | torch.device, local: int) -> torch.device:
    """This rank's own."""
    if isinstance(name, str) and name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        found = torch.device(name)
    except RuntimeError as e:
        raise JoulesmithError(f"--device {str(name)[:40]}: give auto, cpu or cuda") from e
    if found.type != "cuda":
        return found
    if _number("WORLD_SIZE", 1) == 1:
        return found
    have = torch.cuda.device_count()
    if local >= have:
        raise JoulesmithError(
            f"rank {local} of this machine has no GPU of its own, there are {have}: start fewer "
            "ranks, or give --device cpu"
        )
    return torch.device("cuda", local)
