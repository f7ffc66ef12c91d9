"""Results with plausible figures, for looking at the page and for its tests.

The numbers are made up in the proportions seen on a small CPU; they are test
data and back no claim.
"""

from __future__ import annotations

import math
import random

from joulesmith.report.result import (
    Emission,
    Energy,
    FrontPoint,
    Machine,
    Prediction,
    QualityFigures,
    Ratio,
    Result,
    Run,
    TableCell,
    TensorChoice,
)

BITS = {
    "BF16": 16.0,
    "Q8_0": 8.5,
    "Q6_K": 6.5625,
    "Q5_0": 5.5,
    "Q4_K": 4.5,
    "IQ4_NL": 4.5,
    "Q4_0": 4.5,
}
SHAPES = {
    "attn_q": (576, 576),
    "attn_k": (192, 576),
    "attn_v": (192, 576),
    "attn_output": (576, 576),
    "ffn_gate": (1536, 576),
    "ffn_up": (1536, 576),
    "ffn_down": (576, 1536),
}
PARAMETERS = 134_515_008
REFERENCE_PPL = 17.42
HOSTILE = "<script>alert('x')</script>\"&]]>\x1b[31m"


def energy(tokens_per_second: float, watts: float, idle: float = 5.0) -> Energy:
    seconds = 1 / tokens_per_second
    joules = watts * seconds
    return Energy(joules=joules, low=joules * 0.52, high=joules * 1.51, marginal=(watts - idle) * seconds, pedigree="modelled", seconds=seconds)  # fmt: skip


def quality(kept: float, kl: float, top1: float, half: float = 0.0009) -> QualityFigures:
    return QualityFigures(kept=kept, kept_low=kept - half, perplexity=REFERENCE_PPL / kept, reference_perplexity=REFERENCE_PPL, kl=kl, top1=top1, tokens=48_895, text="Python standard library documentation strings, held-out fifth")  # fmt: skip


def run(
    name: str,
    kind: str,
    decode: float,
    prefill: float,
    watts: float,
    bits: float,
    kept: QualityFigures | None,
    **more: object,
) -> Run:
    d, p = energy(decode, watts), energy(prefill, watts + 4.5)
    share = 0.6
    assert d.joules and p.joules
    joules = share * p.joules + (1 - share) * d.joules
    seconds = share * p.seconds + (1 - share) * d.seconds
    w = Energy(
        joules=joules,
        low=joules * 0.52,
        high=joules * 1.51,
        marginal=joules * 0.6,
        pedigree="modelled",
        seconds=seconds,
    )
    n_bytes = round(PARAMETERS * bits / 8)
    fields: dict[str, object] = {
        "name": name,
        "kind": kind,
        "engine": "llama.cpp b6912",
        "file": f"smollm2-135m-{name.lower().removeprefix('smollm2-135m-').removesuffix('.gguf')}.gguf",
        "file_bytes": n_bytes,
        "bits_per_weight": bits,
        "prefill": p,
        "decode": d,
        "workload": w,
        "peak_rss": n_bytes + 71_000_000,
        "quality": kept,
        "passes": kept is not None and kept.kept_low >= 0.99,
    }
    return Run.model_validate(fields | more)


def choose(seed: int = 7) -> tuple[TensorChoice, ...]:
    rng = random.Random(seed)
    out = [
        TensorChoice(
            tensor="token_embd.weight",
            layer=None,
            role="token_embd",
            type="Q8_0",
            rows=49152,
            columns=576,
            bits_per_weight=8.5,
            damage=2.1e-4,
            joules=0.0172,
        )
    ]
    for layer in range(30):
        edge = math.exp(-layer / 3) + math.exp(-(29 - layer) / 2.5)
        for role, (rows, columns) in SHAPES.items():
            wish = edge + rng.random() * 0.5 + (0.45 if role in ("attn_v", "ffn_down") else 0)
            kind = (
                "Q8_0"
                if wish > 0.95
                else "Q5_0"
                if wish > 0.62
                else "IQ4_NL"
                if wish > 0.4
                else "Q4_0"
            )
            bits = BITS[kind]
            damage = (
                2.0 ** (-2 * bits) * (1 + 4 * edge) * rows * columns / 4e6 * (0.4 + rng.random())
            )
            out.append(TensorChoice(tensor=f"blk.{layer}.{role}.weight", layer=layer, role=role, type=kind, rows=rows, columns=columns, bits_per_weight=bits, damage=damage, joules=rows * columns * bits * 1.1e-10))  # fmt: skip
    return tuple(out)


def table() -> tuple[TableCell, ...]:
    cells = []
    for rows, columns in [(49152, 576), (1536, 576), (576, 1536), (576, 576), (192, 576)]:
        for kind in ("BF16", "Q8_0", "Q5_0", "IQ4_NL", "Q4_0"):
            work = rows * columns
            seconds = work * (BITS[kind] ** 0.8) * 9e-12
            cells.append(TableCell(rows=rows, columns=columns, type=kind, decode_joules=seconds * 13.4, prefill_joules=seconds * 3.1, decode_seconds=seconds, prefill_seconds=seconds * 0.21, pedigree="modelled"))  # fmt: skip
    return tuple(cells)


def front(runs: tuple[Run, ...]) -> tuple[FrontPoint, ...]:
    points = []
    for i in range(14):
        t = i / 13
        points.append(
            FrontPoint(
                name=f"front {i + 1}",
                kind="front",
                joules_per_token=0.0366 + 0.0175 * t,
                kept=0.9988 - 0.055 * (1 - t) ** 2.4,
                kept_low=None,
                measured=False,
                kl=0.09 * (1 - t) ** 2.2 + 0.002,
            )
        )
    for r in runs:
        q, j = r.quality, r.workload.joules
        if q is None or j is None or r.kind not in ("plan", "given", "uniform"):
            continue
        if r.kind == "plan":
            points.append(
                FrontPoint(
                    name="plan (predicted)",
                    kind="plan",
                    joules_per_token=j * 0.975,
                    kept=q.kept + 0.0011,
                    kept_low=None,
                    measured=False,
                )
            )
        points.append(
            FrontPoint(
                name=r.name,
                kind=r.kind,
                joules_per_token=j,
                kept=q.kept,
                kept_low=q.kept_low,
                measured=True,
            )
        )  # type: ignore[arg-type]
    return tuple(points)


def passed() -> Result:
    """A run that found a plan."""
    runs = (
        run("plan", "plan", 151, 690, 12.2, 5.61, quality(0.9914, 0.0121, 0.9312)),
        run("smollm2-135m-q8_0.gguf", "given", 125, 610, 12.6, 8.5, quality(0.9994, 0.0011, 0.981), note="from the model's own page"),
        run("BF16", "uniform", 94, 420, 12.9, 16.0, quality(1.0, 0.0, 1.0, 0.0), note="reference of the quality figures"),
        run("Q8_0", "uniform", 125, 611, 12.6, 8.5, quality(0.9994, 0.0011, 0.981)),
        run("Q6_K", "uniform", 118, 505, 12.8, 6.57, quality(0.9969, 0.0048, 0.962)),
        run("Q4_K_M", "uniform", 152, 560, 12.4, 4.97, quality(0.972, 0.031, 0.894)),
        run("Q4_0", "uniform", 182, 760, 12.0, 4.53, quality(0.9387, 0.071, 0.842)),
        run("IQ4_NL", "uniform", 174, 640, 12.1, 4.53, quality(0.9522, 0.056, 0.858)),
        run("torch bf16", "torch", 14.6, 380, 17.8, 16.0, None, engine="torch 2.9 eager", file=None, passes=None, note="what a plain transformers loop costs; not the headline"),
    )  # fmt: skip
    ratios = []
    for base, scale in [
        ("smollm2-135m-q8_0.gguf", 1.24),
        ("BF16", 1.69),
        ("Q6_K", 1.33),
        ("Q4_0", 0.83),
        ("torch bf16", 9.4),
    ]:
        for phase, tilt in [("decode", 1.03), ("prefill", 0.96), ("workload", 1.0)]:
            r = scale * tilt
            ratios.append(
                Ratio(
                    baseline=base,
                    phase=phase,
                    ratio=r,
                    low=r * 0.982,
                    high=r * 1.021,
                    pairs=12,
                    spread=(r * 0.93, r * 1.09),
                )
            )  # type: ignore[arg-type]
    before, after = runs[1].workload.joules, runs[0].workload.joules
    assert before and after
    emissions = []
    for grid, carbon, price, currency in [
        ("Germany 2024", 344.0, 0.38, "EUR"),
        ("Sweden 2024", 36.0, 0.21, "EUR"),
        ("United States 2024", 384.0, 0.17, "USD"),
    ]:
        for name, j in [("smollm2-135m-q8_0.gguf", before), ("plan", after)]:
            kwh = j * 1e6 / 3.6e6
            emissions.append(Emission(name=name, grid=grid, gco2e_per_kwh=carbon, gco2e=kwh * carbon, price_per_kwh=price, currency=currency, cost=kwh * price, source="yearly mean, generation mix"))  # fmt: skip
    d = runs[0]
    assert d.prefill.joules and d.decode.joules and d.workload.joules
    return Result(
        joulesmith="0.1.0",
        created="2026-01-14T09:21:44Z",
        command="joulesmith optimize smollm2 --keep 0.99 --out runs/smollm2 --seed 0",
        seeds={"calibration": 0, "workload": 0, "bootstrap": 1234},
        model="SmolLM2-135M",
        architecture="llama",
        parameters=PARAMETERS,
        origin="HuggingFaceTB/SmolLM2-135M, safetensors, bfloat16",
        engine="llama.cpp b6912",
        machine=Machine(cpu="Example CPU @ 2.60GHz", cores=2, threads=2, memory_bytes=16_700_000_000, gpus=(), system="Linux 6.1, glibc 2.36, Python 3.11.2", power_source="no energy counter is readable: CPU time times a power model of this CPU class, ±50 %", idle_watts=5.0, max_watts=21.0),
        keep=0.99,
        workload_prefill=128,
        workload_decode=64,
        calibration="Python standard library documentation strings, four fifths, 65,536 tokens",
        evaluation="Python standard library documentation strings, held-out fifth, 48,895 tokens",
        status="passed",
        verdict="The plan keeps 99.14 % of the model's quality (at least 99.05 %, floor 99 %) and takes 1.24 times fewer joules per token than the Q8_0 file you gave.",
        headline_baseline="smollm2-135m-q8_0.gguf",
        runs=runs,
        ratios=tuple(ratios),
        front=front(runs),
        tensors=choose(),
        table=table(),
        predictions=(
            Prediction(phase="decode", predicted=d.decode.joules * 0.968, measured=d.decode.joules),
            Prediction(phase="prefill", predicted=d.prefill.joules * 1.043, measured=d.prefill.joules),
            Prediction(phase="workload", predicted=d.workload.joules * 0.975, measured=d.workload.joules),
        ),
        emissions=tuple(emissions),
        caveats=(
            "Joules are modelled, not metered: absolute figures carry about ±50 %; ratios between runs on the same machine carry far less.",
            "One evaluation text, in English; other text may keep more or less.",
        ),
        timings={"baseline": 61.2, "calibrate": 48.0, "joule table": 95.4, "solve": 3.9, "write": 6.1, "measure": 142.7},
        peak_memory=1_180_000_000,
    )  # fmt: skip


def none() -> Result:
    """A run that found no plan, knows no joules and carries hostile names."""
    blank = Energy(joules=None, low=None, high=None, marginal=None, pedigree=None, seconds=0.0104)
    still = Energy(joules=None, low=None, high=None, marginal=None, pedigree=None, seconds=0.0)
    runs = (
        Run(name="plan", kind="plan", engine=f"engine {HOSTILE}", file=f"{HOSTILE}.gguf", file_bytes=None, bits_per_weight=None, prefill=blank, decode=blank, workload=blank, peak_rss=None, quality=quality(0.9831, 0.02, 0.91), passes=False, note=HOSTILE),
        Run(name=f"{HOSTILE}.gguf", kind="given", engine="llama.cpp", file=None, file_bytes=None, bits_per_weight=None, prefill=blank, decode=blank, workload=still, peak_rss=None, quality=None, passes=None),
        Run(name="Q4_0", kind="uniform", engine="llama.cpp", file=None, file_bytes=91_000_000, bits_per_weight=4.5, prefill=blank, decode=blank, workload=blank, peak_rss=None, quality=quality(0.61, 0.9, 0.4), passes=False),
    )  # fmt: skip
    return passed().model_copy(
        update={
            "model": f"a-very-long-unbroken-name-{'x' * 90}{HOSTILE}",
            "verdict": f"No plan keeps 0.99 of {HOSTILE}; the nearest miss keeps 0.983.",
            "headline_baseline": f"{HOSTILE}.gguf",
            "origin": HOSTILE,
            "command": f"joulesmith optimize '{HOSTILE}' --keep 0.99",
            "status": "none",
            "runs": runs,
            "ratios": (),
            "front": (
                FrontPoint(name=f"{HOSTILE}", kind="front", joules_per_token=0.05, kept=0.9831, kept_low=0.98, measured=False),
                FrontPoint(name="Q4_0", kind="uniform", joules_per_token=0.04, kept=0.61, kept_low=None, measured=True),
            ),
            "tensors": (
                TensorChoice(tensor=f"blk.0.{HOSTILE}", layer=0, role=HOSTILE, type=f"Q<{HOSTILE}", rows=8, columns=32, bits_per_weight=4.5, damage=0.0, joules=1e-6),
                TensorChoice(tensor=f"output.{HOSTILE}", layer=None, role=HOSTILE, type="Q4_0", rows=8, columns=32, bits_per_weight=4.5, damage=0.001, joules=1e-6),
            ),
            "table": (TableCell(rows=8, columns=32, type=f"Q<{HOSTILE}", decode_joules=1e-6, prefill_joules=1e-7, decode_seconds=1e-6, prefill_seconds=1e-7, pedigree=None),),
            "predictions": (),
            "emissions": (Emission(name="plan", grid=HOSTILE, gco2e_per_kwh=400, gco2e=None, price_per_kwh=0.3, currency="EUR", cost=None, source=HOSTILE),),
            "caveats": (HOSTILE,),
            "machine": Machine(cpu=HOSTILE, cores=2, threads=2, memory_bytes=8_000_000_000, gpus=(HOSTILE,), system="Linux", power_source=HOSTILE, idle_watts=None, max_watts=None),
            "timings": {},
            "peak_memory": None,
        }
    )  # fmt: skip
