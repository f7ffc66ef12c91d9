"""What a step is: a frozen config with ``apply``. Found by name in one registry."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict

from joulesmith.progress import Tick, silent

if TYPE_CHECKING:
    import torch

    from joulesmith.compress.prune.structured import Shrunk
    from joulesmith.compress.prune.walk import Pruned
    from joulesmith.compress.quantize.activations import InputQuantizer
    from joulesmith.compress.quantize.kv_cache import KVScheme
    from joulesmith.models import Model
    from joulesmith.train.loop import Trained

REGISTRY: dict[str, type[Step]] = {}


@dataclass(frozen=True)
class StepRecord:
    """What a step did.

    packed: GGUF tensor name -> (type name, uint8 (rows, bytes a row)) for tensors
    that are stored as blocks from here on. A step that changes the module's
    parameters in place leaves it empty. inputs: module name -> what rounds a linear layer's
    inputs. cache: how keys and values are cached. factors: GGUF tensor name -> (outer, inner),
    whose product is added to the packed matrix; rows in GGUF's order. pruned: layer by layer what
    became zero. shrunk: what a smaller model lost. trained: what a training took.
    """

    step: str
    packed: dict[str, tuple[str, NDArray[np.uint8]]] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    inputs: dict[str, InputQuantizer] = field(default_factory=dict)
    cache: KVScheme | None = None
    factors: dict[str, tuple[torch.Tensor, torch.Tensor]] = field(default_factory=dict)
    pruned: tuple[Pruned, ...] = ()
    shrunk: Shrunk | None = None
    trained: Trained | None = None


class Step(BaseModel):
    """Base of all steps. Fields are settings; ``apply`` does the work once."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    name: ClassVar[str]

    def apply(
        self, model: Model, calibration: NDArray[np.int32], progress: Tick = silent
    ) -> StepRecord:
        """Change ``model`` or pack its tensors; calibration: token windows (n, length)."""
        raise NotImplementedError


class Resumable(Step):
    """A step that can go on where it was interrupted."""

    def apply(
        self,
        model: Model,
        calibration: NDArray[np.int32],
        progress: Tick = silent,
        keep: Path | None = None,
    ) -> StepRecord:
        """As `Step.apply`. keep: folder for what is done; a call with the same settings, model and
        calibration goes on from there, to the same outcome."""
        raise NotImplementedError


S = TypeVar("S", bound=type[Step])


def register(cls: S) -> S:
    """Class decorator: make a step known by its name."""
    REGISTRY[cls.name] = cls
    return cls


def find(name: str) -> type[Step]:
    """The step of that name; raises `KeyError`. Importing here keeps the registry complete."""
    import joulesmith.compress.lowrank.absorb_step
    import joulesmith.compress.lowrank.step
    import joulesmith.compress.prune.step
    import joulesmith.compress.prune.structured
    import joulesmith.compress.quantize.fold_steps
    import joulesmith.compress.quantize.input_step
    import joulesmith.compress.quantize.kv_step
    import joulesmith.compress.quantize.smooth_step
    import joulesmith.compress.quantize.step
    import joulesmith.train.steps  # noqa: F401

    return REGISTRY[name]


def to_plain(step: Step) -> dict[str, Any]:
    """``{"step": name, ...settings}``."""
    return {"step": step.name, **step.model_dump(mode="json", exclude_defaults=True)}
