"""Devices as data: what a processor draws, computes, holds and moves.

Knows no models and no machine at hand. The tables lie beside this file; docs/devices.md
says what their columns mean and how to add a row. Figures are peaks as vendors give them:
dense rates, link rates in one direction. Unknown is None, never 0.
"""

from __future__ import annotations

import dataclasses
import difflib
import re
import unicodedata
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from joulesmith.errors import JoulesmithError
from joulesmith.estimate import rows

KINDS = ("gpu", "tpu", "cpu", "soc", "edge", "fpga")
COVERS = ("card", "module", "package", "superchip", "system")
BASES = ("measured", "assumed")

# Where a device has no units for a format, the program uses the first of these that it has.
# The two 16-bit formats stand in for one another: a program would sooner change the format
# than leave the matrix units. int4 is a format of weights: they are widened to 16 bits.
_SIXTEEN = ("bf16", "fp16", "tf32", "fp32")
FALLBACKS: Mapping[str, tuple[str, ...]] = {
    "fp32": ("fp32",),
    "tf32": ("tf32", "fp32"),
    "fp16": ("fp16", "bf16", "tf32", "fp32"),
    "bf16": _SIXTEEN,
    "fp8": ("fp8", *_SIXTEEN),
    "int8": ("int8", *_SIXTEEN),
    "fp4": ("fp4", "fp8", *_SIXTEEN),
    "int4": _SIXTEEN,
}
_SYNONYMS = {
    "float32": "fp32", "float": "fp32", "f32": "fp32", "float16": "fp16", "half": "fp16",
    "f16": "fp16", "bfloat16": "bf16", "float8": "fp8", "f8": "fp8", "mxfp8": "fp8",
    "i8": "int8", "nvfp4": "fp4", "mxfp4": "fp4", "i4": "int4", "w4a16": "int4",
}  # fmt: skip


@dataclass(frozen=True)
class Device:
    """One device; what it is a row of, docs/devices.md says. Hashable.

    kind: one of `KINDS`; "tpu" is any matrix accelerator that is no GPU. generation: a
    key of `generations`, as far as known. tdp_w: most power it may draw for long, and
    tdp_covers of what: a "card" or "module" with its memory, a "package" without it (with
    it on kind "soc"), a "superchip" with its CPU, or the whole "system" at the wall.
    idle_w: powered, no program on it; idle_basis: "measured" or "assumed".
    *_tflops, int8_tops: dense peaks, 1e12 operations a second; the rate with fp32
    accumulation where that differs. memory_gib: 2**30 bytes. bandwidth_gb_s, link_gb_s:
    1e9 bytes a second, the latter over all links in one direction; link_kind: of what.
    price_usd: to buy; price_usd_per_hour: to rent. unconfirmed: columns whose figures
    were not found in a document when the row was written.
    """

    name: str
    aliases: tuple[str, ...] = ()
    kind: str = ""
    vendor: str = ""
    generation: str = ""
    year: int | None = None
    tdp_w: float | None = None
    tdp_covers: str = ""
    idle_w: float | None = None
    idle_basis: str = ""
    fp32_tflops: float | None = None
    tf32_tflops: float | None = None
    fp16_tflops: float | None = None
    bf16_tflops: float | None = None
    fp8_tflops: float | None = None
    int8_tops: float | None = None
    fp4_tflops: float | None = None
    memory_gib: float | None = None
    memory_kind: str = ""
    bandwidth_gb_s: float | None = None
    link_kind: str = ""
    link_gb_s: float | None = None
    price_usd: float | None = None
    price_usd_per_hour: float | None = None
    source: str = ""
    unconfirmed: tuple[str, ...] = ()
    note: str = ""

    @property
    def memory_bytes(self) -> float | None:
        """Bytes of its memory; None where that depends on what is plugged in."""
        return _scaled(self.memory_gib, 2.0**30)

    @property
    def bandwidth(self) -> float | None:
        """Bytes per second between it and its memory."""
        return _scaled(self.bandwidth_gb_s, 1e9)

    @property
    def link_bandwidth(self) -> float | None:
        """Bytes per second to other devices, all links together, in one direction."""
        return _scaled(self.link_gb_s, 1e9)

    def peak(self, precision: str) -> float | None:
        """Operations per second on dense matrices in ``precision``, or in what stands in
        for it (`runs_as`). None where that is unknown. Raises as `runs_as` does."""
        used = self.runs_as(precision)
        return None if used is None else _scaled(self._tera(used), 1e12)

    def runs_as(self, precision: str) -> str | None:
        """The format that a multiplication in ``precision`` really runs in here: the first
        of `FALLBACKS` with a rate; None where no rate is known. Raises `JoulesmithError`
        for a precision that is none of these."""
        for used in FALLBACKS[precision_name(precision)]:
            if self._tera(used) is not None:
                return used
        return None

    def confirmed(self, column: str) -> bool:
        """Whether the figure of a column is there and was found in a document."""
        return getattr(self, column) not in (None, "") and column not in self.unconfirmed

    def _tera(self, precision: str) -> float | None:
        unit = "tops" if precision == "int8" else "tflops"
        value: float | None = getattr(self, f"{precision}_{unit}")
        return value


@dataclass(frozen=True)
class Generation:
    """Prior of an architecture. node_nm: the process its vendor names, of the compute
    dies; "5" for TSMC's N5, N4, 4N and 4NP. year: of the first product."""

    generation: str
    node_nm: float | None = None
    year: int | None = None
    source: str = ""
    unconfirmed: tuple[str, ...] = ()


@dataclass(frozen=True)
class MemoryKind:
    """Energy of reading or writing a byte: in the memory and its interface, in pJ, with an
    interval. What a board draws more per byte is several times that: the controller, the
    caches and the way through the chip come on top."""

    memory_kind: str
    low_pj_per_byte: float | None = None
    pj_per_byte: float | None = None
    high_pj_per_byte: float | None = None
    year: int | None = None
    source: str = ""
    unconfirmed: tuple[str, ...] = ()


def precision_name(precision: str) -> str:
    """ "bfloat16" -> "bf16"; one of `FALLBACKS`. Raises `JoulesmithError` for any other."""
    key = precision.strip().lower()
    key = _SYNONYMS.get(key, key)
    if key not in FALLBACKS:
        raise JoulesmithError(
            f"unknown precision {precision[:40]!r}: give one of {', '.join(FALLBACKS)}"
        )
    return key


def find(name: str, file: Path | str | None = None) -> Device:
    """The device of a name or an alias, as people and drivers write them: any case and
    punctuation, with or without the vendor ("h100", "NVIDIA A100-SXM4-80GB", "rtx4090"), words in
    any order ("H100 80GB SXM").

    file: a user's table (`load`) that goes before the shipped one.
    Raises `JoulesmithError` with the nearest names where there is none.
    """
    devices = all_devices(file)
    found = _index(devices)
    key = normalise(name)
    for candidate in (key, *(key.removeprefix(v) for v in _vendors(devices))):
        if candidate in found:
            return found[candidate]
    same = {d.name: d for d in devices if _words(name) in map(_words, (d.name, *d.aliases))}
    if len(same) == 1:
        return next(iter(same.values()))
    raise JoulesmithError(f"unknown device {name[:60]!r}: {_nearest(key, found)}")


def all_devices(file: Path | str | None = None) -> tuple[Device, ...]:
    """The shipped devices; with a user's table (`load`), its devices first and in place of
    shipped ones of the same name."""
    if file is None:
        return _shipped()
    own = load(file)
    names = {normalise(d.name) for d in own}
    return (*own, *(d for d in _shipped() if normalise(d.name) not in names))


def load(path: Path | str) -> tuple[Device, ...]:
    """A user's devices: a CSV file with the columns of `Device`, of which only ``name`` is
    needed, and ``like``: a device, shipped or further up, that gives the cells left empty.

    Raises `JoulesmithError` naming the file, the line and the column.
    """
    return _devices(rows.read(path), str(path), _shipped())


@lru_cache(maxsize=1)
def generations() -> Mapping[str, Generation]:
    """Node and year of each architecture, by name."""
    text = rows.shipped("generations.csv")
    parsed = rows.parse(text, "generations.csv", Generation, ("generation", "node_nm", "year"))
    return {cells["generation"]: Generation(**cells) for _, cells in parsed}


@lru_cache(maxsize=1)
def memory_kinds() -> Mapping[str, MemoryKind]:
    """Energy per byte of each kind of memory, by its name in the devices' table."""
    text = rows.shipped("memory_kinds.csv")
    parsed = rows.parse(text, "memory_kinds.csv", MemoryKind, ("memory_kind", "pj_per_byte"))
    return {cells["memory_kind"]: MemoryKind(**cells) for _, cells in parsed}


# Of processors' names as systems give them: "Intel(R) Xeon(R) Gold 6248 CPU @ 2.50GHz".
_NOISE = re.compile(r"\((?:r|tm)\)|[®™]|\bcpu\s*@.*|\b\d{1,3}-core processor\b", re.IGNORECASE)


def normalise(name: str) -> str:
    """A name without case, spaces, punctuation and trademark signs. Idempotent."""
    text = _NOISE.sub(" ", name[:200])
    for _ in range(2):  # folding may undo the first composition
        text = unicodedata.normalize("NFKC", text).casefold()
    return "".join(c for c in text if c.isalnum())


# ---- tables

_COLUMNS = frozenset(f.name for f in dataclasses.fields(Device))


@lru_cache(maxsize=1)
def _shipped() -> tuple[Device, ...]:
    return _devices(rows.shipped("devices.csv"), "devices.csv", ())


def _devices(text: str, name: str, shipped: Iterable[Device]) -> tuple[Device, ...]:
    known = _index(shipped)
    devices: list[Device] = []
    taken: dict[str, str] = {}
    for where, cells in rows.parse(text, name, Device, ("name",), extra=("like",)):
        device = _device(cells, where, known, name)
        for label in (device.name, *device.aliases):
            key = normalise(label)
            if not key:
                raise JoulesmithError(f"{where}: {label!r} has neither a letter nor a digit")
            if taken.setdefault(key, where) != where:
                raise JoulesmithError(f"{where}: {label!r} is a name of {taken[key]} too")
        devices.append(device)
        known |= _index([device])
    return tuple(devices)


def _device(cells: rows.Cells, where: str, known: Mapping[str, Device], name: str) -> Device:
    like = cells.pop("like", None)
    before = known.get(normalise(cells["name"]))
    if before is not None and normalise(before.name) == normalise(cells["name"]):
        cells = {"aliases": before.aliases, **cells}  # found by the same names as before
    if like is None:
        device = Device(**{"source": name, **cells})
    else:
        model = known.get(normalise(like))
        if model is None:
            nearest = _nearest(normalise(like), known)
            raise JoulesmithError(f"{where}, like: unknown device {like[:60]!r}: {nearest}")
        given = {
            "aliases": (),
            "source": f"{name}; the rest as {model.name}: {model.source}",
            "unconfirmed": tuple(c for c in model.unconfirmed if c not in cells),
        }
        device = dataclasses.replace(model, **{**given, **cells})
    for column, words in (("kind", KINDS), ("tdp_covers", COVERS), ("idle_basis", BASES)):
        word = getattr(device, column)
        if word and word not in words:
            raise JoulesmithError(f"{where}, {column}: {word[:40]!r} is none of {', '.join(words)}")
    for column in device.unconfirmed:
        if column not in _COLUMNS:
            raise JoulesmithError(f"{where}, unconfirmed: no column {column[:40]!r}")
    if device.idle_w is not None and device.tdp_w is not None and device.idle_w > device.tdp_w:
        raise JoulesmithError(
            f"{where}, idle_w: {device.idle_w:g} W idle is more than tdp_w, {device.tdp_w:g} W"
        )
    return device


def _index(devices: Iterable[Device]) -> dict[str, Device]:
    """Devices by each normalised name, whole and without the vendor; the first one wins,
    whole names before shortened ones."""
    whole: dict[str, Device] = {}
    short: dict[str, Device] = {}
    for device in devices:
        vendor = normalise(device.vendor)
        for label in (device.name, *device.aliases):
            key = normalise(label)
            whole.setdefault(key, device)
            short.setdefault(key.removeprefix(vendor) or key, device)
    return {**short, **whole}


def _words(name: str) -> tuple[str, ...]:
    """Normalised, in one order."""
    return tuple(sorted(filter(None, (normalise(w) for w in re.split(r"[^\w.]+|_", name[:200])))))


def _vendors(devices: Iterable[Device]) -> set[str]:
    return {normalise(d.vendor) for d in devices} - {""}


def _nearest(key: str, found: Mapping[str, Device]) -> str:
    near = difflib.get_close_matches(key, found, n=4, cutoff=0.6) if key else []
    near += [k for k in found if len(key) > 1 and key in k]
    names = list(dict.fromkeys(found[k].name for k in near))[:4]
    if names:
        return f"did you mean {', '.join(names)}?"
    some = list(dict.fromkeys(d.name for d in found.values()))[:8]
    return f"there are {', '.join(some)} and others, or give a file of your own"


def _scaled(value: float | None, factor: float) -> float | None:
    return None if value is None else value * factor
