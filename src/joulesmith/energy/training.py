"""What training costs: joules per step, token, sample and parameter, against quality.

`LoopMeter` serves any loop; `trainer.EnergyCallback` puts it into the
``transformers.Trainer``. Knows counts, losses and windows of a meter; knows no models
and no devices, and leaves files to `export`.

A window covers whole steps, about a second of them, so that devices are only waited
for at its ends; a loss or a count may be a tensor and is read there. What lies between
two steps (loading data, a checkpoint) belongs to the training; evaluation goes into a
`pause`. Nothing that fails in here stops the training: it becomes a note.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from joulesmith.energy.reading import Reading
from joulesmith.energy.totals import POINT_COLUMNS, Totals, per

if TYPE_CHECKING:
    from joulesmith.energy.export import Appender

_MAX_POINTS = 10_000


class _Sum:
    """A sum that is unknown once a part is, and reads tensors only when asked."""

    def __init__(self) -> None:
        self._total: Any = 0.0
        self._known = True
        self.count = 0

    def add(self, part: Any) -> None:
        self.count += 1
        if part is None:
            self._known = False
            return
        detach = getattr(part, "detach", None)
        self._total = self._total + (detach() if detach is not None else part)

    def value(self) -> float | None:
        return float(self._total) if self._known and self.count else None


class Step:
    """A step under way; what is only known at its end may be set on it."""

    def __init__(self, tokens: Any, samples: Any, loss: Any) -> None:
        self.tokens, self.samples, self.loss = tokens, samples, loss


class LoopMeter(Totals):
    """Meters a training loop.

        with LoopMeter(parameters=model, path="curve.jsonl", budget_joules=5e6) as loop:
            for batch in data:
                with loop.step(tokens=batch.numel(), samples=len(batch)) as step:
                    step.loss = train_on(batch)
                if loop.should_stop:
                    break

    meter: an `EnergyMeter` in use; default one of its own. parameters: how many the
    model has, or the model. budget_joules: see `should_stop`. every: steps a window
    covers; default as many as fill ``seconds``. path: file of the points, ``.csv`` or
    JSON lines, appended to. label: name of the windows.
    Raises ValueError for numbers out of range, `JoulesmithError` for a file that cannot
    be written to.
    """

    def __init__(
        self,
        meter: Any = None,
        *,
        parameters: Any = None,
        budget_joules: float | None = None,
        every: int | None = None,
        seconds: float = 1.0,
        path: Path | str | None = None,
        label: str = "train",
    ) -> None:
        check(every, seconds, budget_joules)
        super().__init__(count_parameters(parameters))
        self.budget_joules = budget_joules
        self.every = every
        self.label = label
        self.curve: list[dict[str, Any]] = []
        """Points in order; of a very long run the older ones are thinned (the file has all)."""
        self._window_seconds = seconds
        self._meter = meter
        self._owned: Any = None
        self._file: Appender | None = _appender(path)
        self._window: Any = None
        self._opened = 0.0
        self._paused = self._stopped = False
        self._open_counts()

    # ---- use

    def __enter__(self) -> LoopMeter:
        self.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self.stop()

    def start(self) -> None:
        """Starts the meter where it is the loop's own. The first window opens with a step."""
        if self._meter is None:
            from joulesmith.energy.meter import EnergyMeter

            self._owned = self._meter = EnergyMeter()
            self._owned.__enter__()

    def stop(self) -> None:
        """Closes the window, the file and a meter of its own. May be called twice."""
        self._stopped = True
        if self._paused:
            self._end_aside()
        self._finish({}, None)
        if self._owned is not None:
            with self._noted("the meter could not be stopped"):
                self._owned.__exit__(None, None, None)
                self._owned.close()
            self._owned = self._meter = None
        if self._file is not None:
            with self._noted("the file of points could not be closed"):
                self._file.close()

    @contextmanager
    def step(self, tokens: Any = None, samples: Any = None, loss: Any = None) -> Iterator[Step]:
        """One optimiser step. tokens, samples: of its batch; loss: its mean loss.

        All may be tensors, and may be set on the step before it ends. A step that raises
        is not counted, its joules are.
        """
        self.begin_step()
        step = Step(tokens, samples, loss)
        try:
            yield step
        except BaseException:
            self._finish({}, None)
            raise
        self.end_step(step.tokens, step.samples, step.loss)

    def begin_step(self) -> None:
        """`step` in two calls, for loops that call back."""
        if self._window is None and not self._paused:
            self._open(self.label)

    def end_step(self, tokens: Any = None, samples: Any = None, loss: Any = None) -> None:
        """Counts a step; closes the window when it is full."""
        self._in_window += 1
        with self._noted("a loss or a count could not be added"):
            self._w_tokens.add(tokens)
            self._w_samples.add(samples)
            if loss is not None:
                self._w_loss.add(loss)
        full = (
            time.perf_counter() - self._opened >= self._window_seconds
            if self.every is None
            else self._in_window >= self.every
        )
        if full:
            self.flush()

    def flush(self) -> None:
        """Closes the open window and opens the next; the figures are then up to date."""
        if self._window is not None and not self._paused:
            self._finish({}, None)
            self._open(self.label)

    def record(self, loss: float | None = None, **metrics: float | None) -> None:
        """A point of the curve with metrics of this moment, such as ``eval_loss``."""
        if self._window is None or self._paused:
            self._write(self.row(None, loss, metrics))
        else:
            self._finish(metrics, loss)
            self._open(self.label)

    @contextmanager
    def pause(self, label: str = "evaluate") -> Iterator[None]:
        """What runs inside (evaluation, sampling) is metered apart: in `aside`, not `joules`."""
        self.begin_pause(label)
        try:
            yield
        finally:
            self.end_pause()

    def begin_pause(self, label: str = "evaluate") -> None:
        """`pause` in two calls."""
        if not self._paused:
            self._finish({}, None)
            self._paused = True
            self._open(label)

    def end_pause(self) -> None:
        """`pause` in two calls. The next window of training opens with it."""
        if self._paused:
            self._end_aside()
            self._open(self.label)

    @property
    def should_stop(self) -> bool:
        """True once `spent` has reached the budget: by no more than a window is it passed.

        Joules that are unknown cannot be counted: a note says so, and a training of
        which nothing is known is never stopped.
        """
        return self.budget_joules is not None and self.spent >= self.budget_joules

    # ---- resume

    def state_dict(self) -> dict[str, Any]:
        """The totals, for JSON; closes the window first. The points are not in it."""
        self.flush()
        return self.totals()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on from `state_dict`; raises ValueError where ``state`` is none."""
        self.load_totals(state)
        self._open_counts()
        self.note(
            f"resumed at step {self.steps}: joules of work after that point that was lost are "
            "not counted"
        )

    # ---- windows

    def _open_counts(self) -> None:
        self._in_window = 0
        self._w_tokens, self._w_samples, self._w_loss = _Sum(), _Sum(), _Sum()

    def _open(self, label: str) -> None:
        self._opened = time.perf_counter()
        if self._meter is None and not self._stopped:
            self.start()
        with self._noted("a window could not be opened"):
            if self._meter is None:
                raise RuntimeError("the loop was stopped")
            # Waits for the devices: what was asked of them before belongs before.
            window = self._meter.window(label)
            window.__enter__()
            self._window = window
            return
        self._window = _Blind()

    def _end_aside(self) -> None:
        self.add_aside(self._close())
        self._paused = False

    def _close(self) -> Reading:
        window, self._window = self._window, None
        reading = Reading(None, time.perf_counter() - self._opened)
        with self._noted("a window could not be read"):
            window.__exit__(None, None, None)
            closed: Reading = window.reading
            reading = closed
        # The points hold what matters; a month of windows would fill the memory.
        kept = getattr(self._meter, "readings", {}).get(getattr(window, "name", None))
        if kept:
            kept[:] = [r for r in kept if r is not reading]
        for note in reading.notes:
            self.note(note)
        return reading

    def _finish(self, metrics: Mapping[str, float | None], loss_now: float | None) -> None:
        """Closes the window of training, if open, and adds it to the totals and the curve."""
        if self._window is None:
            return
        reading = self._close()
        tokens, samples, loss = (
            self._read(s) for s in (self._w_tokens, self._w_samples, self._w_loss)
        )
        steps, losses = self._in_window, self._w_loss.count
        self._open_counts()
        self.add(reading, steps, tokens, samples)
        if reading.joules is None and self.budget_joules is not None:
            self.note("joules of some windows are unknown: the budget counts the known ones")
        if loss_now is None and loss is not None:
            loss_now = loss / losses
        row = self.row(reading, loss_now, metrics)
        row["window_steps"] = steps
        row["joules_per_step"] = per(reading.joules, steps)
        row["joules_per_token"] = per(reading.joules, tokens)
        row["joules_per_sample"] = per(reading.joules, samples)
        self._write(row)

    def _read(self, total: _Sum) -> float | None:
        with self._noted("a loss or a count could not be read"):
            return total.value()
        return None

    def _write(self, row: dict[str, Any]) -> None:
        self.curve.append(row)
        if len(self.curve) > _MAX_POINTS:
            old = self.curve[: _MAX_POINTS // 2]
            self.curve[: len(old)] = [r for i, r in enumerate(old) if r["metrics"] or i % 2]
        if self._file is not None:
            with self._noted("a point could not be written"):
                self._file.append(row)

    @contextmanager
    def _noted(self, what: str) -> Iterator[None]:
        try:
            yield
        except Exception as e:  # metering must never end the training
            self.note(f"{what}: {type(e).__name__}: {e}")


def check(every: int | None, seconds: float, budget_joules: float | None) -> None:
    """Raises ValueError where an argument of `LoopMeter` is out of range."""
    if every is not None and every < 1:
        raise ValueError(f"every must be 1 or more steps, got {every}")
    for value, what in ((budget_joules, "budget_joules"), (seconds, "seconds")):
        if value is not None and not (math.isfinite(value) and value > 0):
            raise ValueError(f"{what} must be above 0, got {value}")


class _Blind:
    """Stands for a window of a meter that failed."""

    name = None

    def __init__(self) -> None:
        self._start = time.perf_counter()
        self.reading = Reading(None, 0.0)

    def __exit__(self, *exc: object) -> None:
        self.reading = Reading(None, time.perf_counter() - self._start)


def count_parameters(model: Any) -> int | None:
    """Of a torch module, or the number itself; None for None."""
    if model is None or isinstance(model, int):
        count = model
    else:
        count = sum(p.numel() for p in model.parameters())
    if count is not None and count < 0:
        raise ValueError(f"parameters must be 0 or more, got {count}")
    return count


def _appender(path: Path | str | None) -> Appender | None:
    if path is None:
        return None
    from joulesmith.energy.export import CsvLines, JsonLines

    csv = Path(path).suffix.lower() == ".csv"
    return CsvLines(path, POINT_COLUMNS) if csv else JsonLines(path)
