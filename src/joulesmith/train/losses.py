"""What a student is pulled towards: pure functions of tensors, each in nats or squares a token.

Logits are (..., vocab); rows that do not count (padding, the last of a window) are the caller's
to leave out. All are means over rows, computed in float32, or float64 where that is given. A token
that the first of two distributions gives a probability of 0 (a logit of -inf) counts nothing.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from joulesmith.errors import JoulesmithError


def hard(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy with the text: logits (..., vocab), labels (...) -> nats a token."""
    return F.cross_entropy(_wide(logits).flatten(0, -2), labels.flatten())


def soft(student: Tensor, teacher: Tensor, temperature: float = 1.0) -> Tensor:
    """KL(teacher || student) at a temperature, times its square so that gradients keep their size
    (Hinton, Vinyals and Dean 2015, "Distilling the knowledge in a neural network", section 2)."""
    _check(temperature)
    s = (_wide(student) / temperature).log_softmax(-1)
    t = (_wide(teacher) / temperature).log_softmax(-1)
    return temperature**2 * _kl(t, s)


def reverse(student: Tensor, teacher: Tensor, temperature: float = 1.0) -> Tensor:
    """KL(student || teacher), otherwise as `soft`: what the teacher finds unlikely is unlearnt, and
    not all that it finds likely is asked for (Agarwal et al. 2024, "On-policy distillation of
    language models", section 3; Gu et al. 2024, "MiniLLM", equation 1)."""
    _check(temperature)
    s = (_wide(student) / temperature).log_softmax(-1)
    t = (_wide(teacher) / temperature).log_softmax(-1)
    return temperature**2 * _kl(s, t)


def top_of(logits: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest of each row as a cache keeps them: ids int32 (..., k), log-probabilities
    (..., k), largest first."""
    if not 0 < k <= logits.shape[-1]:
        raise JoulesmithError(f"a cache of {k} of {logits.shape[-1]} logits: give 1 to all")
    found = _wide(logits).log_softmax(-1).topk(k, dim=-1)
    return found.indices.int(), found.values


def soft_top(
    student: Tensor, ids: Tensor, values: Tensor, temperature: float = 1.0, vocab: int | None = None
) -> Tensor:
    """`soft` where only the teacher's largest log-probabilities (`top_of`) are known.

    All other tokens are one outcome, "another": what the teacher gives it is what is left of 1,
    and within it nothing is asked of the student, so that no token is taught to be impossible
    (truncation that renormalises does that: Anshumann et al. 2025, "Sparse logit sampling",
    section 3). The gradient is that of `soft` but for the other tokens' shares of their sum.

    temperature: of both; of the teacher's tail only the sum at temperature 1 is known, so that its
    shape is taken for flat over ``vocab`` - k tokens (default: the student's).
    """
    _check(temperature)
    s = (_wide(student) / temperature).log_softmax(-1)
    n = (vocab or student.shape[-1]) - ids.shape[-1]
    t = values.to(s.dtype)
    known = s.gather(-1, ids.long())
    if n <= 0:
        return temperature**2 * _kl((t / temperature).log_softmax(-1), known)
    tail = torch.log1p(-t.exp().sum(-1, keepdim=True).clamp(max=1 - 1e-7))
    level = math.log(n)
    t = torch.cat([t / temperature, (tail - level) / temperature + level], -1).log_softmax(-1)
    rest = s.scatter(-1, ids.long(), -torch.inf).logsumexp(-1, keepdim=True)
    return temperature**2 * _kl(t, torch.cat([known, rest], -1))


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


def _kl(p: Tensor, q: Tensor) -> Tensor:
    """Of log-probabilities (..., outcomes), mean over rows."""
    return (p.exp() * (p - q).masked_fill(p == -torch.inf, 0)).sum(-1).mean()


def _check(temperature: float) -> None:
    if not 0 < temperature < float("inf"):
        raise JoulesmithError(f"a temperature of {temperature:g}: give one above 0")
