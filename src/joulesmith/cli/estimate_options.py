"""What the commands of `joulesmith estimate` share: options, and what they mean."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Optional

import typer

from joulesmith.errors import JoulesmithError
from joulesmith.units import parse_count

if TYPE_CHECKING:
    from joulesmith.energy.carbon import GridRow, PriceRow
    from joulesmith.estimate.answer import Constant
    from joulesmith.estimate.model.shape import Shape
    from joulesmith.estimate.serving.setup import Traffic
    from joulesmith.estimate.training.parallel import Plan

# ruff: noqa: UP045 - typer reads the annotations on Python 3.10

Source = Annotated[
    Optional[str],
    typer.Argument(
        metavar="[MODEL]",
        help="A folder, a config.json, a .gguf file, a hub id, or smollm2. Without it, --params.",
    ),
]
_SHAPE = "The model in numbers"


def _size(help_: str) -> Any:
    return typer.Option(help=help_, rich_help_panel=_SHAPE)


Params = Annotated[Optional[str], _size("Weights in all, e.g. 8e9, 8B; the rest follows.")]
Active = Annotated[Optional[str], _size("Weights that one token uses, of a mixture of experts.")]
Layers = Annotated[Optional[int], _size("Layers.")]
Hidden = Annotated[Optional[int], _size("Width.")]
Heads = Annotated[Optional[int], _size("Attention heads.")]
KvHeads = Annotated[Optional[int], _size("Heads of keys and values.")]
HeadDim = Annotated[Optional[int], _size("Width of a head.")]
Ffn = Annotated[Optional[int], _size("Neurons of a layer's feed-forward part, or of an expert.")]
Vocab = Annotated[Optional[int], _size("Size of the vocabulary.")]
Experts = Annotated[Optional[int], _size("Experts of a layer.")]
ExpertsPerToken = Annotated[Optional[int], _size("Experts that one token meets.")]
Window = Annotated[Optional[int], _size("Tokens that sliding attention reaches.")]

DevicesFile = Annotated[
    Optional[Path],
    typer.Option(metavar="FILE.csv", help="Your own devices; see docs/devices.md."),
]
Grid = Annotated[
    str, typer.Option(help="Grid by country or region, e.g. DE, or grams of CO2e per kWh.")
]
Price = Annotated[
    Optional[str],
    typer.Option(help="Price by country, or money per kWh. Default: the price where --grid is."),
]
Explain = Annotated[
    bool,
    typer.Option(
        "--explain", help="List every constant: value, unit, fitted, published or assumed, source."
    ),
]
Report = Annotated[
    Optional[Path], typer.Option(metavar="OUT.html", help="Write a page with charts.")
]


def shape_of(
    model: str | None, params: str | None, active: str | None, **sizes: int | None
) -> Shape:
    """Of a source, or of numbers. Raises `JoulesmithError` for both, and for neither."""
    given = [k for k, v in {"params": params, "active": active, **sizes}.items() if v is not None]
    if model is not None:
        if given:
            option = given[0].replace("_", "-")
            raise JoulesmithError(f"a model and --{option}: give one of them: {model[:60]}")
        from joulesmith.estimate.model.source import read

        return read(model)
    if not given:
        raise JoulesmithError("no model: give a folder, a config.json, a .gguf, or --params 8B")
    from joulesmith.estimate.model.plain import of_numbers

    total = None if params is None else parse_count(params, "--params")
    used = None if active is None else parse_count(active, "--active")
    name = "model" if params is None else f"{params.strip().upper()} model"
    return of_numbers(total, active=used, name=name, **sizes)  # type: ignore[arg-type]


def traffic_of(prompt: float | None, output: float | None) -> Traffic:
    """Of one sequence; what is not given, as chats have it."""
    from joulesmith.estimate.serving.setup import Traffic

    given = {"prompt": prompt, "output": output}
    return Traffic(**{k: v for k, v in given.items() if v is not None})


def plan_of(text: str) -> Plan:
    """ "data=64,tensor=8" -> a plan. Raises `JoulesmithError`."""
    from joulesmith.estimate.training.parallel import Plan

    found: dict[str, Any] = {}
    for part in filter(None, text.replace(" ", "").split(",")):
        word, _, ranks = part.partition("=")
        if word == "sharding":
            found[word] = ranks
        elif word in ("data", "tensor", "pipeline", "expert", "microbatches") and (
            ranks.isascii() and ranks.isdigit() and len(ranks) < 9
        ):
            found[word] = int(ranks)
        else:
            raise JoulesmithError(
                f"--plan {part[:40]!r}: give ranks such as data=64,tensor=8,pipeline=2,expert=8"
            )
    return Plan(**found)


def teacher_of(text: str) -> Shape:
    """A source, or the number of its weights."""
    try:
        weights = parse_count(text, "--teacher")
    except JoulesmithError:
        return shape_of(text, None, None)
    return shape_of(None, str(weights), None)


def rates(grid: str, price: str | None) -> tuple[GridRow, PriceRow | None]:
    """Of carbon and money. Raises `JoulesmithError` for a series: an estimate has no date."""
    from joulesmith.energy.rates import carbon_rate, price_for, price_rate
    from joulesmith.energy.series import Series

    where = carbon_rate(grid)
    rate = price_for(where) if price is None else price_rate(price)
    if isinstance(where, Series) or isinstance(rate, Series):
        option = "--grid" if isinstance(where, Series) else "--price"
        raise JoulesmithError(f"{option}: values by the hour: give a code or a number")
    return where, rate


def tell(
    found: dict[str, Any],
    constants: tuple[Constant, ...],
    shape: Shape,
    *,
    json_: bool,
    explain: bool,
    report: Path | None,
    render: Any,
    page: Any,
) -> None:
    """JSON or a table, the constants where asked for, and the page."""
    if report is not None:
        from joulesmith.report import estimate_page

        estimate_page.write(page(estimate_page), report)
    if json_:
        import json

        print(json.dumps(found, indent=1, allow_nan=False))
        return
    from joulesmith.cli.common import console

    out = console()
    render(out)
    if explain:
        from joulesmith.report.estimate_tables import render_constants

        print()
        render_constants(constants, shape, out)
    if report is not None:
        print(f"Report: {report}")
