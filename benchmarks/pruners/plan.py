"""Which pruners there are, and what of their weights is counted."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from benchmarks.pruners import settings
from benchmarks.quantizers.runs import Comparison

SLACK = 0.002
"""Shares are rounded in every block of columns or row; N:M is exact."""


@dataclass(frozen=True)
class Planned:
    """A peer in one variant. grouped: whether it is asked for N:M, free: for shares.

    A peer that is not able to do a setting is asked all the same: its own words are told.
    Where a variant is the same as another for some settings, it is not asked twice.
    """

    peer: str
    variant: str
    grouped: bool = True
    free: bool = True
    seeded: bool = True
    subjects: tuple[str, ...] = ("stories260K-172", "stories260K", "shakespeare", "smollm2")

    @property
    def label(self) -> str:
        """ "llm_compressor:sparsegpt"."""
        return f"{self.peer}:{self.variant}"

    def takes(self, name: str) -> bool:
        """Whether it is asked for the setting of that name."""
        return self.grouped if settings.by_name(name).group else self.free


PLAN = (
    Planned("magnitude", "layer", seeded=False),
    Planned("magnitude", "global", grouped=False, seeded=False),
    Planned("ours", "fast"),
    Planned("ours", "default"),
    Planned("llm_compressor", "sparsegpt"),
    Planned("llm_compressor", "sparsegpt-owl", grouped=False),
    Planned("llm_compressor", "wanda"),
    Planned("llm_compressor", "wanda-owl", grouped=False),
    Planned("model_optimizer", "sparsegpt"),
    Planned("model_optimizer", "magnitude", seeded=False),
)


def count(state: dict[str, Any], original: dict[str, Any], name: str) -> dict[str, Any]:
    """Exact zeros of the blocks' matrices.

    Returns sparsity (overall), least and most (of a layer), dense (names of matrices without the
    zeros that were asked for: of a group too few, or no zeros at all), and from (zeros that the
    model had before). Raises `ValueError` where anything else was changed.
    """
    import torch

    setting = settings.by_name(name)
    inside = {k for k, v in original.items() if ".layers." in k and v.ndim == 2}
    for key in set(state) & set(original) - inside:
        if not torch.equal(state[key], original[key]):
            raise ValueError(f"{key} was changed too")
    zeros, before, total, shares, dense = 0, 0, 0, [], []
    for key in sorted(inside):
        w = state[key]
        found = int((w == 0).sum())
        zeros, total = zeros + found, total + w.numel()
        before += int((original[key] == 0).sum())
        shares.append(found / w.numel())
        short = found == 0
        if setting.group:
            whole = w.shape[1] - w.shape[1] % setting.group
            groups = (w[:, :whole] == 0).reshape(w.shape[0], -1, setting.group).sum(-1)
            short = int(groups.min()) < setting.zeros
        if short:
            dense.append(key)
    return {
        "sparsity": zeros / total,
        "least": min(shares),
        "most": max(shares),
        "zeros_before": before / total,
        "short": dense,
    }


PRUNERS = Comparison(
    package="benchmarks.pruners",
    action="prune",
    lines="runs-pruners.jsonl",
    alone=("ours", "magnitude"),
    count=count,
)
