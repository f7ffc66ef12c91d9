"""What a plan may choose from, with joules and damage on every choice.

Puts the joule table and the predicted damage side by side. Knows shapes, roles and
numbers; no files and no engine.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from statistics import median
from typing import TYPE_CHECKING

from joulesmith.gguf_file import type_bytes
from joulesmith.plan.search import Space

if TYPE_CHECKING:
    from joulesmith.energy.reading import Reading
    from joulesmith.engines.base import Bench
    from joulesmith.models import TensorRef

Price = Callable[[int, int, str], tuple[float, float]]
"""(rows, columns, type) -> (joules a decoded token, joules a prefilled token)."""


def tensor_joules(
    ref: TensorRef, kind: str, price: Price, workload: tuple[int, int], tied: bool
) -> tuple[float, float]:
    """(decode, prefill) joules per token of one tensor.

    The head is multiplied once a request in prefill, since only the last position's
    logits are wanted. An embedding that is not the head is only looked up: no joules.
    """
    rows, columns = ref.shape
    if ref.role == "token_embd" and not tied:
        return 0.0, 0.0
    decode, prefill = price(rows, columns, kind)
    if ref.role in ("output", "token_embd"):
        return decode, decode / workload[0]
    return decode, prefill


def workload_joules(decode: float, prefill: float, workload: tuple[int, int]) -> float:
    """Joules per token of a whole request of (prefill, decode) tokens."""
    p, d = workload
    return (p * prefill + d * decode) / (p + d)


def make_space(
    matrices: Sequence[TensorRef],
    damage: Mapping[str, Mapping[str, float]],
    activation: Mapping[str, Mapping[str, float]],
    price: Price,
    workload: tuple[int, int],
    float_type: str,
) -> Space:
    """Joules, bytes and damage of every (tensor, type), the untouched type included.

    An embedding that is only looked up costs no joules: it is left at 8 bits where that is
    on offer (or as a given file has it, which does no damage), since more bytes would buy
    next to nothing and fewer would save nothing.
    """
    tied = not any(m.role == "output" for m in matrices)
    joules: dict[str, dict[str, float]] = {}
    sizes: dict[str, dict[str, int]] = {}
    predicted: dict[str, dict[str, float]] = {}
    for ref in matrices:
        kinds = {**damage[ref.name], float_type: 0.0}
        if ref.role == "token_embd" and not tied and "Q8_0" in kinds:
            kinds = {k: d for k, d in kinds.items() if d <= kinds["Q8_0"] and k != float_type}
        predicted[ref.name] = kinds
        joules[ref.name] = {
            k: workload_joules(*tensor_joules(ref, k, price, workload, tied), workload)
            for k in kinds
        }
        sizes[ref.name] = {k: type_bytes(k, ref.shape) for k in kinds}
    inputs = {m.name: {**activation[m.name], float_type: 0.0} for m in matrices}
    return Space(joules, sizes, predicted, inputs, {m.name: m.role for m in matrices})


def worthwhile(
    types: Iterable[str],
    shapes: Iterable[tuple[int, int]],
    cost: Callable[[int, int, str], float | None],
    coarseness: Mapping[str, float],
    slack: float = 0.08,
) -> list[str]:
    """Types that some finer type does not beat in joules at every shape they fit.

    cost(rows, columns, type): joules per token, None where the type does not fit.
    coarseness: relative squared rounding error of each type, for "finer".
    slack: differences below this are the table's noise.
    """
    types = list(types)
    kept = []
    for kind in types:
        finer = [t for t in types if coarseness[t] < coarseness[kind]]
        for shape in shapes:
            mine = cost(*shape, kind)
            if mine is None:
                continue
            rivals = [c for t in finer if (c := cost(*shape, t)) is not None]
            if not rivals or mine < min(rivals) * (1 - slack):
                kept.append(kind)
                break
    return kept


def fast_types(space: Space, most: int = 1) -> list[str]:
    """The types that are cheapest, or within 5 % of it, for the most bytes of tensors."""
    found: Counter[str] = Counter()
    for tensor, kinds in space.joules.items():
        least = min(kinds.values())
        for kind, joules in kinds.items():
            if joules <= 1.05 * least:
                found[kind] += max(space.sizes[tensor].values())
    return [kind for kind, _ in found.most_common(most)]


def token_joules(runs: Sequence[Bench], workload: tuple[int, int]) -> dict[str, float]:
    """Median joules per token of some runs: "decode", "prefill", "workload" (prompt:answer).

    Seconds where energy is unknown, which is what a joule table then gives too.
    """

    def per_token(reading: Reading, tokens: int) -> float:
        return (reading.seconds if reading.joules is None else reading.joules) / tokens

    decode = median(per_token(r.decode, r.decode_tokens) for r in runs)
    prefill = median(per_token(r.prefill, r.prefill_tokens) for r in runs)
    whole = workload_joules(decode, prefill, workload)
    return {"decode": decode, "prefill": prefill, "workload": whole}


def price_rest(
    matrices: Sequence[TensorRef],
    types: Mapping[str, str],
    float_type: str,
    price: Price,
    runs: Sequence[Bench],
) -> dict[str, float]:
    """Joules per token that are not in the matrices (attention, norms, waiting), by phase.

    runs: of a file of these types. It should be a quantized one, as the plan will be: a
    float file waits for memory where a quantized one computes, and the table sees that
    apart from its surroundings.
    """
    workload = (runs[0].prefill_tokens, runs[0].decode_tokens)
    none = {"decode": 0.0, "prefill": 0.0}
    bare = totals(matrices, types, float_type, price, none, workload)
    whole = token_joules(runs, workload)
    return {phase: whole[phase] - bare[phase] for phase in none}


def totals(
    matrices: Sequence[TensorRef],
    types: Mapping[str, str],
    float_type: str,
    price: Price,
    rest: Mapping[str, float],
    workload: tuple[int, int],
) -> dict[str, float]:
    """Predicted joules per token of a whole model: "decode", "prefill", "workload"."""
    tied = not any(m.role == "output" for m in matrices)
    decode, prefill = rest["decode"], rest["prefill"]
    for ref in matrices:
        d, p = tensor_joules(ref, types.get(ref.name, float_type), price, workload, tied)
        decode += d
        prefill += p
    return {
        "decode": decode,
        "prefill": prefill,
        "workload": workload_joules(decode, prefill, workload),
    }


def stream_weights(parameters: int) -> int:
    """Weights that pass between two uses of one matrix: the model's, to a power of two, so
    that models of like size share a table."""
    return 1 << min(28, max(20, round(math.log2(parameters))))
