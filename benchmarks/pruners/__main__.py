"""One-shot weight pruners side by side: same model, same calibration tokens, same judge.

    python -m benchmarks.pruners --work DIR --data TEXTS --stories FOLDER \\
        --python llm_compressor=venv1/bin/python --python model_optimizer=venv2/bin/python ...

As `benchmarks.quantizers` in everything but what is asked: zeros in the linear layers of the
decoder blocks, 50 % to 70 % of them wherever a pruner likes, or N:M, all but N of every M
weights of a row.
Zeros are counted in the weights that a peer hands over, and whatever else it changed is an error.
Runs are lines of ``DIR/runs-pruners.jsonl``. Time and memory: ``--fresh``, and ``--layers 15``
besides, for how they grow.
"""

from __future__ import annotations

from pathlib import Path

from benchmarks.pruners import settings, table
from benchmarks.pruners.plan import PLAN, PRUNERS
from benchmarks.quantizers import command


def main() -> None:
    """Do what is missing, then write the table."""
    command.run(
        __doc__ or "",
        PRUNERS,
        PLAN,
        lambda _: settings.NAMES,
        table.render,
        ("stories260K-172", "smollm2"),
        Path("benchmarks/results/pruners.md"),
    )


if __name__ == "__main__":
    main()
