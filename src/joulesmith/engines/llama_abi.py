"""llama.cpp's C interface, the part that joulesmith calls, declared for ctypes.

The structures are those of the llama.cpp inside xllamacpp 2026.10.11549 (``llama.h``,
``ggml.h``, ``ggml-backend.h``). Passing a struct of another layout by value corrupts
memory without a word, so `open_library` compares the defaults that the library
returns with the documented ones, field by field, before anything else is called.
Knows no models and no processes.
"""

from __future__ import annotations

import ctypes as C
import importlib.metadata
import importlib.util
import os
import sys
from collections import deque
from pathlib import Path
from typing import Any

from joulesmith.errors import EngineError, MissingExtraError

LIBRARY_VARIABLE = "JOULESMITH_LLAMA_LIB"
PACKAGE = "xllamacpp"

Pointer = C.c_void_p
LogCallback = C.CFUNCTYPE(None, C.c_int, C.c_char_p, C.c_void_p)
_LOG_ERROR = 4  # GGML_LOG_LEVEL_ERROR
FLASH_ATTENTION = 1  # LLAMA_FLASH_ATTN_TYPE_ENABLED

# enum ggml_type, without the types that hold no weights
GGML_TYPES: dict[str, int] = {
    "F32": 0, "F16": 1, "Q4_0": 2, "Q4_1": 3, "Q5_0": 6, "Q5_1": 7, "Q8_0": 8,
    "Q2_K": 10, "Q3_K": 11, "Q4_K": 12, "Q5_K": 13, "Q6_K": 14,
    "IQ2_XXS": 16, "IQ2_XS": 17, "IQ3_XXS": 18, "IQ1_S": 19, "IQ4_NL": 20,
    "IQ3_S": 21, "IQ2_S": 22, "IQ4_XS": 23, "IQ1_M": 29, "BF16": 30,
    "TQ1_0": 34, "TQ2_0": 35, "MXFP4": 39, "NVFP4": 40, "Q1_0": 41, "Q2_0": 42,
}  # fmt: skip


class ModelParams(C.Structure):
    """``struct llama_model_params``."""

    _fields_ = [
        ("devices", Pointer),
        ("tensor_buft_overrides", Pointer),
        ("n_gpu_layers", C.c_int32),
        ("split_mode", C.c_int),
        ("load_mode", C.c_int),
        ("lazy_mode", C.c_int),
        ("main_gpu", C.c_int32),
        ("tensor_split", Pointer),
        ("progress_callback", Pointer),
        ("progress_callback_user_data", Pointer),
        ("kv_overrides", Pointer),
        ("vocab_only", C.c_bool),
        ("check_tensors", C.c_bool),
        ("use_extra_bufts", C.c_bool),
        ("no_host", C.c_bool),
        ("no_alloc", C.c_bool),
        ("load_mtp", C.c_bool),
    ]


class ContextParams(C.Structure):
    """``struct llama_context_params``."""

    _fields_ = [
        ("n_ctx", C.c_uint32),
        ("n_batch", C.c_uint32),
        ("n_ubatch", C.c_uint32),
        ("n_seq_max", C.c_uint32),
        ("n_rs_seq", C.c_uint32),
        ("n_outputs_max", C.c_uint32),
        ("n_outputs_max_per_seq", C.c_uint32),
        ("n_threads", C.c_int32),
        ("n_threads_batch", C.c_int32),
        ("ctx_type", C.c_int),
        ("rope_scaling_type", C.c_int),
        ("pooling_type", C.c_int),
        ("attention_type", C.c_int),
        ("flash_attn_type", C.c_int),
        ("rope_freq_base", C.c_float),
        ("rope_freq_scale", C.c_float),
        ("yarn_ext_factor", C.c_float),
        ("yarn_attn_factor", C.c_float),
        ("yarn_beta_fast", C.c_float),
        ("yarn_beta_slow", C.c_float),
        ("yarn_orig_ctx", C.c_uint32),
        ("defrag_thold", C.c_float),
        ("cb_eval", Pointer),
        ("cb_eval_user_data", Pointer),
        ("type_k", C.c_int),
        ("type_v", C.c_int),
        ("moe_cache_size", C.c_size_t),
        ("abort_callback", Pointer),
        ("abort_callback_data", Pointer),
        ("embeddings", C.c_bool),
        ("offload_kqv", C.c_bool),
        ("no_perf", C.c_bool),
        ("op_offload", C.c_bool),
        ("swa_full", C.c_bool),
        ("kv_unified", C.c_bool),
        ("samplers", Pointer),
        ("n_samplers", C.c_size_t),
        ("ctx_other", Pointer),
    ]


class Batch(C.Structure):
    """``struct llama_batch``."""

    _fields_ = [
        ("n_tokens", C.c_int32),
        ("token", Pointer),
        ("embd", Pointer),
        ("pos", Pointer),
        ("n_seq_id", Pointer),
        ("seq_id", Pointer),
        ("logits", Pointer),
    ]


class InitParams(C.Structure):
    """``struct ggml_init_params``."""

    _fields_ = [("mem_size", C.c_size_t), ("mem_buffer", Pointer), ("no_alloc", C.c_bool)]


class TensorHead(C.Structure):
    """The leading fields of ``struct ggml_tensor``."""

    _fields_ = [
        ("type", C.c_int),
        ("buffer", Pointer),
        ("ne", C.c_int64 * 4),
        ("nb", C.c_size_t * 4),
    ]


# Defaults as llama_model_default_params() and llama_context_default_params() state them;
# a field left out here is zero. The non-zero ones pin every offset between them.
_MODEL_DEFAULTS = {"n_gpu_layers": -1, "split_mode": 1, "load_mode": -1, "lazy_mode": 1,
                   "use_extra_bufts": True}  # fmt: skip
_CONTEXT_DEFAULTS = {
    "n_ctx": 512, "n_batch": 2048, "n_ubatch": 512, "n_seq_max": 1, "n_outputs_max_per_seq": 1,
    "n_threads": 4, "n_threads_batch": 4, "rope_scaling_type": -1, "pooling_type": -1,
    "attention_type": -1, "flash_attn_type": -1, "yarn_ext_factor": -1.0,
    "yarn_attn_factor": -1.0, "yarn_beta_fast": -1.0, "yarn_beta_slow": -1.0,
    "defrag_thold": -1.0, "type_k": 1, "type_v": 1, "offload_kqv": True, "no_perf": True,
    "op_offload": True, "swa_full": True,
}  # fmt: skip

_SIZE, _I64, _I32, _INT, _STR = C.c_size_t, C.c_int64, C.c_int32, C.c_int, C.c_char_p
_SIGNATURES: dict[str, tuple[Any, list[Any]]] = {
    "llama_backend_init": (None, []),
    "llama_log_set": (None, [LogCallback, Pointer]),
    "llama_version": (_STR, []),
    "llama_print_system_info": (_STR, []),
    "llama_model_default_params": (ModelParams, []),
    "llama_context_default_params": (ContextParams, []),
    "llama_model_load_from_file": (Pointer, [_STR, ModelParams]),
    "llama_model_free": (None, [Pointer]),
    "llama_model_get_vocab": (Pointer, [Pointer]),
    "llama_model_size": (C.c_uint64, [Pointer]),
    "llama_vocab_n_tokens": (_I32, [Pointer]),
    "llama_init_from_model": (Pointer, [Pointer, ContextParams]),
    "llama_free": (None, [Pointer]),
    "llama_adapter_lora_init": (Pointer, [Pointer, _STR]),
    "llama_set_adapters_lora": (_I32, [Pointer, Pointer, _SIZE, Pointer]),
    "llama_get_memory": (Pointer, [Pointer]),
    "llama_memory_clear": (None, [Pointer, C.c_bool]),
    "llama_batch_get_one": (Batch, [Pointer, _I32]),
    "llama_decode": (_I32, [Pointer, Batch]),
    "llama_get_logits": (Pointer, [Pointer]),
    "llama_get_logits_ith": (Pointer, [Pointer, _I32]),
    "ggml_init": (Pointer, [InitParams]),
    "ggml_free": (None, [Pointer]),
    "ggml_tensor_overhead": (_SIZE, []),
    "ggml_graph_overhead_custom": (_SIZE, [_SIZE, C.c_bool]),
    "ggml_new_graph_custom": (Pointer, [Pointer, _SIZE, C.c_bool]),
    "ggml_build_forward_expand": (None, [Pointer, Pointer]),
    "ggml_new_tensor_2d": (Pointer, [Pointer, _INT, _I64, _I64]),
    "ggml_mul_mat": (Pointer, [Pointer, Pointer, Pointer]),
    "ggml_nbytes": (_SIZE, [Pointer]),
    "ggml_blck_size": (_I64, [_INT]),
    "ggml_type_size": (_SIZE, [_INT]),
    "ggml_type_name": (_STR, [_INT]),
    "ggml_quantize_requires_imatrix": (C.c_bool, [_INT]),
    "ggml_quantize_chunk": (_SIZE, [_INT, Pointer, Pointer, _I64, _I64, _I64, Pointer]),
    "ggml_backend_dev_by_type": (Pointer, [_INT]),
    "ggml_backend_dev_backend_reg": (Pointer, [Pointer]),
    "ggml_backend_dev_buffer_type": (Pointer, [Pointer]),
    "ggml_backend_dev_supports_op": (C.c_bool, [Pointer, Pointer]),
    "ggml_backend_dev_init": (Pointer, [Pointer, _STR]),
    "ggml_backend_reg_get_proc_address": (Pointer, [Pointer, _STR]),
    "ggml_backend_free": (None, [Pointer]),
    "ggml_backend_graph_compute": (_INT, [Pointer, Pointer]),
    "ggml_backend_buft_name": (_STR, [Pointer]),
    "ggml_backend_buft_alloc_buffer": (Pointer, [Pointer, _SIZE]),
    "ggml_backend_buft_get_alignment": (_SIZE, [Pointer]),
    "ggml_backend_buffer_free": (None, [Pointer]),
    "ggml_backend_buffer_get_base": (Pointer, [Pointer]),
    "ggml_backend_buffer_set_usage": (None, [Pointer, _INT]),
    "ggml_backend_tensor_alloc": (_INT, [Pointer, Pointer, Pointer]),
    "ggml_backend_tensor_set": (None, [Pointer, Pointer, _SIZE, _SIZE]),
    "ggml_backend_tensor_get": (None, [Pointer, Pointer, _SIZE, _SIZE]),
}


_CALLBACKS: list[Any] = []


class Library:
    """An opened llama.cpp. Functions are attributes of ``c``; errors it logged are kept."""

    def __init__(self, path: Path, c: C.CDLL) -> None:
        self.path = path
        self.c = c
        self.errors: deque[str] = deque(maxlen=8)
        callback = LogCallback(self._keep)
        # a library is never unloaded and may log at any time, so this is never freed
        _CALLBACKS.append(callback)
        c.llama_log_set(callback, None)
        c.llama_backend_init()

    def _keep(self, level: int, text: bytes | None, _: object) -> None:
        if level == _LOG_ERROR and text:
            line = text.decode("utf-8", "replace").strip()
            if line:
                self.errors.append(line)
                # also on stderr, so that it survives an abort() of this process
                sys.stderr.write(line + "\n")
                sys.stderr.flush()

    def take_errors(self) -> str:
        """The error lines logged since the last call, joined into one."""
        text = "; ".join(self.errors)
        self.errors.clear()
        return text

    @property
    def version(self) -> str:
        """llama.cpp's own version string."""
        return (self.c.llama_version() or b"").decode("utf-8", "replace")

    @property
    def system_info(self) -> str:
        """What the library was compiled for (``AVX2 = 1 | ...``)."""
        return (self.c.llama_print_system_info() or b"").decode("utf-8", "replace").strip()


def package_version() -> str | None:
    """Version of the installed engine wheel, or None."""
    try:
        return importlib.metadata.version(PACKAGE)
    except importlib.metadata.PackageNotFoundError:
        return None


def find_library(path: str | os.PathLike[str] | None = None) -> Path:
    """Where the engine is: ``path``, else $JOULESMITH_LLAMA_LIB, else the installed wheel.

    Raises `EngineError` when a named file is absent, `MissingExtraError` when there is no wheel.
    """
    named = path if path is not None else os.environ.get(LIBRARY_VARIABLE)
    if named:
        file = Path(named).expanduser()
        if not file.is_file():
            raise EngineError(f"engine library not found: {file}")
        return file.resolve()
    # find_spec does not import the package: its modules are not needed, only the shared object
    spec = importlib.util.find_spec(PACKAGE)
    for folder in (spec.submodule_search_locations or ()) if spec else ():
        for pattern in ("xllamacpp*.so", "xllamacpp*.dylib"):
            for file in sorted(Path(folder).glob(pattern)):
                return file.resolve()
    raise MissingExtraError(PACKAGE)


def open_library(path: str | os.PathLike[str] | None = None) -> Library:
    """Open llama.cpp and prove that its structures are those declared here.

    Raises `EngineError` in one line when the file cannot be loaded or has another ABI.
    """
    file = find_library(path)
    try:
        c = C.CDLL(str(file))
    except OSError as e:
        raise EngineError(f"cannot load the engine library {file}: {e}") from e
    for name, (result, arguments) in _SIGNATURES.items():
        try:
            function = getattr(c, name)
        except AttributeError:
            raise EngineError(_other_abi(file, f"no function {name}")) from None
        function.restype = result
        function.argtypes = arguments
    _check(file, c.llama_model_default_params(), _MODEL_DEFAULTS)
    _check(file, c.llama_context_default_params(), _CONTEXT_DEFAULTS)
    library = Library(file, c)
    _check_tensor(library)
    return library


def _check(file: Path, params: C.Structure, defaults: dict[str, Any]) -> None:
    for field in params._fields_:
        name = field[0]
        got = getattr(params, name) or 0
        want = defaults.get(name, 0)
        if got != want:
            raise EngineError(_other_abi(file, f"default {name} is {got}, not {want}"))


def _check_tensor(library: Library) -> None:
    c = library.c
    context = c.ggml_init(InitParams(4 * c.ggml_tensor_overhead(), None, True))
    try:
        tensor = c.ggml_new_tensor_2d(context, GGML_TYPES["Q8_0"], 64, 3)
        head = TensorHead.from_address(tensor)
        if (head.type, head.buffer, *head.ne, head.nb[1]) != (8, None, 64, 3, 1, 1, 68):
            raise EngineError(_other_abi(library.path, "ggml_tensor has another layout"))
        for name, number in GGML_TYPES.items():
            own = (c.ggml_type_name(number) or b"").decode().upper()
            if own != name:
                raise EngineError(_other_abi(library.path, f"type {number} is {own}, not {name}"))
    finally:
        c.ggml_free(context)


def _other_abi(file: Path, what: str) -> str:
    return (
        f"this llama.cpp build has another ABI: {file}: {what}: "
        f"build it from the source of {PACKAGE} {package_version() or '2026.10.11549'}"
    )
