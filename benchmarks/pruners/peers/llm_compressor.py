"""llm-compressor: SparseGPT and Wanda, block by block, evenly or with OWL's shares.

Its OWL does not run as released, and is mended here; what of it, `prune` says.
"""

from __future__ import annotations

from typing import Any
from unittest import mock

from benchmarks.pruners.settings import Setting
from benchmarks.quantizers.peers.common import plain_logits
from benchmarks.quantizers.peers.llm_compressor import load, one_shot, versions

__all__ = ["forward", "load", "prune", "versions", "warm_imports", "weights"]

OWL = {"sparsity_profile": "owl", "owl_m": 5, "owl_lmbda": 0.08}
"""The OWL paper's values (https://arxiv.org/abs/2310.05175, section 4)."""


def warm_imports() -> None:
    """Imported before the clock starts."""
    import llmcompressor
    import llmcompressor.modifiers.pruning  # noqa: F401


def prune(model: Any, windows: Any, setting: Setting, variant: str, seed: int) -> Any:
    """`oneshot` over the windows. ``preserve_sparsity_mask`` has no effect on a dense model."""
    from llmcompressor.modifiers.pruning import SparseGPTModifier, WandaPruningModifier

    gpt = variant.startswith("sparsegpt")
    base = SparseGPTModifier if gpt else WandaPruningModifier

    class Mended(base):  # type: ignore[misc, valid-type]
        """Release 0.14.0.1 calibrates OWL with a pipeline that may not run yet ("Cannot invoke
        event before initializing"), makes a dict of shares, and then reads only lists."""

        def on_initialize(self, state: Any, **kwargs: Any) -> bool:
            with mock.patch("llmcompressor.pipelines.basic.run_calibration", _forward):
                done = super().on_initialize(state, **kwargs)
            self.sparsity = [float(self.sparsity[k]) for k in self._target_layers]
            return bool(done)

    owl = variant.endswith("owl")
    given: dict[str, Any] = {"block_size": 128, "dampening_frac": 0.01} if gpt else {}
    recipe = (Mended if owl else base)(
        sparsity=setting.sparsity,
        mask_structure=f"{setting.zeros}:{setting.group}",  # its N is of those that go
        # By block, not "Linear": OWL has one share for each block, and with "Linear" the
        # modifier sees a name that ``ignore`` does not match.
        targets=[r"re:model.layers.\d+$"],
        ignore=["re:.*lm_head"],
        **given,
        **(OWL if owl else {}),
    )
    return one_shot(model, windows, [recipe], seed)


def _forward(model: Any, loader: Any) -> None:
    """What calibration is to OWL: every batch through the model."""
    import torch

    with torch.no_grad():
        for batch in loader:
            model(**batch)


def weights(pruned: Any, setting: Setting, variant: str) -> tuple[dict[str, Any], str]:
    """Of the module."""
    words = "block size 128, dampening 0.01" if variant.startswith("sparsegpt") else "by rows"
    if variant.endswith("owl"):
        words += ", OWL with M 5 and lambda 0.08 (mended: as released it fails)"
    return pruned.state_dict(), words


def forward(pruned: Any, ids: Any) -> Any:
    """Logits of the module itself."""
    return plain_logits(pruned, ids)
