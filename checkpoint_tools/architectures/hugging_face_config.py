"""config.json of transformers to our ModelConfig and back: what Llama-like families have in common."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from checkpoint_tools.architectures.table import Dimensions
from foundation.errors import RequestError
from model.config import ModelConfig, RopeScaling

Config = Mapping[str, Any]
Fields = Callable[[Config], dict[str, Any]]

ROPE_FIELDS = {
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    "yarn": (
        "factor",
        "original_max_position_embeddings",
        "beta_fast",
        "beta_slow",
        "mscale",
        "mscale_all_dim",
        "attention_factor",
    ),
}
"""What each kind of rope scaling is described by, under the same names in both configs."""
WHOLE_NUMBERS = ("original_max_position_embeddings",)


def refuse(key: str, value: Any, rule: str) -> RequestError:
    """What says that a model is none that is converted."""
    return RequestError(
        f"config.json has {key} = {value!r}",
        rule=rule,
        cure="convert another model, or correct config.json where it is wrong about its weights",
    )


def refuse_quantised(config: Config) -> None:
    """Raise where the weights are not plain numbers."""
    if config.get("quantization_config") is not None:
        raise refuse("quantization_config", config["quantization_config"], "weights are not quantised")


def model_of(
    more: Fields = lambda _: {}, *, head_dim_default: int | None = None, rotary_base_default: float = 10000.0
) -> Callable[[Config], ModelConfig]:
    """What reads config.json of a family.

    Args:
        more: the family's own fields of ModelConfig.
        head_dim_default: what the family's class means where `head_dim` is not given; None: hidden / heads.
        rotary_base_default: likewise, where no `rope_theta` is.
    """

    def read(config: Config) -> ModelConfig:
        _refuse_what_the_decoder_lacks(config)
        heads, hidden = config["num_attention_heads"], config["hidden_size"]
        width = config.get("head_dim", head_dim_default)
        rope = _rope(config)
        return ModelConfig.model_validate(
            {
                "num_layers": config["num_hidden_layers"],
                "hidden_size": hidden,
                "ffn_hidden_size": config["intermediate_size"],
                "num_attention_heads": heads,
                "num_query_groups": config.get("num_key_value_heads") or heads,
                "kv_channels": None if width is None or width * heads == hidden else width,
                "vocab_size": config["vocab_size"],
                "max_position_embeddings": config["max_position_embeddings"],
                "rotary_base": float(rope.get("rope_theta") or config.get("rope_theta") or rotary_base_default),
                "rope_scaling": _scaling(rope, config),
                "layernorm_epsilon": float(config["rms_norm_eps"]),
                "share_embeddings_and_output_weights": bool(config.get("tie_word_embeddings", False)),
                **more(config),
            }
        )

    return read


def dimensions_of(read: Callable[[Config], ModelConfig]) -> Callable[[Config], Dimensions]:
    """The dimensions of a family whose config `read` reads."""
    return lambda config: Dimensions.of(read(config))


def config_of(
    model_type: str, causal_lm: str, more: Callable[[ModelConfig], dict[str, Any]] = lambda _: {}
) -> Callable[[ModelConfig], dict[str, Any]]:
    """What writes config.json of a family; transformers 4 and 5 both read it."""

    def write(model: ModelConfig) -> dict[str, Any]:
        scaling = _rope_parameters(model.rope_scaling)
        return {
            "architectures": [causal_lm],
            "model_type": model_type,
            "num_hidden_layers": model.num_layers,
            "hidden_size": model.hidden_size,
            "intermediate_size": model.ffn_hidden_size,
            "num_attention_heads": model.num_attention_heads,
            "num_key_value_heads": model.query_groups,
            "head_dim": model.head_width,
            "vocab_size": model.vocab_size,
            "max_position_embeddings": model.max_position_embeddings,
            "rms_norm_eps": model.layernorm_epsilon,
            "hidden_act": "silu",
            "attention_bias": False,
            "attention_dropout": 0.0,
            "initializer_range": model.init_method_std,
            "tie_word_embeddings": model.share_embeddings_and_output_weights,
            "use_cache": True,
            "bos_token_id": None,  # families have numbers of their own here, which are other tokens of this model
            "eos_token_id": None,
            "rope_theta": model.rotary_base,
            "rope_scaling": scaling,
            "rope_parameters": {"rope_theta": model.rotary_base, **(scaling or {"rope_type": "default"})},
            **more(model),
        }

    return write


def sliding_window(config: Config, default: int | None = None) -> dict[str, Any]:
    """The window of families in which it is null or holds for all layers.

    Args:
        default: what the family's class means where nothing is given, which is not null.
    """
    return {"window_size": config.get("sliding_window", default)}


def window_of_all_layers(config: Config) -> dict[str, Any]:
    """The window of families that may give it to some layers only, which the decoder cannot."""
    if not config.get("use_sliding_window", False) or config.get("sliding_window") is None:
        return {"window_size": None}
    layers = config["num_hidden_layers"]
    kinds = config.get("layer_types")
    if kinds is None:
        full = min(config.get("max_window_layers", layers), layers)
        kinds = [kind for kind, count in (("full_attention", full), ("sliding_attention", layers - full)) if count > 0]
    if set(kinds) == {"full_attention"}:
        return {"window_size": None}
    if set(kinds) != {"sliding_attention"}:
        raise refuse("layer_types", kinds, "all layers have a sliding window or none has")
    return {"window_size": config["sliding_window"]}


def window_fields(model: ModelConfig) -> dict[str, Any]:
    """The inverse of `window_of_all_layers`."""
    sliding = model.window_size is not None
    return {
        "use_sliding_window": sliding,
        "sliding_window": model.window_size,
        "max_window_layers": 0 if sliding else model.num_layers,
        "layer_types": ["sliding_attention" if sliding else "full_attention"] * model.num_layers,
    }


def _refuse_what_the_decoder_lacks(config: Config) -> None:
    refuse_quantised(config)
    activation = config.get("hidden_act", "silu")
    if activation not in ("silu", "swish"):
        raise refuse("hidden_act", activation, "is silu: the decoder has SwiGLU only")
    for key in ("attention_bias", "mlp_bias"):
        if config.get(key):
            raise refuse(key, True, "the decoder has biases in query, key and value of Qwen 2 only")
    if config.get("partial_rotary_factor", 1.0) != 1.0:
        raise refuse("partial_rotary_factor", config["partial_rotary_factor"], "is 1: whole heads are rotated")


def _rope(config: Config) -> Mapping[str, Any]:
    """transformers 5 keeps base and scaling in `rope_parameters`, 4 the scaling in `rope_scaling`."""
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if not isinstance(rope, Mapping):
        raise refuse("rope_parameters", rope, "is a mapping")
    if "full_attention" in rope or "sliding_attention" in rope:
        raise refuse("rope_parameters", rope, "is the same for all layers")
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        raise refuse("partial_rotary_factor", rope["partial_rotary_factor"], "is 1: whole heads are rotated")
    return rope


def _scaling(rope: Mapping[str, Any], config: Config) -> dict[str, Any] | None:
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind in ("default", None):
        return None
    if kind not in ROPE_FIELDS:
        raise refuse("rope_type", kind, f"is one of default, {', '.join(ROPE_FIELDS)}")
    given = {key: rope[key] for key in ROPE_FIELDS[kind] if rope.get(key) is not None}
    fields = {key: int(value) if key in WHOLE_NUMBERS else float(value) for key, value in given.items()}
    if kind == "yarn":  # transformers' own default
        fields.setdefault("original_max_position_embeddings", config["max_position_embeddings"])
    return {"kind": kind, **fields}


def _rope_parameters(scaling: RopeScaling | None) -> dict[str, Any] | None:
    if scaling is None:
        return None
    values = {key: getattr(scaling, key) for key in ROPE_FIELDS[scaling.kind]}
    return {"rope_type": scaling.kind, **{key: value for key, value in values.items() if value is not None}}
