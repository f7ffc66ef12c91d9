"""The command line of a comparison: what is missing is run, then the table is written."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.quantizers.runs import Comparison, Runner, order
from benchmarks.quantizers.subjects import SUBJECTS, Places, Subject

HIDDEN = ("--work", "--data", "--stories", "--python", "--out")


def run(
    words: str,
    comparison: Comparison,
    plan: Sequence[Any],
    names: Callable[[Subject], Sequence[str]],
    render: Callable[[Path, str], str],
    subjects: Sequence[str],
    out: Path,
) -> None:
    """names: all settings of a subject. render: runs' file and command line -> Markdown."""
    parser = argparse.ArgumentParser(description=words.split("\n")[0])
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True, help="folder of the three texts")
    parser.add_argument("--stories", type=Path, required=True, help="folder of stories260K.bin")
    parser.add_argument("--python", action="append", default=[], metavar="PEER=PATH")
    parser.add_argument("--subjects", nargs="+", default=list(subjects))
    parser.add_argument("--settings", nargs="+", help="as the table has them; default: all")
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
    parser.add_argument("--out", type=Path, default=out)
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
            args.work, places, pythons, args.threads, args.timeout, args.note, args.retry,
            comparison,
        )  # fmt: skip
        wanted = [p for p in plan if args.peers is None or {p.peer, p.label} & set(args.peers)]
        for name in args.subjects:
            settings = args.settings or names(runner.subject(name))
            for runs in order(name, wanted, settings, args.seeds, args.windows):
                runner.do(runs, args.layers, fresh=args.fresh)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    command = " ".join([f"python -m {comparison.package}", *_shown()])
    args.out.write_text(render(args.work / comparison.lines, command))
    print(f"wrote {args.out}")


def _shown() -> list[str]:
    """The arguments without this machine's paths."""
    shown = []
    skip = False
    for word in sys.argv[1:]:
        if skip:
            skip = False
        elif word in HIDDEN:
            skip = True
        else:
            shown.append(word)
    return shown
