"""Answers as plain dicts for JSON: stable keys, units in names, every figure with its interval.

Unknown is None. Adds nothing to the answers.
"""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from joulesmith._version import __version__
from joulesmith.estimate.answer import Constant, Figure
from joulesmith.estimate.asked import CompareAnswer, ServeAnswer, Work
from joulesmith.estimate.model.shape import Shape
from joulesmith.estimate.serving.daily import Charge, Fleet
from joulesmith.estimate.serving.mixes import Mixed
from joulesmith.estimate.serving.roof import Roof
from joulesmith.estimate.serving.serve import Served
from joulesmith.estimate.serving.setup import Setup, Traffic, engine_of

if TYPE_CHECKING:
    from joulesmith.estimate.asked_training import TrainAnswer


def told_serve(a: ServeAnswer) -> dict[str, Any]:
    return {
        **_head("serve"),
        "model": told_model(a.shape, a.work),
        **told_served(a.served),
        "pue": a.pue,
        "batch_is": "chosen" if a.chosen else "given",
        "latency_limit_s": a.latency_s,
        "most_sequences": a.most,
        "curve": [_curve_row(s) for s in a.curve],
        "roofline": _roof(a.roof),
        "mix": None if a.mixed is None else told_mixed(a.mixed),
        "per_day": None if a.fleet is None else told_fleet(a.fleet),
        "battery": None if a.charge is None else _charge(a.charge),
        "constants": told_constants(a.constants),
        "notes": list(a.notes),
    }


def told_compare(a: CompareAnswer) -> dict[str, Any]:
    rows = []
    fleets = a.fleets or (None,) * len(a.rows)
    for r, f in zip(a.rows, fleets, strict=True):
        rows.append({
            "name": r.name,
            "answer": None if r.served is None else told_served(r.served),
            "why_not": r.why_not or None,
            "joules_ratio_to_first": None if r.ratio is None else
            {"value": r.ratio, "low": r.low, "high": r.high},
            "within_uncertainty": r.within,
            "per_day": None if f is None else told_fleet(f),
        })  # fmt: skip
    return {
        **_head("compare"),
        "model": told_model(a.shape, a.work),
        "pue": a.pue,
        "latency_limit_s": a.latency_s,
        "rows": rows,
        "constants": told_constants(a.constants),
        "notes": list(a.notes),
    }


def told_train(a: TrainAnswer) -> dict[str, Any]:
    t = a.training

    def or_none(f: Figure | None) -> dict[str, float] | None:
        return None if f is None else figure(f)

    return {
        **_head("train"),
        "model": told_model(a.shape),
        "mode": t.mode,
        "setup": {
            "device": t.device, "devices": t.devices, "plan": asdict(t.plan),
            "sequence_tokens": t.sequence, "batch_tokens": t.batch_tokens,
            "recompute": t.recompute,
        },
        "tokens": t.tokens,
        "flops": t.flops,
        "utilisation": figure(t.utilisation),
        "hours": figure(t.hours),
        "device_hours": figure(t.device_hours),
        "device_memory_bytes": t.device_bytes,
        "watts_per_device_with_host": or_none(t.watts),
        "joules": or_none(t.joules),
        "kwh": or_none(t.kwh),
        "split_joules": None if t.parts is None else asdict(t.parts),
        "joules_per_token": or_none(t.joules_per_token),
        "joules_per_parameter": or_none(t.joules_per_parameter),
        "kgco2e": or_none(t.kg_co2e),
        "grid": f"{t.grid.name}, {t.grid.gco2e_per_kwh:g} gCO2e/kWh",
        "energy_money": or_none(t.energy_cost),
        "currency": t.price.currency or None,
        "price": f"{t.price.name}, {t.price.source}",
        "rent_usd": or_none(t.rent_usd),
        "step_s": {
            "compute": t.step.compute, "data": t.step.data, "tensor": t.step.tensor,
            "pipeline": t.step.pipeline, "expert": t.step.expert, "bubble": t.step.bubble,
        },
        "sent_bytes_per_device_and_step": asdict(t.step.volumes),
        "scaling": [asdict(x) for x in a.scaling],
        "constants": told_constants(a.constants),
        "notes": list(a.notes),
    }  # fmt: skip


def told_model(shape: Shape, work: Work | None = None) -> dict[str, Any]:
    """A shape, and what a token of it is."""
    found = {
        "name": shape.name, "architecture": shape.kind, "parameters": shape.parameters,
        "active_parameters": shape.active, "layers": shape.layers, "hidden": shape.hidden,
        "experts": shape.experts or None, "experts_per_token": shape.chosen or None,
        "context_tokens": shape.context, "assumed": list(shape.assumed),
    }  # fmt: skip
    if work is not None:
        found |= {
            "weight_bytes": work.weight_bytes, "bits_per_weight": work.bits_per_weight,
            "cache_bytes_per_token": work.cache_bytes_per_token,
            "state_bytes_per_sequence": work.state_bytes,
            "decode_flops_per_token": work.decode_flops,
            "prefill_flops_per_token": work.prefill_flops,
        }  # fmt: skip
    return found


def told_served(s: Served) -> dict[str, Any]:
    return {
        "pedigree": "modelled",
        "setup": told_setup(s.setup),
        "traffic": told_traffic(s.traffic),
        "joules_per_output_token": figure(s.joules_per_token),
        "joules_per_output_token_with_host_and_pue": figure(s.joules_per_token_whole),
        "joules_per_request": figure(s.joules_per_request),
        "joules_per_token_decode": figure(s.decode),
        "joules_per_token_prefill": None if s.prefill is None else figure(s.prefill),
        "joules_per_token_and_parameter": figure(s.joules_per_token_and_parameter),
        "tokens_per_second": figure(s.tokens_per_second),
        "step_s": figure(s.seconds),
        "watts": figure(s.watts),
        "host_watts_per_device": host_of(s),
        "limit": s.limit,
        "split_joules_per_token": dict(s.split),
        "memory_bytes": s.memory_bytes,
        "memory_room_bytes": s.room_bytes,
        "fits": s.fits,
        "device_was_measured": s.fitted,
    }


def told_setup(setup: Setup) -> dict[str, Any]:
    return {
        "device": setup.device.name, "devices": setup.devices,
        "weights": None if setup.weights is None else str(setup.weights),
        "bits_per_weight": setup.bits, "products": setup.precision,
        "products_run_as": setup.device.runs_as(setup.precision),
        "cache_bits": setup.cache_bits, "engine": engine_of(setup),
    }  # fmt: skip


def told_traffic(t: Traffic) -> dict[str, Any]:
    return {
        "batch": t.batch, "prompt_tokens": t.prompt, "output_tokens": t.output,
        "context_tokens": t.context,
    }  # fmt: skip


def told_mixed(m: Mixed) -> dict[str, Any]:
    return {
        "pedigree": "modelled",
        "prefill": told_setup(m.prefill),
        "decode": told_setup(m.decode),
        "joules_per_request": figure(m.joules_per_request),
        "joules_per_request_with_host_and_pue": figure(m.joules_per_request_whole),
        "joules_per_output_token": figure(m.joules_per_token),
        "prompt_joules": figure(m.prompt),
        "transfer_joules": figure(m.transfer),
        "output_joules": figure(m.output),
        "first_token_s": figure(m.first_token_s),
        "step_s": figure(m.seconds),
        "sent_bytes_per_request": m.sent_bytes,
        "prefill_devices_per_decode_device": m.prefill_per_decode,
        "joules_ratio_to_decode_device_alone": m.ratio,
    }


def told_fleet(f: Fleet) -> dict[str, Any]:
    money = f.money_per_day
    return {
        "requests": f.requests_per_day,
        "kwh": figure(f.kwh_per_day),
        "kgco2e": figure(f.kgco2e_per_day),
        "money": None if money is None else figure(money),
        "currency": f.currency or None,
        "setups_busy": f.setups,
        "grid": f.grid,
        "price": f.price or None,
    }


def told_constants(constants: tuple[Constant, ...]) -> list[dict[str, Any]]:
    return [asdict(c) for c in constants]


def figure(f: Figure) -> dict[str, float]:
    return {"value": f.value, "low": f.low, "high": f.high}


def host_of(s: Served) -> float:
    """Watts beside each device."""
    return next(c.value for c in s.constants if c.name == "host")


def _head(command: str) -> dict[str, Any]:
    return {"command": f"estimate {command}", "joulesmith": __version__, "pedigree": "modelled"}


def _curve_row(s: Served) -> dict[str, Any]:
    return {
        "batch": s.traffic.batch,
        "joules_per_output_token": figure(s.joules_per_token),
        "joules_per_output_token_with_host_and_pue": figure(s.joules_per_token_whole),
        "tokens_per_second": figure(s.tokens_per_second),
        "step_s": figure(s.seconds),
        "memory_bytes": s.memory_bytes,
        "limit": s.limit,
    }


def _roof(r: Roof) -> dict[str, Any]:
    return {
        "bytes_per_second": r.bandwidth, "flops_per_second": r.peak,
        "reached_bytes_per_second": r.reached_bandwidth,
        "reached_flops_per_second": r.reached_peak, "points": [asdict(p) for p in r.points],
    }  # fmt: skip


def _charge(c: Charge) -> dict[str, Any]:
    return {
        "watt_hours": c.watt_hours, "tokens": figure(c.tokens), "requests": figure(c.requests),
        "hours": figure(c.hours),
    }  # fmt: skip
