"""A GGUF model in llama.cpp, inside the process that calls this. Knows no pipes, no parent.

llama.cpp may abort() the whole process on a damaged file, so only the worker uses this.
"""

from __future__ import annotations

import ctypes as C
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from numpy.typing import NDArray

from joulesmith.energy.memory import own_peak
from joulesmith.engines.llama_abi import FLASH_ATTENTION, GGML_TYPES, Batch, Library
from joulesmith.engines.reference import open_reference
from joulesmith.errors import EngineError

UBATCH = 512  # llama.cpp's default physical batch
_ROWS = 32  # rows of logits judged at once: a few MB of scratch whatever the vocabulary
Progress = Callable[[float], None]
Floats = NDArray[np.float32]
Tokens = NDArray[np.int32]


class Model:
    """An opened model with one context of ``context`` tokens on ``threads`` threads.

    cache_type: of keys and values; other than the default F16, flash attention is asked for,
    without which llama.cpp keeps no quantized values. adapter: a GGUF LoRA to add, scale 1.
    Raises `EngineError` with llama.cpp's own words when it refuses the file.
    """

    def __init__(
        self,
        library: Library,
        path: str,
        context: int,
        threads: int,
        cache_type: str = "F16",
        adapter: str | None = None,
    ) -> None:
        self._c = c = library.c
        self._library = library
        self._context: int | None = None
        self.threads = threads
        params = c.llama_model_default_params()
        params.n_gpu_layers = 0
        library.take_errors()
        self._model: int | None = c.llama_model_load_from_file(str(path).encode(), params)
        if not self._model:
            raise EngineError(f"llama.cpp cannot load {path}: {library.take_errors() or 'refused'}")
        settings = c.llama_context_default_params()
        settings.n_ctx = context
        settings.n_batch = context
        settings.n_ubatch = min(UBATCH, context)
        settings.n_threads = threads
        settings.n_threads_batch = threads
        if cache_type != "F16":
            settings.type_k = settings.type_v = GGML_TYPES[cache_type]
            settings.flash_attn_type = FLASH_ATTENTION
        self._context = c.llama_init_from_model(self._model, settings)
        if not self._context:
            self.close()
            raise EngineError(
                f"llama.cpp cannot make a context of {context} tokens for {path}: "
                f"{library.take_errors() or 'refused'}"
            )
        self._memory = c.llama_get_memory(self._context)
        if not self._memory:
            self.close()
            raise EngineError(f"not a causal language model: {path}")
        if adapter is not None:
            self._adapt(adapter)
        self.context = context
        self.vocab = int(c.llama_vocab_n_tokens(c.llama_model_get_vocab(self._model)))
        self.weight_bytes = int(c.llama_model_size(self._model))
        self._pool = ThreadPoolExecutor(threads)
        self._warm_prefill = 0

    def _adapt(self, adapter: str) -> None:
        """Add an adapter to all that follows; it is freed with the model."""
        found = self._c.llama_adapter_lora_init(self._model, str(adapter).encode())
        # Arrays of one: an adapter and its scale.
        one, scale = (C.c_void_p * 1)(found), (C.c_float * 1)(1.0)
        if not found or self._c.llama_set_adapters_lora(self._context, one, 1, scale):
            told = self._library.take_errors() or "refused"
            self.close()
            raise EngineError(f"llama.cpp cannot load the adapter {adapter}: {told}")

    def close(self) -> None:
        """Free the context and the model."""
        if self._context:
            self._c.llama_free(self._context)
        if self._model:
            self._c.llama_model_free(self._model)
        self._context = self._model = None

    # ------------------------------------------------------------------ decoding

    def _clear(self) -> None:
        self._c.llama_memory_clear(self._memory, True)

    def _checked(self, tokens: Tokens, room: int = 0) -> Tokens:
        """Tokens as llama.cpp takes them, proven to fit beside ``room`` further ones."""
        tokens = np.ascontiguousarray(tokens, np.int32)
        if tokens.size == 0:
            raise EngineError("no tokens given")
        if tokens.shape[-1] + room > self.context:
            raise EngineError(
                f"{tokens.shape[-1] + room} tokens do not fit the context of {self.context}: "
                "load with a larger one"
            )
        if int(tokens.min()) < 0 or int(tokens.max()) >= self.vocab:
            raise EngineError(f"a token is outside the vocabulary of {self.vocab}")
        return tokens

    def _decode(self, tokens: Tokens, every: bool = False) -> None:
        """Feed contiguous int32 tokens; logits for each of them, or for the last only."""
        flags = np.ones(tokens.size, np.int8) if every else None
        batch = Batch(
            tokens.size, tokens.ctypes.data, None, None, None, None,
            flags.ctypes.data if flags is not None else None,
        )  # fmt: skip
        status = self._c.llama_decode(self._context, batch)
        if status:
            raise EngineError(
                f"llama.cpp failed to decode (status {status}): {self._library.take_errors()}"
            )

    def _chunks(self, tokens: Tokens) -> Any:
        """Decode from an empty context, yielding (start, view of logits (n, vocab)).

        Views belong to llama.cpp and are overwritten by the next step.
        """
        self._clear()
        for start in range(0, tokens.size, UBATCH):
            part = tokens[start : start + UBATCH]
            self._decode(part, every=True)
            yield start, self._view(self._c.llama_get_logits(self._context), part.size)

    def _view(self, address: int | None, rows: int) -> Floats:
        if not address:
            raise EngineError("llama.cpp returned no logits")
        raw = (C.c_char * (rows * self.vocab * 4)).from_address(address)
        return np.frombuffer(memoryview(raw), np.float32).reshape(rows, self.vocab)

    def _last(self) -> Floats:
        last: Floats = self._view(self._c.llama_get_logits_ith(self._context, -1), 1)[0]
        return last

    # ------------------------------------------------------------------ what is asked of it

    def logits(self, tokens: Tokens) -> Floats:
        """tokens (n,) -> logits (n, vocab)."""
        tokens = self._checked(tokens)
        out = np.empty((tokens.size, self.vocab), np.float32)
        for start, view in self._chunks(tokens):
            out[start : start + view.shape[0]] = view
        return out

    def generate(self, tokens: Tokens, n: int) -> list[int]:
        """Greedy continuation by ``n`` tokens; ties go to the lowest id."""
        tokens = self._checked(tokens, max(n - 1, 0))
        self._clear()
        out: list[int] = []
        step = tokens
        while len(out) < n:
            self._decode(step)
            step = np.array([self._last().argmax()], np.int32)
            out.append(int(step[0]))
        return out

    def score(
        self, windows: Tokens, reference: str | None, progress: Progress
    ) -> tuple[Floats, Floats | None, NDArray[np.bool_] | None]:
        """windows (n, length) -> nll, kl, agree, each (n, length - 1).

        Holds one micro-batch of logits; the reference is read from its file as it is needed.
        Reference log-probabilities are renormalised, as float16 leaves their sum off one.
        A model whose top token ties with the reference's best agrees with it.
        """
        if windows.ndim != 2 or windows.shape[1] < 2:
            raise EngineError(f"windows must be (n, length >= 2), got {windows.shape}")
        n, length = windows.shape
        ref = open_reference(reference, (n, length - 1, self.vocab)) if reference else None
        nll = np.empty((n, length - 1), np.float32)
        kl = np.empty_like(nll) if ref is not None else None
        agree = np.empty(nll.shape, np.bool_) if ref is not None else None
        for w in range(n):
            window = self._checked(windows[w])
            for start, view in self._chunks(window[:-1]):

                def judge(row: int, w: int = w, start: int = start, view: Floats = view) -> None:
                    part = view[row : row + _ROWS]
                    at = slice(start + row, start + row + part.shape[0])
                    target = windows[w, at.start + 1 : at.stop + 1]
                    top = part.argmax(axis=1)
                    rows = np.arange(part.shape[0])
                    best = part[rows, top]
                    # log sum exp, shifted by the largest logit
                    total = best + np.log(np.exp(part - best[:, None]).sum(axis=1))
                    nll[w, at] = total - part[rows, target]
                    if ref is not None and kl is not None and agree is not None:
                        lp = ref[w, at].astype(np.float32)
                        np.maximum(lp, -1e4, out=lp)  # -inf has no mass; 0 * inf would be nan
                        p = np.exp(lp)
                        mass = p.sum(axis=1)
                        agree[w, at] = lp[rows, top] >= lp.max(axis=1)
                        lp -= part
                        lp += total[:, None]
                        kl[w, at] = np.einsum("ij,ij->i", p, lp) / mass - np.log(mass)

                list(self._pool.map(judge, range(0, view.shape[0], _ROWS)))
            progress((w + 1) / n)
        return nll, kl, agree

    def bench(self, prefill: int, decode: int, seed: int, meter: Any) -> dict[str, Any]:
        """One request on random tokens; each phase in a window of ``meter`` of its own.

        Sampling is left out: the cost is the model's. Logits are asked for the last
        prompt token and each decoded one, as in any real request.
        """
        if prefill < 1 or decode < 1:
            raise EngineError(f"prefill and decode must be at least 1, got {prefill} and {decode}")
        rng = np.random.default_rng(seed)
        tokens = rng.integers(0, self.vocab, prefill + decode, dtype=np.int32)
        tokens = self._checked(tokens)
        prompt, rest = tokens[:prefill], [tokens[i : i + 1] for i in range(prefill, tokens.size)]
        # Buffers, caches and threads are touched once before anything is metered; the first
        # time with the full prompt, as it sizes the compute buffers.
        self._clear()
        self._decode(prompt if prefill > self._warm_prefill else prompt[:32])
        self._warm_prefill = max(self._warm_prefill, prefill)
        for step in rest[:4]:
            if min(prefill, 32) + 4 <= self.context:
                self._decode(step)
        self._clear()
        with meter.window("prefill") as first:
            self._decode(prompt)
            self._last()
        with meter.window("decode") as second:
            for step in rest:
                self._decode(step)
                self._last()
        return {
            "prefill": first.reading.to_dict(),
            "decode": second.reading.to_dict(),
            "peak_rss": own_peak(),
        }
