"""From our config sections to megatron-core's TransformerConfig."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.transformer.transformer_config import TransformerConfig
from torch.nn.functional import silu

from model.config import ModelConfig
from model.fp8 import CURRENT, Fp8Config
from model.kernels.bind import bind_to_core
from model.kernels.choice import KernelChoice
from model.rotary import attention_factor
from parallel.layout import ParallelLayout

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp8": torch.bfloat16}
"""Parameters' dtype of each precision; master weights are fp32 in all of them."""


@dataclass(frozen=True)
class Recompute:
    """What the backward pass computes again instead of keeping (Korthikanti et al. 2022).

    Attributes:
        granularity: "none"; "selective": attention's inside; "full": whole layers.
        num_layers: with "full", layers between two kept inputs.
    """

    granularity: str = "none"
    num_layers: int = 1


def core_config(
    model: ModelConfig,
    layout: ParallelLayout,
    precision: str,
    kernels: KernelChoice,
    recompute: Recompute = Recompute(),
    fp8: Fp8Config = CURRENT,
) -> TransformerConfig:
    """The config that core's layers, schedules and gradient reduction read.

    Losses are sums over tokens (`calculate_per_token_loss`): core divides gradients by the number of tokens of the
    whole batch, so micro-batches and replicas with fewer tokens weigh less, at every layout alike.
    """
    dtype = DTYPES[precision]
    config = TransformerConfig(
        **_architecture(model),
        **_grid(layout),
        **_experts(model, layout, kernels),
        **_recompute(recompute),
        **_kernels(model, kernels),
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        **(fp8.core_fields() if precision == "fp8" and kernels.uses_transformer_engine else {}),
        transformer_impl="transformer_engine" if kernels.uses_transformer_engine else "local",
        init_method=_leave_uninitialised,
        output_layer_init_method=_leave_uninitialised,
        embedding_init_method=_leave_uninitialised,
        calculate_per_token_loss=True,
        deallocate_pipeline_outputs=not layout.cuda_graphs,  # a graph writes its outputs to the same place again
        bias_activation_fusion=False,
        bias_dropout_fusion=False,
        masked_softmax_fusion=False,
    )
    _scale_attention_as_yarn(config, model)
    # Core knows of Transformer Engine's FP8 alone: torch's is in the layers that `model.layer_spec` chooses.
    config.torch_fp8 = fp8 if precision == "fp8" and not kernels.uses_transformer_engine else None
    if config.torch_fp8 is not None:
        config.gradient_accumulation_fusion = False  # it would compute weights' gradients in BF16
    return config


def _leave_uninitialised(weight: torch.Tensor) -> torch.Tensor:
    """model/initialization.py fills every parameter by its global name.

    Not `perform_initialization=False`: core marks weights as tensor-parallel only where it initialises them, and a
    weight without the mark is left out of the gradient norm on all tensor-parallel ranks but the first.
    """
    return weight


def _architecture(model: ModelConfig) -> dict[str, Any]:
    return {
        "num_layers": model.num_layers,
        "hidden_size": model.hidden_size,
        "ffn_hidden_size": model.ffn_hidden_size,
        "num_attention_heads": model.num_attention_heads,
        "num_query_groups": model.query_groups,
        "kv_channels": model.head_width,
        "normalization": "RMSNorm",
        "layernorm_epsilon": model.layernorm_epsilon,
        "gated_linear_unit": True,
        "activation_func": silu,
        "add_bias_linear": False,
        "add_qkv_bias": model.add_qkv_bias,
        "qk_layernorm": model.qk_layernorm,
        "window_size": None if model.window_size is None else (model.window_size - 1, 0),
        "hidden_dropout": model.hidden_dropout,
        "attention_dropout": model.attention_dropout,
        "init_method_std": model.init_method_std,
    }


def _experts(model: ModelConfig, layout: ParallelLayout, kernels: KernelChoice) -> dict[str, Any]:
    """Experts are cut along tensor-parallel ranks as everything else is: expert tensor ranks are tensor ranks."""
    if model.num_experts is None:
        return {}
    return {
        "num_moe_experts": model.num_experts,
        "moe_ffn_hidden_size": model.block_width,
        "moe_router_topk": model.moe_router_topk,
        "moe_router_pre_softmax": model.moe_router_pre_softmax,
        "moe_router_load_balancing_type": model.moe_router_load_balancing_type,
        "moe_aux_loss_coeff": model.moe_aux_loss_coeff,
        "moe_z_loss_coeff": model.moe_z_loss_coeff,
        # In bf16, logits that are near each other would round to the same: whom a token goes to would be by chance.
        "moe_router_dtype": "fp32",
        "moe_token_dispatcher_type": model.moe_token_dispatcher_type,
        "moe_grouped_gemm": kernels.uses_transformer_engine,
        "expert_tensor_parallel_size": layout.tp,
    }


def _grid(layout: ParallelLayout) -> dict[str, Any]:
    return {
        "tensor_model_parallel_size": layout.tp,
        "pipeline_model_parallel_size": layout.pp,
        "virtual_pipeline_model_parallel_size": layout.virtual_pipeline_model_parallel_size,
        "context_parallel_size": layout.cp,
        "expert_model_parallel_size": layout.ep,
        "sequence_parallel": layout.sequence_parallel,
        "tp_comm_overlap": layout.tp_comm_overlap,
        "cuda_graph_impl": "local" if layout.cuda_graphs else "none",
        "cuda_graph_scope": [],  # whole layers
        "pipeline_model_parallel_layout": _uneven_stages(layout),
        # Core's default mixes up what two ranks send each other when both hold several chunks, without a word.
        "overlap_p2p_comm": layout.vpp > 1,
        "batch_p2p_comm": layout.vpp == 1,
    }


def _recompute(recompute: Recompute) -> dict[str, Any]:
    if recompute.granularity == "none":
        return {}
    if recompute.granularity == "selective":
        return {"recompute_granularity": "selective", "recompute_modules": ["core_attn"]}
    return {
        "recompute_granularity": "full",
        "recompute_method": "uniform",
        "recompute_num_layers": recompute.num_layers,
    }


def _uneven_stages(layout: ParallelLayout) -> str | None:
    """Core's notation: E embedding, t layer, L loss, stages between bars."""
    if layout.pipeline_layers is None or layout.pp == 1:
        return None
    return "E" + "|".join("t" * layers for layers in layout.pipeline_layers) + "L"


def _kernels(model: ModelConfig, kernels: KernelChoice) -> dict[str, Any]:
    """Core has one name for a provider's own activation, Transformer Engine's or not."""
    bind_to_core(kernels)
    return {
        "use_te_activation_func": True,
        "apply_rope_fusion": attention_factor(model.rope_scaling) == 1.0,  # YaRN's only core's plain one knows
        "gradient_accumulation_fusion": kernels.weight_gradient is not None,
    }


def _scale_attention_as_yarn(config: TransformerConfig, model: ModelConfig) -> None:
    """Core's attention multiplies cosine and sine by a factor that it derives from these attributes where present.

    attention.py: factor = (0.1 * yarn_mscale * ln(scaling) + 1) / (0.1 * yarn_mscale_all_dim * ln(scaling) + 1).
    """
    scaling = model.rope_scaling
    if scaling is None or scaling.kind != "yarn" or scaling.factor == 1:
        return
    config.yarn_rotary_scaling_factor = scaling.factor
    config.yarn_mscale = (attention_factor(scaling) - 1) / (0.1 * math.log(scaling.factor))
    config.yarn_mscale_all_dim = 0.0
