"""NVIDIA's Model Optimizer: SparseGPT and magnitudes, both of them 2:4 alone."""

from __future__ import annotations

from typing import Any

from benchmarks.pruners.settings import Setting
from benchmarks.quantizers.peers.common import plain_logits
from benchmarks.quantizers.peers.model_optimizer import load, versions

__all__ = ["forward", "load", "prune", "versions", "warm_imports", "weights"]

MODES = {"sparsegpt": "sparsegpt", "magnitude": "sparse_magnitude"}


def warm_imports() -> None:
    """Imported before the clock starts."""
    import modelopt.torch.sparsity  # noqa: F401


def prune(model: Any, windows: Any, setting: Setting, variant: str, seed: int) -> Any:
    """`mts.sparsify`, then `mts.export`, which multiplies the masks in."""
    import modelopt.torch.sparsity as mts
    import torch

    def loop(m: Any) -> None:
        with torch.no_grad():
            for start in range(0, len(windows), 8):
                m(input_ids=torch.from_numpy(windows[start : start + 8]).long())

    config: dict[str, Any] = {"pattern": f"{setting.name} sparsity"}
    if variant == "sparsegpt":
        config["forward_loop"] = loop
    try:
        return mts.export(mts.sparsify(model, MODES[variant], config))
    except AttributeError as e:
        if setting.name == "2:4":
            raise
        # It asserts the pattern before it has the configuration that the message quotes.
        raise NotImplementedError(f"its searchers assert 2:4 ({e})") from e


def weights(pruned: Any, setting: Setting, variant: str) -> tuple[dict[str, Any], str]:
    """Of the exported module."""
    words = "its defaults: block size 128, dampening 0.1" if variant == "sparsegpt" else "ASP"
    return pruned.state_dict(), words


def forward(pruned: Any, ids: Any) -> Any:
    """Logits of the module itself."""
    return plain_logits(pruned, ids)
