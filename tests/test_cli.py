"""The command line: help, versions, and one clear line for bad input."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from here import here
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
    for command in (
        "optimize",
        "measure",
        "measure-model",
        "doctor",
        "calibrate-power",
        "inspect",
        "report",
    ):
        assert command in help_.stdout


@pytest.mark.parametrize(
    "words",
    [
        ["optimize", "--help"],
        ["measure", "--help"],
        ["measure", "--json", "--compare", "true", "true"],
        ["doctor", "--json"],
    ],
)
def test_nothing_heavy_is_imported_before_it_is_needed(words: list[str]) -> None:
    code = (
        "import sys\n"
        "from joulesmith.cli import app\n"
        f"try: app({words!r})\n"
        "except SystemExit as e: assert not e.code, e.code\n"
        "heavy = {'torch', 'transformers', 'numpy', 'scipy', 'gguf', 'rich.console'}\n"
        "heavy &= set(sys.modules)\n"
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
        "repeat": ["measure", "--repeat", "0", "true"],
        "no command": ["measure", "--repeat", "2"],
        "compare": ["measure", "--compare", "'", "true"],
        "compare empty": ["measure", "--compare", " ", "true"],
        "pue": ["measure", "--pue", "0.5", "true"],
        "pue nan": ["measure", "--pue", "nan", "true"],
        "idle": ["measure", "--idle", "-1", "true"],
        "measure grid": ["measure", "--grid", "Atlantis", "true"],
        "measure price": ["measure", "--price", "lots", "true"],
        "output": ["measure", "-o", tmp / "absent" / "x", "true"],
        "watts": ["calibrate-power", "--idle", "100", "--max", "50"],
        "watts nan": ["calibrate-power", "--idle", "nan", "--max", "50"],
        "no watts": ["calibrate-power"],
        "log": ["calibrate-power", "--log", tmp / "absent.csv"],
        "inspect": ["inspect", tmp / "garbage.gguf"],
        "report": ["report", tmp / "folder"],
    }


@pytest.mark.parametrize("index", range(32))
def test_bad_input_is_one_line_and_exit_code_2(index: int, tmp_path: Path) -> None:
    given = tmp_path / "given"
    given.mkdir()
    name, words = list(bad_inputs(given).items())[index]
    out = tmp_path / "out"
    if words[0] == "optimize":
        words = [*words, "--out", out]
    done = here(*words)
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


def test_measure_leaves_the_streams_to_the_command() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "joulesmith", "measure", "--label", "mine", "--", "sh", "-c",
         "cat; echo err >&2; exit 5"],
        input="through", capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 5
    assert done.stdout == "through"
    first, report = done.stderr.split("\n", 1)
    assert first == "err" and report.startswith("mine (exit code 5)\n")
    for word in ("energy", "above idle", "mean power", "time", "peak memory", "carbon", "cost"):
        assert f"{word} " in report
    assert "Traceback" not in report


def test_measure_takes_the_commands_own_options_as_they_are() -> None:
    done = joulesmith("measure", "--json", "sh", "-c", "printf %s $0", "--json")
    assert done.returncode == 0
    said, _, told = done.stdout.partition("\n")
    assert said == "--json"
    assert json.loads(told)["command"] == ["sh", "-c", "printf %s $0", "--json"]


def test_measure_compares_and_writes_to_a_file(tmp_path: Path) -> None:
    file = tmp_path / "report.json"
    done = joulesmith(
        "measure", "--json", "-o", file, "--repeat", 3, "--compare", "sh -c 'sleep 0.2'",
        "--grid", "300", "--price", "0.2", "--", "sh", "-c", "sleep 0.02; echo ran",
    )  # fmt: skip
    assert (done.returncode, done.stdout, done.stderr) == (0, "ran\n" * 3, "")
    told = json.loads(file.read_text())
    assert told["repeat"] == 3 and told["other"]["command"] == ["sh", "-c", "sleep 0.2"]
    ratio = told["ratio"]["seconds"]
    assert ratio["pairs"] == 3 and 1 < ratio["low"] <= ratio["ratio"] <= ratio["high"]
    text = tmp_path / "report.txt"
    assert (
        joulesmith("measure", "-o", text, "--compare", "true", "--repeat", 2, "true").returncode
        == 0
    )
    assert "true takes, against true:" in text.read_text()


def test_measure_writes_to_what_is_no_file() -> None:
    done = joulesmith("measure", "-o", "/dev/stdout", "--label", "mine", "true")
    assert (done.returncode, done.stderr) == (0, "") and done.stdout.startswith("mine\n")


@pytest.mark.parametrize(
    ("command", "code"),
    [(["no-such-command"], 127), (["/"], 126), (["sh", "-c", "kill -9 $$"], 137)],
)
def test_measure_passes_on_how_the_command_ended(command: list[str], code: int) -> None:
    done = joulesmith("measure", "--", *command)
    assert done.returncode == code and done.stdout == ""
    if code < 128:
        assert done.stderr.count("\n") == 1 and done.stderr.startswith("joulesmith: ")


def test_ctrl_c_is_for_the_command_and_is_reported(tmp_path: Path) -> None:
    """To the whole group, as a terminal sends it; the session has no terminal here."""
    ready = tmp_path / "ready"
    process = subprocess.Popen(
        [sys.executable, "-m", "joulesmith", "measure", "--repeat", "3", "--",
         sys.executable, "-c",
         f"import pathlib, time; pathlib.Path({str(ready)!r}).touch(); time.sleep(60)"],
        stderr=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip
    while not ready.exists():
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGINT)
    _, stderr = process.communicate()
    assert process.returncode == 130
    assert "joulesmith" not in stderr.split("KeyboardInterrupt")[0].splitlines()[-1]
    assert "energy " in stderr and "a signal stopped it early" in stderr


def test_doctor_names_every_kind_of_source() -> None:
    done = joulesmith("doctor", "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found and all(isinstance(row, dict) for row in found)
    text = joulesmith("doctor")
    assert text.returncode == 0 and "RAPL" in text.stdout


def test_power_is_calibrated_shown_and_forgotten(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    assert joulesmith("calibrate-power", "--show").returncode == 0
    done = joulesmith("calibrate-power", "--idle", 42, "--max", 118)
    assert done.returncode == 0, done.stderr
    shown = joulesmith("calibrate-power", "--show")
    assert "42" in shown.stdout and "118" in shown.stdout
    told = json.loads(joulesmith("measure", "--json", "true").stdout)
    if not any(p["pedigree"] == "measured" for p in told["parts"]):
        assert "42 W" in told["source"] and "118 W" in told["source"]
    assert joulesmith("calibrate-power", "--forget").returncode == 0
    assert "118" not in joulesmith("calibrate-power", "--show").stdout
