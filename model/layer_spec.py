"""The decoder layer as a core layer spec, built from any kernel provider."""

from __future__ import annotations

from typing import Any

from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.models.backends import BackendSpecProvider
from megatron.core.models.gpt.gpt_layer_specs import get_mlp_module_spec_for_backend
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.moe.moe_layer import MoELayer, MoESubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import (
    TransformerLayer,
    TransformerLayerSubmodules,
    get_transformer_layer_offset,
)

from model.kernels.provider import Provider
from model.router import Router

CANONICAL_NORM_NAMES = {
    "input_layernorm.": "self_attention.linear_qkv.layer_norm_",
    "pre_mlp_layernorm.": "mlp.linear_fc1.layer_norm_",
}
"""Norms that Transformer Engine fuses into the linear layer behind them keep one name in checkpoints, fused or not."""


def block_spec(config: TransformerConfig, provider: Provider, vp_stage: int | None) -> Any:
    """Specs of the layers that this pipeline stage builds, and of the final norm.

    Core's `TransformerBlock` would otherwise hard-code a LayerNorm at the end of the last stage.
    """
    count = get_num_layers_to_build(config, vp_stage=vp_stage)
    layers = [layer_spec(config, provider)] * count
    if config.torch_fp8 is not None:
        first = get_transformer_layer_offset(config, vp_stage=vp_stage)
        in_fp8 = layer_spec(config, provider.in_fp8())
        layers = [
            layer if config.torch_fp8.in_bf16(number, config.num_layers) else in_fp8
            for number, layer in enumerate(layers, first)
        ]
    return TransformerBlockSubmodules(layer_specs=layers, layer_norm=provider.layer_norm(rms_norm=True))


def layer_spec(config: TransformerConfig, provider: BackendSpecProvider) -> ModuleSpec:
    """Pre-norm attention and SwiGLU, or experts of it, residual around each (Llama, Mixtral)."""
    fused_norms = provider.fuse_layernorm_and_linear()
    separate = provider.layer_norm(rms_norm=True)
    norm = IdentityOp if fused_norms else separate
    names = {} if fused_norms else dict(CANONICAL_NORM_NAMES)
    experts = config.num_moe_experts is not None
    if experts:  # the router reads the normalised tokens before any expert does: nothing to fuse the norm into
        names.pop("pre_mlp_layernorm.", None)
    return ModuleSpec(
        module=TransformerLayer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=norm,
            self_attention=_attention_spec(config, provider),
            self_attn_bda=get_bias_dropout_add,
            pre_mlp_layernorm=separate if experts else norm,
            mlp=_experts_spec(config, provider) if experts else _dense_spec(config, provider),
            mlp_bda=get_bias_dropout_add,
            sharded_state_dict_keys_map=names,
        ),
    )


def _dense_spec(config: TransformerConfig, provider: BackendSpecProvider) -> ModuleSpec:
    spec = get_mlp_module_spec_for_backend(provider, use_te_activation_func=config.use_te_activation_func)
    spec.params["ffn_hidden_size"] = config.ffn_hidden_size  # core reads it there, and the config's is on its way out
    return spec


def _experts_spec(config: TransformerConfig, provider: BackendSpecProvider) -> ModuleSpec:
    """Our router before core's experts: one grouped product where the provider has it, else one after another."""
    module, submodules = provider.grouped_mlp_modules(config.moe_grouped_gemm, False)
    return ModuleSpec(
        module=MoELayer,
        submodules=MoESubmodules(experts=ModuleSpec(module=module, submodules=submodules), router=Router),
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
