"""What an engine is: something that runs a model file. Knows no way a file was made."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from joulesmith.energy.reading import Reading


@dataclass(frozen=True)
class Bench:
    """One timed request: ``prefill_tokens`` in one go, then ``decode_tokens`` one by one.

    ``prefill`` and ``decode`` are whole-window readings (divide by the token
    counts with `Reading.per`). ``peak_rss``: bytes, of the process that runs the
    model, ``None`` when the platform does not say.
    """

    prefill_tokens: int
    decode_tokens: int
    prefill: Reading
    decode: Reading
    peak_rss: int | None


@dataclass(frozen=True)
class Scores:
    """Per-token judgement of a model on fixed windows, each of shape (n_windows, length - 1).

    nll:     -log p(next token), nats
    kl:      KL(reference || this model) over the whole vocabulary, nats; None without reference
    agree:   whether the most likely token is the reference's; None without reference
    """

    nll: NDArray[np.float32]
    kl: NDArray[np.float32] | None
    agree: NDArray[np.bool_] | None


class Session(Protocol):
    """A loaded model. Use as a context manager; closing frees its memory."""

    def __enter__(self) -> Session: ...
    def __exit__(self, *exc: object) -> None: ...
    def close(self) -> None: ...

    def logits(self, tokens: NDArray[np.int32]) -> NDArray[np.float32]:
        """tokens (n,) -> logits (n, vocab), causal, from an empty context."""
        ...

    def score(self, windows: NDArray[np.int32], reference: Path | None = None) -> Scores:
        """windows (n_windows, length) -> `Scores`.

        reference: a ``.npy`` file of float16 log-probabilities, shape
        (n_windows, length - 1, vocab), as `quality.write_reference` makes it.
        """
        ...

    def generate(self, tokens: NDArray[np.int32], n: int) -> list[int]:
        """Greedy continuation of ``tokens`` by ``n`` tokens."""
        ...

    def bench(self, prefill: int, decode: int, seed: int = 0) -> Bench:
        """One request on random tokens, prefill and decode metered apart."""
        ...


class Engine(Protocol):
    """Opens model files."""

    name: str

    @property
    def version(self) -> str: ...

    @property
    def threads(self) -> int:
        """Threads that `load` uses by default."""
        ...

    def load(self, path: Path, *, context: int = 1024, threads: int | None = None) -> Session:
        """Raises `EngineError` when the engine refuses the file."""
        ...
