"""Recovery: what a compression step took is won back by training against the uncompressed teacher.

`prepared` says what of a module trains, and puts it back together; `recover` does all of it with
the loop and distillation. Knows modules; no files of models, no plans.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from joulesmith.compress.checkpoint import digest
from joulesmith.compress.layers import linears_of
from joulesmith.compress.quantize.grids import Bytes
from joulesmith.errors import JoulesmithError
from joulesmith.train import adapters, loop, quantized
from joulesmith.train.distil import Distil
from joulesmith.train.outputs import eager
from joulesmith.train.recover_settings import DistilSettings, RecoverSettings
from joulesmith.train.settings import TrainSettings
from joulesmith.train.teacher import TopK
from joulesmith.train.zeros import KeepZeros

if TYPE_CHECKING:
    from joulesmith.models import Model

Packed = Mapping[str, tuple[str, Bytes]]
"""Linear layer by its name in the module -> grid, and packed rows in torch's order."""


@dataclass
class Prepared:
    """hook: for the loop. packed: of "quantized", when all is put back together."""

    hook: KeepZeros
    packed: dict[str, tuple[str, Bytes]] = field(default_factory=dict)


@dataclass(frozen=True)
class Recovered:
    """packed: of "quantized", what the module's linear layers now hold exactly."""

    trained: loop.Trained
    packed: dict[str, tuple[str, Bytes]]


def recover(
    module: nn.Module,
    windows: NDArray[np.int32],
    settings: TrainSettings,
    how: RecoverSettings,
    distil: DistilSettings | None = None,
    *,
    teacher: nn.Module | None = None,
    cache: TopK | None = None,
    packed: Packed | None = None,
    vocab: int | None = None,
    eos: int | None = None,
    **given: Any,
) -> Recovered:
    """Train ``module``, a compressed model, in place.

    windows: int32 (n, length). distil, teacher, cache, vocab, eos: as `Distil` has them; packed: as
    `prepared`. given: what else `loop.train` takes (folder, judge, meter, progress ...). Raises
    `JoulesmithError` as these do.
    """
    wanted = distil or DistilSettings()
    objective = Distil(wanted, teacher=teacher, cache=cache, vocab=vocab, eos=eos)
    identity = given.pop("identity", None)
    if given.get("folder") is not None:  # frozen weights are in no checkpoint
        told = None if cache is None else cache.layout.fingerprint
        identity = digest(
            identity, how.model_dump(), wanted.model_dump(), module, teacher, told, vocab, eos,
            packed or {},
        )  # fmt: skip
    with ExitStack() as stack:
        if wanted.attention:
            stack.enter_context(eager(module, *([] if teacher is None else [teacher])))
        parts = stack.enter_context(prepared(module, how, packed))
        trained = loop.train(
            module, windows, objective, settings, hook=parts.hook, identity=identity, **given
        )
    return Recovered(trained, parts.packed)


@contextmanager
def prepared(
    module: nn.Module, how: RecoverSettings, packed: Packed | None = None
) -> Iterator[Prepared]:
    """Inside, exactly what ``how`` trains requires gradients; after it, the module has its own
    classes, parameters and flags again, with adapters merged or weights on their grid.

    packed: of "quantized", the linear layers and the scales to start from, in the place of
    ``how.types``. Two modules that share a matrix keep sharing it: neither gets an adapter or a
    grid. The same module and settings give the same start. After an error inside, adapters are
    dropped and weights are left as they are.

    Raises `JoulesmithError` where nothing would train, for weights of half precision, names that
    are no linear layer, and as `quantized.quantize`.
    """
    flags = {n: p.requires_grad for n, p in module.named_parameters()}
    layers: dict[str, nn.Linear] = {}
    kinds: dict[str, str] = {}
    try:
        module.requires_grad_(False)
        if how.mode == "lora":
            layers = _plain_linears(module)
            generator = torch.Generator().manual_seed(how.seed)
            for layer in layers.values():
                adapters.adapt(layer, how.rank, how.alpha, generator, keep_zeros=how.keep_zeros)
        elif how.mode == "quantized":
            found = _plain_linears(module)
            kinds = _kinds(found, how.types, packed)
            for name, kind in kinds.items():
                raw = None if packed is None else packed[name][1]
                quantized.quantize(found[name], kind, raw, keep_zeros=how.keep_zeros)
                layers[name] = found[name]
        chosen = _chosen(module, how, layers)
        for p in chosen.values():
            p.requires_grad_(True)
        _check(chosen)
        # adapters see to it themselves, and begin with zeros
        keeps = how.keep_zeros and how.mode != "lora"
        parts = Prepared(KeepZeros(chosen.values() if keeps else ()))
        yield parts
        for name, layer in layers.items():
            if isinstance(layer, adapters.LoraLinear):
                adapters.merge(layer)
            elif isinstance(layer, quantized.QuantizedLinear):
                parts.packed[name] = kinds[name], quantized.settle(layer)
    finally:
        for layer in layers.values():
            if isinstance(layer, adapters.LoraLinear):
                adapters.take_off(layer)
            elif isinstance(layer, quantized.QuantizedLinear):
                quantized.take_off(layer)
        for n, p in module.named_parameters():
            p.requires_grad_(flags[n])
            p.grad = None


def _chosen(
    module: nn.Module, how: RecoverSettings, layers: Mapping[str, nn.Linear]
) -> dict[str, nn.Parameter]:
    """What trains, by name."""
    every = {n: p for n, p in module.named_parameters() if p.is_floating_point()}
    if how.mode == "full":
        return every
    own = {id(p) for layer in layers.values() for p in layer.parameters(recurse=False)}
    if how.mode == "lora":
        own -= {id(p) for layer in layers.values() for p in (layer.weight, layer.bias)}
        return {n: p for n, p in every.items() if id(p) in own}
    return {n: p for n, p in every.items() if p.ndim < 2 or id(p) in own}


def _check(chosen: Mapping[str, nn.Parameter]) -> None:
    if not chosen:
        raise JoulesmithError("nothing trains in this mode: the module has no such weights")
    for name, p in chosen.items():
        if p.dtype not in (torch.float32, torch.float64):
            raise JoulesmithError(
                f"{name} is {str(p.dtype).removeprefix('torch.')}, too coarse for small steps: "
                "load the model in float32"
            )


def _plain_linears(module: nn.Module) -> dict[str, nn.Linear]:
    """Of class `torch.nn.Linear` itself, with a matrix that is theirs alone."""
    holders = Counter(
        id(p) for m in module.modules() for p in m.parameters(recurse=False)
    )  # modules, each once
    found = {
        n: x.owner
        for n, x in linears_of(module).items()
        if type(x.owner) is nn.Linear and holders[id(x.stored)] == 1
    }
    if not found:
        raise JoulesmithError(
            f"{type(module).__name__} has no torch.nn.Linear of its own weights: recover it in "
            'mode "full"'
        )
    return found


def _kinds(
    layers: Mapping[str, nn.Linear], types: str | Mapping[str, str], packed: Packed | None
) -> dict[str, str]:
    """Layer -> grid."""
    if packed is not None:
        kinds = {n: kind for n, (kind, _) in packed.items()}
    else:
        kinds = dict.fromkeys(layers, types) if isinstance(types, str) else dict(types)
    for name in kinds:
        if name not in layers:
            raise JoulesmithError(
                f"no linear layer with a matrix of its own is called {name!r}: there are "
                f"{', '.join(list(layers)[:3])} ..."
            )
    for name, (_, raw) in (packed or {}).items():
        if len(raw) != layers[name].out_features:
            raise JoulesmithError(f"{name}: {len(raw)} packed rows for {layers[name]}")
    return kinds


def to_gguf(model: Model, packed: Packed) -> dict[str, tuple[str, Bytes]]:
    """Linear layers of ``model.module`` by GGUF's names, rows in GGUF's order, as exporters and
    `compress.quantize` have them. Raises `JoulesmithError` for a layer that GGUF has no name of."""
    refs = {r.parameter: r for r in model.tensors.values()}
    found = {}
    for name, (kind, raw) in packed.items():
        ref = refs.get(f"{name}.weight")
        if ref is None:
            raise JoulesmithError(f"GGUF has no name for {name}: export another format")
        found[ref.name] = kind, raw if ref.rows is None else raw[ref.rows]
    return found


def from_gguf(model: Model, packed: Packed) -> dict[str, tuple[str, Bytes]]:
    """The inverse of `to_gguf`. Raises `JoulesmithError` for tensors that the model has not."""
    found = {}
    for name, (kind, raw) in packed.items():
        ref = model.ref(name)
        order = slice(None) if ref.rows is None else np.argsort(ref.rows)
        found[ref.parameter.removesuffix(".weight")] = kind, raw[order]
    return found
