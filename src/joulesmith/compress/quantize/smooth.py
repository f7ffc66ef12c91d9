"""SmoothQuant: which factors move outliers of a layer's inputs into its weights.

Xiao, Lin, Seznec, Wu, Demouth, Han, "SmoothQuant" (2022), equation 4:

    s_j = max|X_j|^alpha / max|W_j|^(1 - alpha)        X' = X / s,  W' = W diag(s)

The paper takes one alpha for the whole model. Here alpha is chosen for each set of layers
that share an input, by the error that rounding both sides leaves in their outputs; "not at
all" is among the choices. An output's error counts as the end loss depends on it there,
by the squared gradients of the same tokens.

Tensors in, tensors out. Knows no model; `fold` moves the factors.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from joulesmith.compress.quantize.activations import InputQuantizer, Scheme, round_to, scale_of
from joulesmith.errors import JoulesmithError

ALPHAS = (0.3, 0.4, 0.5, 0.6, 0.7, 0.75, 0.8, 0.85, 0.9, 0.95)
REACH = 1e3
"""Factors stay within this of their geometric mean: norms are stored in float16."""


BEARABLE = 3e-5
"""Nats a token that the best static scale may cost an input above the best by token; where it
costs more, the input is expected to keep a scale by token, and gets the factors for that."""


@dataclass(frozen=True)
class Layer:
    """One linear layer that reads the inputs: what is needed to judge a rounding of it.

    weight: (rows, columns) float32. gradient: (tokens, rows), of the loss at the outputs;
    None where all outputs of all tokens count alike.
    """

    weight: Tensor
    gradient: Tensor | None = None


@dataclass(frozen=True)
class Smoothing:
    """alpha: chosen, None for no smoothing. scale: (channels,) to divide inputs by.

    damage: predicted of rounding inputs and weights so; before: of rounding them
    unsmoothed; by_token: of the chosen factors with a scale for each token. Nats a token
    where gradients were given, else half the summed squared error a token.
    """

    alpha: float | None
    scale: Tensor
    damage: float
    before: float
    by_token: float


def smooth_scale(inputs: Tensor, weights: Tensor, alpha: float) -> Tensor:
    """Equation 4: largest magnitudes (channels,) of inputs and of weights -> s (channels,).

    Normalised to a geometric mean of 1 (a common factor changes no rounding) and kept within
    `REACH` of it. Channels that are 0 on either side keep a factor of 1. Raises
    `JoulesmithError` for an alpha outside 0..1.
    """
    if not 0 <= alpha <= 1:
        raise JoulesmithError(f"alpha is between 0 and 1, not {alpha:g}")
    alive = (inputs > 0) & (weights > 0)
    log = alpha * inputs.double().log() - (1 - alpha) * weights.double().log()
    log = torch.where(alive, log, torch.zeros_like(log))
    mean = log[alive].mean() if bool(alive.any()) else 0.0
    log = torch.where(alive, log - mean, torch.zeros_like(log))
    bound = torch.tensor(REACH, dtype=torch.float64).log()
    return log.clamp(-bound, bound).exp().float()


def round_rows(weight: Tensor, scheme: Scheme) -> Tensor:
    """(rows, columns) -> rounded to nearest with one symmetric scale a row: a stand-in for
    the real rounding, good enough to compare factors."""
    peak = weight.abs().amax(1, keepdim=True)
    scale, _ = scale_of(-peak, peak, Scheme(scheme.kind))
    return round_to(weight, scale, None, scheme.kind)


def output_damage(
    x: Tensor, layers: Sequence[Layer], scheme: Scheme, round_input: Callable[[Tensor], Tensor]
) -> float:
    """Half the summed squared error of the layers' outputs, a token, weighted by squared
    gradients, when inputs x (tokens, columns) and weights are both rounded."""
    rounded = round_input(x)
    total = 0.0
    for layer in layers:
        # In one product: x W - x' W' = (x - x') W + x' (W - W')
        off = (x - rounded) @ layer.weight.T
        off.addmm_(rounded, (layer.weight - round_rows(layer.weight, scheme)).T)
        if layer.gradient is not None:
            off.mul_(layer.gradient)
        total += float(off.square().sum())
    return 0.5 * total / max(1, len(x))


def static_by_ends(ends: Tensor, scheme: Scheme) -> InputQuantizer:
    """A static quantizer that covers all of ``ends`` (any shape), for comparing factors."""
    low, high = torch.aminmax(ends)
    scale, zero = scale_of(low, high, scheme)
    return InputQuantizer(scheme, float(scale), None if zero is None else float(zero))


def search(
    x: Tensor,
    layers: Sequence[Layer],
    scheme: Scheme,
    *,
    ends: Tensor | None = None,
    channels: Callable[[Tensor], Tensor] = lambda peak: peak,
    columns: Callable[[Tensor], Tensor] = lambda scale: scale,
    alphas: Sequence[float] = ALPHAS,
    bearable: float | None = None,
) -> Smoothing:
    """The alpha of least `output_damage`, and its factors.

    bearable: for static schemes whose worst inputs keep a scale by token in the end. Where the
    best static scale costs more than this above the best by token, the factors are those for
    one by token: factors that bring one huge token down cost all others. In nats a token, so
    with gradients.

    x: (tokens, columns) inputs. layers: all that read them. ends: (2, columns) least and
    largest value of each column over all the text that x is drawn from, by default x's own:
    peaks of a few hundred tokens say little of thousands, and a static scale that covers
    only them was ten times worse than predicted. channels, columns: from
    columns to producer channels and back (`Fold`'s methods of these names).
    Raises `JoulesmithError` for inputs that are not finite.
    """
    if not bool(torch.isfinite(x).all()):
        raise JoulesmithError("activations hold NaN or infinity: check the model and the text")

    ends = torch.stack(torch.aminmax(x, dim=0)) if ends is None else ends

    def damage(scale: Tensor | None, dynamic: bool = scheme.dynamic) -> float:
        s = None if scale is None else columns(scale)
        inputs = x if s is None else x / s
        moved = [Layer(y.weight if s is None else y.weight * s, y.gradient) for y in layers]
        used = Scheme(scheme.kind, dynamic, scheme.symmetric)
        reach = ends if s is None else ends / s
        quantizer = InputQuantizer(used) if dynamic else static_by_ends(reach, used)
        return output_damage(inputs, moved, scheme, quantizer)

    x_peak = channels(ends.abs().amax(0))
    w_peak = channels(torch.stack([y.weight.abs().amax(0) for y in layers]).amax(0))
    before = damage(None)
    plain = torch.ones_like(x_peak)
    tried: list[tuple[float, float | None, Tensor]] = [(before, None, plain)]
    for alpha in alphas:
        scale = smooth_scale(x_peak, w_peak, alpha)
        tried.append((damage(scale), alpha, scale))
    found, chosen, scale = min(tried, key=lambda t: t[0])
    if scheme.dynamic:
        return Smoothing(chosen, scale, found, before, found)
    by_token = damage(scale, True)
    if bearable is not None:
        least = [damage(s, True) for _, _, s in tried]
        i = min(range(len(tried)), key=least.__getitem__)
        if found - least[i] > bearable:
            (found, chosen, scale), by_token = tried[i], least[i]
    return Smoothing(chosen, scale, found, before, by_token)
