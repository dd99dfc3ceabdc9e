"""Published architectures by name: the fields of `ModelConfig` that `model.preset` fills in.

Figures are those of the models' own published config files. `vocab_size` is the number of rows that the published
embedding has. The weight of the load-balancing loss is Megatron-LM's usual one, because the published one weighs
another sum: over all layers at once, and over a token's choices without dividing by their number.
The demo models are ours: Llama-style, small enough for a laptop's CPU.
"""

from __future__ import annotations

import difflib
from types import MappingProxyType
from typing import Any

from foundation.errors import ConfigError


def _llama(layers: int, hidden: int, ffn: int, heads: int, groups: int, **more: Any) -> dict[str, Any]:
    return {
        "num_layers": layers,
        "hidden_size": hidden,
        "ffn_hidden_size": ffn,
        "num_attention_heads": heads,
        "num_query_groups": groups,
        "layernorm_epsilon": 1e-5,
        **more,
    }


def _llama2(layers: int, hidden: int, ffn: int, heads: int, groups: int) -> dict[str, Any]:
    sizes = {"vocab_size": 32000, "max_position_embeddings": 4096, "rotary_base": 10000.0}
    return _llama(layers, hidden, ffn, heads, groups, **sizes)


def _llama3(layers: int, hidden: int, ffn: int, heads: int) -> dict[str, Any]:
    sizes = {"vocab_size": 128256, "max_position_embeddings": 8192, "rotary_base": 500000.0}
    return _llama(layers, hidden, ffn, heads, 8, **sizes)


def _llama3_1(layers: int, hidden: int, ffn: int, heads: int) -> dict[str, Any]:
    scaling = {
        "kind": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    return _llama3(layers, hidden, ffn, heads) | {"max_position_embeddings": 131072, "rope_scaling": scaling}


def _mistral(vocab: int, base: float, window: int | None) -> dict[str, Any]:
    sizes = {"vocab_size": vocab, "max_position_embeddings": 32768, "rotary_base": base, "window_size": window}
    return _llama(32, 4096, 14336, 32, 8, **sizes)


def _qwen2_5(layers: int, hidden: int, ffn: int, heads: int, groups: int, **more: Any) -> dict[str, Any]:
    return {
        **_llama(layers, hidden, ffn, heads, groups),
        "layernorm_epsilon": 1e-6,
        "vocab_size": 152064,
        "max_position_embeddings": 131072,
        "rotary_base": 1000000.0,
        "add_qkv_bias": True,
        **more,
    }


def _qwen3(layers: int, hidden: int, ffn: int, heads: int, **more: Any) -> dict[str, Any]:
    return {
        **_llama(layers, hidden, ffn, heads, 8),
        "kv_channels": 128,
        "layernorm_epsilon": 1e-6,
        "vocab_size": 151936,
        "max_position_embeddings": 40960,
        "rotary_base": 1000000.0,
        "qk_layernorm": True,
        **more,
    }


def _mixtral(layers: int, hidden: int, ffn: int, heads: int, vocab: int, positions: int) -> dict[str, Any]:
    return {
        **_llama(layers, hidden, ffn, heads, 8),
        "vocab_size": vocab,
        "max_position_embeddings": positions,
        "rotary_base": 1000000.0,
        "num_experts": 8,
        "moe_router_topk": 2,
        "moe_aux_loss_coeff": 1e-2,
    }


def _qwen3_moe(layers: int, hidden: int, ffn: int, heads: int, groups: int, expert: int) -> dict[str, Any]:
    return {
        **_qwen3(layers, hidden, ffn, heads),
        "num_query_groups": groups,
        "num_experts": 128,
        "moe_router_topk": 8,
        "moe_ffn_hidden_size": expert,
        "moe_aux_loss_coeff": 1e-3,
    }


def _demo(layers: int, hidden: int, ffn: int, heads: int, groups: int, positions: int) -> dict[str, Any]:
    # No vocabulary of their own: a demo model takes its tokenizer's.
    return _llama(layers, hidden, ffn, heads, groups, max_position_embeddings=positions, rotary_base=10000.0)


PRESETS: MappingProxyType[str, dict[str, Any]] = MappingProxyType(
    {
        "demo_3m": _demo(4, 192, 512, 6, 2, 512),
        "demo_20m": _demo(8, 384, 1024, 6, 2, 1024),
        "demo_110m": _demo(12, 768, 2304, 12, 4, 2048),
        "llama2_7b": _llama2(32, 4096, 11008, 32, 32),
        "llama2_13b": _llama2(40, 5120, 13824, 40, 40),
        "llama2_70b": _llama2(80, 8192, 28672, 64, 8),
        "llama3_8b": _llama3(32, 4096, 14336, 32),
        "llama3_70b": _llama3(80, 8192, 28672, 64),
        "llama3_1_8b": _llama3_1(32, 4096, 14336, 32),
        "llama3_1_70b": _llama3_1(80, 8192, 28672, 64),
        "llama3_1_405b": _llama3_1(126, 16384, 53248, 128),
        "mistral_7b_v0_1": _mistral(32000, 10000.0, 4096),
        "mistral_7b_v0_3": _mistral(32768, 1000000.0, None),
        "qwen2_5_0_5b": _qwen2_5(
            24, 896, 4864, 14, 2,
            vocab_size=151936, max_position_embeddings=32768, share_embeddings_and_output_weights=True,
        ),
        "qwen2_5_1_5b": _qwen2_5(
            28, 1536, 8960, 12, 2, vocab_size=151936, share_embeddings_and_output_weights=True
        ),
        "qwen2_5_7b": _qwen2_5(28, 3584, 18944, 28, 4),
        "qwen2_5_72b": _qwen2_5(80, 8192, 29568, 64, 8, layernorm_epsilon=1e-5),
        "qwen3_0_6b": _qwen3(28, 1024, 3072, 16, share_embeddings_and_output_weights=True),
        "qwen3_8b": _qwen3(36, 4096, 12288, 32),
        "qwen3_32b": _qwen3(64, 5120, 25600, 64),
        "mixtral_8x7b": _mixtral(32, 4096, 14336, 32, 32000, 32768),
        "mixtral_8x22b": _mixtral(56, 6144, 16384, 48, 32768, 65536),
        "qwen3_30b_a3b": _qwen3_moe(48, 2048, 6144, 32, 4, 768),
        "qwen3_235b_a22b": _qwen3_moe(94, 4096, 12288, 64, 4, 1536),
    }
)  # fmt: skip
"""Architectures by the name that `model.preset` takes."""


DEMO_VOCABULARIES: MappingProxyType[str, int] = MappingProxyType(
    {"demo_3m": 4096, "demo_20m": 8192, "demo_110m": 16384}
)
"""What the demo models, which take their tokenizer's vocabulary, are counted with."""


def preset_fields(name: object) -> dict[str, Any]:
    """The fields of the preset `name`, a fresh copy.

    Raises:
        ConfigError: no such preset; the cure names the nearest ones.
    """
    if not isinstance(name, str) or name not in PRESETS:
        near = difflib.get_close_matches(str(name), PRESETS, n=3, cutoff=0.5)
        raise ConfigError(
            "model.preset",
            name,
            rule=f"is one of {', '.join(PRESETS)}",
            cure=" or ".join(f"model.preset={one}" for one in near or ["llama3_8b"]),
        )
    return dict(PRESETS[name])
