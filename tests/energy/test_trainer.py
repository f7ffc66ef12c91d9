from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from joulesmith.energy.reading import Reading

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")


class Meter:
    """Every window of training costs 10 joules, every other 3."""

    def __init__(self, known: bool = True) -> None:
        self.known = known

    def window(self, name: str) -> Any:
        meter = self

        class Window:
            def __enter__(self) -> None:
                pass

            def __exit__(self, *exc: object) -> None:
                pass

            @property
            def reading(self) -> Reading:
                j = 10.0 if name == "train" else 3.0
                return Reading(j, 1.0, j, j, "measured") if meter.known else Reading(None, 1.0)

        return Window()


def model() -> Any:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=32, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=2, max_position_embeddings=16,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config)


def trainer(folder: Path, callback: Any, **options: Any) -> Any:
    data = [{"input_ids": torch.arange(8) + i, "labels": torch.arange(8) + i} for i in range(16)]
    args = transformers.TrainingArguments(
        output_dir=str(folder), use_cpu=True, per_device_train_batch_size=2, max_steps=6,
        logging_steps=2, report_to=[], disable_tqdm=True, save_strategy="no", seed=1,
        **options,
    )  # fmt: skip
    return transformers.Trainer(
        model=model(),
        args=args,
        train_dataset=data,
        eval_dataset=data[:4],
        callbacks=[callback] if callback else [],
    )


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def callback(*args: Any, **options: Any) -> Any:
    from joulesmith.energy.trainer import EnergyCallback

    return EnergyCallback(*args, **options)


def test_a_real_training(tmp_path: Path) -> None:
    path = tmp_path / "curve.jsonl"
    energy = callback(Meter(), every=3, path=path)
    run = trainer(
        tmp_path, energy, eval_strategy="steps", eval_steps=6, include_num_input_tokens_seen=True
    )
    run.train()
    loop = energy.loop
    assert loop.steps == 6 and loop.samples == 12 and loop.tokens == 12 * 8
    assert loop.parameters == sum(p.numel() for p in run.model.parameters())
    assert loop.joules == 10.0 * sum(p["window_joules"] is not None for p in loop.curve)
    assert loop.joules_per_token == loop.joules / 96 and loop.joules_per_parameter > 0
    assert loop.aside == 3.0 and loop.spent == loop.joules + 3
    losses = [p["loss"] for p in loop.curve if p["loss"] is not None]
    assert len(losses) == 3 and all(2 < x < 6 for x in losses)
    (judged,) = [p for p in loop.curve if "eval_loss" in p["metrics"]]
    assert judged["step"] == 6 and judged["joules"] > 0
    written = [json.loads(x) for x in path.read_text().splitlines()]
    assert [w["joules"] for w in written] == [p["joules"] for p in loop.curve]
    # Evaluating after the training is not part of it.
    before = (loop.joules, loop.aside, len(loop.curve))
    run.evaluate()
    assert (loop.joules, loop.aside, len(loop.curve)) == before


def test_tokens_are_unknown_unless_counted(tmp_path: Path) -> None:
    energy = callback(Meter())
    trainer(tmp_path, energy).train()
    assert energy.loop.tokens is None and energy.loop.joules_per_token is None
    given = callback(Meter(), tokens_per_step=16)
    trainer(tmp_path, given).train()
    assert given.loop.tokens == 96


def test_budget_stops_the_training(tmp_path: Path) -> None:
    energy = callback(Meter(), every=1, budget_joules=15)
    run = trainer(tmp_path, energy)
    run.train()
    assert run.state.global_step == 2 and energy.loop.spent >= 15


def test_unknown_energy_trains_on(tmp_path: Path) -> None:
    energy = callback(Meter(known=False), every=1, budget_joules=1)
    run = trainer(tmp_path, energy)
    run.train()
    assert run.state.global_step == 6 and energy.loop.joules is None and energy.loop.steps == 6


@pytest.mark.parametrize("restore", [False, True])
def test_resume_goes_on_with_the_joules_of_the_checkpoint(tmp_path: Path, restore: bool) -> None:
    first = callback(Meter(), every=1)
    run = trainer(tmp_path, first)
    run.args.save_strategy, run.args.save_steps = "steps", 4
    run.train()
    saved = json.loads((tmp_path / "checkpoint-4" / "trainer_state.json").read_text())
    state = saved["stateful_callbacks"]["EnergyCallback"]["attributes"]["saved"]
    assert state["steps"] == 4 and 40 <= state["joules"] < first.loop.joules

    energy = callback(None if restore else Meter(), every=1)
    again = trainer(tmp_path, energy, restore_callback_states_from_checkpoint=restore)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    if restore:  # the Trainer replaces the callback by a new one
        (energy,) = [
            c for c in again.callback_handler.callbacks if type(c).__name__ == "EnergyCallback"
        ]
    assert energy.loop.steps == 6 and any("resumed at step 4" in n for n in energy.loop.notes)
    assert energy.loop.spent >= state["joules"]
    if not restore:
        assert energy.loop.joules == state["joules"] + 10 * (
            sum(p["window_joules"] is not None for p in energy.loop.curve)
        )


def test_resume_from_a_checkpoint_without_joules(tmp_path: Path) -> None:
    run = trainer(tmp_path, None)
    run.args.save_strategy, run.args.save_steps = "steps", 4
    run.train()
    energy = callback(Meter(), every=1)
    again = trainer(tmp_path, energy)
    again.args.save_strategy, again.args.save_steps = "steps", 4
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert energy.loop.steps == 2
    assert any("no joules" in n for n in energy.loop.notes)
    assert (tmp_path / "checkpoint-6").is_dir()


def test_with_the_real_meter(tmp_path: Path) -> None:
    energy = callback(every=2)
    trainer(tmp_path, energy).train()
    loop = energy.loop
    assert loop.steps == 6 and loop.seconds > 0
    if loop.joules is not None:
        assert loop.joules > 0 and loop.low <= loop.joules <= loop.high
        assert loop.pedigree in ("measured", "modelled", "assumed")


def test_processes_stop_together(tmp_path: Path) -> None:
    """Two processes vote by gloo; only one of them wants to stop."""
    code = (
        "import sys, torch.distributed as d\n"
        "from joulesmith.energy.trainer import _any_process as ask\n"
        "r = int(sys.argv[1])\n"
        "d.init_process_group('gloo', init_method='file://' + sys.argv[2], rank=r, world_size=2)\n"
        "print([ask(r == 0 and s == 20, 'cpu', s) for s in (10, 15, 20)])\n"
    )
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    both = [
        subprocess.Popen(
            [sys.executable, "-c", code, str(rank), str(tmp_path / "meet")],
            stdout=subprocess.PIPE, text=True, env=env,
        )
        for rank in (0, 1)
    ]  # fmt: skip
    assert [p.communicate(timeout=120)[0].strip() for p in both] == ["[False, False, True]"] * 2


def test_arguments_are_checked_when_made() -> None:
    with pytest.raises(ValueError, match="every"):
        callback(every=0)
