"""A tiny trained model, and the command line run as a user runs it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from runner import Run

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
def joulesmith(cache: Path) -> Run:
    """Run the command; ``until``: a text in the log at which ``send`` is delivered."""

    def run(
        *words: object, until: str | None = None, send: int = signal.SIGKILL
    ) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "joulesmith", *map(str, words)]
        env = {**os.environ, "XDG_CACHE_HOME": str(cache), "HF_HUB_OFFLINE": "1"}
        with subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=env,
            # A background shell hands on SIGINT ignored; a terminal does not.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        ) as process:
            assert process.stdout is not None and process.stderr is not None
            log = ""
            if until is not None:
                for line in process.stderr:
                    log += line
                    if until in line:
                        time.sleep(0.05)
                        process.send_signal(send)
                        break
            out, rest = process.communicate(timeout=300)
            return subprocess.CompletedProcess(command, process.returncode, out, log + rest)

    return run
