"""A module trained by several ranks: replicated (DDP), sharded (FSDP2), or with the matrices of a
Llama-like model split (tensor parallel through DTensor), alone or over the other two.

Knows modules and torch's ways to spread them; not what they are trained for. `ranks` joins the
group that torchrun starts, `spread` is for the loop, and after it the module is whole again.
"""

from __future__ import annotations

import copy
import logging
import math
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from joulesmith.errors import JoulesmithError
from joulesmith.ranks import added, rank, world
from joulesmith.train.group import Ranks, ranks
from joulesmith.train.optimizers import by_mesh
from joulesmith.train.parallel_settings import ParallelSettings
from joulesmith.train.zeros import local

__all__ = ["ParallelSettings", "Ranks", "Spread", "check_split", "ranks", "spread", "whole"]

COLUMNS = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")
"""Linear layers whose outputs are split over ranks (Shoeybi et al. 2019, "Megatron-LM")."""
ROWS = ("o_proj", "down_proj")
"""Those whose inputs are; their outputs are added up."""
_BUCKET = 32 << 20
"""Bytes of gradients that travel together."""


@dataclass
class Spread:
    """module: what an objective calls. inner: whose parameters train and are kept. data_rank of
    data_world: which part of a batch is this rank's. moved: parameters given -> those that train in
    their place, none where they are the same. plan: in words."""

    module: nn.Module
    inner: nn.Module
    data_rank: int = 0
    data_world: int = 1
    plan: str = "one rank"
    moved: dict[nn.Parameter, nn.Parameter] = field(default_factory=dict)
    _average_over: Any = None

    def passes(self, last: bool) -> Any:
        """A context for one forward and backward pass: gradients travel in the last of a step."""
        if isinstance(self.module, _Replicated):
            return nullcontext() if last else self.module.no_sync()
        sync = getattr(self.module, "set_requires_gradient_sync", None)
        if sync is not None:
            sync(last)
            self.module.set_is_last_backward(last)  # type: ignore[operator]
        return nullcontext()

    @torch.no_grad()
    def average(self) -> None:
        """After a step's last pass: gradients that nobody has averaged over data ranks yet."""
        if self._average_over is None:
            return
        found = [local(p.grad) for p in self.inner.parameters() if p.grad is not None]
        for part in _buckets(found):
            flat = torch.cat([g.reshape(-1) for g in part])
            dist.all_reduce(flat, group=self._average_over)
            flat /= self.data_world
            at = 0
            for g in part:
                g.copy_(flat[at : at + g.numel()].view_as(g))
                at += g.numel()

    @torch.no_grad()
    def clip(self, most: float) -> float:
        """Norm of the whole gradient, over all ranks' parts; scaled down to ``most`` if above."""
        parts = [
            (ps, nn.utils.get_total_norm([p.grad for p in ps if p.grad is not None]))
            for ps in by_mesh(p for p in self.inner.parameters() if p.grad is not None)
        ]
        norms = [float(_whole(n)) for _, n in parts]
        total = math.hypot(*norms)
        if self.moved:  # sums of parts may differ by a bit between ranks, which would drift apart
            total = added([total])[0] / world()
        if math.isfinite(total) and total > most:
            for ps, norm in parts:
                nn.utils.clip_grads_with_norm_(ps, most, torch.full_like(_whole(norm), total))
        return total

    @torch.no_grad()
    def back(self) -> None:
        """What was trained into the parameters that were given. All ranks call it."""
        for p, q in self.moved.items():
            p.copy_(_whole(q.detach()))


@contextmanager
def spread(
    module: nn.Module, settings: ParallelSettings, leaves_out: bool = True
) -> Iterator[Spread]:
    """Inside, a module that all ranks train. After it, ``module`` has what was trained, on every
    rank; after an error, of shards and split matrices, what it had.

    leaves_out: whether an objective's passes may leave out parameters that train (DDP then looks
    for them). Ranks start from the first one's parameters. Shards and split matrices are of a copy:
    while it trains, a GPU holds only its part, and the module given waits in the machine's memory.

    Raises `JoulesmithError` for ranks that ``tensor`` does not divide, models that it cannot split
    and parameters that cannot be shards.
    """
    n = world()
    data = settings.data_ranks(n)
    if n == 1:
        yield Spread(module, module)
        return
    if settings.tensor == 1 and settings.data == "replicate":
        yield from _replicated(module, n, leaves_out)
        return
    device = next(module.parameters()).device
    places = _split_places(module, settings.tensor) if settings.tensor > 1 else {}
    _same_start(module)
    shell, moved = _shell(module, copies=data == 1 or settings.data == "replicate")
    mesh = dist.device_mesh.init_device_mesh(
        device.type, (data, settings.tensor), mesh_dim_names=("data", "tensor")
    )
    words = []
    if settings.tensor > 1:
        from torch.distributed.tensor.parallel import parallelize_module

        parallelize_module(shell, mesh["tensor"], places)
        words.append(f"each matrix split over {settings.tensor} (tensor parallel)")
    over = None
    if data > 1 and settings.data == "shard":
        _shard(shell, mesh["data"])
        if settings.tensor > 1:  # it warns of every gathering over two dimensions
            logging.getLogger("torch.distributed.tensor._redistribute").setLevel(logging.ERROR)
        words.append(f"weights and optimizer states in shards over {data} (FSDP2)")
    elif data > 1:
        over = mesh["data"].get_group()
        words.append(f"replicated {data} times")
    names = {id(p): m for p, m in moved.items()}
    now = dict(shell.named_parameters())
    pairs = {p: now[names[id(p)]] for p in moved}
    put_by = device.type == "cuda"
    for p in pairs:
        if put_by:
            p.data = p.data.cpu()
    found = Spread(shell, shell, mesh["data"].get_local_rank(), data, "; ".join(words), pairs, over)
    try:
        yield found
        found.back()
    finally:
        if put_by:
            for p in pairs:
                p.data = p.data.to(device)


def whole(module: nn.Module) -> dict[str, Tensor]:
    """The whole state dict on the processor, of the first rank; {} on the others. All call it."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    found: dict[str, Any] = get_model_state_dict(module, options=options)
    return found if rank() == 0 else {}


class _Replicated(DistributedDataParallel):
    """With the attributes of what it wraps, such as ``config``."""

    @property
    def replica(self) -> nn.Module:
        """This rank's, for passes without gradients."""
        found: nn.Module = self.module
        return found

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("module"), name)


def _replicated(module: nn.Module, n: int, leaves_out: bool) -> Iterator[Spread]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # newer torch has another name for broadcast_buffers
        front = _Replicated(
            module,
            find_unused_parameters=leaves_out,
            broadcast_buffers=False,  # ranks may call it unequally often
            gradient_as_bucket_view=True,
        )
    try:
        yield Spread(front, module, rank(), n, f"replicated {n} times (DDP)")
        for b in module.buffers():
            dist.broadcast(b, 0)
    finally:
        front._remove_autograd_hooks()  # type: ignore[no-untyped-call]
        for p in module.parameters():
            p.grad = None


@torch.no_grad()
def _same_start(module: nn.Module) -> None:
    for t in (*module.parameters(), *module.buffers()):
        dist.broadcast(t.data, 0)


def _shell(module: nn.Module, copies: bool) -> tuple[nn.Module, dict[nn.Parameter, str]]:
    """A copy of the structure; parameters given -> their name in it. copies: of numbers too, where
    not all of them become shards, which are copies by themselves."""
    memo: dict[int, Any] = {}
    names: dict[nn.Parameter, str] = {}
    for name, p in module.named_parameters():
        memo[id(p)] = nn.Parameter(
            p.detach().clone() if copies else p.detach(), requires_grad=p.requires_grad
        )
        names[p] = name
    for b in module.buffers():
        memo[id(b)] = b
    return copy.deepcopy(module, memo), names


def _shard(module: nn.Module, mesh: Any) -> None:
    """Block by block, so that one block at a time is whole."""
    from torch.distributed.fsdp import fully_shard

    for name, p in module.named_parameters():
        if not p.ndim or not p.is_floating_point():
            raise JoulesmithError(f'{name} cannot be a shard: train with data "replicate"')
    holders = Counter(id(p) for m in module.modules() for p in m.parameters(recurse=False))
    for parent in module.modules():
        for block in parent if isinstance(parent, nn.ModuleList) else ():
            own = Counter(id(p) for m in block.modules() for p in m.parameters(recurse=False))
            apart = bool(own) and all(holders[i] == c for i, c in own.items())
            if apart and not any(isinstance(m, nn.ModuleList) for m in block.modules()):
                fully_shard(block, mesh=mesh)
    fully_shard(module, mesh=mesh)


def check_split(module: nn.Module, n: int) -> None:
    """Raises `JoulesmithError` where ``n`` ranks cannot split the module's matrices."""
    if n > 1:
        _split_places(module, n)


def _split_places(module: nn.Module, n: int) -> dict[str, Any]:
    """Linear layer by name -> how it is split. Raises `JoulesmithError` where the model is not of
    the kind, or heads or neurons do not divide."""
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel

    config: Any = getattr(module, "config", None)
    found: dict[str, Any] = {}
    blocks: dict[str, set[str]] = {}
    for name, m in module.named_modules():
        parent, _, last = name.rpartition(".")
        if last not in COLUMNS + ROWS:
            continue
        if type(m) is not nn.Linear:
            raise JoulesmithError(
                f"{name} is a {type(m).__name__}: tensor parallel splits plain linear layers, "
                'train with data "shard"'
            )
        split = m.out_features if last in COLUMNS else m.in_features
        if split % n:
            raise JoulesmithError(f"{name}: {split} rows or columns do not divide by tensor {n}")
        found[name] = ColwiseParallel() if last in COLUMNS else RowwiseParallel()
        blocks.setdefault(parent, set()).add(last)
    kinds = {frozenset(b) for b in blocks.values()}
    attention = frozenset(("q_proj", "k_proj", "v_proj", "o_proj"))
    if kinds != {attention, frozenset(("gate_proj", "up_proj", "down_proj"))}:
        raise JoulesmithError(
            f"{type(module).__name__} is not built like Llama (q_proj, k_proj, v_proj, o_proj; "
            "gate_proj, up_proj, down_proj): tensor parallel cannot split it, train with data "
            '"shard"'
        )
    for what in ("num_attention_heads", "num_key_value_heads"):
        heads = getattr(config, what, None)
        if heads is None or heads % n:
            raise JoulesmithError(f"{what} {heads} does not divide by tensor {n}")
    for parent, held in blocks.items():
        other = module.get_submodule(parent)
        extra = [k for k, c in other.named_children() if any(True for _ in c.parameters())]
        if strange := sorted(set(extra) - held):
            raise JoulesmithError(
                f"{parent}.{strange[0]} would see a part of the heads or neurons: tensor parallel "
                'knows no such layer, train with data "shard"'
            )
    return found


def _whole(t: Tensor) -> Tensor:
    found: Tensor = t.full_tensor() if hasattr(t, "full_tensor") else t  # type: ignore[operator]
    return found


def _buckets(tensors: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Runs of one type, of about `_BUCKET` bytes."""
    part: list[Tensor] = []
    size = 0
    for t in tensors:
        if part and (size >= _BUCKET or part[0].dtype != t.dtype):
            yield part
            part, size = [], 0
        part.append(t)
        size += t.numel() * t.element_size()
    if part:
        yield part


def check_hook(hook: Any, settings: ParallelSettings) -> None:
    """Raises `JoulesmithError` for a hook of the loop that cannot look at parts of matrices, where
    ranks will hold parts."""
    if settings.parts(world()) and hook is not None and not hasattr(hook, "moved"):
        raise JoulesmithError(
            f'{type(hook).__name__} looks at whole matrices: train with data "replicate" and no '
            "tensor parallel"
        )


def moved_hook(hook: Any, moved: Mapping[nn.Parameter, nn.Parameter]) -> None:
    """Tell a hook that parameters are elsewhere."""
    if moved and hook is not None:
        hook.moved(moved)
