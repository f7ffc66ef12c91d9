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

import argparse
import os
import sys
from pathlib import Path

from benchmarks.quantizers import table
from benchmarks.quantizers.runs import PLAN, Runner, order
from benchmarks.quantizers.subjects import SUBJECTS, Places


def main() -> None:
    """Do what is missing, then write the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True, help="folder of the three texts")
    parser.add_argument("--stories", type=Path, required=True, help="folder of stories260K.bin")
    parser.add_argument("--python", action="append", default=[], metavar="PEER=PATH")
    parser.add_argument("--subjects", nargs="+", default=["stories260K", "shakespeare"])
    parser.add_argument("--settings", nargs="+", help="W4-g64, W4-g64-zp ...; default: all")
    parser.add_argument("--peers", nargs="+", help="peer or peer:variant; default: all")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--windows", type=int, default=128, help="calibration windows")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--layers", type=int, help="only the first layers, for time and memory")
    parser.add_argument(
        "--fresh", action="store_true", help="a process for each run: for time and memory"
    )
    parser.add_argument("--timeout", type=float, default=7200, help="seconds, of one process")
    parser.add_argument("--note", default="", help="kept with each run, e.g. 'under load'")
    parser.add_argument("--retry", action="store_true", help="do failed runs again")
    parser.add_argument("--table", action="store_true")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/quantizers.md"))
    args = parser.parse_args()
    unknown = set(args.subjects) - set(SUBJECTS)
    if unknown:
        parser.error(f"no such subject: {', '.join(sorted(unknown))}")
    pythons = dict(p.split("=", 1) for p in args.python)
    places = Places(
        args.data / "tinyshakespeare.txt",
        args.data / "wikitext2-valid.txt",
        args.data / "wikitext2-raw-test.txt",
        args.stories,
    )
    args.work.mkdir(parents=True, exist_ok=True)
    if not args.table:
        runner = Runner(
            args.work, places, pythons, args.threads, args.timeout, args.note, args.retry
        )
        wanted = [p for p in PLAN if args.peers is None or {p.peer, p.label} & set(args.peers)]
        for name in args.subjects:
            for runs in order(runner, name, wanted, args.settings, args.seeds, args.windows):
                runner.do(runs, args.layers, fresh=args.fresh)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    command = " ".join(["python -m benchmarks.quantizers", *_shown()])
    args.out.write_text(table.render(args.work / "runs.jsonl", command))
    print(f"wrote {args.out}")


def _shown() -> list[str]:
    """The arguments without this machine's paths."""
    shown, paths = [], ("--work", "--data", "--stories", "--python", "--out")
    skip = False
    for word in sys.argv[1:]:
        if skip:
            skip = False
        elif word in paths:
            skip = True
        else:
            shown.append(word)
    return shown


if __name__ == "__main__":
    main()
