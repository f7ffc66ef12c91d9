"""NVIDIA's Model Optimizer: AWQ with its clipping search, and its GPTQ, as fake quantization."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks.quantizers.peers.common import installed, linears, load_llama, plain_logits
from benchmarks.quantizers.settings import Setting

ALGORITHMS: dict[str, Any] = {
    "awq_full": {"method": "awq_full", "alpha_step": 0.1},
    "awq_lite": {"method": "awq_lite", "alpha_step": 0.1},
    "awq_clip": {"method": "awq_clip"},
    "gptq": {"method": "gptq", "perc_damp": 0.01, "layerwise": {"enable": True}},
}
"""``alpha_step`` and dampening are the presets' own."""


def load(folder: Path, task: dict[str, Any]) -> Any:
    """The float model."""
    return load_llama(folder)


def warm_imports() -> None:
    """Imported before the clock starts."""
    import modelopt.torch.quantization  # noqa: F401


def quantize(model: Any, windows: Any, setting: Setting, variant: str, seed: int) -> Any:
    """`mtq.quantize`; only weights of linear layers in the blocks."""
    import modelopt.torch.quantization as mtq
    import torch

    def loop(m: Any) -> None:
        with torch.no_grad():
            for start in range(0, len(windows), 8):
                m(input_ids=torch.from_numpy(windows[start : start + 8]).long())

    algorithm = dict(ALGORITHMS[variant])
    if variant == "gptq":
        algorithm["block_size"] = max(128, setting.group)
    block = {"num_bits": setting.bits, "block_sizes": {-1: setting.group, "type": "static"}}
    config = {
        "quant_cfg": [
            {"quantizer_name": "*", "enable": False},
            {"quantizer_name": "*weight_quantizer", "cfg": block},
            {"quantizer_name": "*input_quantizer", "enable": False},
            {"quantizer_name": "*lm_head*", "enable": False},
            {"parent_class": "nn.Embedding", "quantizer_name": "*", "enable": False},
        ],
        "algorithm": algorithm,
    }
    return mtq.quantize(model, config, loop)


def weights(quantized: Any, setting: Setting, variant: str) -> tuple[dict[str, Any], float, str]:
    """Each weight through its own quantizer, its scales rounded to the 16 bits that are stored.

    A layer's input scale (``pre_quant_scale``) is multiplied into its columns and counted
    with 16 bits a column.
    """
    import torch

    state = {k: v for k, v in quantized.state_dict().items() if "quantizer" not in k}
    stored, count = 0.0, 0
    for name, layer in linears(quantized).items():
        quantizer = layer.weight_quantizer
        bound = float(quantizer.maxbound)
        quantizer.amax = ((quantizer.amax / bound).half().float() * bound).clamp(min=1e-12)
        with torch.no_grad():
            w = quantizer(layer.weight.data).detach().clone()
        scale = layer.input_quantizer.pre_quant_scale
        if scale is not None:
            w = w * scale.float().reshape(1, -1)
            stored += 16 * w.shape[1]
        state[f"{name}.weight"] = w
        count += w.numel()
        stored += setting.stored_bits() * w.numel()
    words = ", ".join(f"{k} {v}" for k, v in ALGORITHMS[variant].items())
    return state, stored / count, words + f", int{setting.bits} blocks"


def forward(quantized: Any, ids: Any) -> Any:
    """Logits with its quantizers in place."""
    return plain_logits(quantized, ids)


def versions() -> str:
    """Of what was compared."""
    return installed("nvidia-modelopt", "torch")
