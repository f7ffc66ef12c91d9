"""torchao: HQQ, the best of its weight-only ways that run without a GPU.

Its GPTQ asserts a CUDA device, its AWQ needs tensor classes that only CUDA kernels have, and
its AutoRound prototype is AutoRound, which is here by itself.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks.quantizers.peers.common import installed, linears, load_llama, plain_logits
from benchmarks.quantizers.settings import Setting


def load(folder: Path, task: dict[str, Any]) -> Any:
    """The float model."""
    return load_llama(folder)


def warm_imports() -> None:
    """Imported before the clock starts."""
    import torchao.quantization.quant_primitives  # noqa: F401


def quantize(model: Any, windows: Any, setting: Setting, variant: str, seed: int) -> Any:
    """Data-free. Symmetric: HQQ_SCALE_ONLY through `quantize_`; else HQQ as Int4 tiles call it."""
    import torch
    from torchao.quantization import IntxWeightOnlyConfig, quantize_
    from torchao.quantization.granularity import PerGroup
    from torchao.quantization.quant_primitives import (
        _choose_qparams_and_quantize_affine_hqq as hqq,
    )
    from torchao.quantization.quantize_.workflows import IntxChooseQParamsAlgorithm

    inside = linears(model)
    if setting.symmetric:
        config = IntxWeightOnlyConfig(
            weight_dtype=getattr(torch, f"int{setting.bits}"),
            granularity=PerGroup(setting.group),
            scale_dtype=torch.float16,
            intx_choose_qparams_algorithm=IntxChooseQParamsAlgorithm.HQQ_SCALE_ONLY,
        )
        quantize_(model, config, filter_fn=lambda _, name: name in inside)
        return model
    # What Int4TilePackedTo4dTensor.from_hp(HQQ) calls; its packing alone needs CUDA.
    for layer in inside.values():
        w = layer.weight.data
        code, scale, zero, _ = hqq(
            w, nbits=setting.bits, group_size=setting.group, compute_dtype=torch.bfloat16,
            device="cpu",
        )  # fmt: skip
        middle = 1 << (setting.bits - 1)
        x = code.float().reshape(w.shape[0], -1, setting.group)
        scale = scale.float().reshape(w.shape[0], -1, 1)
        zero = zero.float().reshape(w.shape[0], -1, 1)
        layer.weight.data = ((x - middle) * scale + zero).reshape(w.shape)
    return model


def weights(quantized: Any, setting: Setting, variant: str) -> tuple[dict[str, Any], float, str]:
    """Dequantized by torchao's own tensors; zeros of HQQ are bfloat16, like its scales."""
    state = {}
    for name, value in quantized.state_dict().items():
        state[name] = value.dequantize() if hasattr(value, "dequantize") else value
    if setting.symmetric:
        words = "HQQ scale only, float16 scales"
        return state, setting.stored_bits(zero_bits=0), words
    return state, setting.stored_bits(zero_bits=16), "HQQ, bfloat16 scales and zeros"


def forward(quantized: Any, ids: Any) -> Any:
    """Logits through torchao's tensors."""
    return plain_logits(quantized, ids)


def versions() -> str:
    """Of what was compared."""
    return installed("torchao", "torch")
