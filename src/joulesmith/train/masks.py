"""Which weights live: how many of each layer, how many more die, and which take their places.

Pure functions; masks are bool, True lives. Knows matrices, scores and steps; no modules and no
optimizers.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import functional as F

from joulesmith.compress.prune.patterns import Pattern
from joulesmith.errors import JoulesmithError


def uniform(shapes: Mapping[str, tuple[int, int]], sparsity: float) -> dict[str, int]:
    """Layer -> live weights: the same share everywhere, `total` in all."""
    return _whole({n: (1 - sparsity) * a * b for n, (a, b) in shapes.items()}, shapes, sparsity)


def erk(shapes: Mapping[str, tuple[int, int]], sparsity: float) -> dict[str, int]:
    """Layer -> live weights, `total` in all, by Erdos-Renyi: of a matrix (outputs, inputs) the
    share e (outputs + inputs) / (outputs inputs) lives, 1 where that is more (Mocanu et al. 2018,
    "Scalable training of artificial neural networks with adaptive sparse connectivity"; Evci et
    al. 2020, section 3, "Sparsity distribution": matrices have no kernel)."""
    sizes = {n: a * b for n, (a, b) in shapes.items()}
    free, left = set(shapes), float(total(shapes, sparsity))
    while free:
        e = left / sum(sum(shapes[n]) for n in free)
        full = {n for n in free if e * sum(shapes[n]) > sizes[n]}
        if not full:
            break
        free -= full
        left -= sum(sizes[n] for n in full)
    wanted = {n: float(e * sum(shapes[n]) if n in free else sizes[n]) for n in shapes}
    return _whole(wanted, shapes, sparsity)


def total(shapes: Mapping[str, tuple[int, int]], sparsity: float) -> int:
    """Live weights of all layers together."""
    return round((1 - sparsity) * sum(a * b for a, b in shapes.values()))


def _whole(
    wanted: Mapping[str, float], shapes: Mapping[str, tuple[int, int]], sparsity: float
) -> dict[str, int]:
    """Rounded by largest remainder so that the sum is exact, and at least 1 everywhere."""
    goal = total(shapes, sparsity)
    if goal < len(shapes):
        raise JoulesmithError(
            f"a sparsity of {sparsity:g} leaves {goal} weights to {len(shapes)} layers: give less"
        )
    counts = {n: max(1, math.floor(w)) for n, w in wanted.items()}
    rest = goal - sum(counts.values())
    for n in sorted(wanted, key=lambda n: counts[n] - wanted[n])[: max(0, rest)]:
        counts[n] += 1
    for _ in range(-rest):  # layers of less than one weight got a whole one
        counts[max(counts, key=lambda n: counts[n])] -= 1
    return counts


def cubic(step: int, begin: int, until: int) -> float:
    """Share of the final zeros after ``step`` steps, 0 to 1: 1 - (1 - (t - t0) / (n dt))^3 (Zhu and
    Gupta 2017, "To prune, or not to prune", equation 1, from a dense model)."""
    return 1 - (1 - min(1.0, max(0.0, (step - begin) / (until - begin)))) ** 3


def cosine(step: int, until: int, first: float) -> float:
    """Share of live weights that is exchanged: a / 2 (1 + cos(t pi / T_end)) (Evci et al. 2020,
    "Rigging the lottery", section 3, "Update schedule")."""
    return first / 2 * (1 + math.cos(step * math.pi / until))


def thinned(score: Tensor, mask: Tensor, pattern: Pattern, live: int) -> Tensor:
    """The live weights of the largest scores; none comes back.

    score, mask: (rows, columns). live: how many stay, without effect for N:M.
    """
    return pattern.mask(score.masked_fill(~mask, -math.inf), live)


def at_share(pattern: Pattern, share: float) -> Pattern:
    """An N:M pattern when it has a share of its final zeros: K:M, with K falling from M to N; a
    group never has more zeros than the share (Kao et al. 2022, "Training recipe for N:M structured
    sparsity with decaying pruning mask", "sparse structure decay")."""
    zeros = math.floor((pattern.of - pattern.keep) * share + 1e-9)
    return Pattern(pattern.of - zeros, pattern.of)


def smallest(weight: Tensor, mask: Tensor, share: float) -> Tensor:
    """What RigL drops of the live weights: the floor(share live) smallest magnitudes -> bool
    (Evci et al. 2020, algorithm 1)."""
    live = int(mask.sum())
    return mask & ~thinned(weight.abs(), mask, Pattern(), live - int(share * live))


def smallest_by_sign(weight: Tensor, mask: Tensor, share: float) -> Tensor:
    """What SET drops: that share of the smallest positive and of the largest negative weights
    -> bool (Mocanu et al. 2018, algorithm 1); zeros count as positive."""
    positive = mask & (weight >= 0)
    return smallest(weight, positive, share) | smallest(weight, mask & ~positive, share)


def exchanged(mask: Tensor, dropped: Tensor, score: Tensor, pattern: Pattern) -> Tensor:
    """As many live weights as in ``mask``: those that were not dropped, and of all others those
    of the largest scores, which may be dropped ones (Evci et al. 2020, algorithm 1).

    score: (rows, columns), 0 or more: magnitudes of gradients for RigL, random numbers for SET.
    With N:M each group takes back as many as it lost.
    """
    return pattern.mask(score.masked_fill(mask & ~dropped, math.inf), int(mask.sum()))


def pack(mask: Tensor) -> Tensor:
    """bool, any shape -> uint8 (ceil(n / 8),), the lowest bit first, on the mask's device."""
    octets = F.pad(mask.flatten().to(torch.uint8), (0, -mask.numel() % 8)).view(-1, 8)
    return (octets << _shifts(mask)).sum(1, dtype=torch.uint8)


def unpack(bits: Tensor, shape: torch.Size) -> Tensor:
    """The inverse of `pack`."""
    octets = (bits[:, None] >> _shifts(bits)) & 1
    return octets.flatten()[: shape.numel()].view(shape).bool()


def _shifts(like: Tensor) -> Tensor:
    return torch.arange(8, dtype=torch.uint8, device=like.device)
