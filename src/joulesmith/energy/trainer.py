"""Joules in the ``transformers.Trainer``: a callback around `LoopMeter`.

Knows the Trainer's events and its saved state. transformers is imported when
`EnergyCallback` is first asked for: it takes seconds.
"""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import Any

from joulesmith.energy.training import LoopMeter, check, count_parameters
from joulesmith.errors import MissingExtraError

_STEPS_BETWEEN_VOTES = 10


@lru_cache(maxsize=1)
def _callback_class() -> Any:
    try:
        from transformers.trainer_callback import ExportableState, TrainerCallback
    except ImportError as e:
        raise MissingExtraError("transformers") from e

    class EnergyCallback(TrainerCallback, ExportableState):  # type: ignore[misc]
        """`LoopMeter` for ``transformers.Trainer(callbacks=[EnergyCallback(...)])``.

        Takes the arguments of `LoopMeter` (``parameters`` defaults to the model's) and
        ``tokens_per_step``; without it tokens are known where the training arguments
        have ``include_num_input_tokens_seen``. Samples are counted as full batches.
        Evaluation is metered apart. With ``budget_joules`` the training stops, on all
        processes alike. A run that resumes goes on with the joules of its checkpoint.
        `loop` holds the figures. Of several processes the first of each machine meters.
        """

        def __init__(
            self,
            meter: Any = None,
            *,
            parameters: Any = None,
            budget_joules: float | None = None,
            every: int | None = None,
            seconds: float = 1.0,
            path: Path | str | None = None,
            tokens_per_step: float | None = None,
        ) -> None:
            check(every, seconds, budget_joules)
            self._options: dict[str, Any] = {
                "budget_joules": budget_joules,
                "every": every,
                "seconds": seconds,
                "path": None if path is None else str(path),
            }
            self._meter, self._parameters = meter, parameters
            self._tokens_per_step = tokens_per_step
            self._seen: float | None = None
            self._live: LoopMeter | None = None
            self.saved: dict[str, Any] | None = None
            self.loop: LoopMeter | None = None

        def state(self) -> dict[str, Any]:
            options = {**self._options, "tokens_per_step": self._tokens_per_step}
            if self.loop is not None:
                self.saved = self.loop.state_dict()
            return {"args": options, "attributes": {"saved": self.saved}}

        def on_train_begin(self, args: Any, state: Any, control: Any, **kw: Any) -> None:
            saved = state.stateful_callbacks.get("EnergyCallback")
            # A checkpoint of a run without this callback has no place for its state.
            state.stateful_callbacks.setdefault("EnergyCallback", self.state())
            self.loop = self._live = self._seen = None
            if not state.is_local_process_zero:
                return
            parameters = self._parameters if self._parameters is not None else kw.get("model")
            try:
                parameters = count_parameters(parameters)
            except Exception:  # a model that does not tell
                parameters = None
            loop = LoopMeter(self._meter, parameters=parameters, **self._options)
            if state.global_step > 0:
                found = saved[0] if isinstance(saved, list) and saved else saved
                try:
                    loop.load_state_dict(found["attributes"]["saved"])  # type: ignore[index]
                except (KeyError, TypeError, ValueError):
                    loop.note("the checkpoint holds no joules: they count from here")
            if args.world_size > 1:
                loop.note(
                    f"{args.world_size} processes train: counters cover this machine, modelled "
                    "parts only its first process"
                )
            if self._tokens_per_step is None and _counts_tokens(args):
                self._seen = float(state.num_input_tokens_seen)
            loop.start()
            self.loop = self._live = loop

        def on_step_begin(self, args: Any, state: Any, control: Any, **kw: Any) -> None:
            if self._live is not None:
                self._live.end_pause()
                self._live.begin_step()

        def on_step_end(self, args: Any, state: Any, control: Any, **kw: Any) -> None:
            if self._live is not None:
                tokens = self._tokens_per_step
                if self._seen is not None:
                    seen = float(state.num_input_tokens_seen)
                    tokens, self._seen = seen - self._seen, seen
                batch = args.train_batch_size * args.gradient_accumulation_steps
                self._live.end_step(tokens, batch * args.world_size)
            stop = self._live is not None and self._live.should_stop
            if self._options["budget_joules"] is not None and args.world_size > 1:
                stop = _any_process(stop, args.device, state.global_step)
            if stop:
                control.should_training_stop = True

        def on_prediction_step(self, args: Any, state: Any, control: Any, **kw: Any) -> None:
            if self._live is not None:
                self._live.begin_pause()

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kw: Any) -> None:
            if self._live is not None and logs:
                self._live.end_pause()
                numbers = {k: v for k, v in logs.items() if isinstance(v, int | float)}
                self._live.record(**numbers)

        def on_evaluate(self, args: Any, state: Any, control: Any, **kw: Any) -> None:
            if self._live is not None:
                self._live.end_pause()

        def on_train_end(self, args: Any, state: Any, control: Any, **kw: Any) -> None:
            if self._live is not None:
                self._live.stop()
                self._live = None

    return EnergyCallback


def _counts_tokens(args: Any) -> bool:
    said = getattr(args, "include_num_input_tokens_seen", False)
    return said not in (False, "no", None)


def _any_process(stop: bool, device: Any, step: int) -> bool:
    """True on all processes alike when any wants to stop; asked every tenth step."""
    if step % _STEPS_BETWEEN_VOTES:
        return False
    import torch
    import torch.distributed as dist

    if not (dist.is_available() and dist.is_initialized()):
        return stop
    vote = torch.tensor([int(stop)], device=device)
    dist.all_reduce(vote, op=dist.ReduceOp.MAX)
    return bool(vote.item())


def __getattr__(name: str) -> Any:
    if name == "EnergyCallback":
        return _callback_class()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
