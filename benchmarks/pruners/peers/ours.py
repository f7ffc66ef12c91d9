"""joulesmith's own pruning, by method. Needs joulesmith on the path."""

from __future__ import annotations

from typing import Any

from benchmarks.pruners.settings import Setting
from benchmarks.quantizers.peers.common import plain_logits
from benchmarks.quantizers.peers.ours import load, versions

__all__ = ["VARIANTS", "forward", "load", "prune", "versions", "warm_imports", "weights"]

VARIANTS: dict[str, dict[str, str]] = {
    "default": {},
    "fast": {"method": "sparsegpt"},
    "wanda": {"method": "wanda"},
    "magnitude": {"method": "magnitude"},
    "admm-uniform": {"allocation": "uniform"},
}


def warm_imports() -> None:
    """Imported before the clock starts."""
    import joulesmith.compress.prune.step
    import joulesmith.compress.prune.walk  # noqa: F401


def prune(model: Any, windows: Any, setting: Setting, variant: str, seed: int) -> Any:
    """The step `Prune` on the windows, in place."""
    from joulesmith.compress.prune.step import Prune

    share = {"pattern": setting.name} if setting.group else {"sparsity": setting.sparsity}
    Prune(**share, seed=seed, **VARIANTS[variant]).apply(model, windows)
    return model


def weights(pruned: Any, setting: Setting, variant: str) -> tuple[dict[str, Any], str]:
    """Of the module."""
    words = ", ".join(f"{k} {v}" for k, v in VARIANTS[variant].items())
    return pruned.module.state_dict(), words or "its defaults"


def forward(pruned: Any, ids: Any) -> Any:
    """Logits of the module itself."""
    return plain_logits(pruned.module, ids)
