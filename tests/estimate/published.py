"""Configs of published models, and what their authors or repositories say of their size.

weights: exact where a repository's safetensors index or an official preset says, else
rounded as the paper has it, with the rounding's half as tolerance.
"""

from __future__ import annotations

from typing import Any


def llama(
    hidden: int, layers: int, heads: int, kv: int, ffn: int, vocab: int, **more: Any
) -> dict[str, Any]:
    return {"model_type": "llama", "hidden_size": hidden, "num_hidden_layers": layers,
            "num_attention_heads": heads, "num_key_value_heads": kv, "intermediate_size": ffn,
            "vocab_size": vocab, "max_position_embeddings": 8192, **more}  # fmt: skip


DEEPSEEK_V3 = {
    "model_type": "deepseek_v3", "hidden_size": 7168, "num_hidden_layers": 61,
    "num_attention_heads": 128, "num_key_value_heads": 128, "intermediate_size": 18432,
    "moe_intermediate_size": 2048, "n_routed_experts": 256, "n_shared_experts": 1,
    "num_experts_per_tok": 8, "first_k_dense_replace": 3, "moe_layer_freq": 1, "kv_lora_rank": 512,
    "q_lora_rank": 1536, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128,
    "vocab_size": 129280, "max_position_embeddings": 163840, "tie_word_embeddings": False,
    "num_nextn_predict_layers": 1, "quantization_config": {"quant_method": "fp8"},
}  # fmt: skip
MIXTRAL = {
    "model_type": "mixtral", "hidden_size": 4096, "num_hidden_layers": 32,
    "num_attention_heads": 32, "num_key_value_heads": 8, "intermediate_size": 14336,
    "num_local_experts": 8, "num_experts_per_tok": 2, "vocab_size": 32000,
    "max_position_embeddings": 32768, "sliding_window": None, "tie_word_embeddings": False,
}  # fmt: skip
QWEN3_30B = {
    "model_type": "qwen3_moe", "hidden_size": 2048, "num_hidden_layers": 48, "head_dim": 128,
    "num_attention_heads": 32, "num_key_value_heads": 4, "intermediate_size": 6144,
    "moe_intermediate_size": 768, "num_experts": 128, "num_experts_per_tok": 8,
    "decoder_sparse_step": 1, "mlp_only_layers": [], "vocab_size": 151936,
    "max_position_embeddings": 40960, "sliding_window": None, "use_sliding_window": False,
    "tie_word_embeddings": False,
}  # fmt: skip
GPT_OSS_20B = {
    "model_type": "gpt_oss", "hidden_size": 2880, "num_hidden_layers": 24, "head_dim": 64,
    "num_attention_heads": 64, "num_key_value_heads": 8, "intermediate_size": 2880,
    "num_local_experts": 32, "num_experts_per_tok": 4, "vocab_size": 201088, "attention_bias": True,
    "sliding_window": 128, "layer_types": ["sliding_attention", "full_attention"] * 12,
    "max_position_embeddings": 131072, "tie_word_embeddings": False,
    "quantization_config": {"quant_method": "mxfp4"},
}  # fmt: skip
QWEN3_NEXT = {
    "model_type": "qwen3_next", "hidden_size": 2048, "num_hidden_layers": 48, "head_dim": 256,
    "num_attention_heads": 16, "num_key_value_heads": 2, "intermediate_size": 5120,
    "moe_intermediate_size": 512, "shared_expert_intermediate_size": 512, "num_experts": 512,
    "num_experts_per_tok": 10, "decoder_sparse_step": 1, "mlp_only_layers": [],
    "full_attention_interval": 4, "linear_conv_kernel_dim": 4, "linear_key_head_dim": 128,
    "linear_num_key_heads": 16, "linear_num_value_heads": 32, "linear_value_head_dim": 128,
    "vocab_size": 151936, "max_position_embeddings": 262144, "tie_word_embeddings": False,
}  # fmt: skip
GEMMA3_4B = {  # as on the hub: the rest is left to defaults
    "model_type": "gemma3", "vision_config": {"hidden_size": 1152},
    "text_config": {"model_type": "gemma3_text", "hidden_size": 2560, "intermediate_size": 10240,
                    "num_hidden_layers": 34, "sliding_window": 1024},
}  # fmt: skip
LLAMA4_SCOUT = {
    "model_type": "llama4", "vision_config": {"hidden_size": 1408}, "tie_word_embeddings": False,
    "text_config": {
        "model_type": "llama4_text", "hidden_size": 5120, "num_hidden_layers": 48, "head_dim": 128,
        "num_attention_heads": 40, "num_key_value_heads": 8, "intermediate_size": 8192,
        "intermediate_size_mlp": 16384, "num_local_experts": 16, "num_experts_per_tok": 1,
        "interleave_moe_layer_step": 1, "moe_layers": list(range(48)), "no_rope_layers": [],
        "attention_chunk_size": 8192, "vocab_size": 202048, "max_position_embeddings": 10485760,
    },
}  # fmt: skip
LLAMA4_MAVERICK = {
    **LLAMA4_SCOUT,
    "text_config": {**LLAMA4_SCOUT["text_config"], "num_local_experts": 128,  # type: ignore[dict-item]
                    "interleave_moe_layer_step": 2, "moe_layers": None},
}  # fmt: skip
GLM_45 = {
    "model_type": "glm4_moe", "hidden_size": 5120, "num_hidden_layers": 92, "head_dim": 128,
    "num_attention_heads": 96, "num_key_value_heads": 8, "intermediate_size": 12288,
    "moe_intermediate_size": 1536, "n_routed_experts": 160, "n_shared_experts": 1,
    "num_experts_per_tok": 8, "first_k_dense_replace": 3, "use_qk_norm": True,
    "attention_bias": True, "vocab_size": 151552, "num_nextn_predict_layers": 1,
    "max_position_embeddings": 131072, "tie_word_embeddings": False,
}  # fmt: skip
DEEPSEEK_V2_LITE = {
    "model_type": "deepseek_v2", "hidden_size": 2048, "num_hidden_layers": 27,
    "num_attention_heads": 16, "num_key_value_heads": 16, "intermediate_size": 10944,
    "moe_intermediate_size": 1408, "n_routed_experts": 64, "n_shared_experts": 2,
    "num_experts_per_tok": 6, "first_k_dense_replace": 1, "moe_layer_freq": 1, "kv_lora_rank": 512,
    "q_lora_rank": None, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128,
    "vocab_size": 102400, "max_position_embeddings": 163840,
}  # fmt: skip
GEMMA2_9B = {
    "model_type": "gemma2", "hidden_size": 3584, "num_hidden_layers": 42, "head_dim": 256,
    "num_attention_heads": 16, "num_key_value_heads": 8, "intermediate_size": 14336,
    "vocab_size": 256000, "sliding_window": 4096, "max_position_embeddings": 8192,
}  # fmt: skip
FALCON_40B = {
    "model_type": "falcon", "hidden_size": 8192, "num_hidden_layers": 60,
    "num_attention_heads": 128, "num_kv_heads": 8, "new_decoder_architecture": True,
    "parallel_attn": True, "multi_query": True, "bias": False, "alibi": False, "vocab_size": 65024,
}  # fmt: skip
OPT_350M = {
    "model_type": "opt", "hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16,
    "ffn_dim": 4096, "vocab_size": 50272, "max_position_embeddings": 2048,
    "word_embed_proj_dim": 512, "do_layer_norm_before": False,
}  # fmt: skip
QWEN15_MOE = {
    "model_type": "qwen2_moe", "hidden_size": 2048, "num_hidden_layers": 24,
    "num_attention_heads": 16, "num_key_value_heads": 16, "intermediate_size": 5632,
    "moe_intermediate_size": 1408, "shared_expert_intermediate_size": 5632, "num_experts": 60,
    "num_experts_per_tok": 4, "vocab_size": 151936, "max_position_embeddings": 8192,
}  # fmt: skip
PHI3_MINI = {
    "model_type": "phi3", "hidden_size": 3072, "num_hidden_layers": 32, "num_attention_heads": 32,
    "num_key_value_heads": 32, "intermediate_size": 8192, "vocab_size": 32064,
    "sliding_window": 2047, "max_position_embeddings": 4096,
}  # fmt: skip
QWEN25_7B = {
    "model_type": "qwen2", "hidden_size": 3584, "num_hidden_layers": 28, "num_attention_heads": 28,
    "num_key_value_heads": 4, "intermediate_size": 18944, "vocab_size": 152064,
    "max_window_layers": 28, "sliding_window": 131072, "use_sliding_window": False,
    "max_position_embeddings": 32768, "tie_word_embeddings": False, "torch_dtype": "bfloat16",
}  # fmt: skip
GPT2 = {"model_type": "gpt2", "n_embd": 768, "n_layer": 12, "n_head": 12, "n_positions": 1024,
        "n_ctx": 1024, "vocab_size": 50257}  # fmt: skip
PYTHIA_69B = {
    "model_type": "gpt_neox", "hidden_size": 4096, "num_hidden_layers": 32,
    "num_attention_heads": 32, "intermediate_size": 16384, "vocab_size": 50432,
    "max_position_embeddings": 2048, "tie_word_embeddings": False,
}  # fmt: skip
BLOOM = {"model_type": "bloom", "n_embed": 14336, "n_layer": 70, "num_attention_heads": 112,
         "vocab_size": 250880}  # fmt: skip
OLMO2_7B = {
    "model_type": "olmo2", "hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32,
    "num_key_value_heads": 32, "intermediate_size": 11008, "vocab_size": 100352,
    "max_position_embeddings": 4096,
}  # fmt: skip
GRANITE_8B = {
    "model_type": "granite", "hidden_size": 4096, "num_hidden_layers": 40,
    "num_attention_heads": 32, "num_key_value_heads": 8, "intermediate_size": 12800,
    "vocab_size": 49155, "max_position_embeddings": 131072, "tie_word_embeddings": True,
}  # fmt: skip
SMOLLM2 = llama(576, 30, 9, 3, 1536, 49152, tie_word_embeddings=True)
LLAMA_8B = llama(4096, 32, 32, 8, 14336, 128256)
LLAMA_70B = llama(8192, 80, 64, 8, 28672, 128256)

EXACT: dict[str, tuple[dict[str, Any], int]] = {
    "SmolLM2-135M": (SMOLLM2, 134_515_008),
    "Llama-3.1-8B": (LLAMA_8B, 8_030_261_248),
    "Llama-3.1-70B": (LLAMA_70B, 70_553_706_496),
    "Llama-3.2-1B": (llama(2048, 16, 32, 8, 8192, 128256, tie_word_embeddings=True), 1_235_814_400),
    "Mistral-7B-v0.1": ({**llama(4096, 32, 32, 8, 14336, 32000), "model_type": "mistral", "sliding_window": 4096}, 7_241_732_096),
    "Mixtral-8x7B": (MIXTRAL, 46_702_792_704),
    "Qwen2.5-7B": (QWEN25_7B, 7_615_616_512),
    "Qwen1.5-MoE-A2.7B": (QWEN15_MOE, 14_315_784_192),
    "Qwen3-30B-A3B": (QWEN3_30B, 30_532_122_624),
    "gemma-2-9b": (GEMMA2_9B, 9_241_705_984),
    "gemma-3-4b, text": (GEMMA3_4B, 3_880_099_328 + 64 * 2560),  # 64 rows for images
    "gpt-oss-20b": (GPT_OSS_20B, 20_914_757_184),
    "Phi-3-mini": (PHI3_MINI, 3_821_079_552),
    "GPT-2": (GPT2, 124_439_808),
    "Pythia-6.9B": (PYTHIA_69B, 6_857_302_016),
    "BLOOM": (BLOOM, 176_247_271_424),
    "DeepSeek-V2-Lite": (DEEPSEEK_V2_LITE, 15_706_484_224),
    "OPT-350m": (OPT_350M, 331_196_416),
    "granite-3.1-8b": (GRANITE_8B, 8_170_848_256),
    "OLMo-2-7B": (OLMO2_7B, 7_298_617_344),
}  # fmt: skip

# name: config, billions in all, billions that a token uses, as their authors round them; how
# far off rounding, and what they count of sight, MTP and such, may put the first; the second
ROUNDED: dict[str, tuple[dict[str, Any], float, float, float, float]] = {
    "Mixtral-8x7B": (MIXTRAL, 46.7, 12.9, 0.05, 0.05),
    "Qwen3-30B-A3B": (QWEN3_30B, 30.5, 3.3, 0.05, 0.05),
    "Qwen1.5-MoE-A2.7B": (QWEN15_MOE, 14.3, 2.7, 0.05, 0.05),
    "DeepSeek-V2-Lite": (DEEPSEEK_V2_LITE, 15.7, 2.4, 0.05, 0.05),
    "DeepSeek-V3": (DEEPSEEK_V3, 671, 37, 0.5, 0.5),
    "Qwen3-Next-80B-A3B": (QWEN3_NEXT, 80, 3, 0.5, 0.5),
    "Llama-4-Scout": (LLAMA4_SCOUT, 109, 17, 1.5, 0.5),  # 0.9 of them see
    "Llama-4-Maverick": (LLAMA4_MAVERICK, 400, 17, 2, 0.5),
    "GLM-4.5": (GLM_45, 355, 32, 4, 0.5),  # with a layer of MTP
}  # fmt: skip
