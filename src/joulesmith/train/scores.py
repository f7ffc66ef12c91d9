"""What a model makes of windows: scores to choose training data by. Knows a module and tokens; what
is chosen by them is `data`'s to say."""

from __future__ import annotations

from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from joulesmith.errors import JoulesmithError
from joulesmith.progress import Tick, silent
from joulesmith.ranks import shared
from joulesmith.train.outputs import device_of, lockstep, run

Score = Literal["loss", "gradient"]
BATCH = {"cpu": 4, "cuda": 64}
"""Windows in one pass: on a GPU many, as small ones leave it idle."""
ROWS = 1 << 22
"""Logits handled at a time."""


@torch.no_grad()
def scores(
    module: nn.Module,
    windows: NDArray[np.int32],
    kind: Score = "loss",
    progress: Tick = silent,
) -> NDArray[np.float64]:
    """A score of each window, (n,): "loss", mean nats a token; "gradient", mean over tokens of the
    norm of the loss's gradient by the logits, ||p - y||, which is EL2N (Paul et al. 2021, "Deep
    learning on a data diet", section 2.3) and needs no backward pass.

    windows: int32 (n, length). In eval mode, on the module's device. Raises `JoulesmithError` for
    windows that are none and logits that are not finite.
    """
    if windows.ndim != 2 or not len(windows) or windows.shape[1] < 2:
        raise JoulesmithError("no windows to score: give more text")
    found = np.empty(len(windows), np.float64)
    training = module.training
    module.eval()
    try:
        device = device_of(module)
        batch = BATCH.get(device.type, BATCH["cpu"])
        if device.type == "cuda":  # logits of a large vocabulary fill the memory
            vocab = getattr(getattr(module, "config", None), "vocab_size", 1 << 15)
            batch = max(1, min(batch, (1 << 30) // (windows.shape[1] * vocab)))
        for i in range(0, len(windows), batch):
            tokens = torch.from_numpy(windows[i : i + batch].astype(np.int64)).to(device)
            logits = run(module, tokens[:, :-1]).logits
            labels = tokens[:, 1:]
            each = torch.empty(labels.shape, dtype=torch.float32, device=tokens.device)
            many = max(1, ROWS // (logits.shape[-1] * len(tokens)))
            for at in range(0, labels.shape[1], many):
                part = logits[:, at : at + many].float().log_softmax(-1)
                label = labels[:, at : at + many, None]
                own = part.gather(-1, label)[..., 0]
                if kind == "gradient":
                    # ||p - y||^2 = sum p^2 - 2 p_y + 1
                    squares = (2 * part).exp().sum(-1) - 2 * own.exp() + 1
                    own = -squares.clamp_min(0).sqrt()
                each[:, at : at + many] = -own
            found[i : i + len(tokens)] = each.double().mean(1).cpu().numpy()
            progress((i + len(tokens)) / len(windows))
    finally:
        module.train(training)
    if not np.isfinite(found).all():
        raise JoulesmithError("the model's predictions are not finite on this text")
    return found


class HeldOut:
    """Mean loss of windows, nats a token, when called with a module. Ranks share the windows, but
    where each holds a part of the module: all call it."""

    def __init__(self, windows: NDArray[np.int32]) -> None:
        self.windows = windows

    def __call__(self, module: nn.Module) -> float:
        """In nats a token."""
        if lockstep(module):
            return float(scores(module, self.windows).mean())
        every = shared(self.windows, lambda part: scores(module, part).tolist())  # type: ignore[arg-type]
        return float(np.mean(every))
