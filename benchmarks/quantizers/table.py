"""The table of the runs, made from their JSON lines alone."""

from __future__ import annotations

import platform
from collections import defaultdict
from collections.abc import Callable, Sequence
from datetime import date
from pathlib import Path
from typing import Any

from benchmarks.quantizers import settings
from benchmarks.quantizers.runs import PLAN, read_lines, spread

Line = dict[str, Any]


def render(path: Path, command: str) -> str:
    """Markdown: one table a subject and setting, then what each setting of a peer was."""
    lines = read_lines(path)
    good = [x for x in lines if "kl" in x]
    out = [
        f"# Weight quantizers side by side ({date.today()})",
        "",
        f"`{command}`",
        "",
        f"{platform.machine()}. Medians over seeds (least to most); a seed is a sample of "
        "calibration windows and the algorithm's own seed. KL is in nats a token to the float "
        "model; bits are stored bits a weight of the matrices inside the blocks, scales and "
        "zero points counted; embedding, head and norms stay float for all. Bold: the lowest "
        "median; an asterisk: outside the spread of every other's seeds. Seconds and memory are "
        "told of runs that had a process of their own.",
        "",
    ]
    subjects = list(dict.fromkeys(x["subject"] for x in good))
    for subject in subjects:
        out += _subject(subject, [x for x in good if x["subject"] == subject])
    out += costs(lines, "quantizer")
    out += recipes(good, "quantizer", [p.label for p in PLAN])
    out += failures(lines, "quantizer", _setting_key)
    return "\n".join(out) + "\n"


def _subject(subject: str, lines: list[Line]) -> list[str]:
    first = lines[0]
    out = [
        f"## {subject}",
        "",
        f"{first['origin']}. Judged on {first['evaluated_on']} (perplexity of the float model "
        f"{first['reference_perplexity']:.3f}); calibrated on {first['windows']} windows of "
        f"{first['calibrated_on']}.",
        "",
        "| setting | quantizer | bits | KL | perplexity | top-1 | seeds | s "
        "| peak MB (above weights) |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    named = sorted({x["setting"] for x in lines}, key=_setting_key)
    for setting in named:
        groups: dict[str, list[Line]] = defaultdict(list)
        for x in lines:
            if x["setting"] == setting:
                groups[f"{x['peer']}:{x['variant']}"].append(x)
        kls = {k: spread([x["kl"] for x in v]) for k, v in groups.items()}
        best = min(kls, key=lambda k: kls[k][0])
        seeded = len(groups[best]) > 2  # one seed has no spread to be outside of
        clear = seeded and all(kls[best][2] < v[1] for k, v in kls.items() if k != best)
        for label in sorted(groups, key=lambda k: kls[k][0]):
            rows = groups[label]
            kl = shown(kls[label])
            if label == best and len(groups) > 1:
                kl = f"**{kl}**" + ("*" if clear else "")
            out.append(
                f"| {setting} | {label} | {rows[0]['bits_per_weight']:.4g} | {kl} "
                f"| {shown(spread([x['perplexity'] for x in rows]))} "
                f"| {spread([x['top1'] for x in rows])[0]:.4f} | {len(rows)} "
                f"| {cost(rows)} |"
            )
    return [*out, ""]


def cost(rows: list[Line]) -> str:
    """Two cells, seconds and peak, of the runs that had a process of their own."""
    alone = [x for x in rows if x["fresh"]]
    if not alone:
        return "— | —"
    seconds = spread([x["seconds"] for x in alone])[0]
    peak = spread([x["rss_peak"] / 1e6 for x in alone])[0]
    above = [x for x in map(_above, alone) if x is not None]
    told = f" ({spread(above)[0]:.0f})" if above else ""
    return f"{seconds:.0f} | {peak:.0f}{told}"


def _above(x: Line) -> float | None:
    """MB at the peak beyond imports and float weights; None for runs that did not tell."""
    if "weight_bytes" not in x:
        return None
    return float((x["rss_peak"] - x["rss_imported"] - x["weight_bytes"]) / 1e6)


def costs(lines: list[Line], noun: str) -> list[str]:
    """How time and memory grow with layers, where two sizes were run."""
    lines = [x for x in lines if "seconds" in x and x["fresh"]]
    groups: dict[tuple[str, str, str, int], dict[Any, list[Line]]] = defaultdict(
        lambda: defaultdict(list)
    )
    for x in lines:
        key = (x["subject"], x["setting"], f"{x['peer']}:{x['variant']}", x["threads"])
        groups[key][x["layers"]].append(x)
    rows = []
    for (subject, setting, label, threads), sizes in sorted(groups.items()):
        if len(sizes) < 2:
            continue
        for layers, runs in sorted(sizes.items(), key=lambda kv: kv[0] or 10**9):
            notes = ", ".join(sorted({x["note"] for x in runs if x["note"]}))
            above = [x for x in map(_above, runs) if x is not None]
            rows.append(
                f"| {subject} | {setting} | {label} | {layers or 'all'} | {threads} "
                f"| {shown(spread([x['seconds'] for x in runs]), 1)} "
                f"| {shown(spread([x['cpu_seconds'] for x in runs]), 1)} "
                f"| {shown(spread([x['rss_peak'] / 1e6 for x in runs]), 0)} "
                f"| {shown(spread(above), 0) if above else '—'} | {notes} |"
            )
    if not rows:
        return []
    return [
        "## Time and memory by number of layers",
        "",
        "The work alone: importing, loading and judging are not counted. Peak of the process, "
        "and what of it is above what imports and the float32 weights take.",
        "",
        f"| subject | setting | {noun} | layers | threads | s | CPU s | peak MB "
        "| MB above weights | note |",
        "|---|---|---|---|---|---|---|---|---|---|",
        *rows,
        "",
    ]


def recipes(lines: list[Line], noun: str, known: Sequence[str]) -> list[str]:
    """What each was called with, and whether its own forward pass says the same."""
    found: dict[str, Line] = {}
    for x in lines:
        found.setdefault(f"{x['peer']}:{x['variant']}", x)
    order = sorted(found, key=lambda k: known.index(k) if k in known else len(known))
    checks = defaultdict(list)
    for x in lines:
        if x["forward_check"] is not None:
            checks[f"{x['peer']}:{x['variant']}"].append(x["forward_check"])
    out = [
        "## Settings",
        "",
        f"Check: the largest difference of a logit between the {noun}'s own forward pass and "
        "the float32 model holding the weights that were judged.",
        "",
        f"| {noun} | settings | versions | check |",
        "|---|---|---|---|",
    ]
    for label in order:
        x = found[label]
        check = f"{max(checks[label]):.2g}" if checks[label] else "none"
        out.append(f"| {label} | {x['words']} | {x['versions']} | {check} |")
    notes = sorted({x["note"] for x in lines if x["note"]})
    if notes:
        out += ["", f"Runs were noted as: {'; '.join(notes)}."]
    return [*out, ""]


def failures(lines: list[Line], noun: str, key: Callable[[str], Any]) -> list[str]:
    """What did not run and why. key: the order of settings' names."""
    failed: dict[tuple[str, str, str], list[str]] = defaultdict(list)
    identity = (
        "subject",
        "peer",
        "variant",
        "setting",
        "seed",
        "windows",
        "layers",
        "threads",
        "fresh",
    )
    done = {tuple(x[k] for k in identity) for x in lines if "error" not in x}
    last = {tuple(x[k] for k in identity): x for x in lines if "error" in x}
    for name, x in last.items():
        if name not in done:
            failed[x["subject"], f"{x['peer']}:{x['variant']}", x["error"]].append(x["setting"])
    if not failed:
        return []
    out = [
        "## What did not run",
        "",
        f"| subject | {noun} | settings | why |",
        "|---|---|---|---|",
    ]
    for (subject, label, why), where in failed.items():
        names = ", ".join(sorted(set(where), key=key))
        out.append(f"| {subject} | {label} | {names} | {why.replace('|', '/')} |")
    return [*out, ""]


def _setting_key(name: str) -> tuple[int, int, bool]:
    s = settings.by_name(name)
    return -s.bits, -s.group, not s.symmetric


def shown(found: tuple[float, float, float], digits: int | None = None) -> str:
    """ "median (least–most)", or the median where they are the same."""
    middle, least, most = found

    def show(v: float) -> str:
        return f"{v:.4g}" if digits is None else f"{v:.{digits}f}"

    return show(middle) if least == most else f"{show(middle)} ({show(least)}–{show(most)})"
