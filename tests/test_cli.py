"""The command line: help, versions, and one clear line for bad input."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from joulesmith import cli
from joulesmith._version import __version__
from joulesmith.errors import JoulesmithError


def joulesmith(*words: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "joulesmith", *map(str, words)],
        capture_output=True,
        text=True,
        check=False,
    )


def test_version_and_help() -> None:
    assert joulesmith("--version").stdout == f"joulesmith {__version__}\n"
    help_ = joulesmith("--help")
    assert help_.returncode == 0
    for command in ("optimize", "measure-model", "inspect", "report"):
        assert command in help_.stdout


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys\n"
        "from joulesmith.cli import app\n"
        "try: app(['optimize', '--help'])\n"
        "except SystemExit: pass\n"
        "heavy = {'torch', 'transformers', 'numpy', 'scipy', 'gguf'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def bad_inputs(tmp: Path) -> dict[str, list[object]]:
    (tmp / "empty.txt").write_text("")
    (tmp / "short.txt").write_text("too short a text")
    (tmp / "garbage.gguf").write_bytes(b"\x00" * 100)
    (tmp / "truncated.gguf").write_bytes(b"GGUF\x03\x00\x00\x00" + b"\xff" * 16)
    (tmp / "folder").mkdir()
    (tmp / "pickle").mkdir()
    (tmp / "pickle" / "config.json").write_text('{"model_type": "llama"}')
    (tmp / "pickle" / "pytorch_model.bin").write_bytes(b"\x80\x02")
    (tmp / "alien").mkdir()
    (tmp / "alien" / "config.json").write_text('{"model_type": "alien"}')
    return {
        "no such model": ["optimize", tmp / "absent"],
        "not a gguf": ["optimize", tmp / "garbage.gguf"],
        "truncated": ["optimize", tmp / "truncated.gguf"],
        "empty folder": ["optimize", tmp / "folder"],
        "pickle": ["optimize", tmp / "pickle"],
        "architecture": ["optimize", tmp / "alien"],
        "floor": ["optimize", "smollm2", "--keep", "1.5"],
        "floor nan": ["optimize", "smollm2", "--keep", "nan"],
        "floor word": ["optimize", "smollm2", "--keep", "lots"],
        "workload": ["optimize", "smollm2", "--workload", "64"],
        "workload zero": ["optimize", "smollm2", "--workload", "0:4"],
        "time": ["optimize", "smollm2", "--time-budget", "soon"],
        "engine": ["optimize", "smollm2", "--engine", "steam"],
        "grid": ["optimize", "smollm2", "--grid", "Atlantis"],
        "no text": ["optimize", "smollm2", "--eval", tmp / "absent.txt"],
        "measure": ["measure-model", tmp / "truncated.gguf"],
        "inspect": ["inspect", tmp / "garbage.gguf"],
        "report": ["report", tmp / "folder"],
    }


@pytest.mark.parametrize("index", range(18))
def test_bad_input_is_one_line_and_exit_code_2(index: int, tmp_path: Path) -> None:
    given = tmp_path / "given"
    given.mkdir()
    name, words = list(bad_inputs(given).items())[index]
    out = tmp_path / "out"
    if words[0] == "optimize":
        words = [*words, "--out", out]
    done = joulesmith(*words)
    assert done.returncode == 2, (name, done.stderr)
    assert "Traceback" not in done.stderr
    lines = [x for x in done.stderr.splitlines() if not x.startswith(("[", "load:"))]
    assert len(lines) == 1 and lines[0].startswith("joulesmith: "), (name, done.stderr)
    assert not (out / "result.json").exists()


@pytest.mark.parametrize(
    ("text", "seconds"), [("10m", 600), ("600s", 600), ("1h", 3600), ("90", 90), ("1.5min", 90)]
)
def test_durations(text: str, seconds: float) -> None:
    assert cli.parse_duration(text) == seconds


@pytest.mark.parametrize("text", ["", "64", "64:", "a:b", "-1:4", "64:256:1", "99999999:1"])
def test_bad_workloads(text: str) -> None:
    with pytest.raises(JoulesmithError, match="--workload"):
        cli.parse_workload(text)


def test_keep_is_a_share_or_a_name() -> None:
    assert cli.parse_keep("0.99") == 0.99
    assert cli.parse_keep("Q4_K_M") == "Q4_K_M"
