"""The decoder layer as a core layer spec, built from any kernel provider."""

from __future__ import annotations

from typing import Any

from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.models.backends import BackendSpecProvider
from megatron.core.models.gpt.gpt_layer_specs import get_mlp_module_spec_for_backend
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules

CANONICAL_NORM_NAMES = {
    "input_layernorm.": "self_attention.linear_qkv.layer_norm_",
    "pre_mlp_layernorm.": "mlp.linear_fc1.layer_norm_",
}
"""Norms that Transformer Engine fuses into the linear layer behind them keep one name in checkpoints, fused or not."""


def block_spec(config: TransformerConfig, provider: BackendSpecProvider, vp_stage: int | None) -> Any:
    """Specs of the layers that this pipeline stage builds, and of the final norm.

    Core's `TransformerBlock` would otherwise hard-code a LayerNorm at the end of the last stage.
    """
    layer = layer_spec(config, provider)
    count = get_num_layers_to_build(config, vp_stage=vp_stage)
    return TransformerBlockSubmodules(layer_specs=[layer] * count, layer_norm=provider.layer_norm(rms_norm=True))


def layer_spec(config: TransformerConfig, provider: BackendSpecProvider) -> ModuleSpec:
    """Pre-norm attention and SwiGLU, residual around each (Llama)."""
    fused_norms = provider.fuse_layernorm_and_linear()
    norm = IdentityOp if fused_norms else provider.layer_norm(rms_norm=True)
    return ModuleSpec(
        module=TransformerLayer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=norm,
            self_attention=_attention_spec(config, provider),
            self_attn_bda=get_bias_dropout_add,
            pre_mlp_layernorm=norm,
            mlp=get_mlp_module_spec_for_backend(backend=provider),
            mlp_bda=get_bias_dropout_add,
            sharded_state_dict_keys_map={} if fused_norms else CANONICAL_NORM_NAMES,
        ),
    )


def _attention_spec(config: TransformerConfig, provider: BackendSpecProvider) -> ModuleSpec:
    qk_norm = provider.layer_norm(rms_norm=True, for_qk=True) if config.qk_layernorm else IdentityOp
    return ModuleSpec(
        module=SelfAttention,
        params={"attn_mask_type": AttnMaskType.causal},
        submodules=SelfAttentionSubmodules(
            linear_qkv=provider.column_parallel_layer_norm_linear() or provider.column_parallel_linear(),
            core_attention=provider.core_attention(),
            linear_proj=provider.row_parallel_linear(),
            q_layernorm=qk_norm,
            k_layernorm=qk_norm,
        ),
    )
