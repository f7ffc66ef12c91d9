"""CPU time of `joulesmith --help` and of importing the parts that need no torch.

    python benchmarks/startup.py

User plus system seconds of whole processes, median and spread of 15 runs each, beside
those of an empty Python, which is the floor.
"""

from __future__ import annotations

import os
import subprocess
import sys
from datetime import date
from pathlib import Path
from statistics import median

RUNS = 15
COMMANDS = {
    "python -c pass": [sys.executable, "-c", "pass"],
    "joulesmith --help": [sys.executable, "-m", "joulesmith", "--help"],
    "joulesmith --version": [sys.executable, "-m", "joulesmith", "--version"],
    "joulesmith measure -o FILE true": [
        *(sys.executable, "-m", "joulesmith", "measure", "-o", os.devnull, "true"),
    ],
    "import joulesmith.energy": [sys.executable, "-c", "import joulesmith.energy"],
    "from joulesmith import EnergyMeter": [
        sys.executable,
        "-c",
        "from joulesmith import EnergyMeter",
    ],
}


def cpu(command: list[str]) -> float:
    """CPU seconds of one run."""
    before = os.times()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    after = os.times()
    return (after.children_user + after.children_system) - (
        before.children_user + before.children_system
    )


def main() -> None:
    """Interleaved runs; the table goes to the screen and to benchmarks/results/."""
    found: dict[str, list[float]] = {name: [] for name in COMMANDS}
    for _ in range(RUNS):
        for name, command in COMMANDS.items():
            found[name].append(cpu(command))
    lines = [
        f"# CPU seconds at start ({date.today()})",
        "",
        "`python benchmarks/startup.py`",
        "",
        "| command | median | least | most |",
        "|---|---|---|---|",
    ]
    for name, values in found.items():
        lines.append(f"| `{name}` | {median(values):.3f} | {min(values):.3f} | {max(values):.3f} |")
    text = "\n".join(lines) + "\n"
    print(text)
    results = Path(__file__).parent / "results"
    results.mkdir(exist_ok=True)
    (results / "startup.md").write_text(text)


if __name__ == "__main__":
    main()
