"""A tiny trained model, and the command line run as a user runs it."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from runner import Run

from here import here
from tiny import write_tiny


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a small Llama."""
    return write_tiny(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One cache for all runs, so that the joule table is measured once."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def joulesmith(cache: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Run the command, in this process, which has torch and all else; ``until``: in one of its own,
    a text in the log at which ``send`` is delivered."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")

    def run(
        *words: object, until: str | None = None, send: int = signal.SIGKILL
    ) -> subprocess.CompletedProcess[str]:
        given = [str(w) for w in words]
        return here(*given) if until is None else _signalled(given, until, send)

    return run


def _signalled(words: list[str], until: str, send: int) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "joulesmith", *words]
    with subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # A background shell hands on SIGINT ignored; a terminal does not.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    ) as process:
        assert process.stdout is not None and process.stderr is not None
        log = ""
        for line in process.stderr:
            log += line
            if until in line:
                time.sleep(0.05)
                process.send_signal(send)
                break
        out, rest = process.communicate(timeout=300)
        return subprocess.CompletedProcess(command, process.returncode, out, log + rest)
