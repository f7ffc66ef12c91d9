"""Find the cheapest choice of types whose measured quality clears the floor.

Predictions propose, measurements decide: each proposal of the solver is written as
a file, run on the engine over the search windows, and its true loss moves the
budget of the next one. The final windows are never seen here.
Knows a judge (types -> `Quality`) and numbers; not formats, engines or rounding.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from joulesmith.errors import JoulesmithError
from joulesmith.plan.damage import INPUTS, Correction, group
from joulesmith.plan.solve import Choice, Option, solve
from joulesmith.progress import Tick, silent
from joulesmith.ranks import shared

if TYPE_CHECKING:
    from joulesmith.quality import Quality

Judge = Callable[[Mapping[str, str]], "Quality"]
"""types of all tensors -> quality on the search windows (measured, cached by the caller)."""


@dataclass(frozen=True)
class Space:
    """All that the search may choose from.

    joules/sizes/damage/activation: tensor -> type -> number. damage: of the rounded
    weights, activation: of the inputs that the engine rounds; both raw predictions.
    roles: tensor -> role.
    """

    joules: Mapping[str, Mapping[str, float]]
    sizes: Mapping[str, Mapping[str, int]]
    damage: Mapping[str, Mapping[str, float]]
    activation: Mapping[str, Mapping[str, float]]
    roles: Mapping[str, str]

    def options(self, correction: Correction) -> dict[str, list[Option]]:
        """The solver's input, with damage corrected."""
        return {
            t: [
                Option(
                    k, self.joules[t][k], option_damage(self, correction, t, k), self.sizes[t][k]
                )
                for k in kinds
            ]
            for t, kinds in self.damage.items()
        }


@dataclass(frozen=True)
class Trial:
    """One plan that was run: what was predicted and what its quality was."""

    types: dict[str, str]
    joules: float
    damage: float
    quality: Quality


def option_damage(space: Space, correction: Correction, tensor: str, kind: str) -> float:
    """Corrected damage of one choice, nats per token."""
    name = group(space.roles[tensor])
    weights = space.damage[tensor][kind] * correction.factor(name, kind)
    inputs = space.activation[tensor][kind]
    return weights + (inputs * correction.factor(name, INPUTS) if inputs else 0.0)


def best_types(space: Space) -> dict[str, str]:
    """The type of least predicted damage for each tensor."""
    return {
        t: min(kinds, key=lambda k: kinds[k] + space.activation[t][k])
        for t, kinds in space.damage.items()
    }


def finest_rounding(space: Space) -> str | None:
    """The type with the least damage to weights among those that round inputs, if any."""
    total: dict[str, float] = {}
    everywhere = set.intersection(*(set(k) for k in space.damage.values()))
    for kind in everywhere:
        if any(space.activation[t][kind] for t in space.damage):
            total[kind] = sum(space.damage[t][kind] for t in space.damage)
    return min(total, key=lambda k: total[k]) if total else None


def correct(
    space: Space, judge: Judge, worth: Sequence[str], progress: Tick = silent
) -> Correction:
    """Measure each group of tensors at each type of ``worth``, the rest at its best type.

    The finest type that rounds inputs comes first, everywhere at once: what it costs is
    due to the inputs, and is then taken off what the other types cost.
    """
    correction = Correction()
    base = best_types(space)
    base_kl = judge(base).kl
    groups = sorted({group(space.roles[t]) for t in space.damage})
    fine = finest_rounding(space)

    def change(kind: str, names: Sequence[str]) -> tuple[float, float, float] | None:
        """KL measured, and predicted of weights and of inputs, with ``names`` at ``kind``."""
        members = [
            t
            for t in space.damage
            if group(space.roles[t]) in names and kind in space.damage[t] and base[t] != kind
        ]
        if not members:
            return None
        measured = judge(base | dict.fromkeys(members, kind)).kl - base_kl
        weights = sum(space.damage[t][kind] for t in members)
        return measured, weights, sum(space.activation[t][kind] for t in members)

    todo = [(g, k) for k in worth if k != fine for g in groups]
    if fine and (found := change(fine, groups)):
        measured, weights, inputs = found
        for g in groups:
            correction.learn(g, INPUTS, inputs, measured - weights)
            correction.learn(g, fine, weights, weights)
    done = 0

    def changes(part: Sequence[tuple[str, str]]) -> list[tuple[float, float, float] | None]:
        nonlocal done
        found = []
        for g, k in part:
            done += 1
            progress(done / (len(part) + 1))
            found.append(change(k, [g]))
        return found

    for (g, k), seen in zip(todo, shared(todo, changes), strict=True):
        if seen:
            measured, weights, inputs = seen
            correction.learn(g, k, weights, measured - inputs * correction.factor(g, INPUTS))
    progress(1.0)
    return correction


def search(
    space: Space,
    correction: Correction,
    judge: Judge,
    keep: float,
    *,
    final_tokens: int,
    rounds: int = 7,
    progress: Tick = silent,
) -> list[Trial]:
    """Plans that clear the floor on the search windows, cheapest first; then the nearest miss.

    final_tokens: positions that the final judgement will use. The bound is computed
    for that many, so that a plan is not dropped for the search split's smaller size.
    Raises `JoulesmithError` only when there is nothing to choose from.
    """
    options = space.options(correction)
    least = sum(min(o.damage for o in os) for os in options.values())
    cheapest = sum(min(os, key=lambda o: (o.joules, o.damage)).damage for os in options.values())
    target = -math.log(keep)
    budget = min(max(target, 1.02 * least), 1.02 * cheapest)
    trials: dict[tuple[tuple[str, str], ...], Trial] = {}
    passing, failing = least, math.inf
    for i in range(rounds):
        choice = _solve(options, budget)
        key = tuple(sorted(choice.types.items()))
        if key not in trials:
            quality = judge(choice.types)
            trials[key] = Trial(choice.types, choice.joules, choice.damage, quality)
        loss = loss_bound(trials[key].quality, final_tokens)
        progress((i + 1) / rounds)
        if loss <= target:
            passing = max(passing, choice.damage)
            if budget >= cheapest:
                break
        else:
            failing = min(failing, choice.damage)
            if choice.damage <= 1.02 * least:
                break
        if failing < passing * 1.03:  # finer than what the windows can tell
            break
        seen = trials[key].quality
        mean, margin = expected_loss(seen), _margin(seen, final_tokens)
        guess = _aim(choice.damage, mean, margin, 0.97 * target)
        if not passing < guess < failing:
            # Outside of what is known to bracket the answer: halve the bracket instead.
            low = max(passing, 1e-9, failing / 16 if failing < math.inf else 0.0)
            guess = math.sqrt(low * failing) if failing < math.inf else 2 * passing
        budget = min(max(guess, 1.02 * least), 1.02 * cheapest)
    found = list(trials.values())
    good = [t for t in found if loss_bound(t.quality, final_tokens) <= target]
    bad = [t for t in found if t not in good]
    return sorted(good, key=lambda t: t.joules) + sorted(bad, key=lambda t: -t.quality.kept_low)


def _aim(damage: float, mean: float, margin: float, target: float) -> float:
    """The damage at which the loss bound would be ``target``, going by one trial, whose mean
    loss and margin at ``damage`` are given.

    The mean loss grows in proportion to the damage, its noise with the square root (the
    variance of a token's NLL change is about twice its KL): a d + b sqrt(d) = target.
    """
    a = max(mean, 0.0) / damage
    b = margin / math.sqrt(damage)
    if not math.isfinite(b):
        return 0.5 * damage
    if a <= 0:
        return min(4 * damage, (target / b) ** 2) if b > 0 else 4 * damage
    root = (-b + math.sqrt(b * b + 4 * a * target)) / (2 * a)
    return min(4 * damage, root * root)


def safer(
    space: Space, correction: Correction, trial: Trial, judged: Quality, keep: float
) -> Choice | None:
    """The plan after one that was judged and failed: with the damage that its loss suggests,
    at most 0.9 of the failed one's. None when there is none."""
    mean, margin = -math.log(judged.kept), _margin(judged, judged.tokens)
    damage = _aim(trial.damage, mean, margin, -0.97 * math.log(keep))
    try:
        return solve(space.options(correction), min(damage, 0.9 * trial.damage))
    except JoulesmithError:
        return None


def bolder(
    space: Space, correction: Correction, trial: Trial, judged: Quality, keep: float
) -> Choice | None:
    """The plan after one that was judged and passed with room to spare: with the damage that
    its loss suggests, at most twice its own. None when that would save under 1 % of the
    matrices' joules."""
    mean, margin = -math.log(judged.kept), _margin(judged, judged.tokens)
    damage = _aim(trial.damage, mean, margin, -0.95 * math.log(keep))
    if damage < 1.05 * trial.damage:
        return None
    choice = _solve(space.options(correction), min(damage, 2 * trial.damage))
    return choice if choice.joules < 0.99 * trial.joules else None


def front(space: Space, correction: Correction, points: int = 12) -> list[Choice]:
    """Predicted plans from the least to the most damage: joules against damage."""
    options = space.options(correction)
    least = sum(min(o.damage for o in os) for os in options.values())
    most = sum(min(os, key=lambda o: (o.joules, o.damage)).damage for os in options.values())
    low, high = math.log(max(least, 1e-9) * 1.01), math.log(max(most, least * 1.02, 2e-9))
    return [_solve(options, math.exp(low + (high - low) * i / (points - 1))) for i in range(points)]


LOSS_PER_KL = (1.0, 0.25)
"""Mean and spread of NLL increase / KL over files of one model, before any is looked at."""


def expected_loss(quality: Quality) -> float:
    """The mean NLL increase to expect on other windows of the text, nats per token.

    To second order the NLL of text that the reference model describes well rises by the
    KL divergence, which is known several times better from the same windows. So the mean
    that was seen is drawn towards the KL, by as much as its own noise warrants (the
    posterior mean of two normal distributions).
    """
    mean = -math.log(quality.kept)
    noise = _margin(quality, quality.tokens) / 1.7  # one-sided 95 % margin to standard error
    ratio, spread = LOSS_PER_KL
    prior = (spread * quality.kl) ** 2
    if not math.isfinite(noise) or prior + noise**2 <= 0:
        return mean
    trust = prior / (prior + noise**2)
    return trust * mean + (1 - trust) * ratio * quality.kl


def loss_bound(quality: Quality, tokens: int) -> float:
    """Upper bound of the mean NLL increase to expect when judged on ``tokens`` other positions."""
    return expected_loss(quality) + _margin(quality, tokens)


def _margin(quality: Quality, tokens: int) -> float:
    """Width of the one-sided 95 % bound of the mean NLL increase over ``tokens`` positions."""
    margin = (
        math.log(quality.kept) - math.log(quality.kept_low) if quality.kept_low > 0 else math.inf
    )
    return margin * math.sqrt(quality.tokens / tokens)


def _solve(options: Mapping[str, Sequence[Option]], budget: float) -> Choice:
    least = sum(min(o.damage for o in os) for os in options.values())
    return solve(options, max(budget, least * (1 + 1e-9) + 1e-12), gap=1e-4)
