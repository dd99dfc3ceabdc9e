"""Megatron-LM's `args`, which its checkpoints hold, to our ModelConfig."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from checkpoint_tools.architectures.identity import Identity
from checkpoint_tools.dtypes import DType
from checkpoint_tools.formats.pickle_writer import Named
from checkpoint_tools.formats.rank_cuts import RankGrid
from foundation.errors import OrthantError, RequestError
from model.config import ModelConfig

REQUIRED = {
    "swiglu": (True, "the decoder has SwiGLU only"),
    "add_bias_linear": (False, "the decoder has no biases but those of query, key and value"),
    "normalization": ("RMSNorm", "the decoder has RMSNorm only"),
    "position_embedding_type": ("rope", "the decoder has rotary embeddings only"),
}

USUAL: dict[str, tuple[Any, ...]] = {
    "apply_layernorm_1p": (False,),
    "layernorm_zero_centered_gamma": (False,),
    "apply_residual_connection_post_layernorm": (False,),
    "rotary_interleaved": (False,),
    "rotary_percent": (1.0,),
    "rotary_seq_len_interpolation_factor": (None, 1),
    "no_rope_freq": (None,),
    "window_attn_skip_freq": (None,),
    "softmax_scale": (None,),
    "softmax_type": ("vanilla",),
    "qk_l2_norm": (False,),
    "glu_linear_offset": (0.0,),
    "activation_func_clamp_value": (None,),
    "moe_router_score_function": ("softmax",),
    "moe_router_topk_scaling_factor": (None, 1.0),
    "moe_router_num_groups": (None, 1),
    "moe_router_group_topk": (None,),
    "moe_apply_probs_on_input": (False,),
}
"""What changes the function and shows in no name or shape of a weight: the values that the decoder has."""

LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
"""What Megatron-LM's rope scaling always has."""


def identity_from_arguments(arguments: Mapping[str, Any], vocab_size: int | None, where: Path) -> Identity:
    """Whose weights, from the arguments of the training that wrote them.

    Args:
        vocab_size: the true vocabulary where the arguments do not say; they mostly hold the padded one.

    Raises:
        RequestError: an architecture that is not converted, or an unknown vocabulary.
    """
    for name, (wanted, rule) in REQUIRED.items():
        if arguments.get(name, wanted) != wanted:
            raise RequestError(
                f"the checkpoint was trained with {name} = {arguments[name]!r}",
                where=str(where),
                rule=f"is {wanted!r}: {rule}",
                cure="convert a Llama-family model",
            )
    for name, usual in USUAL.items():
        if name in arguments and not any(arguments[name] == value for value in usual):
            raise RequestError(
                f"the checkpoint was trained with {name} = {arguments[name]!r}",
                where=str(where),
                rule=f"is {' or '.join(map(repr, usual))}: with another value its weights compute something else",
                cure="convert a model that was trained without it",
            )
    vocabulary = vocab_size or arguments.get("vocab_size")
    if not isinstance(vocabulary, int):
        raise RequestError(
            "the checkpoint does not say its true vocabulary, only the padded one: "
            f"{arguments.get('padded_vocab_size')}",
            where=str(where),
            rule="rows that pad the vocabulary are never exported",
            cure="--vocab-size N, the tokenizer's",
        )
    try:
        return Identity.from_model(ModelConfig.model_validate(_fields(arguments, vocabulary)))
    except (OrthantError, ValidationError, LookupError, TypeError, ValueError, OverflowError) as error:
        raise RequestError(
            f"the checkpoint's arguments describe no model that is converted: {error}",
            where=str(where),
            cure="convert a Llama-family model",
        ) from error


def _fields(arguments: Mapping[str, Any], vocab_size: int) -> dict[str, Any]:
    heads = arguments["num_attention_heads"]
    grouped = arguments.get("group_query_attention", arguments.get("num_query_groups") is not None)
    experts, width = arguments.get("num_experts"), arguments.get("kv_channels")
    fields = {
        "num_layers": arguments["num_layers"],
        "hidden_size": arguments["hidden_size"],
        "ffn_hidden_size": arguments["ffn_hidden_size"],
        "num_attention_heads": heads,
        "num_query_groups": arguments.get("num_query_groups") if grouped else heads,
        "kv_channels": None if width is None or width * heads == arguments["hidden_size"] else width,
        "vocab_size": vocab_size,
        "max_position_embeddings": arguments.get("max_position_embeddings") or arguments["seq_length"],
        "rotary_base": float(arguments.get("rotary_base", 10000)),
        "rope_scaling": _rope_scaling(arguments),
        "layernorm_epsilon": float(arguments.get("norm_epsilon", arguments.get("layernorm_epsilon", 1e-5))),
        "qk_layernorm": bool(arguments.get("qk_layernorm", False)),
        "add_qkv_bias": bool(arguments.get("add_qkv_bias", False)),
        "share_embeddings_and_output_weights": not arguments.get("untie_embeddings_and_output_weights", False),
        "window_size": _window(arguments),
    }
    if experts:
        fields |= {
            "num_experts": experts,
            "moe_router_topk": arguments.get("moe_router_topk", 2),
            "moe_ffn_hidden_size": arguments.get("moe_ffn_hidden_size"),
            "moe_router_pre_softmax": bool(arguments.get("moe_router_pre_softmax", False)),
        }
    return fields


def _rope_scaling(arguments: Mapping[str, Any]) -> dict[str, Any] | None:
    """Megatron-LM knows Llama 3's scaling only, with its published factors but the first."""
    if not arguments.get("use_rope_scaling"):
        return None
    return {
        "kind": "llama3",
        "factor": float(arguments.get("rope_scaling_factor", 8.0)),
        **LLAMA3,
    }


def _window(arguments: Mapping[str, Any]) -> int | None:
    window = arguments.get("window_size")
    return window[0] + 1 if isinstance(window, tuple | list) and window[0] >= 0 else None


def arguments_of(identity: Identity, grid: RankGrid, padded_vocab_size: int, dtype: DType) -> dict[str, Any]:
    """Megatron-LM's arguments for a model, as `--use-checkpoint-args` takes them from rank files."""
    sizes = identity.dimensions
    arguments: dict[str, Any] = {
        "num_layers": sizes.num_layers,
        "hidden_size": sizes.hidden,
        "ffn_hidden_size": sizes.ffn,
        "num_attention_heads": sizes.heads,
        "group_query_attention": sizes.groups != sizes.heads,
        "num_query_groups": sizes.groups,
        "kv_channels": sizes.head,
        "vocab_size": sizes.vocab,
        "padded_vocab_size": padded_vocab_size,
        "untie_embeddings_and_output_weights": not sizes.tied,
        "tensor_model_parallel_size": grid.tp,
        "pipeline_model_parallel_size": grid.pp,
        "virtual_pipeline_model_parallel_size": grid.vpp if grid.vpp > 1 else None,
        "num_layers_per_virtual_pipeline_stage": sizes.num_layers // (grid.pp * grid.vpp) if grid.vpp > 1 else None,
        "expert_model_parallel_size": grid.ep,
        "expert_tensor_parallel_size": grid.tp,
        "num_experts": sizes.experts or None,
        "transformer_impl": "local" if grid.local_names else "transformer_engine",
        "params_dtype": Named("torch", dtype.torch),
        "bf16": dtype.torch == "bfloat16",
        "fp16": dtype.torch == "float16",
        "consumed_train_samples": 0,
        "consumed_valid_samples": 0,
        "use_mcore_models": True,
        "swiglu": True,
        "add_bias_linear": False,
        "normalization": "RMSNorm",
        "position_embedding_type": "rope",
        "use_rotary_position_embeddings": True,
        "add_position_embedding": False,
        "rotary_percent": 1.0,
        "rotary_interleaved": False,
        "apply_query_key_layer_scaling": False,
        "apply_layernorm_1p": False,
        "squared_relu": False,
    }
    return arguments if identity.model is None else arguments | _of_model(identity.model)


def unsaid(identity: Identity) -> str | None:
    """What the arguments have no word for, None where they say all: rank files are then read as another model."""
    model = identity.model
    if model is None:
        return f"what makes a {identity.architecture.name} of its weights"
    scaling = model.rope_scaling
    if scaling is None:
        return None
    if scaling.kind != "llama3":
        return f"rope_scaling of kind {scaling.kind}"
    wrong = [f"{key} = {getattr(scaling, key)}" for key, value in LLAMA3.items() if getattr(scaling, key) != value]
    return f"rope_scaling with {', '.join(wrong)}" if wrong else None


def _of_model(model: ModelConfig) -> dict[str, Any]:
    scaling = model.rope_scaling
    window = model.window_size
    return {
        "ffn_hidden_size": model.ffn_hidden_size,
        "max_position_embeddings": model.max_position_embeddings,
        "seq_length": model.max_position_embeddings,
        "rotary_base": int(model.rotary_base) if model.rotary_base.is_integer() else model.rotary_base,
        "use_rope_scaling": scaling is not None and scaling.kind == "llama3",
        "rope_scaling_factor": scaling.factor if scaling is not None else 8.0,
        "norm_epsilon": model.layernorm_epsilon,
        "qk_layernorm": model.qk_layernorm,
        "add_qkv_bias": model.add_qkv_bias,
        "window_size": None if window is None else (window - 1, 0),
        "moe_router_topk": model.moe_router_topk,
        "moe_ffn_hidden_size": model.moe_ffn_hidden_size,
        "moe_router_pre_softmax": model.moe_router_pre_softmax,
        "moe_grouped_gemm": False,
    }
