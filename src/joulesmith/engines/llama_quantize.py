"""llama.cpp's own quantizer, for reference points: what `llama-quantize` would have stored."""

from __future__ import annotations

import ctypes as C
import os

import numpy as np
from numpy.typing import NDArray

from joulesmith.engines.llama_abi import find_library
from joulesmith.errors import EngineError


class LlamaQuantizer:
    """Calls ``ggml_quantize_chunk`` of the engine's library, in this process.

    The library checks nothing, so types, shapes and finiteness are checked here.
    """

    def __init__(self, library: str | os.PathLike[str] | None = None) -> None:
        self._c = C.CDLL(str(find_library(library)))
        self._c.ggml_quantize_chunk.restype = C.c_size_t
        self._c.ggml_quantize_chunk.argtypes = [
            C.c_int,
            C.c_void_p,
            C.c_void_p,
            C.c_int64,
            C.c_int64,
            C.c_int64,
            C.c_void_p,
        ]
        self._c.ggml_quantize_init.argtypes = [C.c_int]

    def pack(
        self,
        weight: NDArray[np.float32],
        type_name: str,
        importance: NDArray[np.float32] | None = None,
    ) -> NDArray[np.uint8]:
        """weight (rows, columns), importance (columns,) mean squared inputs -> uint8 (rows, bytes).

        Raises `EngineError` for a type that does not fit or weights that are not finite.
        """
        import gguf

        w = np.ascontiguousarray(weight, np.float32)
        kind = gguf.GGMLQuantizationType[type_name]
        block, block_bytes = gguf.GGML_QUANT_SIZES[kind]
        rows, columns = w.shape
        if columns % block:
            raise EngineError(
                f"rows of {columns} weights are no whole number of {type_name} blocks"
            )
        if not np.isfinite(w).all():
            raise EngineError("weights that are not finite cannot be quantized")
        scale = None if importance is None else np.ascontiguousarray(importance, np.float32)
        if scale is not None and scale.shape != (columns,):
            raise EngineError(f"importance has shape {scale.shape}, expected ({columns},)")
        out = np.zeros((rows, columns // block * block_bytes), np.uint8)
        self._c.ggml_quantize_init(int(kind))
        written = self._c.ggml_quantize_chunk(
            int(kind),
            w.ctypes.data,
            out.ctypes.data,
            0,
            rows,
            columns,
            None if scale is None else scale.ctypes.data,
        )
        if written != out.nbytes:
            raise EngineError(
                f"llama.cpp wrote {written} bytes of {type_name}, expected {out.nbytes}"
            )
        return out
