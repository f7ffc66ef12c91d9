"""What one weight may be, times its scale, in the small-float and normal-float types.

Levels and their bit patterns, generated from the types' definitions. Knows no scales.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from scipy.special import ndtri
from torch import Tensor


@dataclass(frozen=True)
class Element:
    """What one weight may be, times its scale.

    levels: ascending. patterns: the stored bits of each level. dtype: torch's own type of
    these values, if it has one. landings: where the largest weight of a group is tried.
    """

    name: str
    bits: int
    levels: tuple[float, ...]
    patterns: tuple[int, ...]
    landings: tuple[float, ...]
    dtype: torch.dtype | None = None


def minifloat(
    name: str, exponent: int, mantissa: int, top: float, dtype: torch.dtype | None = None
) -> Element:
    """A float of sign, ``exponent`` and ``mantissa`` bits whose largest value is ``top``.

    Bias 2^(exponent - 1) - 1, with subnormals (OCP 8-bit Floating Point v1.0;
    Microscaling Formats v1.0, section 5.3). Patterns beyond ``top`` (NaN, infinity) and
    negative zero are not levels.
    """
    bias = (1 << (exponent - 1)) - 1
    positive = []
    for pattern in range(1 << (exponent + mantissa)):
        e, m = pattern >> mantissa, pattern & ((1 << mantissa) - 1)
        value = (m + (1 << mantissa) * (e > 0)) * 2.0 ** (max(e, 1) - bias - mantissa)
        if value <= top:
            positive.append(value)
    sign = 1 << (exponent + mantissa)
    n = len(positive)
    # FP8's error is ragged in the step and alike in every octave; few bits may want clipping
    reach = (0.5, 1.1, 48) if exponent > 2 else (0.45, 1.7, 28)
    return Element(
        name,
        1 + exponent + mantissa,
        (*(-v for v in reversed(positive[1:])), *positive),
        (*(sign | k for k in range(n - 1, 0, -1)), *range(n)),
        tuple(np.linspace(reach[0] * top, reach[1] * top, reach[2]).tolist()),
        dtype,
    )


def normal_float(bits: int = 4) -> Element:
    """NF4 and its kin: quantiles of the standard normal, scaled to [-1, 1], zero among them.

    QLoRA (Dettmers et al. 2023), equation 4 and appendix E: evenly spaced shares, eight
    for the positive half and seven for the negative one of four bits, meet in one zero.
    The outermost share leaves out half of a sixteenth's and of a fifteenth's mean. Its
    seven digits and the float32 spacing are those behind the published table.
    """
    half = 1 << (bits - 1)
    outer = round(1 - (1 / (4 * half) + 1 / (4 * half - 2)) / 2, 7)

    def quantiles(n: int) -> Tensor:
        # n of them, without the zero in the middle
        shares = torch.linspace(outer, 0.5, n + 1, dtype=torch.float32)[:-1]
        return torch.from_numpy(ndtri(shares.double().numpy()))

    ends = quantiles(half), torch.zeros(1), -quantiles(half - 1)
    found = torch.cat(ends).float().sort().values
    levels = tuple((found / found[-1]).tolist())
    landings = tuple(np.linspace(0.75, 1.8, 28).tolist())
    return Element(f"NF{bits}", bits, levels, tuple(range(2 * half)), landings)


E4M3 = minifloat("FP8-E4M3", 4, 3, 448.0, torch.float8_e4m3fn)
E5M2 = minifloat("FP8-E5M2", 5, 2, 57344.0, torch.float8_e5m2)
E2M3 = minifloat("FP6-E2M3", 2, 3, 7.5)
E3M2 = minifloat("FP6-E3M2", 3, 2, 28.0)
E2M1 = minifloat("FP4-E2M1", 2, 1, 6.0)
NF4 = normal_float()
ELEMENTS = {e.name: e for e in (E4M3, E5M2, E2M3, E3M2, E2M1, NF4)}
