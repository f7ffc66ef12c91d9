"""Colours of the page, each as a pair for light and dark. Knows no charts.

Charts are drawn once, in the light colours, written as plain attributes: an
SVG lifted from the page stays whole. In the dark the style sheet answers each
light colour with its partner, so every light colour here is unique.

The bits ramp follows ColorBrewer YlGnBu and the damage ramp its PuRd in
lightness: both are monotone in lightness and safe for the common colour
blindnesses. In the dark each ramp runs the other way, away from the paper.
"""

from __future__ import annotations

PAIRS: dict[str, tuple[str, str]] = {
    "ink": ("#17202b", "#e7ecf2"),
    "soft": ("#55616f", "#a3afbc"),
    "rule": ("#dce2e9", "#323b46"),
    "paper": ("#f6f7f9", "#0f1419"),
    "card": ("#ffffff", "#171d24"),
    "wash": ("#eef2f7", "#1f2731"),
    "plan": ("#1257a6", "#85bcff"),
    "reference": ("#5b6775", "#a2adb9"),
    "front": ("#7d98b8", "#5e7fa6"),
    "pass": ("#0b6b5d", "#62d2bd"),
    "fail": ("#a63d00", "#ffab74"),
    "failwash": ("#fdf1e9", "#33210f"),
    "bits0": ("#ebf0c4", "#16305c"),
    "bits1": ("#c7e9b4", "#1e4a86"),
    "bits2": ("#7fcdbb", "#236a9f"),
    "bits3": ("#41b6c4", "#207591"),
    "bits4": ("#18759c", "#45b5bd"),
    "bits5": ("#23509a", "#85cfb9"),
    "bits6": ("#232f7e", "#c5e6ae"),
    "bits7": ("#0b1b4d", "#eef3c8"),
    "onpale": ("#10213a", "#fdfdfe"),
    "ondeep": ("#fefefe", "#0f203b"),
    "damage0": ("#f3eff9", "#262233"),
    "damage1": ("#d9c9ea", "#443460"),
    "damage2": ("#b795d4", "#6a4b97"),
    "damage3": ("#8d5fb5", "#9b78cc"),
    "damage4": ("#5d2b88", "#d8c5f3"),
}
BITS = tuple(f"bits{i}" for i in range(8))
DAMAGE = tuple(f"damage{i}" for i in range(5))


def light(name: str) -> str:
    """The colour that charts are drawn in."""
    return PAIRS[name][0]


def ramp(steps: tuple[str, ...], n: int) -> list[str]:
    """``n`` names spread evenly over a ramp; more than the ramp has share neighbours."""
    if n <= 1:
        return [steps[len(steps) // 2]] * n
    return [steps[round(i * (len(steps) - 1) / (n - 1))] for i in range(n)]


def on(name: str) -> str:
    """The text colour that is readable on a step of a ramp."""
    deep = (name in BITS and BITS.index(name) >= 4) or (name in DAMAGE and DAMAGE.index(name) >= 3)
    return "ondeep" if deep else "onpale"


def style() -> str:
    """The pairs as CSS: variables, and dark answers to the charts' light colours."""
    light_vars = "".join(f"--{k}:{a};" for k, (a, _) in PAIRS.items())
    dark_vars = "".join(f"--{k}:{b};" for k, (_, b) in PAIRS.items())
    answers = "".join(
        f'.chart [fill="{a}"]{{fill:{b}}}.chart [stroke="{a}"]{{stroke:{b}}}'
        for a, b in PAIRS.values()
    )
    return (
        f":root{{{light_vars}}}\n"
        f"@media screen and (prefers-color-scheme:dark){{:root{{{dark_vars}}}{answers}}}"
    )
