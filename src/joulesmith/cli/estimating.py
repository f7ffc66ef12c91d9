"""`joulesmith estimate`: joules before anything runs, of serving, of training, side by side."""

from __future__ import annotations

from typing import Annotated, Optional

import typer

from joulesmith.cli import estimate_options as options
from joulesmith.cli.common import AsJson, app, parse_latency
from joulesmith.cli.measuring import check_output
from joulesmith.errors import JoulesmithError
from joulesmith.units import parse_count

# ruff: noqa: UP045 - typer reads the annotations on Python 3.10

estimate = typer.Typer(
    name="estimate",
    help="Joules, carbon and money of serving or training a model, before anything runs.",
    no_args_is_help=True,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.add_typer(estimate)

Prompt = Annotated[Optional[float], typer.Option(help="Tokens of a prompt. Default: a chat's.")]
Output = Annotated[Optional[float], typer.Option(help="Tokens of an answer. Default: a chat's.")]
CacheBits = Annotated[float, typer.Option(help="Bits of a key or value: 16 or 8.")]
Engine = Annotated[
    Optional[str], typer.Option(help="Whose overheads, e.g. 'vLLM 0.11' or 'no engine'.")
]
Latency = Annotated[
    Optional[str],
    typer.Option(metavar="TIME", help="Longest step, that is time between tokens, e.g. 50ms."),
]
Pue = Annotated[float, typer.Option(help="Energy of the building / energy of the machines.")]
HostWatts = Annotated[
    Optional[float],
    typer.Option(help="Watts of the host beside each device. Default: 150 in servers, else 0."),
]
Requests = Annotated[
    Optional[str], typer.Option(help="Requests a day, e.g. 1e6: kWh, carbon and money.")
]


@estimate.command()
def serve(
    model: options.Source = None,
    device: Annotated[Optional[str], typer.Option(help="What serves, e.g. h100.")] = None,
    devices: Annotated[int, typer.Option(help="How many, each layer spread over all.")] = 1,
    batch: Annotated[
        Optional[int],
        typer.Option(help="Sequences side by side. Default: all that fit, and the best of them."),
    ] = None,
    prompt: Prompt = None,
    output: Output = None,
    weights: Annotated[
        Optional[str],
        typer.Option(help="Precision or bits of a weight: bf16, fp8, q4_k, 4.5. Default: as is."),
    ] = None,
    cache_bits: CacheBits = 16,
    latency: Latency = None,
    engine: Engine = None,
    prefill_device: Annotated[
        Optional[str],
        typer.Option(help="Another kind that reads the prompts; --device then only writes."),
    ] = None,
    prefill_devices: Annotated[int, typer.Option(help="How many of it read a prompt.")] = 1,
    link: Annotated[float, typer.Option(help="GB/s between the two kinds, one direction.")] = 50,
    pue: Pue = 1.0,
    host_watts: HostWatts = None,
    requests: Requests = None,
    grid: options.Grid = "WORLD",
    price: options.Price = None,
    battery: Annotated[
        Optional[float], typer.Option(metavar="WH", help="Tokens from a charge of a battery.")
    ] = None,
    devices_file: options.DevicesFile = None,
    params: options.Params = None,
    active: options.Active = None,
    layers: options.Layers = None,
    hidden: options.Hidden = None,
    heads: options.Heads = None,
    kv_heads: options.KvHeads = None,
    head_dim: options.HeadDim = None,
    ffn: options.Ffn = None,
    vocab: options.Vocab = None,
    experts: options.Experts = None,
    experts_per_token: options.ExpertsPerToken = None,
    window: options.Window = None,
    json_: AsJson = False,
    explain: options.Explain = False,
    report: options.Report = None,
) -> None:
    """Joules of an output token and of a request, by batch, on a device that need not be here.

    Without --batch: the curve over batches, and the one of the fewest joules a token whose
    steps take no longer than --latency.
    """
    from joulesmith.estimate.asked import answer_serve
    from joulesmith.estimate.devices import find
    from joulesmith.estimate.serving.setup import Setup
    from joulesmith.estimate.told import told_serve

    if device is None:
        raise JoulesmithError("no device: give --device, e.g. h100, 'rtx 4090' or 'jetson orin'")
    if report is not None:
        check_output(report)
    shape = options.shape_of(
        model, params, active, layers=layers, hidden=hidden, heads=heads, kv_heads=kv_heads,
        head_dim=head_dim, ffn=ffn, vocab=vocab, experts=experts,
        experts_per_token=experts_per_token, window=window,
    )  # fmt: skip
    where, rate = options.rates(grid, price)
    setup = Setup(find(device, devices_file), devices, weights, None, cache_bits, engine)
    first = None
    if prefill_device is None and (prefill_devices != 1 or link != 50):
        raise JoulesmithError(
            "prompts on no other kind: --prefill-devices, --link: give --prefill-device too"
        )
    if prefill_device is not None:
        first = Setup(
            find(prefill_device, devices_file), prefill_devices, weights, None, cache_bits, engine
        )
    found = answer_serve(
        shape, setup, options.traffic_of(prompt, output), batch=batch,
        latency_s=None if latency is None else parse_latency(latency),
        prefill=first, link=link * 1e9, pue=pue, host_w=host_watts,
        requests_per_day=None if requests is None else parse_count(requests, "--requests"),
        grid=where, price=rate, battery_wh=battery,
    )  # fmt: skip
    from joulesmith.report.estimate_tables import render_serve

    options.tell(
        told_serve(found), found.constants, shape, json_=json_, explain=explain, report=report,
        render=lambda console: render_serve(found, console),
        page=lambda page: page.serve_page(found),
    )  # fmt: skip


@estimate.command()
def compare(
    model: options.Source = None,
    device: Annotated[
        Optional[list[str]], typer.Option(help="What serves; give it once for each kind.")
    ] = None,
    weights: Annotated[
        Optional[list[str]],
        typer.Option(help="Precision or bits of a weight; give it once for each."),
    ] = None,
    devices: Annotated[
        Optional[int],
        typer.Option(help="How many of each. Default: the fewest that fit and are fast enough."),
    ] = None,
    batch: Annotated[
        Optional[int], typer.Option(help="Sequences side by side. Default: each at its best.")
    ] = None,
    prompt: Prompt = None,
    output: Output = None,
    cache_bits: CacheBits = 16,
    latency: Latency = None,
    engine: Engine = None,
    pue: Pue = 1.0,
    host_watts: HostWatts = None,
    requests: Requests = None,
    grid: options.Grid = "WORLD",
    price: options.Price = None,
    devices_file: options.DevicesFile = None,
    params: options.Params = None,
    active: options.Active = None,
    layers: options.Layers = None,
    hidden: options.Hidden = None,
    heads: options.Heads = None,
    kv_heads: options.KvHeads = None,
    head_dim: options.HeadDim = None,
    ffn: options.Ffn = None,
    vocab: options.Vocab = None,
    experts: options.Experts = None,
    experts_per_token: options.ExpertsPerToken = None,
    window: options.Window = None,
    json_: AsJson = False,
    explain: options.Explain = False,
    report: options.Report = None,
) -> None:
    """Kinds of devices and precisions side by side, each at its best batch.

    Every --device with every --weights, against the first: ratios of joules per output token,
    and whether the intervals tell them apart.
    """
    from joulesmith.estimate.asked import answer_compare
    from joulesmith.estimate.devices import find
    from joulesmith.estimate.serving.setup import Setup
    from joulesmith.estimate.told import told_compare

    if not device:
        raise JoulesmithError("no device: give --device once for each kind, e.g. h100")
    if report is not None:
        check_output(report)
    shape = options.shape_of(
        model, params, active, layers=layers, hidden=hidden, heads=heads, kv_heads=kv_heads,
        head_dim=head_dim, ffn=ffn, vocab=vocab, experts=experts,
        experts_per_token=experts_per_token, window=window,
    )  # fmt: skip
    where, rate = options.rates(grid, price)
    setups = [
        Setup(find(d, devices_file), devices or 1, w, None, cache_bits, engine)
        for d in device for w in (weights or (None,))
    ]  # fmt: skip
    found = answer_compare(
        shape, setups, options.traffic_of(prompt, output), batch=batch, devices=devices,
        latency_s=None if latency is None else parse_latency(latency),
        pue=pue, host_w=host_watts,
        requests_per_day=None if requests is None else parse_count(requests, "--requests"),
        grid=where, price=rate,
    )  # fmt: skip
    from joulesmith.report.estimate_tables import render_compare

    options.tell(
        told_compare(found), found.constants, shape, json_=json_, explain=explain, report=report,
        render=lambda console: render_compare(found, console),
        page=lambda page: page.compare_page(found),
    )  # fmt: skip


@estimate.command()
def train(
    model: options.Source = None,
    tokens: Annotated[Optional[str], typer.Option(help="Tokens trained on, e.g. 15T.")] = None,
    device: Annotated[Optional[str], typer.Option(help="What trains, e.g. h100.")] = None,
    devices: Annotated[
        Optional[int],
        typer.Option(help="How many. Default: of the plan, or a month's worth that hold it."),
    ] = None,
    mode: Annotated[str, typer.Option(help="full, finetune, lora or distil.")] = "full",
    teacher: Annotated[
        Optional[str], typer.Option(help="To distil from: a model, or its weights, e.g. 70B.")
    ] = None,
    lora_rank: Annotated[int, typer.Option(help="Rank of adapters.")] = 16,
    plan: Annotated[
        Optional[str],
        typer.Option(
            help="Ranks, e.g. data=64,tensor=8,pipeline=2; also expert=, microbatches=, "
            "sharding=none, optimizer or full. Default: the usual one."
        ),
    ] = None,
    sequence: Annotated[Optional[int], typer.Option(help="Tokens of a sequence.")] = None,
    batch_tokens: Annotated[Optional[str], typer.Option(help="Tokens of a step, e.g. 4M.")] = None,
    precision: Annotated[str, typer.Option(help="bf16, fp16, fp8, tf32 or fp32.")] = "bf16",
    recompute: Annotated[
        Optional[str],
        typer.Option(help="Activations computed again: none, selective, full. Default: as needed."),
    ] = None,
    optimizer: Annotated[str, typer.Option(help="adamw, adamw8bit, sgd, adafactor...")] = "adamw",
    utilisation: Annotated[
        Optional[float], typer.Option(help="Share of the peak reached, instead of the model's.")
    ] = None,
    power: Annotated[
        Optional[float], typer.Option(help="Watts a device, host included, instead of the model's.")
    ] = None,
    pue: Annotated[
        Optional[float],
        typer.Option(help="Energy of the building / energy of the machines. Default: the usual."),
    ] = None,
    grid: options.Grid = "WORLD",
    price: options.Price = None,
    devices_file: options.DevicesFile = None,
    params: options.Params = None,
    active: options.Active = None,
    layers: options.Layers = None,
    hidden: options.Hidden = None,
    heads: options.Heads = None,
    kv_heads: options.KvHeads = None,
    head_dim: options.HeadDim = None,
    ffn: options.Ffn = None,
    vocab: options.Vocab = None,
    experts: options.Experts = None,
    experts_per_token: options.ExpertsPerToken = None,
    window: options.Window = None,
    json_: AsJson = False,
    explain: options.Explain = False,
    report: options.Report = None,
) -> None:
    """Hours, kWh, carbon and money of a training, and what more devices would change."""
    from joulesmith.estimate.asked_training import answer_train
    from joulesmith.estimate.devices import find
    from joulesmith.estimate.told import told_train

    if device is None:
        raise JoulesmithError("no device: give --device, e.g. h100")
    if tokens is None:
        raise JoulesmithError("no tokens: give how many are trained on, e.g. --tokens 15T")
    if report is not None:
        check_output(report)
    shape = options.shape_of(
        model, params, active, layers=layers, hidden=hidden, heads=heads, kv_heads=kv_heads,
        head_dim=head_dim, ffn=ffn, vocab=vocab, experts=experts,
        experts_per_token=experts_per_token, window=window,
    )  # fmt: skip
    if teacher is not None and mode != "distil":
        raise JoulesmithError(f"a teacher in mode {mode[:40]}: give --mode distil or no --teacher")
    where, rate = options.rates(grid, price)
    found = answer_train(
        shape, parse_count(tokens, "--tokens"), find(device, devices_file), devices, mode=mode,
        plan=None if plan is None else options.plan_of(plan), sequence=sequence,
        batch_tokens=None if batch_tokens is None else parse_count(batch_tokens, "--batch-tokens"),
        precision=precision, recompute=recompute, optimizer=optimizer, lora_rank=lora_rank,
        teacher=None if teacher is None else options.teacher_of(teacher),
        utilisation=utilisation, power=power, pue=pue, grid=where, price=rate or "WORLD",
    )  # fmt: skip
    from joulesmith.report.estimate_training_tables import render_train

    options.tell(
        told_train(found), found.constants, shape, json_=json_, explain=explain, report=report,
        render=lambda console: render_train(found, console),
        page=lambda page: page.train_page(found),
    )  # fmt: skip
