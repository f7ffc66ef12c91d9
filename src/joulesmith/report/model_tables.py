"""Terminal tables of single models: what a file holds, what it costs to run."""

from __future__ import annotations

from typing import TYPE_CHECKING

from joulesmith.units import si, size

if TYPE_CHECKING:
    from rich.console import Console

    from joulesmith.compress.prune.structured import Shrunk
    from joulesmith.inspection import DecodeCost, Inspection
    from joulesmith.job.quantize import Made
    from joulesmith.measure import Measurement
    from joulesmith.quality import Quality


def render_measurement(m: Measurement, console: Console) -> None:
    """Joules and tokens per second by phase, with interval and pedigree."""
    from rich.table import Table
    from rich.text import Text

    table = Table(title=None, box=None, pad_edge=False)
    for name, side in (
        ("phase", "left"),
        ("J/token", "right"),
        ("90 % interval", "right"),
        ("above idle", "right"),
        ("tokens/s", "right"),
        ("range", "right"),
        ("pedigree", "left"),
    ):
        table.add_column(name, justify=side)  # type: ignore[arg-type]
    for phase, c in m.costs.items():
        fast, slow = m.spread[phase]
        interval = "unknown" if c.low is None else f"{si(c.low, 'J')} – {si(c.high, 'J')}"
        table.add_row(
            phase,
            si(c.joules, "J"),
            interval,
            si(c.marginal, "J"),
            f"{1 / c.seconds:.1f}",
            f"{1 / slow:.1f} – {1 / fast:.1f}",
            c.pedigree or "unknown",
        )
    head = f"{m.model} {m.note}".strip()
    console.print(Text(f"{head}: {size(m.file_bytes)}, {m.engine}"))
    prefill, decode = m.workload
    console.print(
        Text(
            f"{m.repeat} requests of {prefill} + {decode} tokens, medians; "
            f"peak memory {size(m.peak_rss) if m.peak_rss else 'unknown'}"
        )
    )
    console.print(table)


def render_inspection(
    found: Inspection, console: Console, *, every_tensor: bool = False, heat_map: bool = False
) -> None:
    """Architecture, sizes and types of a model file. Names come from the file: made harmless."""
    from rich.table import Table
    from rich.text import Text

    from joulesmith.report.figures import printable

    def say(text: str) -> Text:
        return Text(printable(text, console.encoding))

    def known(value: object) -> str:
        return "unknown" if value is None else str(value)

    def bits(value: float | None) -> str:
        return "-" if value is None else f"{value:.2f}"

    tied = {True: "tied to the embedding", False: "separate", None: "unknown"}
    lines = [
        f"{found.path}: {found.format}",
        f"{found.name or 'unnamed'}: {found.architecture}, {found.parameters / 1e6:.1f} M weights, "
        f"{bits(found.bits_per_weight)} bits per weight, {size(found.file_bytes)}",
        f"{known(found.layers)} layers, hidden {known(found.hidden)}, {known(found.heads)} heads "
        f"({known(found.kv_heads)} key/value), vocabulary {known(found.vocabulary)}, context "
        f"{known(found.context)}, head {tied[found.tied_head]}",
    ]
    if found.made_by:
        lines.append(f"written by {found.made_by}")
    if found.cost is not None:
        lines += _cost_lines(found.cost)
    for text in lines:
        console.print(say(text))
    table = Table(box=None, pad_edge=False)
    table.add_column("type")
    for name in ("tensors", "weights", "bytes", "bits per weight"):
        table.add_column(name, justify="right")
    for t in found.types:
        table.add_row(
            say(t.type), str(t.tensors), f"{t.weights / 1e6:.2f} M", size(t.bytes),
            bits(t.bits_per_weight),
        )  # fmt: skip
    console.print(table)
    if heat_map:
        from joulesmith.report.heat_map import bits_of, render_map

        render_map(bits_of(found), console)
    if every_tensor:
        rows = Table(box=None, pad_edge=False)
        for name in ("tensor", "shape", "type", "bytes"):
            rows.add_column(name, justify="right" if name == "bytes" else "left")
        for line in found.tensors:
            shape = " x ".join(map(str, line.shape))
            rows.add_row(say(line.name), shape, say(line.type), size(line.bytes))
        console.print(rows)


def _cost_lines(cost: DecodeCost) -> list[str]:
    """The prediction, its interval and what it leaves out; "unknown" with the reason."""
    if cost.seconds is None:
        return [f"joules per decoded token: unknown: {cost.how}"]
    if cost.joules is None:
        joules = "unknown (no counter and no power model here)"
    else:
        joules = f"{si(cost.joules, 'J')}"
        if cost.low is not None and cost.high is not None:
            joules += f" ({si(cost.low, 'J')} to {si(cost.high, 'J')}, 90 %)"
        joules += f", {cost.pedigree or 'unknown pedigree'}"
    return [
        f"joules per decoded token, predicted: {joules}; {si(cost.seconds, 's')}",
        f"  {cost.how}; attention, norms and sampling come on top",
    ]


def render_made(found: Made, console: Console, worst: int = 5) -> None:
    """What a compressed model keeps, what went, and which matrices were damaged most."""
    from rich.text import Text

    def kept(q: Quality) -> str:
        return (
            f"kept {q.kept:.4f} of the quality (at least {q.kept_low:.4f}), KL {q.kl:.4f} nats, "
            f"top-1 {q.top1:.1%}, perplexity {q.perplexity:.2f} ({q.reference_perplexity:.2f} "
            "before)"
        )

    q = found.quality
    kind = f"{found.type}, " if found.type else ""
    lines = [
        f"{found.folder}: {found.format}, {size(found.bytes)}, {kind}"
        f"{found.bits_per_weight:.3f} bits per weight in the blocks{_others(found)}",
    ]
    before, after = found.parameters
    if after != before:
        lines.append(
            f"{after / 1e6:.2f} M parameters, {after / before:.1%} of {before / 1e6:.2f} M"
        )
    if found.pruned:
        lines.append(
            "zeros are left out of the file; no engine runs them faster"
            if found.format == "sparse"
            else f"{found.format} stores zeros like other weights: neither the file nor a token "
            "costs less (--format sparse: a smaller file)"
        )
    if found.inputs is not None:
        smooth = f"; {found.smoothing} sets of inputs smoothed" if found.smoothing else ""
        lines.append(f"inputs: {found.inputs}{smooth}")
    lines += [n for n in found.notes if n not in lines]
    if found.engine_quality is not None:
        lines.append(f"in {found.engine}: {kept(found.engine_quality)}")
        lines.append(f"in torch, inputs as they are: {kept(q)}")
    else:
        lines.append(kept(q))
    lines.append(f"judged on {q.tokens} tokens of {q.text}, against {found.origin}")
    if found.cache is not None:
        bits = f"{found.cache.bits:.2f} bits a key or value"
        lines.append(f"with a key-value cache of {bits}: {kept(found.cache.quality)}")
    if found.damage:
        lines.append(
            f"predicted damage of rounding {sum(found.damage.values()):.4f} nats, most of all:"
        )
    most = sorted(found.damage, key=lambda n: -found.damage[n])[:worst]
    lines += [f"  {found.damage[n]:.5f}  {n}" for n in most]
    if found.adapter is not None:
        reader = "llama.cpp's --lora" if found.format == "gguf" else "PEFT"
        lines.append(f"with the adapter {found.adapter}, for {reader}")
    lines.append(f"the same again: --recipe {found.recipe}")
    for line in lines:
        console.print(Text(line))


def _others(found: Made) -> str:
    """What embedding and head are stored as."""
    ends = {k for n, k in found.types.items() if not n.startswith("blk.")}
    return f", embedding and head {', '.join(sorted(ends))}" if ends else ", the rest float16"


def render_removed(found: Made, console: Console) -> None:
    """`--explain`: layer by layer and part by part what went, and by which score."""
    from rich.table import Table
    from rich.text import Text

    from joulesmith.report.heat_map import removed_of, render_map

    if found.pruned or found.shrunk is not None:
        render_map(removed_of(found, title=""), console)
    if any(p.damage is not None or p.error is not None for p in found.pruned):
        table = Table(box=None, pad_edge=False)
        for name in ("matrix", "zeros", "predicted damage, nats", "output error"):
            table.add_column(name, justify="left" if name == "matrix" else "right")
        for p in sorted(found.pruned, key=lambda p: -(p.damage or 0)):
            table.add_row(
                Text(p.name),
                f"{p.sparsity:.1%}",
                "" if p.damage is None else f"{p.damage:.5f}",
                "" if p.error is None else f"{p.error:.2%}",
            )
        console.print(table)
    if found.shrunk is None:
        return
    table = Table(box=None, pad_edge=False)
    for name in ("layer", "what went", "score", "unit"):
        table.add_column(name, justify="right" if name == "score" else "left")
    for line in _gone(found.shrunk):
        table.add_row(*map(Text, line))
    console.print(table)


def _gone(shrunk: Shrunk) -> list[tuple[str, str, str, str]]:
    """Rows of the table: a layer or head each; neurons and channels of a layer together."""
    rows: list[tuple[str, str, str, str]] = []
    many: dict[tuple[int | None, str, str], list[float]] = {}
    for d in shrunk.decisions:
        word = d.part.split()[0]
        if word in ("neuron", "channel"):
            many.setdefault((d.layer, word, d.unit), []).append(d.score)
        else:
            where = "" if d.layer is None else str(d.layer)
            rows.append((where, d.part, f"{d.score:.4g}", d.unit))
    for (layer, word, unit), scores in many.items():
        where = "" if layer is None else str(layer)
        span = f"{min(scores):.3g} to {max(scores):.3g}"
        rows.append((where, f"{len(scores)} {word}s", span, unit))
    return rows
