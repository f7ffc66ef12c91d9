"""llm-compressor: GPTQ, with what its documentation calls best (static activation order)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks.quantizers.peers.common import installed, linears, load_llama, plain_logits
from benchmarks.quantizers.settings import Setting

# variant: (algorithm, activation order, damping, observer)
VARIANTS = {
    "gptq": ("gptq", "static", 0.01, "memoryless_mse"),
    "gptq-damp0.1": ("gptq", "static", 0.1, "memoryless_mse"),
    "gptq-weight": ("gptq", "weight", 0.01, "memoryless_mse"),
    "gptq-minmax": ("gptq", "static", 0.01, "memoryless_minmax"),
    "gptq-none": ("gptq", None, 0.01, "memoryless_mse"),
    "awq": ("awq", None, 0.0, "memoryless_mse"),
    "awq+gptq": ("awq+gptq", "static", 0.01, "memoryless_mse"),
}


def load(folder: Path, task: dict[str, Any]) -> Any:
    """The float model."""
    return load_llama(folder, "sdpa")  # faster than eager attention


def warm_imports() -> None:
    """Imported before the clock starts."""
    import llmcompressor
    import llmcompressor.modifiers.gptq
    import llmcompressor.modifiers.quantization  # noqa: F401


def quantize(model: Any, windows: Any, setting: Setting, variant: str, seed: int) -> Any:
    """`oneshot` over the windows, layer by layer."""
    import torch
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
    from llmcompressor.modifiers.gptq import GPTQModifier

    algorithm, order, damping, observer = VARIANTS[variant]
    scheme = QuantizationScheme(
        targets=["Linear"],
        weights=QuantizationArgs(
            num_bits=setting.bits,
            type="int",
            symmetric=setting.symmetric,
            strategy="group",
            group_size=setting.group,
            observer=observer,
        ),
    )
    recipe: list[Any] = []
    groups = {"group_0": scheme}
    if "awq" in algorithm:
        from llmcompressor.modifiers.transform.awq import AWQModifier
        from llmcompressor.pipelines.cache import IntermediatesCache

        # It pins memory for a copy to the GPU even where there is none, and fails there.
        if not torch.cuda.is_available():
            IntermediatesCache.pin_memory = lambda *_, **__: None
        recipe.append(AWQModifier(duo_scaling="both"))
    if "gptq" in algorithm:
        recipe.append(
            GPTQModifier(
                config_groups=groups, ignore=["lm_head"], actorder=order, dampening_frac=damping
            )
        )
    else:
        from llmcompressor.modifiers.quantization import QuantizationModifier

        recipe.append(QuantizationModifier(config_groups=groups, ignore=["lm_head"]))
    return one_shot(model, windows, recipe, seed)


def one_shot(model: Any, windows: Any, recipe: list[Any], seed: int) -> Any:
    """The recipe on the windows, in place."""
    import torch
    from datasets import Dataset
    from llmcompressor import oneshot

    torch.manual_seed(seed)
    rows = [{"input_ids": w.tolist(), "attention_mask": [1] * len(w)} for w in windows]
    oneshot(
        model=model,
        tokenizer=_NoTokenizer(),
        dataset=Dataset.from_list(rows),
        recipe=recipe,
        max_seq_length=windows.shape[1],
        num_calibration_samples=len(windows),
        shuffle_calibration_samples=False,
        batch_size=8,
        pipeline="sequential",
    )
    return model


def weights(quantized: Any, setting: Setting, variant: str) -> tuple[dict[str, Any], float, str]:
    """Codes from the stored scales and zeros, as compressed-tensors packs them."""
    import torch

    inside = linears(quantized)
    state = {
        k: v
        for k, v in quantized.state_dict().items()
        if "_scale" not in k and "zero_point" not in k and "g_idx" not in k
    }
    half = 1 << (setting.bits - 1)
    for name, layer in inside.items():
        w = layer.weight.data.float()
        # Stored scales have 16 bits; the model is float32 here, so they are rounded now.
        scale = layer.weight_scale.data.half().float()
        zero = getattr(layer, "weight_zero_point", None)
        x = w.reshape(w.shape[0], -1, setting.group)
        z = torch.zeros_like(scale) if zero is None else zero.data.float()
        code = (x / layer.weight_scale.data.float()[:, :, None] + z[:, :, None]).round()
        code = code.clamp(-half, half - 1)
        state[f"{name}.weight"] = ((code - z[:, :, None]) * scale[:, :, None]).reshape(w.shape)
    algorithm, order, damping, observer = VARIANTS[variant]
    words = f"{algorithm}, actorder {order}, dampening {damping:g}, observer {observer}"
    return state, setting.stored_bits(), words


def forward(quantized: Any, ids: Any) -> Any:
    """Logits with the fake-quantized weights of the peer."""
    return plain_logits(quantized, ids)


def versions() -> str:
    """Of what was compared."""
    return installed("llmcompressor", "compressed-tensors", "transformers", "torch")


class _NoTokenizer:
    """The windows are tokens already; oneshot asks for a tokenizer all the same."""

    pad_token = eos_token = "</s>"

    def save_pretrained(self, *args: Any, **kwargs: Any) -> None:
        """Nothing to save."""
