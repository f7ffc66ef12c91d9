"""Weight quantizers side by side: same model, same calibration tokens, same judge.

    python -m benchmarks.quantizers --work DIR --data TEXTS --stories FOLDER \\
        --python llm_compressor=venv1/bin/python --python autoround=venv2/bin/python ...

Run it in the repository's root with ``PYTHONPATH=src``. Each peer quantizes in a process of
its own, in the interpreter given for it, and hands back its dequantized weights, which are
put into one float32 model and judged by `joulesmith.quality`: perplexity and KL to the float
model. Every finished run is a line of ``DIR/runs.jsonl``; a second call does what is missing
and writes ``benchmarks/results/quantizers.md`` anew. ``--table`` only writes the table.
Time and memory at two sizes: ``--subjects smollm2 --settings W4-g64 --peers ours:default
llm_compressor:gptq --fresh``, once with ``--layers 15`` and once without. With ``ROUNDED`` set to a
folder, our efforts share what error feedback gave, which spares time but tells none.

Each peer's virtual environment needs torch and transformers, and
``llmcompressor==0.14.0.1``, ``auto-round==0.16.1``, ``nvidia-modelopt==0.47.0 requests``,
``nncf==3.4.0`` or ``torchao==0.18.0``; they do not agree on versions of transformers, hence
one environment each. GGUF types at equal bytes: ``python -m benchmarks.quantizers.gguf_types``.
"""

from __future__ import annotations

import json
from pathlib import Path

from benchmarks.quantizers import command, settings, table
from benchmarks.quantizers.runs import PLAN, Comparison
from benchmarks.quantizers.subjects import Subject


def _names(subject: Subject) -> list[str]:
    config = json.loads((subject.folder / "config.json").read_text())
    return settings.usual({config["hidden_size"], config["intermediate_size"]})


def main() -> None:
    """Do what is missing, then write the table."""
    command.run(
        __doc__ or "",
        Comparison(),
        PLAN,
        _names,
        table.render,
        ("stories260K", "shakespeare"),
        Path("benchmarks/results/quantizers.md"),
    )


if __name__ == "__main__":
    main()
