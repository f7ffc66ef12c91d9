"""Readings for Prometheus. Knows its text format; knows no meters beyond their readings.

Unknown is an absent sample, never 0. The format is version 0.0.4 of Prometheus'
document "Exposition formats", names and units by "Metric and label naming".
"""

from __future__ import annotations

import math
import re
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from joulesmith.energy.reading import Reading
from joulesmith.errors import JoulesmithError

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_NAME = re.compile(r"[a-zA-Z_:][a-zA-Z0-9_:]*")
_LABEL = re.compile(r"[a-zA-Z_][a-zA-Z0-9_]*")


@dataclass(frozen=True)
class Metric:
    """One metric family; samples: (labels, value), a value of None is left out."""

    name: str
    kind: str
    help: str
    samples: Sequence[tuple[Mapping[str, str], float | None]] = field(default_factory=tuple)


def render(metrics: Iterable[Metric]) -> str:
    """The text of an exposition. Raises ValueError for a name that the format forbids."""
    out: list[str] = []
    seen: set[str] = set()
    for m in metrics:
        if not _NAME.fullmatch(m.name) or m.kind not in ("counter", "gauge") or m.name in seen:
            raise ValueError(f"not a metric: {m.kind} {m.name!r}")
        if m.kind == "counter" and not m.name.endswith("_total"):
            raise ValueError(f"a counter's name ends in _total: {m.name}")
        seen.add(m.name)
        lines: dict[str, str] = {}
        for labels, value in m.samples:
            if value is None:
                continue
            for label in labels:
                if not _LABEL.fullmatch(label) or label.startswith("__"):
                    raise ValueError(f"not a label: {label!r}")
            inside = ",".join(f'{k}="{_escape(v)}"' for k, v in labels.items())
            key = f"{m.name}{{{inside}}}" if inside else m.name
            if key in lines:
                raise ValueError(f"two samples of {key}")
            lines[key] = f"{key} {_float(value)}"
        if lines:
            text = m.help.replace("\\", r"\\").replace("\n", r"\n")
            out += [f"# HELP {m.name} {text}", f"# TYPE {m.name} {m.kind}", *lines.values()]
    return "\n".join(out) + "\n" if out else ""


def meter_metrics(
    readings: Mapping[str, Sequence[Reading]], labels: Mapping[str, str] | None = None
) -> list[Metric]:
    """Closed windows by name, such as `EnergyMeter.readings`, as counters.

    Joules and seconds add up by window and device. A window whose energy is unknown adds
    nothing to joules and one to ``joulesmith_windows_unknown_total``. labels: added to
    every sample.
    """
    base = dict(labels or {})
    per: dict[str, list[tuple[Mapping[str, str], float | None]]] = {}

    def add(name: str, value: float | None, **more: str) -> None:
        per.setdefault(name, []).append(({**base, **more}, value))

    for window, found in list(readings.items()):
        rows = list(found)
        add("seconds", math.fsum(r.seconds for r in rows), window=window)
        add("windows", float(len(rows)), window=window)
        add("unknown", float(sum(r.joules is None for r in rows)), window=window)
        for r in reversed(rows):
            if r.peak_memory_bytes is not None:
                add("memory", r.peak_memory_bytes, window=window, kind="resident")
                add("memory", r.device_memory_bytes, window=window, kind="device")
                break
        known = [r for r in rows if r.joules is not None]
        if not known:
            continue
        add("joules", _fsum(r.joules for r in known), window=window)
        # One model errs one way in all its windows: the ends add up.
        add("low", _fsum(r.joules if r.low is None else r.low for r in known), window=window)
        add("high", _fsum(r.joules if r.high is None else r.high for r in known), window=window)
        if all(r.marginal is not None for r in known):
            add("marginal", _fsum(r.marginal for r in known), window=window)
        add("watts", known[-1].watts, window=window)
        devices: dict[tuple[str, str], float] = {}
        # What lies within another device is left out: a sum over devices is the total.
        parts = (p for r in known for p in r.parts if p.within is None)
        for p in (p for p in parts if p.joules is not None):
            key = (p.device, p.pedigree or "unknown")
            devices[key] = devices.get(key, 0.0) + (p.joules or 0.0)
        for (device, pedigree), joules in devices.items():
            add("device", joules, window=window, device=device, pedigree=pedigree)

    def metric(key: str, name: str, text: str, kind: str = "counter") -> Metric:
        return Metric(f"joulesmith_{name}", kind, text, per.get(key, ()))

    return [
        metric("joules", "energy_joules_total", "Energy of closed windows, idle draw included."),
        metric("low", "energy_low_joules_total", "Lower end of the 90 % interval of the energy."),
        metric("high", "energy_high_joules_total", "Upper end of the 90 % interval of the energy."),
        metric("marginal", "energy_marginal_joules_total", "Energy above the idle draw."),
        metric("device", "device_energy_joules_total", "Energy by device and how it is known."),
        metric("seconds", "window_seconds_total", "Wall time of closed windows."),
        metric("windows", "windows_total", "Closed windows."),
        metric("unknown", "windows_unknown_total", "Closed windows whose energy is unknown."),
        metric("watts", "power_watts", "Mean power of the last known window.", "gauge"),
        metric("memory", "peak_memory_bytes", "Peak memory of the last known window.", "gauge"),
    ]


class PrometheusEndpoint:
    """Serves ``http://host:port/metrics`` from a thread. A context manager.

    text: makes the exposition at each request, such as
    ``lambda: render(meter_metrics(meter.readings))``; if it fails, that
    request is answered with 500. port: 0 for any free one, then see `url`. host: this
    machine only unless told otherwise; there is no password.
    Raises `JoulesmithError` when the port is taken.
    """

    def __init__(self, text: Callable[[], str], port: int = 9817, host: str = "127.0.0.1") -> None:
        from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

        class Handler(BaseHTTPRequestHandler):
            server_version = "joulesmith"
            timeout = 10

            def do_GET(self) -> None:
                status, kind = 200, CONTENT_TYPE
                if self.path.split("?", 1)[0] not in ("/", "/metrics"):
                    status, kind, body = 404, "text/plain; charset=utf-8", "see /metrics\n"
                else:
                    try:
                        body = text()
                    except Exception as e:  # a request must not end the program metered
                        status, kind = 500, "text/plain; charset=utf-8"
                        body = f"{type(e).__name__}: {e}\n"
                data = body.encode()
                self.send_response(status)
                self.send_header("Content-Type", kind)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, format: str, *args: Any) -> None:
                pass

        try:
            self._server = ThreadingHTTPServer((host, port), Handler)
        except (OSError, OverflowError) as e:
            raise JoulesmithError(
                f"cannot listen on {host}:{port}: {e}: give another port, or 0 for any"
            ) from e
        self._server.daemon_threads = True
        self.url = f"http://{host}:{self._server.server_address[1]}/metrics"
        self._thread = threading.Thread(
            target=self._server.serve_forever, name="joulesmith-prometheus", daemon=True
        )
        self._thread.start()

    def __enter__(self) -> PrometheusEndpoint:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        """Stops listening."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join(timeout=5.0)


def _fsum(values: Iterable[float | None]) -> float:
    return math.fsum(v for v in values if v is not None)


def _escape(text: str) -> str:
    return text.replace("\\", r"\\").replace("\n", r"\n").replace('"', r"\"")


def _float(value: float) -> str:
    if math.isnan(value):
        return "NaN"
    if math.isinf(value):
        return "+Inf" if value > 0 else "-Inf"
    return repr(float(value))
