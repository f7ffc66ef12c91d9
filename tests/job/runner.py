"""Running the command line as a user runs it."""

from __future__ import annotations

import subprocess
from collections.abc import Callable

FAST = ["--workload", "8:8", "--time-budget", "60s", "--pairs", "3"]

Run = Callable[..., "subprocess.CompletedProcess[str]"]
