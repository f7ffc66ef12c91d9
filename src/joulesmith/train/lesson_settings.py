"""All that a training is asked to do, but for texts and models. Knows no torch."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field, model_validator

from joulesmith.errors import JoulesmithError
from joulesmith.train.data_settings import DataSettings
from joulesmith.train.parallel_settings import ParallelSettings
from joulesmith.train.recover_settings import DistilSettings, RecoverSettings
from joulesmith.train.settings import TrainSettings
from joulesmith.train.sparse_settings import OPTIMIZERS, SparseSettings


class LessonSettings(BaseModel):
    """train: how the loop runs. distil: what is learned from whom; the text alone where soft is 0.
    how: what of the model trains. sparse: zeros that come and go while it trains, with every weight
    training. data: which windows. cache: the teacher is asked once and so many of its likeliest
    tokens are kept; 0 asks it in every step. points: of the energy-to-quality curve, in the place
    of ``train.every``; 0 leaves that. save_seconds: between checkpoints. parallel: how ranks share
    it, where there are several. compiled: the blocks, on a processor: steps of large models take
    about half the time after a minute or two; nothing changes without a C++ compiler.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)
    train: TrainSettings = TrainSettings(steps=1)
    distil: DistilSettings = DistilSettings()
    how: RecoverSettings = RecoverSettings()
    sparse: SparseSettings | None = None
    data: DataSettings = DataSettings()
    cache: int = Field(default=0, ge=0)
    points: int = Field(default=0, ge=0)
    save_seconds: float = Field(default=60.0, ge=0, allow_inf_nan=False)
    parallel: ParallelSettings = ParallelSettings()
    compiled: bool = False

    @model_validator(mode="after")
    def _together(self) -> LessonSettings:
        if self.sparse is not None and self.how.mode != "full":
            raise ValueError(f"sparse training trains every weight: not with mode {self.how.mode}")
        if self.sparse is not None and self.train.optimizer not in OPTIMIZERS:
            raise ValueError(
                f"{self.train.optimizer} has no states of single weights: sparse training goes "
                f"with {', '.join(OPTIMIZERS)}"
            )
        if self.cache and self.train.start_length:
            raise ValueError("a cache is of whole windows: give no start_length")
        if self.compiled and (self.distil.on_policy or self.train.start_length):
            raise ValueError(
                "compiled blocks want windows of one length: neither on_policy nor "
                "start_length goes with them"
            )
        if self.train.joules_per_percent is not None and not (self.points or self.train.every):
            raise ValueError("joules_per_percent goes by held-out losses: give points or every")
        if self.cache and not self.distil.soft:
            raise ValueError("a cache keeps a teacher's predictions: give soft a weight")
        return self

    def check_ranks(self, world: int) -> None:
        """Refuse what so many ranks cannot do. Raises `JoulesmithError`."""
        p, t = self.parallel, self.train
        p.check_batch(t.batch, world)
        if not p.parts(world):
            return
        both = p.data == "shard" and p.data_ranks(world) > 1 and p.tensor > 1
        for wrong, what, why in (
            (self.sparse is not None, "sparse training", "it looks at whole matrices"),
            (t.optimizer == "adafactor", "adafactor", "it looks at whole matrices"),
            (self.compiled, "compiled blocks", "they are compiled whole"),
            (self.distil.attention and p.tensor > 1, "matched attention", "a rank sees few heads"),
            (
                self.how.mode in ("lora", "quantized") and p.tensor > 1,
                f"mode {self.how.mode}",
                "its linear layers are no plain ones",
            ),
            (t.optimizer == "muon" and both, "muon", "its products of shards of parts are wrong"),
        ):
            if wrong:
                given = f"tensor {p.tensor}" if p.tensor > 1 else 'data "shard"'
                raise JoulesmithError(
                    f"{what} does not go with {given}{' and shards' if both else ''}: {why}: "
                    'train with data "replicate" and no tensor parallel'
                )

    @property
    def taught(self) -> bool:
        """Whether a teacher is needed."""
        d = self.distil
        return bool(d.soft or d.hidden or d.attention or d.on_policy)

    @property
    def asks(self) -> bool:
        """Whether the teacher itself is needed in each step, a cache or not."""
        d = self.distil
        inside = bool(d.hidden or d.attention or d.on_policy)
        return inside or bool(d.soft and not self.cache)
