"""The default config of any family, made small by what its fields are called.

Where that does not fit together, `FIELDS_OF` holds what a family needs; `VARIANTS` holds forms beside the default.
"""

import re

from transformers import CONFIG_MAPPING, PreTrainedConfig

VOCABULARY = 300
FIRST_SPECIAL_TOKEN = 256  # special tokens, those of images among them, lie behind all that texts are made of
MAX_LAYERS = 4

# What whole numbers become, by the first pattern that a field's name fits.
SIZES = [
    (r".*vocab_size.*|num_embeddings", VOCABULARY),
    (r"qk_head_dim", 32),
    (r"qk_(rope|nope)_head_dim|v_head_dim", 16),
    (r"index_head_dim", 32),
    (r"(linear_)?num_value_heads", 4),
    (r"mamba_(n|num)_heads", 8),
    (r"hidden_size_global", 64),
    (r"attention_hidden_size", 128),
    (r"attention_head_dim", 32),
    (r"linear_num_key_heads", 2),
    (r"q_lora_rank", 32),
    (r".*_rank", 16),
    (r"(.*_)?(head_dim|d_head|dim_head|d_kv|kv_channels|key_head_dim|value_head_dim)|mamba_headdim", 16),
    (r"rotary_dim", 8),
    (r"(.*_)?(num_attention_heads|attention_heads|n_heads?|num_heads|index_n_heads)", 4),
    (r"(moe_|num_|n_)*(local_|routed_)?(num_)?experts", 4),
    (r"(num_|moe_)*(experts_per_tok(en)?|top_?k|k)", 2),
    (r"top_k_experts", 2),
    (r"hidden_size_per_layer_input", 8),
    (r"n_groups?|num_expert_group", 2),
    (r"topk_group|(moe_|num_|n_)*shared_experts", 1),
    (r"first_k_dense_replace|num_dense_layers", 1),
    (r"(.*_)?(ffn_dim|d_ff|dff|dim_ff|n_inner|ffn_hidden_size|mlp_dim|intermediate_size)(_mlp)?", 96),
    (r"(.*_)?(hidden_size|hidden_dim|d_model|n_embd|embed_dim|embedding_size|projection_dim|output_dim|dim)", 64),
    (r"(.*_)?(max_position_embeddings|n_positions|n_ctx|max_seq_len|max_(source|target)_positions|model_max_length)",
     2048),
    (r"query_pre_attn_scalar", 16),
    (r"sliding_window|swa_window_size|sliding_window_size|attention_chunk_size|local_attention(_window_len)?", 16),
    (r"index_topk", 16),
    (r"(mamba_)?(d_state|state_size)|ssm_state_size", 16),
    (r"(mamba_)?chunk_size|mlstm_chunk_size", 16),
    (r"image_size|crop_size", 32),
    (r"patch_size", 8),
]  # fmt: skip
NUM_LAYERS = r"(num_|n_|encoder_|decoder_|conf_num_)*(hidden_)?(layers?|blocks)|depth|layers"
PLACES = r"(.*_)?(idxs|layer_ids|moe_layers|mlp_only_layers|cross_attention_layers|rope_scaling_layers|layer_indices)"
NEEDED = {"head_dim": 16, "num_key_value_heads": 4, "num_experts_per_tok": 2, "n_routed_experts": 4}  # if None
KV_HEADS = r"(.*_)?(num_key_value_heads|n_heads_kv|kv_n_heads|num_kv_heads)"
SPECIAL_TOKENS = r"(.*_)?token_(id|ids|index)"

_COMPASS = {"layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
            "rope_parameters": {kind: {"rope_type": "default", "rope_theta": 1e4}
                                for kind in ("sliding_attention", "full_attention")}}  # fmt: skip

# What single families need beside: fields of the config, or of the text's config within it.
FIELDS_OF: dict[str, dict[str, object]] = {
    "bamba": {"attn_layer_indices": [1]},
    "blt": {"encoder_hash_byte_group_vocab": 128},
    "cohere_compass": _COMPASS,
    "cohere_compass_text": _COMPASS,
    "cosmos3_edge": {"rope_parameters": {"mrope_section": [2, 3, 3]}},
    "deepseek_ocr2": {"mlp_layer_types": ["dense", "sparse", "sparse"]},
    "ernie4_5_vl_moe": {"rope_parameters": {"mrope_section": [3, 3, 2]}},
    "hunyuan_vl": {"rope_parameters": {"mrope_section": [2, 2, 2, 2]}},
    "mistral4": {"head_dim": 32},
    "molmo2": {"adapter_config": {"vision_feature_layer": [2, 1]}},
    "step3p7": {"sliding_window": 16},
    "dbrx": {"attn_config": {"rope_theta": 1e4, "clip_qkv": 8.0}},
    "dots1": {"n_shared_experts": 1},
    "dots3_note": {"head_dim": 40, "audio_config": {"adapter_input_size": 64}},
    "dots3_note_text": {"head_dim": 40},
    "fun_asr_nano": {"adaptor_config": {"intermediate_size": 16}},
    "falcon_h1": {"mamba_d_ssm": 128},
    "gemma3n": {"num_kv_shared_layers": 2},
    "gemma3n_text": {"num_kv_shared_layers": 2},
    "glm4v_moe": {"rope_parameters": {"mrope_section": [2, 1, 1]}},
    "granitemoehybrid": {"layer_types": ["linear_attention", "full_attention", "linear_attention"]},
    "hrm_text": {"num_layers_per_stack": 2, "num_hidden_layers": 16},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "lfm2_moe": {"layer_types": ["conv", "full_attention", "conv"]},
    "longcat_flash": {"zero_expert_num": 2},
    "mamba2": {"num_heads": 8},
    "qwen4_exp": {"indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": 16, "indexer_budget": 16,
                  "indexer_compress_ratio": 4, "hc_lowrank": 8},
    "qwen4_exp_text": {"indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": 16, "indexer_budget": 16,
                       "indexer_compress_ratio": 4, "hc_lowrank": 8},
    "recurrent_gemma": {"lru_width": 64},
    "reformer": {"is_decoder": True, "axial_pos_shape": [32, 64], "axial_pos_embds_dim": [32, 32]},
    "rwkv": {"attention_hidden_size": 64},
    "xlstm": {"qk_dim_factor": 1.0},
    "xmod": {"default_language": "en_XX"},
    "zamba": {"num_hidden_layers": 4, "layers_block_type": ["linear_attention", "hybrid"] * 2},
    "zamba2": {"num_hidden_layers": 4, "layers_block_type": ["linear_attention", "hybrid"] * 2,
               "hybrid_layer_ids": [1, 3]},
} | {name: {"rope_parameters": {"mrope_section": [2, 3, 3]}}
     for name in ("glm46v", "glm4v", "glm_ocr", "glmga", "paddleocr_vl", "qwen2_vl", "qwen2_5_vl",
                  "qwen2_5_omni_thinker")}  # fmt: skip

_SHARED_KEYS = {"num_hidden_layers": 6, "num_kv_shared_layers": 2, "per_layer_config": {"05": {"head_dim": 32}},
                "layer_types": ["sliding_attention", "sliding_attention", "full_attention"] * 2}  # fmt: skip
_LONGER = {"factor": 4.0, "original_max_position_embeddings": 32}

# Forms of a family that its default config does not show, by a name after the family's.
VARIANTS: dict[str, dict[str, object]] = {
    "gemma4, no inputs per layer": {"hidden_size_per_layer_input": 0, "pad_token_id": 0},
    "gemma4_text, no inputs per layer": {"hidden_size_per_layer_input": 0},
    "gemma4_text, shared keys": _SHARED_KEYS,
    "gemma4_unified_text, shared keys": _SHARED_KEYS,
    "gemma4_text, experts": {"enable_moe_block": True, "num_experts": 4, "top_k_experts": 2,
                             "moe_intermediate_size": 32},
    "deepseek_v2, dense": {"first_k_dense_replace": 3, "mlp_layer_types": ["dense"] * 3},
    "deepseek_v3, dense": {"first_k_dense_replace": 3, "mlp_layer_types": ["dense"] * 3},
    "deepseek_v32, dense": {"first_k_dense_replace": 3, "mlp_layer_types": ["dense"] * 3},
    "glm_moe_dsa, dense": {"first_k_dense_replace": 3, "mlp_layer_types": ["dense"] * 3},
    "llama4_text, dense": {"moe_layers": []},
    "granitemoehybrid, dense": {"num_local_experts": 0},
    "jamba, dense": {"expert_layer_period": 9, "expert_layer_offset": 8},
    "nemotron_h, dense": {"layers_block_type": ["linear_attention", "mlp", "full_attention", "mlp"]},
    "qwen3_next, dense": {"mlp_only_layers": [0, 1, 2]},
    "kimi_linear, dense": {"mlp_layer_types": ["dense"] * 4},
    "bailing_hybrid, dense": {"mlp_layer_types": ["dense"] * 4},
    "lfm2, convolutions": {"layer_types": ["conv", "full_attention", "conv"]},
    "llama4, wrapper": {"moe_layers": []},
    "mllama, wrapper": {},
    "qwen3_5, wrapper": {},
    "qwen3_5_moe, wrapper": {},
    "qwen2, window": {"use_sliding_window": True, "sliding_window": 16,
                      "layer_types": ["full_attention", "sliding_attention", "sliding_attention"]},
    "llama, tied": {"tie_word_embeddings": True},
    "gemma3_text, untied": {"tie_word_embeddings": False},
    "gemma3, untied": {"tie_word_embeddings": False},
    "llama, rope linear": {"rope_parameters": {"rope_type": "linear"} | _LONGER},
    "llama, rope dynamic": {"rope_parameters": {"rope_type": "dynamic"} | _LONGER},
    "llama, rope yarn": {"rope_parameters": {"rope_type": "yarn"} | _LONGER},
    "llama, rope llama3": {"rope_parameters": {"rope_type": "llama3", "low_freq_factor": 1.0,
                                               "high_freq_factor": 4.0} | _LONGER},
    "llama, rope longrope": {"rope_parameters": {"rope_type": "longrope", "short_factor": [1.0, 1.1] * 4,
                                                 "long_factor": [1.5, 2.0] * 4} | _LONGER},
    "opt, narrow embedding": {"word_embed_proj_dim": 32, "do_layer_norm_before": False},
    "falcon, new": {"new_decoder_architecture": True, "num_kv_heads": 2},
    "falcon, alibi": {"alibi": True},
    "gpt_neox, sequential": {"use_parallel_residual": False},
    "qwen4_exp_text, inputs per layer": {"ple_layer_ids": [1], "number_of_conv_states": 3, "eos_token_id": 256,
                                         "ngram_vocab_size_base": 100, "split_ngram_parts": 2, "heads_per_ngram": 2},
}  # fmt: skip


def tiny_config(model_type: str, **fields: object) -> PreTrainedConfig:
    """A config of the family with few layers, 64 wide.

    Args:
        fields: further fields, in place of those chosen here.
    """
    config_class = CONFIG_MAPPING[model_type]
    small = _shrunk(config_class().to_dict(), {})
    _put(small, FIELDS_OF.get(model_type, {}) | fields)
    return config_class.from_dict(small)


def _put(config: dict, fields: dict[str, object]) -> None:
    """Set fields where the config, or the text's config within it, has them; a dict's items beside those it has."""
    text = config.get("text_config")
    for name, value in fields.items():
        owner = text if isinstance(text, dict) and name in text else config
        merged = isinstance(value, dict) and isinstance(owner.get(name), dict)
        owner[name] = owner[name] | value if merged else value


def _shrunk(config: dict, special_tokens: dict[int, int]) -> dict:
    """The same config with small numbers, lists of layers cut to those that are kept, and so all configs within it."""
    depths = [value for name, value in config.items() if _is_size(value) and re.fullmatch(NUM_LAYERS, name)]
    depth = max(depths, default=0)
    kept = _kept_layers(config, depth)
    small = {}
    for name, value in config.items():
        if name == "per_layer_config":
            small[name] = _per_layer(value, config, kept)
        elif isinstance(value, dict) and all(isinstance(key, str) for key in value):
            small[name] = _shrunk(value, special_tokens)
        elif value is None:
            small[name] = NEEDED.get(name)
        elif re.fullmatch(SPECIAL_TOKENS, name):
            small[name] = _special(value, special_tokens)
        elif isinstance(value, list | tuple):
            small[name] = _cut(name, list(value), depth, kept)
        elif _is_size(value) and value > 0:
            small[name] = _small(name, value, config, len(kept))
        else:
            small[name] = value
    return small


def _is_size(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _kept_layers(config: dict, depth: int) -> list[int]:
    """Places of the layers that stay: the first of each kind, then others from the front; `MAX_LAYERS` at most."""
    kinds = [
        tuple(str(value[layer]) if len(value) == depth and not re.fullmatch(PLACES, name) else layer in value
              for name, value in config.items()
              if isinstance(value, list | tuple) and (len(value) == depth or re.fullmatch(PLACES, name)))
        for layer in range(depth)
    ]  # fmt: skip
    firsts = [layer for layer in range(depth) if kinds[layer] not in kinds[:layer]]
    others = [layer for layer in range(depth) if layer not in firsts]
    num = min(depth, max(3, min(len(firsts) + 1, MAX_LAYERS)))
    return sorted((firsts + others)[:num])


def _per_layer(configs: dict[str, dict], config: dict, kept: list[int]) -> dict[str, dict]:
    """Fields that single layers have of their own, as much larger or smaller than the others' as they were."""
    return {
        f"{place:02d}": {
            name: _small(name, config[name], config, 0) * value // config[name] for name, value in configs[key].items()
        }
        for place, layer in enumerate(kept)
        for key in configs
        if int(key) == layer
    }


def _cut(name: str, values: list, depth: int, kept: list[int]) -> list:
    if re.fullmatch(PLACES, name):
        return [place for place, layer in enumerate(kept) if layer in values]
    if depth and len(values) == depth:
        values = [values[layer] for layer in kept]
    return [_small(name, value, {}, len(kept)) if _is_size(value) and value > 0 else value for value in values]


def _small(name: str, value: int, config: dict, num_layers: int) -> int:
    if re.fullmatch(NUM_LAYERS, name):
        return num_layers
    if re.fullmatch(KV_HEADS, name):
        heads = [size for other, size in config.items() if re.fullmatch(r"(num_attention|num|n)_heads?", other)]
        return 1 if value == 1 else 4 if value in heads else 2
    size = next((size for pattern, size in SIZES if re.fullmatch(pattern, name)), value)
    return min(size, value) if size <= 4 else size


def _special(value: object, special_tokens: dict[int, int]) -> object:
    if isinstance(value, list | tuple):
        return [_special(token, special_tokens) for token in value]
    if value is None or not _is_size(value) or value < 0:
        return value
    free = FIRST_SPECIAL_TOKEN + len(special_tokens)
    return special_tokens.setdefault(value, min(free, VOCABULARY - 1))
