"""What a student is pulled towards: pure functions of tensors, each in nats or squares a token.

Logits are (..., vocab); rows that do not count (padding, the last of a window) are the caller's
to leave out. Divergences are means over rows, computed in float32, or float64 where that is given.
A token that the first of two distributions gives a probability of 0 (a logit of -inf) counts
nothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from joulesmith.errors import JoulesmithError

PIECE = 1 << 22
"""Logits handled at a time."""
CPU_PIECE = 1 << 18
"""The same on a processor, where they stay in its cache: a third of the time."""


def hard(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy with the text: logits (..., vocab), labels (...) -> nats a token."""
    return F.cross_entropy(_wide(logits).flatten(0, -2), labels.flatten())


def soft(student: Tensor, teacher: Tensor, temperature: float = 1.0) -> Tensor:
    """KL(teacher || student) at a temperature, times its square so that gradients keep their size
    (Hinton, Vinyals and Dean 2015, "Distilling the knowledge in a neural network", section 2).
    None of these divergences has a gradient by the teacher."""
    t = _check(temperature)

    def rows(s: Tensor, logits: Tensor) -> tuple[Tensor, Tensor]:
        log_q, log_p = (s / t).log_softmax(-1), (_wide(logits) / t).log_softmax(-1)
        p = log_p.exp()
        return t**2 * _kl(p, log_p, log_q), t * (log_q.exp() - p)

    return _mean(rows, student, teacher)


def reverse(student: Tensor, teacher: Tensor, temperature: float = 1.0) -> Tensor:
    """KL(student || teacher), otherwise as `soft`: what the teacher finds unlikely is unlearnt, and
    not all that it finds likely is asked for (Agarwal et al. 2024, "On-policy distillation of
    language models", section 3; Gu et al. 2024, "MiniLLM", equation 1)."""
    t = _check(temperature)

    def rows(s: Tensor, logits: Tensor) -> tuple[Tensor, Tensor]:
        log_q, log_p = (s / t).log_softmax(-1), (_wide(logits) / t).log_softmax(-1)
        q = log_q.exp()
        each = (log_q - log_p).masked_fill(q == 0, 0)
        found = (q * each).sum(-1)
        return t**2 * found, t * q * (each - found[:, None])

    return _mean(rows, student, teacher)


def top_of(logits: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest of each row as a cache keeps them: ids int32 (..., k), log-probabilities
    (..., k), largest first."""
    if not 0 < k <= logits.shape[-1]:
        raise JoulesmithError(f"a cache of {k} of {logits.shape[-1]} logits: give 1 to all")
    found = _wide(logits).log_softmax(-1).topk(k, dim=-1)
    return found.indices.int(), found.values


def soft_top(
    student: Tensor,
    ids: Tensor,
    values: Tensor,
    temperature: float = 1.0,
    vocab: int | None = None,
    labels: Tensor | None = None,
    share: float = 0.0,
) -> Tensor:
    """`soft` where only the teacher's largest log-probabilities (`top_of`) are known.

    All other tokens are one outcome, "another": what the teacher gives it is what is left of 1,
    and within it nothing is asked of the student, so that no token is taught to be impossible
    (truncation that renormalises does that: Anshumann et al. 2025, "Sparse logit sampling",
    section 3). The gradient is that of `soft` but for the other tokens' shares of their sum.

    temperature: of both; of the teacher's tail only the sum at temperature 1 is known, so that its
    shape is taken for flat over ``vocab`` - k tokens (default: the student's).

    labels: int64 (...); adds ``share`` times `hard` at no more passes over logits, at temperature
    1 alone (`JoulesmithError`).
    """
    t = _check(temperature)
    n = (vocab or student.shape[-1]) - ids.shape[-1]
    if labels is not None and t != 1:
        raise JoulesmithError(f"labels at a temperature of {t:g}: they are learnt at 1")

    def rows(
        s: Tensor, ids: Tensor, values: Tensor, labels: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        s = s if t == 1 else s / t
        log_p, at, more = values.to(s.dtype), ids.long(), 0.0 if labels is None else share
        label = None if labels is None else s.gather(-1, labels)
        if n <= 0:
            log_p, whole = (log_p / t).log_softmax(-1), s.logsumexp(-1, keepdim=True)
            found = t**2 * _kl(log_p.exp(), log_p, s.gather(-1, at) - whole)
            q = (s - whole).exp_()
            every = q.mul_(t + more).scatter_add_(-1, at, -t * log_p.exp())
        else:
            known = s.gather(-1, at)
            s = s.scatter(-1, at, -torch.inf)
            # not 1 less the known: that says nothing of a student that is sure
            rest = s.logsumexp(-1, keepdim=True)
            whole = torch.logaddexp(rest, known.logsumexp(-1, keepdim=True))
            tail = torch.log1p(-log_p.exp().sum(-1, keepdim=True).clamp(max=1 - 1e-7))
            level = math.log(n)
            log_p = torch.cat([log_p / t, (tail - level) / t + level], -1).log_softmax(-1)
            log_q = torch.cat([known, rest], -1) - whole
            p, q = log_p.exp(), log_q.exp()
            found = t**2 * _kl(p, log_p, log_q)
            by = t * (q - p) + more * q
            # within the rest as the student has it; in place, as passes over logits are the cost
            every = s.sub_(rest).exp_().mul_(by[:, -1:]).scatter_(-1, at, by[:, :-1])
        if labels is not None and label is not None:
            found = found + share * (whole - label).squeeze(-1)
            every.scatter_add_(-1, labels, torch.full_like(label, -share))
        return found, every

    taught = (student, ids, values)
    return _mean(rows, *taught) if labels is None else _mean(rows, *taught, labels[..., None])


def hidden(student: Tensor, teacher: Tensor) -> Tensor:
    """Squared difference of hidden states (..., width) as a share of the teacher's squares; 0 where
    they are the same, about 1 where they have nothing to do with each other."""
    if student.shape[-1] != teacher.shape[-1]:
        raise JoulesmithError(
            f"hidden states of {student.shape[-1]} and {teacher.shape[-1]} channels do not match: "
            "leave their matching out"
        )
    s, t = _wide(student), _wide(teacher)
    return (s - t).square().sum() / t.square().sum().clamp_min(1e-12)


def attention(student: Tensor, teacher: Tensor) -> Tensor:
    """KL(teacher || student) of attention weights (..., queries, keys), averaged over heads before
    where their numbers differ: (batch, heads, queries, keys) each (Wang et al. 2020, "MiniLM",
    equation 3, whose heads are as many)."""
    if student.shape[1] != teacher.shape[1]:
        student, teacher = student.mean(1), teacher.mean(1)
    if student.shape[-2:] != teacher.shape[-2:]:
        raise JoulesmithError("attention over windows of different lengths: give both the same")
    t = _wide(teacher)
    s = _wide(student).clamp_min(1e-9).log()
    return (torch.xlogy(t, t) - t * s).sum(-1).mean()


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _kl(p: Tensor, log_p: Tensor, log_q: Tensor) -> Tensor:
    """(rows, outcomes) each -> (rows,)."""
    return (p * (log_p - log_q).masked_fill(p == 0, 0)).sum(-1)


_Rows = Callable[..., tuple[Tensor, Tensor]]
"""Rows of the student's logits and of what else there is -> losses (rows,), and by the logits."""


def _mean(rows: _Rows, student: Tensor, *others: Tensor) -> Tensor:
    out: Tensor = _ByRows.apply(rows, student, *others)  # type: ignore[no-untyped-call]
    return out


class _ByRows(torch.autograd.Function):
    """Mean loss of rows, its gradient made at once and some rows at a time: what stands between
    logits and loss would else be several times the logits, which are large as it is."""

    @staticmethod
    def forward(ctx: Any, rows: _Rows, student: Tensor, *others: Tensor) -> Tensor:
        flat = [x.reshape(-1, x.shape[-1]) for x in (student, *others)]
        n = len(flat[0])
        gradient = torch.empty_like(flat[0]) if ctx.needs_input_grad[1] else None
        total = _wide(flat[0]).new_zeros(())
        piece = CPU_PIECE if flat[0].device.type == "cpu" else PIECE
        many = max(1, piece // flat[0].shape[-1])
        for start in range(0, n, many):
            part = [x[start : start + many] for x in flat]
            found, by = rows(_wide(part[0]), *part[1:])
            total += found.sum()
            if gradient is not None:
                gradient[start : start + many] = by / n
        ctx.gradient, ctx.shape = gradient, student.shape
        return total / n

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, *upstream: Tensor) -> Any:
        by = (ctx.gradient * upstream[0].to(ctx.gradient.dtype)).view(ctx.shape)
        return None, by, *[None] * (len(ctx.needs_input_grad) - 2)


def _check(temperature: float) -> float:
    if not 0 < temperature < float("inf"):
        raise JoulesmithError(f"a temperature of {temperature:g}: give one above 0")
    return temperature
