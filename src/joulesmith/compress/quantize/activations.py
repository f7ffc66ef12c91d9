"""Inputs of linear layers on eight bits: scales by token or for the whole tensor, and a way
to run a module with them.

The arithmetic is that of the compressed-tensors library, which `transformers` runs and
whose files vLLM loads: ``q = round(clamp(x / scale + zero, low, high))``, read back as
``scale * (q - zero)``. Integers span -128..127 with the largest magnitude at 127.5 (vLLM's
own kernel for dynamic integers lays it at 127, which moves a value by less than half a
step); FP8 is E4M3 with the largest magnitude at 448. Zero is always representable.

Pure functions on tensors, and hooks on modules. Knows no calibration, no search and no
files; which range a static scale should cover is `static_range`'s business alone.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from joulesmith.errors import JoulesmithError
from joulesmith.progress import Tick, silent

Kind = Literal["int8", "fp8"]
Method = Literal["absmax", "percentile", "mse"]

INT_LOW, INT_HIGH = -128.0, 127.0
FP8_MAX = 448.0
"""The largest finite value of E4M3 (OCP 8-bit floating point, "fn" variant: no infinity)."""

_OCTAVES = 48  # 2^-24 .. 2^24: beyond what float16 engines hold on either side
_PER_OCTAVE = 32
_INSIDE = 4  # points at which a bin's error is taken
_CLIPS = 96  # ranges tried, down to 2^-12 of the largest value
_PER_CLIP = 8


@dataclass(frozen=True)
class Scheme:
    """How inputs are rounded.

    kind: "int8" or "fp8" (E4M3). dynamic: a scale for each token, found as it comes;
    else one for the tensor, fixed beforehand. symmetric: no zero point; FP8 has none.
    Raises `JoulesmithError` for asymmetric FP8.
    """

    kind: Kind = "int8"
    dynamic: bool = True
    symmetric: bool = True

    def __post_init__(self) -> None:
        if self.kind == "fp8" and not self.symmetric:
            raise JoulesmithError("FP8 inputs have no zero point: symmetric only")


# -- scales -----------------------------------------------------------------------


def scale_of(low: Tensor, high: Tensor, scheme: Scheme) -> tuple[Tensor, Tensor | None]:
    """Ends of a range, any equal shapes -> scale and zero point of that shape.

    The range is widened to hold 0. The zero point is a whole number in float (None where
    symmetric). A range of nothing but 0 has the dtype's epsilon as its scale.
    """
    low, high = low.clamp(max=0), high.clamp(min=0)
    if scheme.symmetric:
        top = FP8_MAX if scheme.kind == "fp8" else (INT_HIGH - INT_LOW) / 2
        return _positive(torch.maximum(-low, high) / top), None
    scale = _positive((high - low) / (INT_HIGH - INT_LOW))
    return scale, (INT_LOW - low / scale).clamp(INT_LOW, INT_HIGH).round()


def _positive(scale: Tensor) -> Tensor:
    least = torch.full_like(scale, torch.finfo(scale.dtype).eps)
    return torch.where(scale == 0, least, scale)


def token_scale(x: Tensor, scheme: Scheme) -> tuple[Tensor, Tensor | None]:
    """x (..., columns) -> scale and zero point of each token, (..., 1)."""
    low, high = torch.aminmax(x, dim=-1, keepdim=True)
    return scale_of(low, high, scheme)


def round_to(x: Tensor, scale: Tensor, zero: Tensor | None, kind: Kind) -> Tensor:
    """x -> what it reads back as after rounding, same shape and dtype.

    scale, zero: broadcast against x.
    """
    u = x / scale
    if kind == "fp8":
        return u.clamp_(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn).to(x.dtype).mul_(scale)
    if zero is None:
        return u.clamp_(INT_LOW, INT_HIGH).round_().mul_(scale)
    return u.add_(zero).clamp_(INT_LOW, INT_HIGH).round_().sub_(zero).mul_(scale)


# -- static ranges ----------------------------------------------------------------


@dataclass
class Histogram:
    """Counts of values by sign and magnitude, streamed; exact least and largest value.

    Bins are 32 to the octave from 2^-24 to 2^24, values beyond in the outermost bins, so
    that values a thousand times the usual cost no resolution, and histograms of parts add
    up to that of the whole.
    """

    counts: Tensor = field(
        default_factory=lambda: torch.zeros(2, _OCTAVES * _PER_OCTAVE, dtype=torch.float64)
    )
    low: float = 0.0
    high: float = 0.0

    def add(self, x: Tensor) -> None:
        """Count all values of x, any shape. Raises `JoulesmithError` for NaN or infinity."""
        if not x.numel():
            return
        low, high = (float(v) for v in torch.aminmax(x))
        if not (math.isfinite(low) and math.isfinite(high)):
            raise JoulesmithError("activations hold NaN or infinity: check the model and the text")
        self.low, self.high = min(self.low, low), max(self.high, high)
        flat = x.detach().float().flatten()
        last = self.counts.shape[1] - 1
        # zeros land in the lowest bin, where any rounding is free
        where = flat.abs().log2_().add_(_OCTAVES / 2).mul_(_PER_OCTAVE).floor_()
        at = where.clamp_(0, last).long().add_((flat < 0).long() * (last + 1))
        found = torch.bincount(at, minlength=2 * (last + 1))
        self.counts += found.view(2, -1).to(self.counts)

    def points(self) -> tuple[Tensor, Tensor]:
        """Values that stand for the counted ones, ascending in each bin, and their weights."""
        sign, at = self.counts.nonzero(as_tuple=True)
        inside = (torch.arange(_INSIDE, dtype=torch.float64) + 0.5) / _INSIDE
        start = torch.exp2(at.double() / _PER_OCTAVE - _OCTAVES / 2)
        size = start[:, None] * (1 + inside * (2 ** (1 / _PER_OCTAVE) - 1))
        value = torch.where(sign[:, None] == 1, -size, size).clamp(self.low, self.high)
        weight = self.counts[sign, at][:, None].expand_as(value) / _INSIDE
        return value.flatten(), weight.flatten()


def static_range(
    seen: Histogram, scheme: Scheme, method: Method = "mse", share: float = 0.9999
) -> tuple[float, float]:
    """The range, low <= 0 <= high, that a static scale should cover.

    absmax: all that was seen. percentile: the least range that leaves at most 1 - share of
    the values outside (on each side its half where asymmetric). mse: of ranges from the whole
    down to 2^-12 of it, eight to the octave, the one of least summed squared error; where
    asymmetric, both ends together, then each alone. Symmetric ranges have low = -high.
    Raises `JoulesmithError` where nothing was counted or share is not in (0, 1].
    """
    if not bool(seen.counts.any()):
        raise JoulesmithError("no activations were seen: calibrate before choosing a range")
    if not 0 < share <= 1:
        raise JoulesmithError(f"the share inside a range is above 0 and at most 1, not {share:g}")
    low, high = seen.low, seen.high
    if scheme.symmetric:
        high = max(-low, high)
        low = -high
    if method == "absmax":
        return low, high
    value, weight = seen.points()
    if method == "percentile":
        if scheme.symmetric:
            top = _quantile(value.abs(), weight, share)
            return -top, top
        half = (1 - share) / 2
        return (
            -max(0.0, _quantile(-value, weight, 1 - half)),
            max(0.0, _quantile(value, weight, 1 - half)),
        )

    def error(a: float, b: float) -> float:
        ends = torch.tensor([a, b], dtype=torch.float64)
        scale, zero = scale_of(ends[0], ends[1], scheme)
        return float((weight * (value - round_to(value, scale, zero, scheme.kind)).square()).sum())

    shares = [2 ** (-i / _PER_CLIP) for i in range(_CLIPS + 1)]
    low, high = min(((low * s, high * s) for s in shares), key=lambda r: error(*r))
    if not scheme.symmetric:
        low = min((low * s for s in shares), key=lambda a: error(a, high))
        high = min((high * s for s in shares), key=lambda b: error(low, b))
    return low, high


def _quantile(value: Tensor, weight: Tensor, share: float) -> float:
    order = value.argsort()
    below = weight[order].cumsum(0)
    at = int(torch.searchsorted(below, share * below[-1]))
    return float(value[order[min(at, len(order) - 1)]])


# -- running ----------------------------------------------------------------------


@dataclass(frozen=True)
class InputQuantizer:
    """What happens to one linear layer's inputs: ``__call__`` rounds them.

    scale, zero: of a static scheme (zero only where asymmetric); None where dynamic.
    Raises `JoulesmithError` where scheme and scale do not belong together.
    """

    scheme: Scheme
    scale: float | None = None
    zero: float | None = None

    def __post_init__(self) -> None:
        if self.scheme.dynamic != (self.scale is None):
            raise JoulesmithError("static inputs need a scale, and dynamic ones have none")
        if self.scale is not None and not (math.isfinite(self.scale) and self.scale > 0):
            raise JoulesmithError(f"the scale of static inputs is {self.scale}: not above 0")
        if (self.zero is not None) != (not self.scheme.symmetric and not self.scheme.dynamic):
            raise JoulesmithError("a zero point belongs to static asymmetric inputs, and only them")

    def __call__(self, x: Tensor) -> Tensor:
        """x (..., columns) -> rounded, same shape and dtype."""
        if self.scale is None:
            return round_to(x, *token_scale(x, self.scheme), self.scheme.kind)
        scale = torch.tensor(self.scale, dtype=x.dtype, device=x.device)
        zero = None if self.zero is None else torch.tensor(self.zero, dtype=x.dtype)
        return round_to(x, scale, zero, self.scheme.kind)


def static_quantizer(
    seen: Histogram, scheme: Scheme, method: Method = "mse", share: float = 0.9999
) -> InputQuantizer:
    """The quantizer of a static scheme from what was seen; its scale is a float16, as files
    hold it. Raises as `static_range`, and where the range is beyond float16."""
    low, high = (torch.tensor(v) for v in static_range(seen, scheme, method, share))
    scale, zero = scale_of(low, high, scheme)
    # The least float16 is a scale too small to matter: all inputs are 0 there.
    stored = float(scale.clamp(min=2.0**-24).half())
    if not math.isfinite(stored):
        raise JoulesmithError("activations are beyond what a float16 scale covers")
    return InputQuantizer(scheme, stored, None if zero is None else float(zero))


@contextmanager
def quantized_inputs(
    module: torch.nn.Module, quantizers: Mapping[str, InputQuantizer]
) -> Iterator[None]:
    """While open, the named linear layers of ``module`` read rounded inputs.

    quantizers: dotted module name -> what rounds its inputs. Gradients are not defined.
    Raises `JoulesmithError` for a name that is no linear layer.
    """
    handles = []
    try:
        for name, quantizer in quantizers.items():
            layer = dict(module.named_modules()).get(name)
            if not isinstance(layer, torch.nn.Linear):
                raise JoulesmithError(f"{name} is no linear layer of {type(module).__name__}")

            def hook(_: object, args: tuple[Tensor, ...], q: InputQuantizer = quantizer) -> object:
                return (q(args[0]), *args[1:])

            handles.append(layer.register_forward_pre_hook(hook))
        yield
    finally:
        for handle in handles:
            handle.remove()


def observe(
    module: torch.nn.Module, names: list[str], inputs: list[Tensor], progress: Tick = silent
) -> dict[str, Histogram]:
    """Histograms of the named linear layers' inputs over ``inputs`` (token ids, (b, n) each)."""
    found = {name: Histogram() for name in names}
    modules = dict(module.named_modules())
    handles = []
    try:
        for name in names:

            def hook(_: object, args: tuple[Tensor, ...], seen: Histogram = found[name]) -> None:
                seen.add(args[0])

            handles.append(modules[name].register_forward_pre_hook(hook))
        with torch.no_grad():
            for i, ids in enumerate(inputs):
                module(input_ids=ids, use_cache=False)
                progress((i + 1) / len(inputs))
    finally:
        for handle in handles:
            handle.remove()
    return found
