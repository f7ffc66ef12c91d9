"""The table of the pruners' runs, made from their JSON lines alone."""

from __future__ import annotations

import platform
from collections import defaultdict
from datetime import date
from pathlib import Path
from typing import Any

from benchmarks.pruners import settings
from benchmarks.pruners.plan import PLAN, SLACK
from benchmarks.quantizers.runs import read_lines, spread
from benchmarks.quantizers.table import cost, costs, failures, recipes, shown

Line = dict[str, Any]


def render(path: Path, command: str) -> str:
    """Markdown: one table a subject, then what each setting of a peer was."""
    lines = read_lines(path)
    good = [x for x in lines if "kl" in x]
    out = [
        f"# One-shot weight pruners side by side ({date.today()})",
        "",
        f"`{command}`",
        "",
        f"{platform.machine()}. Medians over seeds (least to most); a seed is a sample of "
        "calibration windows and the algorithm's own seed. Zeros: share of exact zeros in the "
        "linear layers of the blocks, counted in the weights handed over, and the layers with the "
        "least and the most; embedding, head and norms were checked to be untouched. KL is in nats "
        "a token to the dense model; kept is its perplexity over the pruned one's. 2:4 is two "
        "zeros in each four weights of a row, checked in every group. No pruner trains "
        "afterwards. Bold: the lowest median of those with the zeros asked for; an asterisk: "
        "outside the spread of every other's seeds; †: fewer zeros than asked for, or not in "
        "every group. Seconds and memory are told of runs that had a process of their own.",
        "",
    ]
    for subject in dict.fromkeys(x["subject"] for x in good):
        out += _subject(subject, [x for x in good if x["subject"] == subject])
    out += costs(lines, "pruner")
    out += recipes(good, "pruner", [p.label for p in PLAN])
    out += failures(lines, "pruner", settings.key)
    return "\n".join(out) + "\n"


def fulfilled(x: Line) -> bool:
    """Whether the zeros asked for are there."""
    s = settings.by_name(x["setting"])
    return not x["short"] if s.group else bool(x["sparsity"] >= s.sparsity - SLACK)


def _subject(subject: str, lines: list[Line]) -> list[str]:
    first = lines[0]
    out = [
        f"## {subject}",
        "",
        f"{first['origin']}. Judged on {first['evaluated_on']} (perplexity of the dense model "
        f"{first['reference_perplexity']:.3f}); calibrated on {first['windows']} windows of "
        f"{first['calibrated_on']}.",
        "",
        "| setting | pruner | zeros (least–most) | KL | perplexity | kept | top-1 | seeds | s "
        "| peak MB (above weights) |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for setting in sorted({x["setting"] for x in lines}, key=settings.key):
        groups: dict[str, list[Line]] = defaultdict(list)
        for x in lines:
            if x["setting"] == setting and x["layers"] is None:
                groups[f"{x['peer']}:{x['variant']}"].append(x)
        kls = {k: spread([x["kl"] for x in v]) for k, v in groups.items()}
        whole = {k: v for k, v in kls.items() if all(map(fulfilled, groups[k]))}
        best = min(whole, key=lambda k: whole[k][0], default=None)
        for label in sorted(groups, key=lambda k: (k not in whole, kls[k][0])):
            rows = groups[label]
            kl = shown(kls[label])
            if label == best and len(whole) > 1:
                others = [v[1] for k, v in whole.items() if k != best]
                clear = len(rows) > 2 and kls[label][2] < min(others)
                kl = f"**{kl}**" + ("*" if clear else "")
            share = spread([x["sparsity"] for x in rows])[0]
            least, most = min(x["least"] for x in rows), max(x["most"] for x in rows)
            mark = "" if label in whole else " †"
            out.append(
                f"| {setting} | {label}{mark} | {share:.2%} ({least:.0%}–{most:.0%}) | {kl} "
                f"| {shown(spread([x['perplexity'] for x in rows]))} "
                f"| {spread([x['kept'] for x in rows])[0]:.3f} "
                f"| {spread([x['top1'] for x in rows])[0]:.4f} | {len(rows)} | {cost(rows)} |"
            )
    return [*out, ""]
