"""The reference engine: a causal language model as a torch module, in this process.

Says what the untouched float model predicts, and what it costs to run it as
`transformers` runs it: eager, with a key-value cache. Knows no files.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from joulesmith.energy.memory import own_peak
from joulesmith.engines.base import Bench, Scores
from joulesmith.engines.reference import open_reference
from joulesmith.errors import EngineError
from joulesmith.models import cache_word

if TYPE_CHECKING:
    import torch

_ROWS = 64  # rows of the vocabulary judged at once, in float32


class TorchSession:
    """A `Session` on a loaded module; closing it leaves the module to its owner.

    module: called as ``module(input_ids=..., past_key_values=..., use_cache=...)`` and
    answering ``.logits`` and ``.past_key_values`` (or as `models.cache_word` has it). device:
    where it lives already or is moved to. Metering is of this process and its descendants.
    """

    def __init__(self, module: Any, device: str = "cpu") -> None:
        import torch

        self._torch = torch
        self.device = torch.device(device)
        self._module: Any = module.to(self.device)
        self._word = cache_word(module)
        self._meter: Any = None

    def __enter__(self) -> TorchSession:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        """Drop the reference to the module."""
        self._module = None
        if self._meter is not None:
            self._meter.close()
            self._meter = None

    # ------------------------------------------------------------------ running

    def _run(self, ids: torch.Tensor, past: Any, cache: bool, last: bool = False) -> Any:
        """One forward pass over ids (1, n)."""
        if self._module is None:
            raise EngineError("the engine session is closed")
        # only generation may skip the head for all but the last position
        extra = {"logits_to_keep": 1} if last and self._keeps else {}
        return self._module(input_ids=ids, use_cache=cache, **{self._word: past}, **extra)

    def _cache_of(self, answer: Any) -> Any:
        return getattr(answer, self._word)

    @property
    def _keeps(self) -> bool:
        import inspect

        return "logits_to_keep" in inspect.signature(self._module.forward).parameters

    def _ids(self, tokens: NDArray[np.int32]) -> torch.Tensor:
        array = np.ascontiguousarray(tokens, np.int64)
        if array.ndim != 1 or array.size == 0:
            raise EngineError(f"tokens must be one row of at least one, got shape {array.shape}")
        vocab = self.vocab
        if int(array.min()) < 0 or int(array.max()) >= vocab:
            raise EngineError(f"a token is outside the vocabulary of {vocab}")
        return self._torch.from_numpy(array)[None].to(self.device)

    @property
    def vocab(self) -> int:
        """Number of tokens."""
        if self._module is None:
            raise EngineError("the engine session is closed")
        return int(self._module.config.vocab_size)

    def _quiet(self) -> Any:
        """Evaluation mode without gradients; the module's own mode returns afterwards."""
        return _Evaluating(self._torch, self._module)

    # ------------------------------------------------------------------ what is asked of it

    def logits(self, tokens: NDArray[np.int32]) -> NDArray[np.float32]:
        """tokens (n,) -> logits (n, vocab), float32."""
        ids = self._ids(tokens)
        with self._quiet():
            out = self._run(ids, None, cache=False).logits[0]
        return np.asarray(out.to("cpu", self._torch.float32).numpy())

    def score(
        self,
        windows: NDArray[np.int32],
        reference: Path | None = None,
        progress: Callable[[float], None] | None = None,
    ) -> Scores:
        """windows (n_windows, length) -> `Scores`; the conventions are the file engine's.

        Raises `EngineError` when the reference has another shape.
        """
        torch = self._torch
        windows = np.ascontiguousarray(windows, np.int32)
        if windows.ndim != 2 or windows.shape[1] < 2:
            raise EngineError(f"windows must be (n, length >= 2), got {windows.shape}")
        n, length = windows.shape
        ref = None if reference is None else open_reference(reference, (n, length - 1, self.vocab))
        nll = np.empty((n, length - 1), np.float32)
        kl = None if ref is None else np.empty_like(nll)
        agree = None if ref is None else np.empty(nll.shape, np.bool_)
        for w in range(n):
            ids = self._ids(windows[w])
            with self._quiet():
                every = self._run(ids[:, :-1], None, cache=False).logits[0]
                for start in range(0, length - 1, _ROWS):
                    at = slice(start, min(start + _ROWS, length - 1))
                    log_q = torch.log_softmax(every[at].float(), dim=-1)
                    targets = ids[0, at.start + 1 : at.stop + 1, None]
                    nll[w, at] = -log_q.gather(1, targets)[:, 0].cpu().numpy()
                    if ref is None or kl is None or agree is None:
                        continue
                    log_p = torch.from_numpy(ref[w, at].astype(np.float32)).to(self.device)
                    log_p = log_p.clamp(min=-1e4)
                    log_p -= log_p.logsumexp(dim=-1, keepdim=True)
                    found = (log_p.exp() * (log_p - log_q)).sum(dim=-1)
                    kl[w, at] = found.cpu().numpy()
                    top = log_q.argmax(dim=-1, keepdim=True)
                    same = log_p.gather(1, top)[:, 0] >= log_p.amax(dim=-1)
                    agree[w, at] = same.cpu().numpy()
            if progress is not None:
                progress((w + 1) / n)
        return Scores(nll, kl, agree)

    def generate(self, tokens: NDArray[np.int32], n: int) -> list[int]:
        """Greedy continuation of ``tokens`` by ``n`` tokens."""
        step, past = self._ids(tokens), None
        out: list[int] = []
        with self._quiet():
            while len(out) < n:
                answer = self._run(step, past, cache=True, last=True)
                step = answer.logits[:, -1].argmax(dim=-1, keepdim=True)
                past = self._cache_of(answer)
                out.append(int(step))
        return out

    def bench(self, prefill: int, decode: int, seed: int = 0) -> Bench:
        """One request on random tokens, prefill and decode metered apart, cache kept."""
        if prefill < 1 or decode < 1:
            raise EngineError(f"prefill and decode must be at least 1, got {prefill} and {decode}")
        if self._meter is None:
            from joulesmith.energy import EnergyMeter

            self._meter = EnergyMeter()
        rng = np.random.default_rng(seed)
        ids = self._ids(rng.integers(0, self.vocab, prefill + decode, dtype=np.int32))
        prompt = ids[:, :prefill]
        steps = [ids[:, i : i + 1] for i in range(prefill, prefill + decode)]
        with self._quiet():
            warm = self._run(prompt[:, :32], None, cache=True, last=True)
            self._run(steps[0], self._cache_of(warm), cache=True, last=True)
            del warm
            self._wait()
            with self._meter.window("prefill") as first:
                answer = self._run(prompt, None, cache=True, last=True)
                self._wait()
            with self._meter.window("decode") as second:
                for step in steps:
                    past = self._cache_of(answer)
                    answer = self._run(step, past, cache=True, last=True)
                self._wait()
        return Bench(prefill, decode, first.reading, second.reading, own_peak())

    def _wait(self) -> None:
        if self.device.type == "cuda":
            self._torch.cuda.synchronize(self.device)


class _Evaluating:
    def __init__(self, torch: Any, module: Any) -> None:
        if module is None:
            raise EngineError("the engine session is closed")
        self._module = module
        self._grad = torch.no_grad()  # inference mode would mark tensors that modules cache

    def __enter__(self) -> None:
        self._training = self._module.training
        self._module.eval()
        self._grad.__enter__()

    def __exit__(self, *exc: Any) -> None:
        self._grad.__exit__(*exc)
        self._module.train(self._training)
