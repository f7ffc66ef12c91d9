"""Rotations of a decoder that change nothing it says, folded into its weights.

Rotated weights and activations have fewer outliers, so that low-bit grids fit them better:
Ashkboos et al. 2024, "QuaRot", section 4 (stage 1a and 1c), after the invariance of
"SliceGPT" (Ashkboos et al. 2024, theorem 1). The result is an ordinary model of the same
architecture: every engine runs it, and no multiplication is added.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from joulesmith.architectures import head_dim, tensor_refs
from joulesmith.compress.quantize.hadamard import rotation

if TYPE_CHECKING:
    from joulesmith.models import Model


def rotate_values(model: Model, seed: int = 0) -> None:
    """Rotate what heads carry from the value to the output projection, each head alike.

    In place and exact: ``o (R^T v) R``; nothing else of the model changes.
    """
    width = head_dim(model.module.config)
    r = rotation(width, seed)
    for layer in model.module.model.layers:
        attention = layer.self_attn
        v, o = attention.v_proj, attention.o_proj
        _put(v.weight, _by_head(v.weight.detach().double(), r.T))
        if v.bias is not None:
            _put(v.bias, _by_head(v.bias.detach().double()[:, None], r.T)[:, 0])
        _put(o.weight, _by_head(o.weight.detach().double().T, r.T).T)


def rotate_residual(model: Model, seed: int = 0) -> None:
    """Rotate the residual stream; norms' weights go into the layers that read them.

    In place and exact. A tied head must part from the embedding, because the final norm's
    weight goes into the head alone: the stored model grows by one matrix.
    """
    module, inner = model.module, model.module.model
    if model.tied:
        untie(model)
    r = rotation(module.config.hidden_size, seed)
    for layer in inner.layers:
        attention, mlp = layer.self_attn, layer.mlp
        readers = (
            (layer.input_layernorm, (attention.q_proj, attention.k_proj, attention.v_proj)),
            (layer.post_attention_layernorm, (mlp.gate_proj, mlp.up_proj)),
        )
        for norm, linears in readers:
            _read_rotated(norm, linears, r)
        for linear in (attention.o_proj, mlp.down_proj):
            _put(linear.weight, r.T @ linear.weight.detach().double())
            if linear.bias is not None:
                _put(linear.bias, r.T @ linear.bias.detach().double())
    _read_rotated(inner.norm, (module.lm_head,), r)
    embedding = inner.embed_tokens.weight
    _put(embedding, embedding.detach().double() @ r)


def _read_rotated(norm: Any, linears: tuple[Any, ...], r: Tensor) -> None:
    """``W diag(w) R`` for the layers behind a norm of weight w, which becomes 1."""
    scale = norm.weight.detach().double()
    for linear in linears:
        _put(linear.weight, (linear.weight.detach().double() * scale) @ r)
    with torch.no_grad():
        norm.weight.fill_(1.0)


def _by_head(rows: Tensor, r: Tensor) -> Tensor:
    """Apply (width, width) r to each head's rows of (heads * width, n)."""
    heads = rows.view(-1, len(r), rows.shape[1])
    return (r @ heads).reshape(rows.shape)


def _put(parameter: Tensor, value: Tensor) -> None:
    with torch.no_grad():
        parameter.copy_(value)


def untie(model: Model) -> None:
    """Give the head a matrix of its own, a copy of the embedding."""
    module = model.module
    module.config.tie_word_embeddings = False
    embedding = module.model.embed_tokens.weight
    module.lm_head.weight = torch.nn.Parameter(
        embedding.detach().clone(), requires_grad=embedding.requires_grad
    )
    shapes = {n: tuple(p.shape) for n, p in module.named_parameters()}
    model.tensors = tensor_refs(shapes, module.config)
    model.parameters = sum(p.numel() for p in module.parameters())
