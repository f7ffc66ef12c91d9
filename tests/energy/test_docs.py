"""The docs on energy say what exists: Python runs, commands, options, names and links are there."""

from __future__ import annotations

import re
from datetime import datetime, timezone
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

from joulesmith import cli
from joulesmith.energy.reading import Reading

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "docs" / "energy.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```", TEXT, re.S)
TRAINING = (ROOT / "docs" / "training_energy.md").read_text(encoding="utf-8")
LOOP = re.findall(r"```python\n(.*?)```", TRAINING, re.S)[0]


class _Batch(list[int]):
    def numel(self) -> int:
        return 2 * len(self)


def test_python_blocks_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("hourly.csv").write_text(
        "datetime,gCO2/kWh\n2026-01-01T00:00:00Z,100\n2026-01-01T01:00:00Z,200\n"
    )
    names: dict[str, Any] = {
        "reading": Reading(3.6e6, 60.0, 3e6, 4e6, "measured"),
        "when": datetime(2026, 1, 1, 0, 30, tzinfo=timezone.utc),
        "model": 1000,
        "data": [_Batch([1, 2])] * 3,
        "train_on": lambda batch: 1.0,
        "evaluate": lambda model: 1.0,
    }
    assert len(BLOCKS) == 2
    exec(compile(LOOP, "docs/training_energy.md", "exec"), dict(names))
    capsys.readouterr()
    for block in BLOCKS:
        exec(compile(block, "docs/energy.md", "exec"), names)
    said = capsys.readouterr().out
    assert said.startswith("load ") and "value=100.0" in said
    assert Path("curve.jsonl").read_text().count("\n") >= 1


def test_commands_and_options_exist() -> None:
    import typer

    known = {
        name: {option for p in command.params for option in p.opts}
        for name, command in typer.main.get_command(cli.app).commands.items()  # type: ignore[attr-defined]
    }
    lines = [line.strip() for line in TEXT.splitlines() if line.startswith("    joulesmith ")]
    assert len(lines) >= 9
    for line in lines:
        words = line.split(" -- ")[0].split()
        options = {re.match(r"[\w-]+", w)[0] for w in words[2:] if w.startswith("-") and w != "--"}  # type: ignore[index]
        # OTHER's own options stand in quotes.
        options -= {"--fast", "--watts"}
        assert options <= known[words[1]], line
    for option in ("--json", "--grid", "--price", "--pue", "--idle", "--meter", "--compare", "-o"):
        assert option in known["measure"]


def test_names_and_links_exist() -> None:
    for name in re.findall(r"`(joulesmith\.energy\.\w+(?:\.\w+)?)`", TEXT):
        module, _, attribute = name.rpartition(".")
        if module == "joulesmith.energy":
            import_module(name)
        else:
            assert attribute in (ROOT / "src" / (module.replace(".", "/") + ".py")).read_text()
    for link in re.findall(r"\]\(([^):]+)\)", TEXT + TRAINING):
        assert (ROOT / "docs" / link).exists(), link
