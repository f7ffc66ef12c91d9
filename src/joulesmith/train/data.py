"""Less data for the same quality: repeats left out, windows chosen by what a model makes of them,
short windows first. Knows tokens and losses; no files and no loops.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
from numpy.typing import NDArray

from joulesmith.errors import JoulesmithError

GRAM = 13
"""Tokens that are a repeat when they are seen again, as in the decontamination of GPT-3 (Brown et
al. 2020, appendix C)."""
_MIX = np.uint64(0x9E3779B97F4A7C15)

Keep = Literal["middle", "high", "low"]


def grams(windows: NDArray[np.int32], size: int = GRAM) -> NDArray[np.uint64]:
    """(n, length) -> hashes (n, length - size + 1) of ``size`` tokens from each place on."""
    n, length = windows.shape
    if not 0 < size <= length:
        raise JoulesmithError(f"runs of {size} tokens in windows of {length}: give fewer")
    found = np.zeros((n, length - size + 1), np.uint64)
    with np.errstate(over="ignore"):  # arithmetic modulo 2^64 is meant
        for k in range(size):
            part = windows[:, k : length - size + 1 + k].astype(np.uint64) + np.uint64(1)
            found = (found ^ part) * _MIX
            found ^= found >> np.uint64(29)
    return found


def repeats(
    windows: NDArray[np.int32], size: int = GRAM, known: NDArray[np.int32] | None = None
) -> NDArray[np.float64]:
    """Share of each window's runs of ``size`` tokens that an earlier window has, or ``known``
    (such as the text that is judged on): (n,), 0 to 1.

    Lee et al. 2022, "Deduplicating training data makes language models better", section 4, by
    hashes of short runs instead of suffix arrays.
    """
    found = grams(windows, size)
    seen = np.zeros(0, np.uint64) if known is None else np.unique(grams(known, size))
    flat, first = np.unique(found, return_index=True)
    # The window where each run is first; a run of the known text is never first.
    owner = first // found.shape[1]
    at = np.searchsorted(flat, found)
    again = owner[at] < np.arange(len(found))[:, None]
    again |= np.isin(found, seen)
    shares: NDArray[np.float64] = again.mean(axis=1)
    return shares


def overlap(
    windows: NDArray[np.int32], known: NDArray[np.int32], size: int = 50
) -> NDArray[np.float64]:
    """Share of each window's runs of ``size`` tokens, or half a window's, that ``known`` has, such
    as the text that is judged on: (n,), 0 to 1. Lee et al. 2022, section 4, find runs of 50 tokens
    to be the same text and not chance."""
    size = max(1, min(size, windows.shape[1] // 2, known.shape[1] // 2))
    shares: NDArray[np.float64] = np.isin(grams(windows, size), grams(known, size)).mean(axis=1)
    return shares


def without_repeats(
    windows: NDArray[np.int32],
    most: float = 0.5,
    size: int = GRAM,
    known: NDArray[np.int32] | None = None,
) -> NDArray[np.int64]:
    """Places of the windows of which no more than a share ``most`` is a repeat, rising."""
    if not 0 <= most <= 1:
        raise JoulesmithError(f"a share of repeats of {most:g}: give 0 to 1")
    return np.flatnonzero(repeats(windows, size, known) <= most)


def by_score(scores: NDArray[np.float64], share: float, keep: Keep = "middle") -> NDArray[np.int64]:
    """Places of a ``share`` of the windows by a score each, rising.

    scores: (n,) losses of a reference model in nats a token, or sizes of gradients. "middle":
    neither noise nor what is known already (Marion et al. 2023, "When less is more", section 3.3,
    who find the middle best by perplexity); "high": the hardest (EL2N and GraNd keep these: Paul
    et al. 2021, "Deep learning on a data diet"); "low": the easiest.
    """
    n = len(scores)
    if not 0 < share <= 1:
        raise JoulesmithError(f"a share of {share:g} of the windows: give one above 0, up to 1")
    if not np.isfinite(scores).all():
        raise JoulesmithError("scores of windows that are not finite: look at the model and text")
    count = max(1, round(share * n))
    order = np.argsort(scores, kind="stable")
    start = {"low": 0, "middle": (n - count) // 2, "high": n - count}[keep]
    return np.sort(order[start : start + count])


def learnable(now: NDArray[np.float64], best: NDArray[np.float64]) -> NDArray[np.float64]:
    """What is left to learn of each window: its loss now less that of a model trained on other
    text, nats a token. High is worth training on, noise is low (Mindermann et al. 2022,
    "Prioritized training on points that are learnable", equation 3)."""
    if now.shape != best.shape:
        raise JoulesmithError(f"{len(now)} and {len(best)} losses: give both of the same windows")
    return now - best


def length_at(done: float, length: int, start: int, share: float) -> int:
    """Tokens of a window after a share ``done`` of a training that begins with ``start`` and has
    all ``length`` after ``share`` of it: the divisor of ``length`` that is next below a straight
    line (Li, Zhang and He 2022, "The stability-efficiency dilemma", section 4)."""
    if not 2 <= start <= length or length % start:
        raise JoulesmithError(f"windows of {start} tokens first: give a divisor of {length}")
    if share <= 0 or done >= share:
        return length
    wanted = start + (length - start) * done / share
    return max(d for d in range(start, length + 1) if length % d == 0 and d <= wanted)


def cut(windows: NDArray[np.int32], length: int) -> NDArray[np.int32]:
    """The same tokens in windows of ``length``, a divisor of what they have: attention over short
    windows costs less a token."""
    return windows.reshape(-1, length)


def packed(documents: list[NDArray[np.int32]], length: int, separator: int) -> NDArray[np.int32]:
    """Documents in windows (n, length), each followed by ``separator``: whole ones side by side,
    the longest first, each where it leaves the least room (best fit decreasing; Ding et al. 2024,
    "Fewer truncations improve language modeling", section 3); longer ones are cut. Room that is
    left is filled with separators.
    """
    if length < 2:
        raise JoulesmithError(f"windows of {length} tokens: give 2 or more")
    pieces = []
    for document in documents:
        whole = np.append(document.astype(np.int32), np.int32(separator))
        pieces += [whole[i : i + length] for i in range(0, len(whole), length)]
    # bins by the room that they have: as many lists as there are sizes
    bins: list[list[NDArray[np.int32]]] = []
    room: list[list[int]] = [[] for _ in range(length + 1)]
    for piece in sorted(pieces, key=len, reverse=True):
        size = len(piece)
        fits = next((r for r in range(size, length + 1) if room[r]), None)
        if fits is None:
            bins.append([piece])
            room[length - size].append(len(bins) - 1)
        else:
            at = room[fits].pop()
            bins[at].append(piece)
            room[fits - size].append(at)
    found = np.full((len(bins), length), separator, np.int32)
    for row, parts in zip(found, bins, strict=True):
        tokens = np.concatenate(parts)
        row[: len(tokens)] = tokens
    return found
