"""GGUF's codebook types: IQ3_S, IQ3_XXS, IQ2_S, IQ2_XS, IQ2_XXS, IQ1_S, IQ1_M.

The codebooks are those of the gguf package. Layouts: ggml's ``block_iq3_s`` and its kin.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from joulesmith.compress.quantize.grids import Bytes, Lattice
from joulesmith.compress.quantize.legacy import HALF_MAX, half_bytes, read_half, spread
from joulesmith.compress.quantize.vectors import SIGN_SHIFT, WIDTH, VectorGrid
from joulesmith.errors import MissingExtraError

Raw = NDArray[Any]
_INDEX = (1 << SIGN_SHIFT) - 1


def _of_gguf(name: str) -> Any:
    try:
        import gguf.quants
    except ImportError as e:
        raise MissingExtraError("gguf") from e
    return getattr(gguf.quants, name)


class _Coded(VectorGrid):
    """Index, signs and scales cut apart; a type lays them out.

    ``index`` (rows, blocks, 256 / dim) int64; ``mask`` (rows, blocks, 32) uint8, a bit a sign;
    ``s`` (rows, blocks, groups) uint8; ``d`` (rows, blocks, 2) uint8.
    """

    def codebook(self) -> Tensor:
        found = _of_gguf(self.name)
        found.init_grid()
        return torch.from_numpy(np.array(found.grid, np.float32).reshape(-1, self.dim))

    def write(self, codes: Tensor, lattice: Lattice) -> Bytes:
        c = codes.numpy().reshape(len(codes), -1, self.block // self.dim)
        mask: Raw = (c >> SIGN_SHIFT).astype(np.uint8)
        if self.dim < WIDTH:
            mask = mask[..., 0::2] | mask[..., 1::2] << 4
        d, s = half_bytes(lattice.stored[0]), lattice.stored[1].numpy().astype(np.uint8)
        return self._write(c & _INDEX, mask, s, d, *lattice.stored[2:]).reshape(len(codes), -1)

    def read(self, packed: Bytes, columns: int) -> tuple[Tensor, Lattice]:
        raw = packed.reshape(len(packed), -1, self.block_bytes)
        index, mask, s, d, *shift = self._read(raw)
        if self.dim < WIDTH:
            mask = np.stack([mask & 15, mask >> 4], axis=-1).reshape(index.shape)
        codes = index.astype(np.int32) | mask.astype(np.int32) << SIGN_SHIFT
        stored = (read_half(d), torch.from_numpy(s.astype(np.float32)), *shift)
        return torch.from_numpy(codes.reshape(len(packed), -1)), self.lattice(stored)

    def _write(self, index: Raw, mask: Raw, s: Raw, d: Raw, *shift: Tensor) -> Raw:
        raise NotImplementedError

    def _read(self, raw: Raw) -> tuple[Any, ...]:
        raise NotImplementedError


def _as(x: Raw, kind: str) -> Raw:
    """Bytes of little-endian numbers, and back."""
    return np.ascontiguousarray(x).view(kind)


def _nibbles(x: Raw) -> Raw:
    """(..., n) -> (..., n / 2): neighbours low and high in one byte."""
    pairs: Raw = x[..., 0::2] | x[..., 1::2] << 4
    return pairs


def _halves(raw: Raw) -> Raw:
    """The inverse of `_nibbles`."""
    return np.stack([raw & 15, raw >> 4], axis=-1).reshape(*raw.shape[:-1], -1)


def _join_bits(x: Raw, bits: int, kind: str) -> Raw:
    """(..., n) small numbers -> (...,) one number, the first in its lowest bits."""
    at = np.arange(x.shape[-1], dtype=kind) * bits
    joined: Raw = np.bitwise_or.reduce(x.astype(kind) << at.astype(kind), axis=-1)
    return joined


def _split_bits(x: Raw, bits: int, count: int) -> Raw:
    """The inverse of `_join_bits`."""
    at = (np.arange(count) * bits).astype(x.dtype)
    found: Raw = (x[..., None] >> at) & x.dtype.type((1 << bits) - 1)
    return found


def _sign_words(mask: Raw, s: Raw) -> Raw:
    """Four masks of even parity and a scale in 32 bits: seven bits of each, the eighth follows."""
    word = _join_bits(mask.reshape(*mask.shape[:2], 8, 4) & 127, 7, "<u4")
    return _as(word | s.astype("<u4") << np.uint32(28), "u1")


def _read_sign_words(raw: Raw) -> tuple[Raw, Raw]:
    word = _as(raw, "<u4")
    mask = _even_masks()[_split_bits(word, 7, 4)]
    return mask.reshape(*raw.shape[:2], 32), (word >> np.uint32(28)).astype(np.uint8)


def _even_masks() -> Raw:
    return np.frombuffer(_of_gguf("IQ2_XXS").ksigns, np.uint8)


class IQ3_S(_Coded):  # noqa: N801
    """512 codewords of 4, free signs, groups of 32."""

    name, ggml_type, block_bytes = "IQ3_S", 21, 110
    group, dim, signs, top, unit = 32, 4, "free", 15, 1.0
    largest = HALF_MAX * 15
    landings = spread((9.0, 24.0, 14))

    def _write(self, index: Raw, mask: Raw, s: Raw, d: Raw, *shift: Tensor) -> Raw:
        high = _join_bits((index >> 8).reshape(*index.shape[:2], 8, 8), 1, "u1")
        low = (index & 255).astype(np.uint8)
        return np.concatenate([d, low, high, mask, _nibbles(s)], axis=-1)

    def _read(self, raw: Raw) -> tuple[Any, ...]:
        high = _split_bits(raw[..., 66:74], 1, 8).reshape(*raw.shape[:2], 64)
        index = raw[..., 2:66].astype(np.int32) | high.astype(np.int32) << 8
        return index, raw[..., 74:106], _halves(raw[..., 106:]), raw[..., :2]


class IQ3_XXS(_Coded):  # noqa: N801
    """256 codewords of 4, even signs, groups of 32."""

    name, ggml_type, block_bytes = "IQ3_XXS", 18, 98
    group, dim, signs, top, unit = 32, 4, "even", 15, 0.25
    largest = HALF_MAX * 62
    landings = spread((36.0, 98.0, 14))

    def _write(self, index: Raw, mask: Raw, s: Raw, d: Raw, *shift: Tensor) -> Raw:
        return np.concatenate([d, index.astype(np.uint8), _sign_words(mask, s)], axis=-1)

    def _read(self, raw: Raw) -> tuple[Any, ...]:
        return raw[..., 2:66], *_read_sign_words(raw[..., 66:]), raw[..., :2]


class IQ2_S(_Coded):  # noqa: N801
    """1024 codewords of 8, free signs, groups of 16."""

    name, ggml_type, block_bytes = "IQ2_S", 22, 82
    group, dim, signs, top, unit = 16, 8, "free", 15, 0.125
    largest = HALF_MAX * 43
    landings = spread((24.0, 72.0, 14))

    def _write(self, index: Raw, mask: Raw, s: Raw, d: Raw, *shift: Tensor) -> Raw:
        high = _join_bits((index >> 8).reshape(*index.shape[:2], 8, 4), 2, "u1")
        low = (index & 255).astype(np.uint8)
        return np.concatenate([d, low, mask, high, _nibbles(s)], axis=-1)

    def _read(self, raw: Raw) -> tuple[Any, ...]:
        high = _split_bits(raw[..., 66:74], 2, 4).reshape(*raw.shape[:2], 32)
        index = raw[..., 2:34].astype(np.int32) | high.astype(np.int32) << 8
        return index, raw[..., 34:66], _halves(raw[..., 74:]), raw[..., :2]


class IQ2_XS(_Coded):  # noqa: N801
    """512 codewords of 8, even signs, groups of 16."""

    name, ggml_type, block_bytes = "IQ2_XS", 17, 74
    group, dim, signs, top, unit = 16, 8, "even", 15, 0.125
    largest = HALF_MAX * 43
    landings = IQ2_S.landings

    def _write(self, index: Raw, mask: Raw, s: Raw, d: Raw, *shift: Tensor) -> Raw:
        word = index.astype("<u2") | (mask & 127).astype("<u2") << np.uint16(9)
        return np.concatenate([d, _as(word, "u1"), _nibbles(s)], axis=-1)

    def _read(self, raw: Raw) -> tuple[Any, ...]:
        word = _as(raw[..., 2:66], "<u2")
        return word & 511, _even_masks()[word >> 9], _halves(raw[..., 66:]), raw[..., :2]


class IQ2_XXS(_Coded):  # noqa: N801
    """256 codewords of 8, even signs, groups of 32."""

    name, ggml_type, block_bytes = "IQ2_XXS", 16, 66
    group, dim, signs, top, unit = 32, 8, "even", 15, 0.125
    largest = HALF_MAX * 43
    landings = IQ2_S.landings

    def _write(self, index: Raw, mask: Raw, s: Raw, d: Raw, *shift: Tensor) -> Raw:
        low = index.astype(np.uint8).reshape(*index.shape[:2], 8, 4)
        word = _sign_words(mask, s).reshape(*index.shape[:2], 8, 4)
        body = np.concatenate([low, word], axis=-1).reshape(*index.shape[:2], 64)
        return np.concatenate([d, body], axis=-1)

    def _read(self, raw: Raw) -> tuple[Any, ...]:
        body = raw[..., 2:].reshape(*raw.shape[:2], 8, 8)
        index, word = body[..., :4], body[..., 4:].reshape(*raw.shape[:2], 32)
        return index.reshape(*raw.shape[:2], 32), *_read_sign_words(word), raw[..., :2]


class IQ1_S(_Coded):  # noqa: N801
    """2048 ternary codewords of 8; groups of 32 add an eighth to all levels, or take it."""

    name, ggml_type, block_bytes = "IQ1_S", 19, 50
    group, dim, signs, top, unit = 32, 8, "none", 7, 1.0
    shifts = (0.125, -0.125)
    largest = HALF_MAX
    landings = spread((1.0, 3.0, 10))

    def _write(self, index: Raw, mask: Raw, s: Raw, d: Raw, *shift: Tensor) -> Raw:
        low = (index & 255).astype(np.uint8)
        high = _join_bits((index >> 8).reshape(*index.shape[:2], 8, 4), 3, "<u2")
        minus = (shift[0].numpy() < 0).astype("<u2") << np.uint16(15)
        word = high | s.astype("<u2") << np.uint16(12) | minus
        return np.concatenate([d, low, _as(word, "u1")], axis=-1)

    def _read(self, raw: Raw) -> tuple[Any, ...]:
        word = _as(raw[..., 34:], "<u2")
        high = _split_bits(word, 3, 4).reshape(*raw.shape[:2], 32)
        index = raw[..., 2:34].astype(np.int32) | high.astype(np.int32) << 8
        shift = torch.from_numpy(np.where(word >> 15, -0.125, 0.125).astype(np.float32))
        return index, np.zeros_like(raw[..., 2:34]), word >> 12 & 7, raw[..., :2], shift


class IQ1_M(_Coded):  # noqa: N801
    """The codewords of IQ1_S, each an eighth up and down: 4096 of 8; groups of 16."""

    name, ggml_type, block_bytes = "IQ1_M", 29, 56
    group, dim, signs, top, unit = 16, 8, "none", 7, 1.0
    largest = HALF_MAX
    landings = IQ1_S.landings

    def codebook(self) -> Tensor:
        plain = super().codebook()
        return torch.cat([plain + 0.125, plain - 0.125])

    def _write(self, index: Raw, mask: Raw, s: Raw, d: Raw, *shift: Tensor) -> Raw:
        low = (index & 255).astype(np.uint8)
        high = _nibbles((index >> 8).astype(np.uint8))
        # d goes in pieces of four bits above the scales
        piece = _split_bits(_as(d, "<u2")[..., 0], 4, 4) << np.uint16(12)
        word = _join_bits(s.reshape(*s.shape[:2], 4, 4), 3, "<u2") | piece
        return np.concatenate([low, high, _as(word, "u1")], axis=-1)

    def _read(self, raw: Raw) -> tuple[Any, ...]:
        index = raw[..., :32].astype(np.int32) | _halves(raw[..., 32:48]).astype(np.int32) << 8
        word = _as(raw[..., 48:], "<u2")
        s = _split_bits(word, 3, 4).reshape(*raw.shape[:2], 16)
        d = _as(_join_bits(word >> 12, 4, "<u2")[..., None], "u1")
        return index, np.zeros_like(raw[..., :32]), s, d


GRIDS: dict[str, VectorGrid] = {
    g.name: g for g in (IQ3_S(), IQ3_XXS(), IQ2_S(), IQ2_XS(), IQ2_XXS(), IQ1_S(), IQ1_M())
}
