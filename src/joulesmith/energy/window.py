"""A span being metered, and ways to put one around code. Knows no devices."""

from __future__ import annotations

import functools
import inspect
from collections.abc import AsyncGenerator, Callable, Generator
from contextlib import closing
from types import TracebackType
from typing import TYPE_CHECKING, Any, TypeVar

from joulesmith.energy.reading import Reading

if TYPE_CHECKING:
    from joulesmith.energy.meter import EnergyMeter
    from joulesmith.energy.parts import Snapshot

F = TypeVar("F", bound=Callable[..., Any])


class Window:
    """A span being metered. A context manager, plain or ``async``; or `start` and `stop`.

    Windows may nest and overlap, across threads and tasks: a window is an object of
    its own and knows nothing of the others.
    """

    def __init__(self, meter: EnergyMeter, name: str) -> None:
        self.name = name
        self.peaks = Peaks()
        self._meter = meter
        self._start: Snapshot | None = None
        self._reading: Reading | None = None

    def start(self) -> Window:
        """Opens the window (again): what is known of an earlier span is forgotten."""
        self._reading = None
        self.peaks = Peaks()
        self._start = self._meter.open(self)
        return self

    def stop(self, why: str | None = None) -> Reading:
        """Closes the window. Raises RuntimeError when it is not open.

        why: a note for the reading.
        """
        if self._start is None:
            raise RuntimeError(f"window {self.name!r} is not open: start it first")
        start, self._start = self._start, None
        self._reading = self._meter.shut(self, start, (why,) if why else ())
        return self._reading

    def __enter__(self) -> Window:
        return self.start()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._start is not None:
            self.stop(f"the window ended by {kind.__name__}" if kind is not None else None)

    async def __aenter__(self) -> Window:
        return self.start()

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.__exit__(kind, error, trace)

    @property
    def reading(self) -> Reading:
        """What the window cost. Raises RuntimeError while the window is open."""
        if self._reading is None:
            raise RuntimeError(f"window {self.name!r} is not closed yet: read it after the block")
        return self._reading


class Peaks:
    """The most memory seen while a window was open; ``None`` until any was seen."""

    def __init__(self) -> None:
        self.resident: int | None = None
        self.device: int | None = None

    def see(self, resident: int | None, device: int | None) -> None:
        """Takes one look in."""
        if resident is not None:
            self.resident = max(resident, self.resident or 0)
        if device is not None:
            self.device = max(device, self.device or 0)


def metered(function: F, open_window: Callable[[], Window]) -> F:
    """``function``, each call of it in a window of its own.

    A coroutine's window lasts until it returns. A generator's, plain or async, lasts
    from its first item until it ends or is closed, what its user does between included.
    """
    wrapper: Any
    if inspect.isasyncgenfunction(function):

        @functools.wraps(function)
        async def wrapper(*args: Any, **kwargs: Any) -> AsyncGenerator[Any, Any]:
            items = function(*args, **kwargs)
            with open_window():
                try:
                    step = items.asend(None)
                    while True:
                        try:
                            item = await step
                        except StopAsyncIteration:
                            return
                        try:
                            sent = yield item
                        except GeneratorExit:
                            raise
                        except BaseException as e:
                            step = items.athrow(e)
                        else:
                            step = items.asend(sent)
                finally:
                    await items.aclose()

    elif inspect.iscoroutinefunction(function):

        @functools.wraps(function)
        async def wrapper(*args: Any, **kwargs: Any) -> Any:
            with open_window():
                return await function(*args, **kwargs)

    elif inspect.isgeneratorfunction(function):

        @functools.wraps(function)
        def wrapper(*args: Any, **kwargs: Any) -> Generator[Any, Any, Any]:
            with open_window(), closing(function(*args, **kwargs)) as items:
                return (yield from items)

    else:

        @functools.wraps(function)
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            with open_window():
                return function(*args, **kwargs)

    result: F = wrapper
    return result
