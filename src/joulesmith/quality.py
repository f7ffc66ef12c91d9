"""How much of a model's quality is kept: perplexity, KL divergence, top-1 agreement.

Knows windows of tokens and per-token scores; not how the candidate was made.

Kept quality is ppl(reference) / ppl(candidate) = exp(-(mean NLL difference)). The
two models see the same tokens, so the difference is paired and its noise is far
smaller than either perplexity's. Tokens of one window are not independent;
windows nearly are. The lower bound is therefore a one-sided Student t bound over
window means (each window has the same number of tokens, so the mean of means is
the mean).
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from joulesmith.atomic import atomic_path, check_space
from joulesmith.errors import JoulesmithError

if TYPE_CHECKING:
    from joulesmith.engines.base import Scores, Session

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Quality:
    """Quality of a candidate against its reference on one set of windows.

    kept:      exp(-(mean NLL difference)); 1 is the reference, above 1 is better
    kept_low:  one-sided lower 95 % bound of ``kept``
    kl:        mean KL(reference || candidate), nats per token
    top1:      share of positions where both have the same most likely token
    tokens:    positions judged
    """

    kept: float
    kept_low: float
    perplexity: float
    reference_perplexity: float
    kl: float
    kl_stderr: float
    top1: float
    tokens: int
    windows: int
    text: str

    def passes(self, floor: float) -> bool:
        """Whether the lower bound is at or above ``floor``."""
        return self.kept_low >= floor

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)


@dataclass(frozen=True)
class Reference:
    """The reference's log-probabilities on a set of windows, kept on disk.

    windows: int32 (n, length). nll: float32 (n, length - 1), nats.
    path: ``.npy`` of float16 log-probabilities (n, length - 1, vocab).
    """

    windows: NDArray[np.int32]
    nll: NDArray[np.float32]
    path: Path
    text: str


def check_floor(keep: float) -> float:
    """The floor as a share in (0, 1]. Raises `JoulesmithError` otherwise."""
    if not (math.isfinite(keep) and 0.0 < keep <= 1.0):
        raise JoulesmithError(
            f"--keep must be above 0 and at most 1, got {keep:g}: "
            "0.99 keeps 99 % of the quality (perplexity ratio)"
        )
    return keep


def judge(scores: Scores, reference: Reference) -> Quality:
    """Compare per-token scores of a candidate with the reference's on the same windows.

    Raises `JoulesmithError` when the candidate's probabilities are not finite.
    """
    if scores.kl is None or scores.agree is None:
        raise ValueError("scores were made without a reference")
    if scores.nll.shape != reference.nll.shape:
        raise ValueError(f"shapes differ: {scores.nll.shape} and {reference.nll.shape}")
    if not (np.isfinite(scores.nll).all() and np.isfinite(scores.kl).all()):
        raise JoulesmithError(
            "the candidate's probabilities are not finite on the evaluation text: "
            "its weights overflow on this engine"
        )
    n = scores.nll.shape[0]
    diff = (scores.nll.astype(np.float64) - reference.nll).mean(axis=1)
    mean = float(diff.mean())
    kl_windows = scores.kl.astype(np.float64).mean(axis=1)
    return Quality(
        kept=math.exp(-mean),
        kept_low=math.exp(-(mean + _t_margin(diff))),
        perplexity=math.exp(float(scores.nll.astype(np.float64).mean())),
        reference_perplexity=math.exp(float(reference.nll.astype(np.float64).mean())),
        kl=float(kl_windows.mean()),
        kl_stderr=float(kl_windows.std(ddof=1) / math.sqrt(n)) if n > 1 else math.inf,
        top1=float(scores.agree.mean()),
        tokens=int(scores.nll.size),
        windows=n,
        text=reference.text,
    )


def _t_margin(diff: NDArray[np.float64]) -> float:
    """Half-width of the one-sided Student t interval of the mean."""
    from scipy.special import stdtrit

    n = diff.size
    if n < 2:
        return math.inf
    return float(stdtrit(n - 1, CONFIDENCE) * diff.std(ddof=1) / math.sqrt(n))


def write_reference(
    session: Session,
    windows: NDArray[np.int32],
    path: Path,
    text: str,
    progress: Callable[[float], None] | None = None,
) -> Reference:
    """Run the reference over ``windows`` and keep its log-probabilities at ``path`` (.npy).

    Written to a temporary name and renamed when complete; an existing complete file
    of the same windows is read back instead. Float16 holds log-probabilities of
    likely tokens (near 0) to about 4e-3 nats at worst, of random sign: the KL of one token
    is off by up to some 1e-4, the mean over thousands of tokens by far less.
    Raises `JoulesmithError` when the reference itself is not finite or the disk is full.
    """
    side = path.with_suffix(".nll.npy")
    marker = path.with_suffix(".json")
    key = {"windows": _digest(windows), "shape": list(windows.shape), "text": text}
    if path.exists() and side.exists() and _same(marker, key):
        return Reference(windows, np.load(side, allow_pickle=False), path, text)
    n, length = windows.shape
    nll = np.empty((n, length - 1), np.float32)
    rows = np.arange(length - 1)
    # Written as a stream, not through a memory map: a full disk is then an error that
    # can be reported, where a map would kill the process (SIGBUS).
    with atomic_path(path) as temporary, temporary.open("wb") as out:
        for i in range(n):
            logits = session.logits(windows[i])[:-1]
            if not np.isfinite(logits).all():
                raise JoulesmithError(
                    "the reference model's logits are not finite: the weights are damaged"
                )
            logp = log_softmax(logits)
            if i == 0:
                _start_array(out, path, (n, length - 1, logits.shape[1]))
            nll[i] = -logp[rows, windows[i, 1:]]
            out.write(np.maximum(logp, -6e4).astype("<f2").tobytes())
            if progress:
                progress((i + 1) / n)
    with atomic_path(side) as temporary, temporary.open("wb") as out:
        np.save(out, nll)
    with atomic_path(marker) as temporary:
        temporary.write_text(json.dumps(key))  # last: it says that the rest is complete
    return Reference(windows, nll, path, text)


def first_windows(reference: Reference, n: int) -> Reference:
    """The first ``n`` windows of a reference, in the same file, for rougher judgements."""
    return Reference(reference.windows[:n], reference.nll[:n], reference.path, reference.text)


def _start_array(out: BinaryIO, path: Path, shape: tuple[int, ...]) -> None:
    """The header of a float16 ``.npy``, once there is space for all of it."""
    check_space(path.parent, 2 * math.prod(shape))
    np.lib.format.write_array_header_1_0(
        out, {"descr": "<f2", "fortran_order": False, "shape": shape}
    )


def log_softmax(logits: NDArray[np.float32]) -> NDArray[np.float32]:
    """Log-probabilities over the last axis, float32, shifted for range."""
    shifted: NDArray[np.float32] = logits - logits.max(axis=-1, keepdims=True)
    shifted -= np.log(np.exp(shifted).sum(axis=-1, keepdims=True, dtype=np.float32))
    return shifted


def _digest(windows: NDArray[np.int32]) -> str:
    import hashlib

    return hashlib.sha256(np.ascontiguousarray(windows, np.int32).tobytes()).hexdigest()


def _same(marker: Path, key: dict[str, Any]) -> bool:
    try:
        return bool(json.loads(marker.read_text()) == key)
    except (OSError, ValueError):
        return False
