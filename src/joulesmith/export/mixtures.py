"""Which type each tensor gets in the files that people download ("Q4_K_M", "Q8_0", ...).

Facts restated from llama.cpp's quantizer (src/llama-quant.cpp, release b11549) for
dense Llama-like models, so that reference points are what users know by these names.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from joulesmith.errors import JoulesmithError

if TYPE_CHECKING:
    from joulesmith.models import TensorRef

MARKS = ("Q8_0", "Q6_K", "Q5_K_M", "Q4_K_M", "Q4_0")
"""Reference points of every run."""

MIXTURES = ("Q8_0", "Q6_K", "Q5_K_M", "Q4_K_M", "Q5_0", "Q4_0", "IQ4_NL")

_BASE = {"Q5_K_M": "Q5_K", "Q4_K_M": "Q4_K"}
# Super-blocks hold 256 weights; rows that are no multiple of that fall back.
_FALLBACK = {"Q4_K": "Q5_0", "Q5_K": "Q5_1", "Q6_K": "Q8_0", "Q3_K": "IQ4_NL"}
_SUPER = 256


def mixture(name: str, matrices: Sequence[TensorRef], layers: int) -> dict[str, str]:
    """Tensor name -> type, as ``llama-quantize`` with an importance matrix would choose.

    Raises `JoulesmithError` for a name that is not in `MIXTURES`.
    """
    if name not in MIXTURES:
        raise JoulesmithError(f"no such mixture: {name}: known are {', '.join(MIXTURES)}")
    tied = not any(m.role == "output" for m in matrices)
    return {m.name: _one(name, m, layers, tied) for m in matrices}


def _one(name: str, ref: TensorRef, layers: int, tied: bool) -> str:
    base = _BASE.get(name, name)
    kind = base
    columns = ref.shape[1]
    if ref.role == "output" or (tied and ref.role == "token_embd"):
        # The head is kept at 6 bits, or at 8 where a row holds no whole super-block.
        kind = "Q8_0" if base == "Q8_0" or columns % _block(base) else "Q6_K"
    elif (
        name in ("Q4_K_M", "Q5_K_M")
        and ref.role in ("attn_v", "ffn_down")
        and ref.layer is not None
        and _more_bits(ref.layer, layers)
    ):
        kind = "Q6_K"
    return _FALLBACK[kind] if kind in _FALLBACK and columns % _SUPER else kind


def _more_bits(layer: int, layers: int) -> bool:
    """The first and last eighth of the layers, and every third between."""
    eighth = layers // 8
    return layer < eighth or layer >= 7 * layers // 8 or (layer - eighth) % 3 == 2


def _block(kind: str) -> int:
    return _SUPER if kind.endswith("_K") else 32
