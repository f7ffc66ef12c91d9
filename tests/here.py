"""The command line called in this process, which has paid for the imports."""

from __future__ import annotations

import contextlib
import io
import subprocess
import sys
import traceback

import pytest


def here(*words: object) -> subprocess.CompletedProcess[str]:
    """What a process of its own would say, and its exit code."""
    from joulesmith.cli import main

    command = ["joulesmith", *map(str, words)]
    out, log, code = io.StringIO(), io.StringIO(), 0
    torch = sys.modules.get("torch")
    threads = torch.get_num_threads() if torch else None
    with (
        pytest.MonkeyPatch.context() as patch,
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(log),
    ):
        patch.setattr(sys, "argv", command)
        try:
            main()
        except SystemExit as e:
            code = e.code if isinstance(e.code, int) else int(e.code is not None)
        except Exception:
            traceback.print_exc()  # as the interpreter would
            code = 1
        finally:
            if torch:
                torch.set_num_threads(threads)
    return subprocess.CompletedProcess(command, code, out.getvalue(), log.getvalue())
