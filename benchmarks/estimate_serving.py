"""The constants of `joulesmith.estimate.serving`, fitted on published joules of GPUs, and their
errors on model families that were left out.

    python benchmarks/estimate_serving.py inference_energy.csv [--own results/gpu_serving.csv]
        [--write] [--out results/estimate_serving.md]

The table has a row a measurement: model, GPU and how many, batch, tokens in and out, joules per
output token, tokens a second. ``--write`` renews src/joulesmith/estimate/serving/fitted.json. The
peer is the formula of EcoLogits, called from its package where that is installed.

Fitted together are logarithms of joules and of seconds a step, with a loss that grows linearly for
large errors (pseudo-Huber). All constants are logarithms with a prior, stated below; those of a
device are drawn to its generation's mean and that to all generations', those of an engine to the
engines'.
"""

from __future__ import annotations

import argparse
import csv
import json
import shlex
import sys
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import least_squares

from joulesmith.estimate.devices import find
from joulesmith.estimate.model import work
from joulesmith.estimate.model.hub_config import of_config
from joulesmith.estimate.model.shape import Shape
from joulesmith.estimate.serving import setup as serving_setup
from joulesmith.estimate.serving.roofline import Constants, Pass, cost

HERE = Path(__file__).parent
TARGET = HERE.parent / "src/joulesmith/estimate/serving" / serving_setup.FILE
# Mean and spread of the logarithm: what is known before any row is seen.
DEVICE = {
    "static": (0.3, 0.4), "per_byte": (0.35, 0.4), "per_flop": (0.7, 0.4),
    "bandwidth": (0.75, 0.15), "compute": (0.65, 0.2),
}  # fmt: skip
ENGINE = {"layer_s": (15e-6, 1.0), "sync_s": (20e-6, 1.5), "step_s": (1e-3, 1.0),
          "sequence_s": (60e-6, 1.5)}  # fmt: skip
SHARED = {
    # fused kernels for experts reach about half of a dense product's rate
    "expert_layer_s": (40e-6, 0.7), "expert_bandwidth": (0.7, 0.3), "expert_compute": (0.5, 0.4),
    # an FP8 product took 0.56 of bfloat16's joules by itself (results/gpu.md); engines round inputs
    "narrow_compute": (0.8, 0.2), "narrow_per_flop": (0.7, 0.15),
}  # fmt: skip
TEXT = {"reach": (0.75, 0.2), "prompt": (200.0, 0.7)}
WITHIN, DEVICES_APART, ENGINES_APART = 0.1, 0.25, 1.0
"""Spread of the logarithm among devices of a generation, among generations, among engines."""
NOISE, SECONDS = 0.08, 0.5
"""Spread of a row's logarithm, and the weight of its seconds."""
CHAT = "mlenergy"
ENGINES = {
    "mlenergy-v3": serving_setup.SERVED,
    "mlenergy-v2": "vLLM 2024",
    "splitwise-isca24": "vLLM 2023",
    "own": serving_setup.BARE,
}


def llama(layers: int, hidden: int, heads: int, kv: int, ffn: int, vocab: int, **more: Any) -> Any:
    """A config of that family."""
    return {
        "model_type": "llama", "num_hidden_layers": layers, "hidden_size": hidden,
        "num_attention_heads": heads, "num_key_value_heads": kv, "intermediate_size": ffn,
        "vocab_size": vocab, "tie_word_embeddings": False, "max_position_embeddings": 131072,
        **more,
    }  # fmt: skip


# part of the name -> (family, config as published)
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "Llama-3.1-8B": ("Llama 3.1", llama(32, 4096, 32, 8, 14336, 128256)),
    "Llama-3.1-70B": ("Llama 3.1", llama(80, 8192, 64, 8, 28672, 128256)),
    "Llama-3.1-405B": ("Llama 3.1", llama(126, 16384, 128, 8, 53248, 128256)),
    "Qwen3-8B": ("Qwen3", llama(36, 4096, 32, 8, 12288, 151936, model_type="qwen3", head_dim=128)),
    "Qwen3-32B": ("Qwen3", llama(64, 5120, 64, 8, 25600, 151936, model_type="qwen3", head_dim=128)),
    "Qwen3-30B-A3B": (
        "Qwen3 MoE",
        llama(48, 2048, 32, 4, 6144, 151936, model_type="qwen3_moe", head_dim=128, num_experts=128,
              num_experts_per_tok=8, moe_intermediate_size=768, decoder_sparse_step=1,
              mlp_only_layers=[]),
    ),
    "llama2-70b": ("Llama 2", llama(80, 8192, 64, 8, 28672, 32000)),
    "bloom-176b": (
        "BLOOM",
        {"model_type": "bloom", "n_layer": 70, "n_head": 112, "hidden_size": 14336,
         "vocab_size": 250880},
    ),
}  # fmt: skip


class Rows:
    """All rows as arrays, and how a pass is made of them."""

    def __init__(self, table: Path, own: Path) -> None:
        self.device: list[str] = []
        self.engine: list[str] = []
        self.family: list[str] = []
        self.dropped: list[str] = []
        kept: list[tuple[Shape, dict[str, Any]]] = []
        for r in csv.DictReader(table.open(encoding="utf-8")):
            kept.append(self._published(r))
        for r in csv.DictReader(own.open(encoding="utf-8")):
            kept.append(self._measured(r))
        self.devices, self.engines = sorted(set(self.device)), list(dict.fromkeys(self.engine))
        self.device_at = np.array([self.devices.index(d) for d in self.device])
        self.engine_at = np.array([self.engines.index(e) for e in self.engine])
        self.shapes = [s for s, _ in kept]
        self.all = {k: np.array([r[k] for _, r in kept], float) for k in kept[0][1]}
        self.names = np.array(self.family)
        rows = self.all
        count = np.where(rows["reading"] > 0, rows["batch"] * rows["prompt"], rows["batch"])
        self.joules, self.seconds = rows["joules"], count / rows["rate"]
        # Devices that decode draw more than this; three rows of the table say 18 % of TDP.
        watts = rows["joules"] * rows["rate"] / rows["devices"]
        self.sane = ~(watts < 0.2 * rows["tdp_w"]) | (rows["own"] > 0)
        self._bases()

    def _published(self, r: dict[str, str]) -> tuple[Shape, dict[str, Any]]:
        family, config = next(v for k, v in MODELS.items() if k in r["model"])
        self.family.append(family)
        self.engine.append(ENGINES[r["dataset"]])
        fp8 = r["weight_precision"] == "fp8"
        return of_config(config), self._row(
            r["gpu"], int(r["num_gpus"]), fp8, float(r["batch_avg"] or r["batch_max"]),
            float(r["avg_input_tokens"] or "nan"), float(r["avg_output_tokens"]),
            float(r["J_per_output_token"]), float(r["output_tok_s"] or "nan"),
            chat=r["dataset"].startswith(CHAT),
        )  # fmt: skip

    def _measured(self, r: dict[str, str]) -> tuple[Shape, dict[str, Any]]:
        n = {k: int(r[k]) for k in ("layers", "hidden", "heads", "kv_heads", "head_dim", "vocab")}
        params, tied = int(r["params"]), r["model"] == "135M"
        table = n["vocab"] * n["hidden"]
        attention = n["layers"] * n["hidden"] * n["head_dim"] * 2 * (n["heads"] + n["kv_heads"])
        ffn = (params - table * (1 if tied else 2) - attention) // (3 * n["layers"] * n["hidden"])
        config = llama(n["layers"], n["hidden"], n["heads"], n["kv_heads"], ffn, n["vocab"],
                       head_dim=n["head_dim"], tie_word_embeddings=tied)  # fmt: skip
        self.family.append("own")
        self.engine.append(ENGINES["own"])
        reading = r["phase"] == "prefill"
        context = float(r["context"])
        return of_config(config), self._row(
            r["device"].removeprefix("NVIDIA "), 1, False, float(r["batch"]), context, np.inf,
            float(r["joules_per_token"]), float(r["tokens_per_second"]), reading=reading, own=True,
        )  # fmt: skip

    def _row(
        self, gpu: str, n: int, fp8: bool, batch: float, prompt: float, output: float,
        joules: float, rate: float, *, chat: bool = False, reading: bool = False, own: bool = False,
    ) -> dict[str, Any]:  # fmt: skip
        d = find(gpu)
        self.device.append(d.name)
        precision = "fp8" if fp8 else "bf16"
        return {
            "devices": n, "tdp_w": d.tdp_w, "bandwidth": d.bandwidth, "peak": d.peak(precision),
            "peak_16": d.peak("bf16"), "link": d.link_bandwidth, "bits": 8 if fp8 else 16,
            "narrow": d.runs_as(precision) == "fp8", "batch": batch, "prompt": prompt,
            "output": output, "joules": joules, "rate": rate, "chat": chat, "reading": reading,
            "own": own,
        }  # fmt: skip

    def _bases(self) -> None:
        """What does not change while fitting; FLOPs and caches are linear in the tokens reached but
        for a prompt's own attention, which is quadratic."""
        a, s = self.all, self.shapes
        n = range(len(s))
        tokens = np.where(a["reading"] > 0, a["batch"] * a["prompt"], a["batch"])
        self.weights = np.array([work.step_bytes(s[i], float(tokens[i]), a["bits"][i]) for i in n])
        flops = np.array([[work.decode_flops(x, c) for c in (1, 1001)] for x in s])
        self.flops_0, self.flops_1 = flops[:, 0], (flops[:, 1] - flops[:, 0]) / 1000
        self.cache = np.array([work.cache_bytes_per_token(x) for x in s])
        read = np.array([[work.prefill_flops(x, p) for p in (1, 1001, 2001)] for x in s])
        second = (read[:, 2] - 2 * read[:, 1] + read[:, 0]) / 1e6 / 2
        first = (read[:, 1] - read[:, 0]) / 1000 - second * 1000
        self.read = np.stack([read[:, 0], first, second], 1)
        self.layers = np.array([x.layers for x in s], float)
        self.experts = np.array([x.experts > 0 for x in s], float)
        self.expert_layers = np.array([x.expert_layers for x in s], float)
        self.hidden = np.array([x.hidden for x in s], float)

    def passes(self, reach: float, prompt: float) -> Pass:
        """As `serving.steady` and `serving.reading` make them."""
        a = self.all
        p = np.where(np.isnan(a["prompt"]), prompt, a["prompt"])
        out = np.where(np.isinf(a["output"]), 0, a["output"])
        reading = a["reading"] > 0
        context = p + out * np.where(a["chat"] > 0, reach, 0.5)
        share = np.where(np.isinf(a["output"]), 0, a["batch"] / a["output"])  # prompts a step
        whole = self.read[:, 0] + self.read[:, 1] * (p - 1) + self.read[:, 2] * (p - 1) ** 2
        flops = a["batch"] * (self.flops_0 + self.flops_1 * (context - 1)) + share * whole
        flops = np.where(reading, a["batch"] * whole, flops)
        tokens = np.where(reading, a["batch"] * p, a["batch"] + share * p)
        cache = a["batch"] * self.cache * np.where(reading, p, context)
        n = a["devices"]
        sent = 2 * self.layers * tokens * self.hidden * 2 * 2 * (n - 1) / n
        return Pass(
            n, a["tdp_w"], a["bandwidth"], a["peak"], a["peak_16"], a["link"], a["narrow"],
            self.experts, self.layers, self.expert_layers, a["batch"], self.weights, cache, flops,
            sent,
        )  # fmt: skip


class Fit:
    """The constants as one vector of logarithms."""

    def __init__(self, rows: Rows) -> None:
        self.rows = rows
        self.at: dict[str, slice] = {}
        mean: list[float] = []
        spread: list[float] = []
        for group, times in (
            (DEVICE, len(rows.devices)), (ENGINE, len(rows.engines)), (SHARED, 1), (TEXT, 1),
        ):  # fmt: skip
            for name, (middle, s) in group.items():
                self.at[name] = slice(len(mean), len(mean) + times)
                mean += [float(np.log(middle))] * times
                spread += [s] * times
        self.mean, self.spread = np.array(mean), np.array(spread)
        names = [find(d).generation for d in rows.devices]
        self.generations = sorted(set(names))
        self.generation = np.array([self.generations.index(g) for g in names])
        self.bare = rows.engines.index(serving_setup.BARE)

    def by_generation(self, each: NDArray[Any]) -> NDArray[Any]:
        """Means of the devices of each."""
        return np.array([each[self.generation == g].mean() for g in range(len(self.generations))])

    def predict(self, v: NDArray[Any]) -> tuple[NDArray[Any], NDArray[Any]]:
        """Joules a token and seconds a step of all rows."""
        e, r = np.exp(v), self.rows

        def one(name: str) -> float:
            return float(e[self.at[name]][0])

        c = Constants(
            **{k: e[self.at[k]][r.device_at] for k in DEVICE},
            **{k: e[self.at[k]][r.engine_at] for k in ENGINE},
            **{k: one(k) for k in SHARED},
        )
        found = cost(r.passes(one("reach"), one("prompt")), c)
        reading = r.all["reading"] > 0
        count = r.all["batch"] * np.where(reading, r.all["prompt"], 1)
        return found.joules / count, found.seconds

    def residuals(self, v: NDArray[Any], chosen: NDArray[Any]) -> NDArray[Any]:
        joules, seconds = self.predict(v)
        a = np.log(joules / self.rows.joules)[chosen] / NOISE
        b = SECONDS * np.log(seconds / self.rows.seconds)[chosen] / NOISE
        out = np.concatenate([a, b[np.isfinite(b)]])
        parts = [
            np.sign(out) * np.sqrt(2 * (np.sqrt(1 + out**2) - 1)),
            (v - self.mean) / self.spread,
        ]
        for name in DEVICE:
            each = v[self.at[name]]
            means = self.by_generation(each)
            parts.append((each - means[self.generation]) / WITHIN)
            parts.append((means - means.mean()) / DEVICES_APART)
        for name in ENGINE:  # kernels without an engine are no engine
            each = np.delete(v[self.at[name]], self.bare)
            parts.append((each - each.mean()) / ENGINES_APART)
        return np.concatenate(parts)

    def solve(self, chosen: NDArray[Any], start: NDArray[Any] | None = None) -> NDArray[Any]:
        found = least_squares(
            self.residuals, self.mean if start is None else start, args=(chosen,), max_nfev=200
        )
        v: NDArray[Any] = found.x
        return v

    def pooled(self, v: NDArray[Any]) -> dict[str, float]:
        """The geometric mean of the generations."""
        return {k: float(np.exp(self.by_generation(v[self.at[k]]).mean())) for k in DEVICE}


def left_out(
    fit: Fit, groups: NDArray[Any], v: NDArray[Any], also: NDArray[Any] | None = None
) -> tuple[NDArray[Any], NDArray[Any]]:
    """Logarithms of predicted over measured joules and seconds, each group by a fit without it (and
    without ``also``). A device that is left out has the others' mean, by its prior."""
    rows = fit.rows
    base = rows.sane if also is None else rows.sane & ~also
    joules, seconds = np.full(len(groups), np.nan), np.full(len(groups), np.nan)
    for g in sorted({str(x) for x in groups if x}):
        out = groups == g
        found = fit.predict(fit.solve(base & ~out, v))
        joules[out] = np.log(found[0] / rows.joules)[out]
        seconds[out] = np.log(found[1] / rows.seconds)[out]
    return joules, seconds


def factor(errors: NDArray[Any], level: float = 0.9) -> float:
    """Of an interval that holds ``level`` of the errors, one more added (split conformal)."""
    e = np.sort(np.abs(errors[np.isfinite(errors)]))
    at = min(len(e) - 1, int(np.ceil((len(e) + 1) * level)) - 1)
    return float(np.exp(e[at]))


def mape(errors: NDArray[Any], chosen: NDArray[Any]) -> float:
    """Mean absolute error as a share, of logarithms."""
    e = errors[chosen]
    return float(np.mean(np.abs(np.exp(e[np.isfinite(e)]) - 1)))


def ecologits(rows: Rows) -> dict[str, NDArray[Any]]:
    """Logarithms of its joules of GPUs over measured ones, at the true batch: with the true number
    of GPUs, and with its own; nothing where it is not installed."""
    try:
        from ecologits.impacts import llm  # type: ignore[import-not-found, unused-ignore]
    except ImportError:
        return {}
    true, own = [], []
    for i, shape in enumerate(rows.shapes):
        kwh = llm.gpu_energy(
            model_active_parameter_count=shape.active / 1e9, output_token_count=1,
            batch_size=rows.all["batch"][i], gpu_energy_alpha=llm.GPU_ENERGY_ALPHA,
            gpu_energy_beta=llm.GPU_ENERGY_BETA, gpu_energy_gamma=llm.GPU_ENERGY_GAMMA,
        )  # fmt: skip
        memory = llm.model_required_memory(
            model_total_parameter_count=shape.parameters / 1e9,
            model_quantization_bits=int(rows.all["bits"][i]),
        )
        count = llm.gpu_required_count(model_required_memory=memory, gpu_memory=llm.GPU_MEMORY)
        true.append(kwh * 3.6e6 * rows.all["devices"][i])
        own.append(kwh * 3.6e6 * count)
    return {
        "EcoLogits, true GPUs": np.log(np.array(true) / rows.joules),
        "EcoLogits, its own GPUs": np.log(np.array(own) / rows.joules),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("table", type=Path)
    parser.add_argument("--own", type=Path, default=HERE / "results/gpu_serving.csv")
    parser.add_argument("--write", action="store_true")
    parser.add_argument("--out", type=Path, default=HERE / "results/estimate_serving.md")
    args = parser.parse_args()
    rows = Rows(args.table, args.own)
    fit = Fit(rows)
    v = fit.solve(rows.sane)
    inside = np.log(fit.predict(v)[0] / rows.joules)
    published = rows.names != "own"
    apart = np.where(published, rows.names, "")
    strict = np.where(rows.names == "Qwen3 MoE", "Qwen3", apart)
    device = np.array(rows.device)
    by_family, _ = left_out(fit, apart, v)
    by_strict, by_strict_s = left_out(fit, strict, v)
    by_device, by_device_s = left_out(fit, np.where(published, device, ""), v)
    moe = rows.experts > 0
    main_gpus = np.isin(device, [find("H100").name, find("B200").name])
    peers: dict[str, NDArray[Any] | None] = {**ecologits(rows)} or {"EcoLogits": None}
    kinds = {
        "dense, H100 and B200": main_gpus & ~moe, "experts, H100 and B200": main_gpus & moe,
        "dense, A100 80 GB (vLLM 2023)": (device == find("A100 80GB").name) & rows.sane,
        "dense, A100 40 GB (vLLM 2024)": device == find("A100 40GB").name,
        "all published": published & rows.sane, "all, with the three odd rows": published,
    }  # fmt: skip
    given = [Path(a).name if "/" in a else a for a in sys.argv[1:]]
    lines = [
        f"# Joules of serving before anything runs ({date.today()})",
        "",
        f"`python benchmarks/estimate_serving.py {shlex.join(given)}`",
        "",
        f"{int(published.sum())} published rows and {int((~published).sum())} of our own of an "
        f"H200; {int((~rows.sane).sum())} rows that say under a fifth of TDP while decoding are "
        "not fitted.",
        "Mean absolute error of joules per output token. Left out: a model family at a time, "
        "Qwen3's mixture of experts and dense models apart or (strict) as one; a device at a time, "
        "whose constants are then its generation's, or the mean of generations.",
        "",
        f"| rows | n | all fitted | family left out | strict | device left out "
        f"| {' | '.join(peers)} |",
        "|---" * (6 + len(peers)) + "|",
    ]
    for name, chosen in kinds.items():
        cells = [mape(x, chosen) for x in (inside, by_family, by_strict, by_device)]
        others = [
            "not installed" if p is None else f"{mape(p, chosen):.1%}" for p in peers.values()
        ]
        told = " | ".join([*(f"{x:.1%}" for x in cells), *others])
        lines.append(f"| {name} | {int(chosen.sum())} | {told} |")
    intervals, coverage = calibrated(fit, rows, strict, device, v, moe, by_strict, by_device,
                                     by_strict_s, by_device_s, published)  # fmt: skip
    lines += ["", *coverage, ""]
    shipped = {
        "source": "ML.ENERGY leaderboard (vLLM), Splitwise, and an H200 of our own; "
        f"benchmarks/estimate_serving.py, {date.today()}",
        "devices": {
            d: {k: _round(np.exp(v[fit.at[k]][i])) for k in DEVICE}
            for i, d in enumerate(rows.devices)
        },
        "generations": {
            g: {k: _round(np.exp(fit.by_generation(v[fit.at[k]])[i])) for k in DEVICE}
            for i, g in enumerate(fit.generations)
        },
        "pooled": {k: _round(x) for k, x in fit.pooled(v).items()},
        "engines": {
            e: {k: _round(np.exp(v[fit.at[k]][i])) for k in ENGINE}
            for i, e in enumerate(rows.engines)
        },
        "newest": newest(rows),
        "shared": {k: _round(np.exp(v[fit.at[k]][0])) for k in SHARED},
        "reach": _round(np.exp(v[fit.at["reach"]][0])),
        "prompt": round(float(np.exp(v[fit.at["prompt"]][0]))),
        "intervals": intervals,
    }  # fmt: skip
    lines += constants_table(shipped)
    args.out.write_text("\n".join(lines) + "\n", "utf-8")
    print(args.out.read_text("utf-8"))
    if args.write:
        TARGET.write_text(json.dumps(shipped, indent=1) + "\n", "utf-8")


def calibrated(
    fit: Fit, rows: Rows, strict: NDArray[Any], device: NDArray[Any], v: NDArray[Any],
    moe: NDArray[Any], by_family: NDArray[Any], by_device: NDArray[Any], family_s: NDArray[Any],
    device_s: NDArray[Any], published: NDArray[Any],
) -> tuple[dict[str, Any], list[str]]:  # fmt: skip
    """Factors of the intervals, and how many left-out rows such ones hold: for each family they are
    made of the other families' errors, in fits that saw neither."""
    sane = rows.sane & published

    def pair(joules: NDArray[Any], seconds: NDArray[Any], chosen: NDArray[Any]) -> dict[str, float]:
        return {
            "joules": _round(factor(joules[chosen])),
            "seconds": _round(factor(seconds[chosen])),
        }

    intervals = {
        "measured": pair(by_family, family_s, sane & ~moe),
        "measured experts": pair(by_family, family_s, sane & moe),
        "other": pair(by_device, device_s, sane & ~moe),
    }
    both = {
        k: _round(float(np.exp(np.hypot(np.log(intervals["other"][k]),
                                        np.log(intervals["measured experts"][k])))))
        for k in ("joules", "seconds")
    }  # fmt: skip
    intervals["other experts"] = both
    lines = [
        "90 % intervals on a family that was left out, from errors of the other families in fits "
        "that saw neither:",
        "",
        "| family left out | rows | factor | rows inside |",
        "|---|---|---|---|",
    ]
    held = total = 0
    for f in sorted({str(x) for x in strict if x}):
        out = strict == f
        others = np.where(out, "", strict)
        errors, _ = left_out(fit, others, v, also=out)
        x = factor(errors[sane & ~out])
        mine = by_family[sane & out]
        inside = int((np.abs(mine) <= np.log(x)).sum())
        held, total = held + inside, total + len(mine)
        lines.append(f"| {f} | {len(mine)} | {x:.2f} | {inside} ({inside / len(mine):.0%}) |")
    lines.append(f"| all | {total} | | **{held} ({held / total:.0%})** |")
    return intervals, lines


def newest(rows: Rows) -> dict[str, str]:
    """Each generation's newest engine among its rows."""
    order = list(ENGINES.values())[:-1]  # newest first; kernels alone are no engine
    found: dict[str, str] = {}
    for device, engine in zip(rows.device, rows.engine, strict=True):
        g = find(device).generation
        if engine in order:
            found[g] = min(found.get(g, order[-1]), engine, key=order.index)
    return found


def constants_table(shipped: dict[str, Any]) -> list[str]:
    """As they are shipped."""
    out = ["## Constants", "", "| device | " + " | ".join(DEVICE) + " |"]
    out.append("|---" * (len(DEVICE) + 1) + "|")
    made = {f"{g}, mean": c for g, c in shipped["generations"].items()}
    for d, c in {**shipped["devices"], **made, "mean of generations": shipped["pooled"]}.items():
        out.append(f"| {d} | " + " | ".join(f"{c[k]:.3g}" for k in DEVICE) + " |")
    out += ["", "| engine | " + " | ".join(f"{k[:-2]} µs" for k in ENGINE) + " |"]
    out.append("|---" * (len(ENGINE) + 1) + "|")
    for e, c in shipped["engines"].items():
        out.append(f"| {e} | " + " | ".join(f"{c[k] * 1e6:.3g}" for k in ENGINE) + " |")
    out += ["", ", ".join(f"{k} {x:.3g}" for k, x in shipped["shared"].items())
            + f"; reach {shipped['reach']:.3g}; prompts of chats whose length is not told: "
            f"{shipped['prompt']} tokens.", "", "Intervals (factors of joules and of seconds): "
            + ", ".join(f"{k} {x['joules']:.2f} and {x['seconds']:.2f}"
                        for k, x in shipped["intervals"].items()) + "."]  # fmt: skip
    return out


def _round(x: Any) -> float:
    return float(f"{float(x):.4g}")


if __name__ == "__main__":
    main()
