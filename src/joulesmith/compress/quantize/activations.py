"""Inputs of linear layers on eight bits: scales by token or for the whole tensor, and a way
to run a module with them.

The arithmetic is that of the compressed-tensors library, which `transformers` runs and
whose files vLLM loads: ``q = round(clamp(x / scale + zero, low, high))``, read back as
``scale * (q - zero)``. Integers span -128..127 with the largest magnitude at 127.5 (vLLM's
own kernel for dynamic integers lays it at 127, which moves a value by less than half a
step); FP8 is E4M3 with the largest magnitude at 448. Zero is always representable.

Pure functions on tensors, and hooks on modules. Knows no calibration, no search and no
files; which range a static scale should cover is the business of `ranges`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from joulesmith.compress.quantize import entropy, ranges
from joulesmith.compress.quantize.histograms import Histogram
from joulesmith.compress.quantize.tiles import Levels, Range
from joulesmith.errors import JoulesmithError
from joulesmith.progress import Tick, silent

Kind = Literal["int8", "fp8"]
Method = Literal["absmax", "percentile", "mse", "kl"]

INT_LOW, INT_HIGH = -128.0, 127.0
FP8_MAX = 448.0
"""The largest finite value of E4M3 (OCP 8-bit floating point, "fn" variant: no infinity)."""

BINS = 1 << 15
"""Of histograms of inputs: an input whose largest value is a thousand times the usual still
shows the usual ones in dozens of bins."""
RATIOS = (*ranges.RATIOS, *(0.05 * 2 ** (-k / 4) for k in range(1, 27)))
"""Ranges tried, as shares of the largest: inputs ask for narrower ones than weights do."""


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


# -- static ranges ----------------------------------------------------------------


def levels_of(scheme: Scheme) -> Levels:
    """What a scaled input may be, in the words of `ranges`: integers from 0 where there is a
    zero point."""
    if scheme.kind == "fp8":
        return Levels(-FP8_MAX, FP8_MAX, False, lambda u: round_to(u, torch.ones(()), None, "fp8"))
    return Levels.integers(8, affine=not scheme.symmetric)


def static_quantizer(
    seen: Histogram, scheme: Scheme, method: Method = "mse", share: float = 0.9999
) -> InputQuantizer:
    """The quantizer of a static scheme from what was seen.

    Its range is `ranges.absmax`, `ranges.percentile` with ``share`` inside, `ranges.mse_grid` or
    `entropy.kl`; its scale is a float16, as files hold it. Raises `JoulesmithError` as
    they do, and where the range is beyond float16.
    """
    ways: Mapping[Method, Callable[[], Range]] = {
        "absmax": lambda: ranges.absmax(seen, levels_of(scheme)),
        "percentile": lambda: ranges.percentile(seen, levels_of(scheme), keep=share),
        "mse": lambda: ranges.mse_grid(seen, levels_of(scheme), ratios=RATIOS),
        "kl": lambda: entropy.kl(seen, levels_of(scheme)),
    }
    found = ways[method]()
    # The least float16 is a scale too small to matter: all inputs are 0 there.
    stored = float(found.step.clamp(min=2.0**-24).half())
    if not math.isfinite(stored):
        raise JoulesmithError("activations are beyond what a float16 scale covers")
    zero = None if scheme.symmetric else float(found.zero) + INT_LOW
    return InputQuantizer(scheme, stored, zero)


def observe(
    module: torch.nn.Module, names: list[str], inputs: list[Tensor], progress: Tick = silent
) -> dict[str, Histogram]:
    """Histograms of the named linear layers' inputs over ``inputs`` (token ids, (b, n) each)."""
    found = {name: Histogram(bins=BINS) for name in names}
    modules = dict(module.named_modules())
    handles = []
    try:
        for name in names:

            def hook(_: object, args: tuple[Tensor, ...], seen: Histogram = found[name]) -> None:
                seen.observe(args[0])

            handles.append(modules[name].register_forward_pre_hook(hook))
        with torch.no_grad():
            for i, ids in enumerate(inputs):
                module(input_ids=ids, use_cache=False)
                progress((i + 1) / len(inputs))
    finally:
        for handle in handles:
            handle.remove()
    return found
