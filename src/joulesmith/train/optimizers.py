"""Optimizers by name, out of torch: which parameters each gets. Knows no data and no loops."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from joulesmith.errors import JoulesmithError
from joulesmith.train.settings import TrainSettings
from joulesmith.train.zeros import local

ADAM_SHARE = 0.1
"""Of Muon's rate, for what Muon does not take: its steps have unit size in every direction, Adam's
in every weight."""


class Several(Optimizer):
    """Optimizers that step together; their groups and states are those of all. beside: tensors
    of parameters that are kept beside the states."""

    def __init__(self, parts: Iterable[Optimizer]) -> None:
        self.parts = list(parts)
        self.beside: dict[nn.Parameter, Tensor] = {}
        super().__init__([g for o in self.parts for g in o.param_groups], {})
        self.share_groups()

    def share_groups(self) -> None:
        """The parts look at the groups and states of the whole."""
        at = 0
        for o in self.parts:
            o.param_groups = self.param_groups[at : at + len(o.param_groups)]
            o.state = self.state
            at += len(o.param_groups)

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Each in turn."""
        assert closure is None
        for o in self.parts:
            o.step()

    def load_state_dict(self, state_dict: Any) -> None:
        """As any optimizer."""
        super().load_state_dict(state_dict)
        self.share_groups()


def build(parameters: Mapping[str, nn.Parameter], settings: TrainSettings) -> Optimizer:
    """name -> parameter to train, each once, -> the optimizer; weights of matrices decay, others
    do not. Muon takes the matrices of blocks, Adam what is left (Jordan et al. 2024, "Muon").

    Every group says in ``share`` what part of the scheduled rate it gets.
    """
    s = settings
    chosen = {n: p for n, p in parameters.items() if p.requires_grad}
    if not chosen:
        raise JoulesmithError("there is nothing to train: every parameter is frozen")
    matrices = {n: p for n, p in chosen.items() if p.ndim >= 2}
    rest = [p for n, p in chosen.items() if n not in matrices]

    def groups(parts: Iterable[nn.Parameter], others: list[nn.Parameter]) -> list[dict[str, Any]]:
        # operations on lists take tensors of one mesh of ranks
        return [
            {"params": ps, "weight_decay": decay, "share": 1.0}
            for found, decay in ((parts, s.decay), (others, 0.0))
            for ps in by_mesh(found)
        ]

    both = groups(matrices.values(), rest)
    if s.optimizer == "sgd":
        return torch.optim.SGD(both, lr=s.rate)
    if s.optimizer == "momentum":
        return torch.optim.SGD(both, lr=s.rate, momentum=0.9, nesterov=True)
    if s.optimizer == "adafactor":
        if any(hasattr(p, "device_mesh") for p in chosen.values()):
            raise JoulesmithError(
                "adafactor needs whole matrices, of which ranks hold parts here: train with adamw, "
                'or data "replicate" and no tensor parallel'
            )
        return torch.optim.Adafactor(both, lr=s.rate)
    # One pass over memory; of parts that ranks hold, torch's usual way.
    fused = not any(hasattr(p, "device_mesh") for p in chosen.values())
    if s.optimizer == "adamw":
        return torch.optim.AdamW(both, lr=s.rate, betas=(0.9, 0.95), eps=1e-8, fused=fused)
    inner = {n: p for n, p in matrices.items() if p.ndim == 2 and not _end(n)}
    left = [p for n, p in matrices.items() if n not in inner]
    meshes: list[Any] = [getattr(p, "device_mesh", None) for p in chosen.values()]
    if any(m is not None and m.ndim > 1 for m in meshes):
        raise JoulesmithError(  # torch's products of such parts are wrong
            "muon does not go with shards of split matrices: train with adamw, or without one of "
            "the two"
        )
    parts: list[Optimizer] = []
    if inner:
        found = torch.optim.Muon(list(inner.values()), lr=s.rate, weight_decay=s.decay)
        parts.append(found)
    if ends := groups(left, rest):
        parts.append(torch.optim.AdamW(ends, lr=s.rate, betas=(0.9, 0.95), eps=1e-8, fused=fused))
    for i, part in enumerate(parts):
        for group in part.param_groups:
            group["share"] = 1.0 if i == 0 and inner else ADAM_SHARE
    return Several(parts)


def by_mesh(parameters: Iterable[nn.Parameter]) -> list[list[nn.Parameter]]:
    """Whole parameters, and those of which ranks hold parts, by who holds them. In order."""
    found: dict[Any, list[nn.Parameter]] = {}
    for p in parameters:
        found.setdefault(getattr(p, "device_mesh", None), []).append(p)
    return list(found.values())


def _end(name: str) -> bool:
    return any(part in name for part in ("embed", "lm_head", "wte", "wpe"))


def set_rate(optimizer: Optimizer, rate: float) -> None:
    """The scheduled rate, in each group's share."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group.get("share", 1.0)


def state_bytes(optimizer: Optimizer) -> int:
    """Bytes of all tensors that it keeps."""
    found: dict[int, int] = {}

    def look(value: Any) -> None:
        if isinstance(value, torch.Tensor):
            value = local(value)
            found[value.data_ptr() or id(value)] = value.numel() * value.element_size()
        elif isinstance(value, Mapping):
            for v in value.values():
                look(v)
        elif isinstance(value, list | tuple):
            for v in value:
                look(v)

    for state in optimizer.state.values():
        look(state)
    if isinstance(optimizer, Several):
        look(optimizer.beside)
    return sum(found.values())
