"""Checkpoints of a training: whole or not at all, the last good one kept, no pickle.

torch's distributed checkpoint, stored as safetensors: each rank writes its part, and any other
number of ranks reads it back. Numbers and names are JSON beside it. Knows tensors by name; not
what is trained.
"""

from __future__ import annotations

import json
import re
import shutil
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import (
    HuggingFaceStorageReader,
    HuggingFaceStorageWriter,
)
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_state_dict,
    set_state_dict,
)
from torch.distributed.checkpoint.state_dict_loader import load as dcp_load
from torch.distributed.checkpoint.state_dict_saver import save as dcp_save
from torch.optim import Optimizer

from joulesmith.atomic import check_space, sync
from joulesmith.errors import JoulesmithError
from joulesmith.ranks import rank, wait, world

__all__ = ["STATE", "latest", "load", "rank", "read_state", "save", "wait", "world"]

STATE = "state.json"
_NAME = re.compile(r"step-(\d{9})")
_OPTIONS = StateDictOptions(flatten_optimizer_state_dict=True, ignore_frozen_params=True)


def latest(folder: Path) -> Path | None:
    """The newest complete checkpoint in ``folder``, None where there is none."""
    found = [p for p in folder.glob("step-*") if _NAME.fullmatch(p.name) and (p / STATE).is_file()]
    return max(found, default=None)


def save(
    folder: Path,
    step: int,
    module: nn.Module,
    optimizer: Optimizer,
    state: Mapping[str, Any],
    extra: Mapping[str, Tensor] | None = None,
) -> Path:
    """Write ``folder``/step-N and remove older ones. state: JSON. extra: more tensors, by name.

    All ranks call it. Raises `JoulesmithError` where the disk is full or cannot be written to: the
    checkpoint before is then as it was.
    """
    final = folder / f"step-{step:09d}"
    part = folder / f"{final.name}.part"
    first = rank() == 0
    tensors, rest = _flat(module, optimizer)
    tensors |= _named(extra)
    try:
        if first:
            shutil.rmtree(part, ignore_errors=True)
            part.mkdir(parents=True)
            check_space(folder, sum(t.numel() * t.element_size() for t in tensors.values()))
        wait()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # one process is no mistake
            dcp_save(
                dict(tensors),
                storage_writer=HuggingFaceStorageWriter(path=str(part), save_distributed=True),
                no_dist=world() == 1,
            )
        if first:
            (part / STATE).write_text(json.dumps({**state, "step": step, "groups": rest}))
            for item in (part / STATE, part):  # torch has synced its own files
                sync(item)
            shutil.rmtree(final, ignore_errors=True)  # an incomplete one of a killed run
            part.replace(final)
            sync(folder)  # before those that it replaces are gone
            for old in folder.glob("step-*"):
                if old != final:
                    shutil.rmtree(old, ignore_errors=True)
        wait()
    except JoulesmithError:
        shutil.rmtree(part, ignore_errors=True)
        raise
    except (Exception, CheckpointException) as e:  # torch wraps what the disk says
        shutil.rmtree(part, ignore_errors=True)
        _not_to_be_kept(e)
        raise JoulesmithError(
            f"cannot write the checkpoint {final}: {_why(e)}: free some space; the one before it "
            "is kept, and the same command goes on from there"
        ) from e
    return final


def read_state(path: Path) -> dict[str, Any]:
    """The JSON part. Raises `JoulesmithError` for one that is damaged."""
    try:
        found = json.loads((path / STATE).read_text())
        if not isinstance(found, dict) or not isinstance(found.get("step"), int):
            raise ValueError
    except (OSError, ValueError, RecursionError) as e:
        raise JoulesmithError(f"damaged checkpoint: {path}: remove it to start anew") from e
    return found


def load(
    path: Path,
    module: nn.Module,
    optimizer: Optimizer,
    extra: Mapping[str, Tensor] | None = None,
) -> None:
    """Tensors of ``extra`` in place; then weights and optimizer state, of the shapes that the
    optimizer gives its states by then. Raises `JoulesmithError` where they do not fit."""
    if extra:
        _read(path, _named(extra))
    tensors, rest = _flat(module, optimizer)
    # Weights that no gradient reached had no state to keep, and get none here.
    bare = _stateless(path, tensors)
    _read(path, {n: t for n, t in tensors.items() if not n.startswith(tuple(bare))})
    weights: dict[str, Any] = {k[6:]: v for k, v in tensors.items() if k.startswith("model.")}
    optimizer_state: dict[str, Any] = {
        k[6:]: v for k, v in tensors.items() if k.startswith("optim.")
    }
    set_state_dict(
        module,
        optimizer,
        model_state_dict=weights,
        optim_state_dict={**optimizer_state, **rest},
        options=StateDictOptions(
            flatten_optimizer_state_dict=True, ignore_frozen_params=True, strict=False
        ),
    )
    for n, p in module.named_parameters():
        if f"optim.state.{n}." in bare:
            optimizer.state.pop(p, None)


def _stateless(path: Path, tensors: Mapping[str, Tensor]) -> set[str]:
    """Prefixes of the weights of which the checkpoint has no optimizer state at all."""
    try:
        stored = set(HuggingFaceStorageReader(path=str(path)).read_metadata().state_dict_metadata)
    except Exception:  # what is wrong with it `_read` tells
        return set()
    names = {n.removeprefix("model.") for n in tensors if n.startswith("model.")}
    prefixes = {f"optim.state.{n}." for n in names}
    return {x for x in prefixes if not any(n.startswith(x) for n in stored)}


def _read(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """In place."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            dcp_load(
                dict(tensors),
                storage_reader=HuggingFaceStorageReader(path=str(path)),
                no_dist=world() == 1,
            )
    except (Exception, CheckpointException) as e:
        _not_to_be_kept(e)
        raise JoulesmithError(
            f"the checkpoint {path} is of another model or damaged: {_why(e)}: remove it to start "
            "anew"
        ) from e


def _named(extra: Mapping[str, Tensor] | None) -> dict[str, Tensor]:
    """Tensors under "extra."."""
    return {f"extra.{n}": t for n, t in (extra or {}).items()}


def _flat(module: nn.Module, optimizer: Optimizer) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors under "model." and "optim."; the numbers of the optimizer's groups."""
    weights, states = get_state_dict(module, optimizer, options=_OPTIONS)
    again = _second_names(module)
    every: dict[str, Any] = {f"model.{n}": t for n, t in weights.items() if n not in again}
    every |= {f"optim.{n}": t for n, t in states.items()}
    tensors = {n: t for n, t in every.items() if isinstance(t, Tensor)}
    return tensors, {n: v for n, v in states.items() if not isinstance(v, Tensor)}


def _second_names(module: nn.Module) -> set[str]:
    """Of parameters that the module has under two, such as a head that is the embedding."""
    first = {n for n, _ in module.named_parameters()}
    every = {n for n, _ in module.named_parameters(remove_duplicate=False)}
    return {n.removeprefix("module.").replace("_orig_mod.", "") for n in every - first}


def _not_to_be_kept(e: BaseException) -> None:
    """torch gathers Ctrl-C and the like as failures too: raised as what it was."""
    for failure, *_ in getattr(e, "failures", {}).values():
        if not isinstance(failure, Exception):
            raise failure


def _why(e: BaseException) -> str:
    """The last cause, in one line."""
    if failures := getattr(e, "failures", None):  # of ranks, as torch gathers them
        e = next(iter(failures.values()))[0]
    while e.__cause__ is not None or e.__context__ is not None:
        e = e.__cause__ or e.__context__  # type: ignore[assignment]
    lines = str(e).strip().splitlines()
    return (lines[-1].strip() if lines else type(e).__name__)[:200]
