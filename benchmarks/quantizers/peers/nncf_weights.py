"""NNCF: weight compression of a torch model, with AWQ and scale estimation at 4 bits.

Its GPTQ and LoRA correction refuse torch models, and it knows 4 and 8 bits only.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks.quantizers.peers.common import installed, load_llama, plain_logits
from benchmarks.quantizers.settings import Setting


def load(folder: Path, task: dict[str, Any]) -> Any:
    """The float model, its head freed from the embedding so that it stays as it is."""
    return load_llama(folder)


def warm_imports() -> None:
    """Imported before the clock starts."""
    import nncf
    import nncf.torch  # noqa: F401


def quantize(model: Any, windows: Any, setting: Setting, variant: str, seed: int) -> Any:
    """`compress_weights` of all linear layers of the blocks."""
    import nncf
    import torch

    kind = "SYM" if setting.symmetric else "ASYM"
    mode = getattr(nncf.CompressWeightsMode, f"INT{setting.bits}_{kind}")
    rows = [{"input_ids": torch.from_numpy(w[None]).long(), "use_cache": False} for w in windows]
    # Its 8-bit mode would take the embedding and the head too.
    ends = nncf.IgnoredScope(patterns=[".*embed_tokens.*", ".*lm_head.*"], validate=False)
    given: dict[str, Any] = {"mode": mode, "dataset": nncf.Dataset(rows), "ignored_scope": ends}
    if setting.bits == 4:
        given |= {
            "ratio": 1.0,
            "group_size": setting.group,
            "all_layers": False,
            "subset_size": len(windows),
            "backup_mode": nncf.BackupMode.NONE,
            "awq": "awq" in variant,
            "scale_estimation": "scale" in variant,
            "advanced_parameters": nncf.AdvancedCompressionParameters(
                awq_params=nncf.quantization.advanced_parameters.AdvancedAWQParameters(
                    subset_size=len(windows)
                ),
                scale_estimation_params=(
                    nncf.quantization.advanced_parameters.AdvancedScaleEstimationParameters(
                        subset_size=len(windows), initial_steps=5, scale_steps=10
                    )
                ),
            ),
        }
    return nncf.compress_weights(model, **given)


def weights(quantized: Any, setting: Setting, variant: str) -> tuple[dict[str, Any], float, str]:
    """Decompressed by NNCF's own modules; AWQ merges its scales into the layer before."""
    import torch

    state = {k: v for k, v in quantized.state_dict().items() if "__nncf_hooks" not in k}
    hooks = quantized.get_submodule("__nncf_hooks.post_hooks")
    kinds = {type(m).__name__ for m in quantized.modules()}
    if "SQMultiply" in kinds:
        raise NotImplementedError("a scale on activations has no place in plain weights")
    for name in [k for k in state if ".layers." in k and k.endswith("proj.weight")]:
        inside = hooks.get_submodule(name.replace(".", ":") + "__0")
        with torch.no_grad():
            state[name] = inside.get_submodule("0")(state[name]).float()
    zero = 8 if setting.bits == 8 else None
    words = variant if setting.bits == 4 else "min and max, one scale a row"
    if setting.bits == 4:
        words += ", 10 scale steps, all windows as subset, no backup precision"
    bits = setting.stored_bits(zero_bits=zero if not setting.symmetric else 0)
    if setting.bits == 8:  # a scale for each row, whatever group was asked for
        rows = {k: v.shape for k, v in state.items() if ".layers." in k and "proj" in k}
        count = sum(r * c for r, c in rows.values())
        each = 16 + (0 if setting.symmetric else 8)
        bits = 8 + each * sum(r for r, _ in rows.values()) / count
    elif not setting.symmetric:
        bits = setting.stored_bits()
    return state, bits, words


def forward(quantized: Any, ids: Any) -> Any:
    """Logits of the compressed model."""
    return plain_logits(quantized, ids)


def versions() -> str:
    """Of what was compared."""
    return installed("nncf", "torch")
