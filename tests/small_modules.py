"""Modules of a few thousand weights with random ones, of every kind that compression meets."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def mlp(inputs: int = 12, hidden: int = 16, classes: int = 4, seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Linear(inputs, hidden),
        nn.ReLU(),
        nn.Linear(hidden, hidden),
        nn.ReLU(inplace=True),
        nn.Linear(hidden, classes),
    ).eval()


class Branches(nn.Module):
    """Blocks that do not feed each other."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(8, 8)) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.blocks[0](x)) + self.blocks[1](x)


def language(kind: str, seed: int = 0, layers: int = 2) -> nn.Module:
    """ "llama", "gpt2" (Conv1D, fused QKV, tied), "bert" or "mixtral" (fused experts)."""
    import transformers as t

    torch.manual_seed(seed)
    if kind == "llama":
        made: nn.Module = t.LlamaForCausalLM(
            t.LlamaConfig(
                vocab_size=50, hidden_size=16, intermediate_size=24, num_hidden_layers=layers,
                num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=64,
                tie_word_embeddings=True,
            )
        )  # fmt: skip
    elif kind == "gpt2":
        made = t.GPT2LMHeadModel(
            t.GPT2Config(
                vocab_size=50, n_embd=16, n_layer=layers, n_head=2, n_positions=64, bos_token_id=0,
                eos_token_id=0,
            )
        )  # fmt: skip
    elif kind == "bert":
        made = t.BertModel(
            t.BertConfig(
                vocab_size=50, hidden_size=16, intermediate_size=24, num_hidden_layers=layers,
                num_attention_heads=2, max_position_embeddings=64,
            )
        )  # fmt: skip
    else:
        made = t.MixtralForCausalLM(
            t.MixtralConfig(
                vocab_size=50, hidden_size=16, intermediate_size=24, num_hidden_layers=layers,
                num_attention_heads=2, num_key_value_heads=1, num_local_experts=3,
                num_experts_per_tok=2, max_position_embeddings=64,
            )
        )  # fmt: skip
    with torch.no_grad():
        for p in made.parameters():  # initial weights of 0.02 say next to nothing
            if p.ndim > 1:
                p.copy_(torch.randn_like(p) / p.shape[-1] ** 0.5)
            elif p.abs().sum() == 0:
                p.copy_(0.1 * torch.randn_like(p))
    return made.eval()


def tokens(n: int = 6, length: int = 10, seed: int = 0) -> Tensor:
    return torch.randint(0, 50, (n, length), generator=torch.Generator().manual_seed(seed))
