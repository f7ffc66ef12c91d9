"""The default: zeros and weights together, by alternating directions, then weights alone.

minimise over W:  tr(W A W^T) - 2 tr(W B^T)   with at most so many weights other than zero,

A the moments of a layer's inputs and B = W_0 C what it shall say: C = A where inputs are as
they were, and E[y x^T] where blocks before are pruned and y is what they gave before. The
splitting is that of ALPS (Meng et al. 2024, "ALPS: improved optimization for highly sparse
one-shot pruning", section 3.1 and 3.2): weights follow the quadratic, a copy follows the pattern,
and a penalty that grows as the pattern settles brings them together. Then conjugate gradients
find the best weights in their places (their section 3.3), each row with steps of its own. Pure
functions of tensors.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from joulesmith.calibrate import products
from joulesmith.compress.prune.patterns import Pattern
from joulesmith.errors import JoulesmithError

DAMPING = 0.01
STEPS = 18
"""Of the alternation at most. With a penalty that grows 2, 1.65 or 1.3 times every sixth step, as
each time costs a factorization. Twelve steps lose half a point more of MiniLM's score at half its
weights; 60 steps at the paper's 1.3, 1.2 and 1.1 every third gain nothing."""
REFIT = 6


@dataclass(frozen=True)
class Problem:
    """A layer's quadratic in coordinates where every input has size 1.

    a: (n, n) moments with a diagonal of 1 and more. best: (rows, n) the weights that minimise it
    without zeros. scale: (n,) what weights were multiplied with.
    """

    a: Tensor
    best: Tensor
    scale: Tensor


def problem(
    weight: Tensor, gram: Tensor, cross: Tensor | None = None, *, damping: float = DAMPING
) -> Problem:
    """weight (rows, n), gram (n, n) E[x x^T], cross (n, n) E[y x^T] -> `Problem`.

    damping: pulls towards ``weight``, as a share of the diagonal; tenfold until what rounding
    left of the moments is positive definite. Raises `JoulesmithError` where moments are not
    finite, or far from positive semidefinite.
    """
    if not bool(torch.isfinite(gram).all()):
        raise JoulesmithError("the input moments hold NaN or infinity: check the calibration data")
    w = weight.float()
    d = gram.diagonal().clamp_min(0)
    mean = d.mean().clamp_min(1e-30)
    root = (d + 1e-4 * mean).sqrt()
    a = gram / root[:, None] / root
    a = (a + a.T) / 2
    added, factor, wrong = 0.0, a, torch.ones(())
    while int(wrong):
        a.diagonal().add_(damping)
        added += damping
        damping = 9 * added
        factor, wrong = torch.linalg.cholesky_ex(a)
        if added > 1e6:
            raise JoulesmithError(
                "the input moments are far from positive semidefinite: check the calibration data"
            )
    best = w * root
    if cross is not None:
        # B = W (C + damping), solved for the weights without zeros.
        c = cross / root[:, None] / root
        c.diagonal().add_(added)
        wanted = (best @ c).T
        best = torch.cholesky_solve(wanted, factor)
        # float32 loses what the weakest directions say; once more for what is missing
        best = (best + torch.cholesky_solve(wanted - a @ best, factor)).T.contiguous()
    return Problem(a, best, root)


def prune(
    p: Problem,
    pattern: Pattern,
    kept: int,
    *,
    rows: Tensor | None = None,
    steps: int = STEPS,
    refit: int = REFIT,
) -> Tensor:
    """`Problem` -> weights (rows, n) in the layer's own coordinates, zeros in place.

    kept: weights that stay. rows: (rows,) what a squared error of each output costs; None for
    all the same. Where alternating ends worse than it began, the places of the beginning are
    taken: the error is never above that of magnitude in scaled coordinates, repaired alike.
    """
    weigh = None if rows is None else (rows / rows.mean().clamp_min(1e-30)).sqrt()[:, None]

    def lost(weight: Tensor) -> float:
        with products("medium"):
            found = loss(p, weight)
        return float((found if weigh is None else found * weigh[:, 0].square()).sum())

    first = support(p, pattern, kept, weigh, 0)
    new = refitted(p, support(p, pattern, kept, weigh, steps), refit) / p.scale
    with products("medium"):
        simple = refitted(p, first, refit) / p.scale
    if lost(new) > lost(simple):
        return refitted(p, first, refit) / p.scale
    return new


def support(
    p: Problem, pattern: Pattern, kept: int, weigh: Tensor | None = None, steps: int = STEPS
) -> Tensor:
    """Where weights stay: bool (rows, n). weigh: (rows, 1) roots of what errors cost."""
    v, n = p.best, p.a.shape[0]
    square = None if weigh is None else weigh.square()

    def chosen(x: Tensor) -> Tensor:
        score = x.square()
        if square is not None:
            score *= square
        return pattern.mask(score, kept)

    mask = chosen(v)
    if steps == 0:
        return mask
    rho, z, u = 0.2, v * mask, torch.zeros_like(v)
    eye = torch.eye(n)
    inverse: Tensor | None = None
    for step in range(steps):
        if inverse is None:
            inverse = torch.cholesky_inverse(torch.linalg.cholesky(p.a + rho * eye))
        # x = (v A + rho z - u)(A + rho)^-1, told as a change of v; only the places matter, and
        # coarse products err by little of a step.
        with products("medium"):
            x = torch.addmm(v, z.sub_(v).mul_(rho).sub_(u), inverse)
        torch.add(x, u, alpha=1 / rho, out=z)
        new = chosen(z)
        z *= new
        u.add_(x, alpha=rho).sub_(z, alpha=rho)
        if step % 6 == 5 or step + 1 == steps:
            changed = int((new != mask).sum()) / 2
            mask = new
            if changed < 1:
                break
            rho *= 2.0 if changed >= 0.1 * kept else 1.65 if changed >= 0.005 * kept else 1.3
            inverse = None
    return mask


def refitted(p: Problem, mask: Tensor, steps: int = REFIT) -> Tensor:
    """Best weights where ``mask`` (rows, n) is true: conjugate gradients in every row, scaled
    coordinates; the diagonal is 1 already, which is Jacobi's preconditioner."""
    stays = mask.float()
    x = p.best * stays
    r = ((p.best - x) @ p.a).mul_(stays)
    d, rr = r.clone(), r.square().sum(1, keepdim=True)
    zero = torch.zeros_like(rr)
    for _ in range(steps):
        # Only the first residual decides what is reached; a coarse product turns a step a little.
        with products("medium"):
            ad = (d @ p.a).mul_(stays)
        curve = torch.linalg.vecdot(d, ad)[:, None]
        alpha = torch.where(curve > 0, rr / curve.clamp_min(1e-30), zero)
        x.addcmul_(alpha, d)
        r.addcmul_(alpha, ad, value=-1)
        new = torch.linalg.vecdot(r, r)[:, None]
        d.mul_(torch.where(rr > 0, new / rr.clamp_min(1e-30), zero)).add_(r)
        rr = new
    return x


def loss(p: Problem, weight: Tensor) -> Tensor:
    """(rows,) squared error of the outputs beyond that of the best weights, own coordinates."""
    d = weight * p.scale - p.best
    return ((d @ p.a) * d).sum(1)
