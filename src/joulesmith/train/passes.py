"""The gradients of one step's batch, of which each rank has its part. Knows no optimizer."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from joulesmith.ranks import added, alone
from joulesmith.train import data, schedule
from joulesmith.train.modes import precision
from joulesmith.train.settings import TrainSettings

if TYPE_CHECKING:
    from joulesmith.train.parallel import Spread


def leaves_out(
    module: nn.Module, windows: NDArray[np.int32], objective: Any, s: TrainSettings
) -> bool:
    """Whether parameters that train may get no gradient, as a head that no loss looks at, or an
    expert that no token goes to: by one pass, on each rank alone, of which nothing stays."""
    if any("expert" in n for n, _ in module.named_modules()):
        return True
    chosen = [p for p in module.parameters() if p.requires_grad]
    device = chosen[0].device
    gpus = [device] if device.type == "cuda" else []
    places = schedule.windows_of(0, 1, len(windows), s.seed)
    tokens = torch.from_numpy(windows[places].astype(np.int64)).to(device)
    with torch.random.fork_rng(devices=gpus), alone(), precision(s, device):
        torch.manual_seed(s.seed)
        objective(module, tokens, places).backward()
    missing = any(p.grad is None for p in chosen)
    for p in chosen:
        p.grad = None
    return added([float(missing)])[0] > 0


def length_of(s: TrainSettings, step: int, length: int) -> int:
    """Tokens of the pieces that windows of ``length`` are cut to. Raises `JoulesmithError` for a
    start that does not divide it."""
    if not s.start_length:
        return length
    return data.length_at(step / s.steps, length, s.start_length, s.short)


def gradients(
    spread: Spread,
    windows: NDArray[np.int32],
    objective: Any,
    s: TrainSettings,
    step: int,
    device: torch.device,
) -> Tensor:
    """Those of the batch's mean loss, in the parameters' ``grad``, averaged over ranks -> the loss
    of this rank's part, scalar. Whatever is drawn follows from seed, step and part."""
    at = schedule.windows_of(step, s.batch, len(windows), s.seed)
    mine = at[spread.data_rank :: spread.data_world]
    drawn = s.seed * 1_000_003 + step * spread.data_world + spread.data_rank
    torch.manual_seed(drawn % 2**63)
    total = torch.zeros((), device=device)
    length = length_of(s, step, windows.shape[1])
    for i in range(0, len(mine), s.micro):
        places = mine[i : i + s.micro]
        tokens = torch.from_numpy(data.cut(windows[places], length).astype(np.int64)).to(device)
        share = len(places) / len(mine)
        with spread.passes(last=i + s.micro >= len(mine)):
            with precision(s, device):
                loss = objective(spread.module, tokens, places)
            (loss * share).backward()
        total += loss.detach().float() * share
    spread.average()
    return total
