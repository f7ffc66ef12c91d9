"""AutoRound: signed gradient descent on rounding and ranges, block by block."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks.quantizers.peers.common import installed, linears, load_llama, plain_logits
from benchmarks.quantizers.settings import Setting

# variant: iterations, the algorithm extension, bfloat16 autocast (its own default)
VARIANTS = {
    "200": (200, False, False),
    "200-amp": (200, False, True),
    "200-ext": (200, True, False),
    "best": (1000, True, False),
}


def load(folder: Path, task: dict[str, Any]) -> Any:
    """The float model."""
    return load_llama(folder)


def warm_imports() -> None:
    """Imported before the clock starts."""
    import auto_round  # noqa: F401


def quantize(model: Any, windows: Any, setting: Setting, variant: str, seed: int) -> Any:
    """As its recipes "default" and "best" do, on these windows."""
    import torch
    from auto_round import AutoRound

    iterations, extension, amp = VARIANTS[variant]
    rows = [
        {"input_ids": torch.from_numpy(windows[at : at + 8]).long()}
        for at in range(0, len(windows), 8)
    ]
    tuner = AutoRound(
        model,
        tokenizer=_NoTokenizer(),
        scheme={
            "bits": setting.bits,
            "group_size": setting.group,
            "sym": setting.symmetric,
            "data_type": "int",
            "act_bits": 16,
        },
        iters=iterations,
        nsamples=len(windows),
        seqlen=windows.shape[1],
        batch_size=8,
        dataset=rows,
        device_map="cpu",
        enable_torch_compile=False,
        enable_alg_ext=extension,
        amp=amp,
        seed=seed,
        format="fake",
    )
    found, _ = tuner.quantize()
    return found


def weights(quantized: Any, setting: Setting, variant: str) -> tuple[dict[str, Any], float, str]:
    """Of the module, whose weights are dequantized already."""
    # It leaves the module in float16: what it did not quantize stays as it was.
    inside = linears(quantized).items()
    wanted = {f"{name}.weight": layer.weight.data.float() for name, layer in inside}
    iterations, extension, amp = VARIANTS[variant]
    form = "bfloat16 autocast" if amp else "float32"
    words = f"{iterations} iterations, batch 8, {form}, algorithm extension {extension}"
    return wanted, setting.stored_bits(), words


def forward(quantized: Any, ids: Any) -> Any:
    """Logits of the module."""
    return plain_logits(quantized, ids)


def versions() -> str:
    """Of what was compared."""
    return installed("auto-round", "transformers", "torch")


class _NoTokenizer:
    """The windows are tokens already."""

    def save_pretrained(self, *args: Any, **kwargs: Any) -> None:
        """Nothing to save."""
