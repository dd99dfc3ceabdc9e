"""The peers of benchmarks.gpu on the same shapes: transformers with SDPA and torch.compile, and core's own GPTModel."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_layer_local_spec,
    get_gpt_layer_with_transformer_engine_spec,
)
from megatron.core.optimizer import MegatronOptimizer, OptimizerConfig, get_megatron_optimizer
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.tensor_parallel import layers
from megatron.core.transformer.transformer_config import TransformerConfig
from torch.nn.functional import silu

from benchmarks.peer_llama import _network
from foundation.libraries import transformer_engine_version
from launch.config import RunConfig
from model.config import ModelConfig
from model.kernels import weight_gradient

Batches = list[tuple[torch.Tensor, torch.Tensor]]


def hugging_face(config: RunConfig) -> tuple[Any, str]:
    """LlamaForCausalLM with sdpa under torch.compile: fp32 weights, BF16 autocast, fused AdamW, clipping."""
    model, device = config.model, torch.device(torch.cuda.current_device())
    with device:  # drawn where they lie
        network = _network(model, model.vocab_size or 1).to(device)
    if model.share_embeddings_and_output_weights:
        network.lm_head.weight = network.model.embed_tokens.weight
    on_gpu = device.type == "cuda"
    forward = torch.compile(network) if on_gpu else network
    optimizer = torch.optim.AdamW(network.parameters(), lr=config.optimizer.lr, betas=(0.9, 0.95), fused=True)

    def step(batches: Batches) -> float:
        optimizer.zero_grad()
        total = torch.zeros((), device=device)
        for tokens, labels in batches:
            with torch.autocast(device.type, torch.bfloat16):
                loss = forward(input_ids=tokens, labels=labels, shift_labels=labels).loss / len(batches)
            loss.backward()
            total += loss.detach()
        torch.nn.utils.clip_grad_norm_(network.parameters(), config.optimizer.clip_grad)
        optimizer.step()
        return float(total)

    return step, f"transformers, sdpa{', torch.compile' if on_gpu else ''}, bf16 autocast, fused AdamW"


def megatron_core(config: RunConfig) -> tuple[Any, str]:
    """GPTModel in core's data parallelism and distributed optimizer, with its own spec of Transformer Engine's modules.

    Fusions are those that Megatron-LM's arguments switch on. Without the library core's local spec: for dry runs alone.
    """
    model, training = config.model, config.training
    engine = transformer_engine_version() is not None and torch.cuda.is_available()
    core = _core_config(model, engine=engine)
    if engine:  # its output layer asks for apex's module: the same function by torch, as ours has
        layers.fused_weight_gradient_mlp_cuda, layers._grad_accum_fusion_available = weight_gradient, True
    spec = get_gpt_layer_with_transformer_engine_spec() if engine else get_gpt_layer_local_spec(normalization="RMSNorm")
    network = GPTModel(
        core,
        spec,
        vocab_size=model.padded_vocab_size(model.vocab_size or 1, 1),
        max_sequence_length=training.seq_length,
        position_embedding_type="rope",
        rotary_base=int(model.rotary_base),
        share_embeddings_and_output_weights=model.share_embeddings_and_output_weights,
    ).to(torch.cuda.current_device(), torch.bfloat16)
    core.finalize_model_grads_func = finalize_model_grads
    options = DistributedDataParallelConfig(grad_reduce_in_fp32=True, use_distributed_optimizer=True)
    wrapped = DistributedDataParallel(core, options, network)
    optimizer = _core_optimizer(wrapped, config.optimizer.lr, config.optimizer.clip_grad)

    def step(batches: Batches) -> float:
        wrapped.zero_grad_buffer()
        optimizer.zero_grad()
        losses = get_forward_backward_func()(
            forward_step_func=_core_forward,
            data_iterator=iter(batches),
            model=wrapped,
            num_microbatches=len(batches),
            seq_length=training.seq_length,
            micro_batch_size=training.micro_batch_size,
            forward_only=False,
        )
        optimizer.step()
        return float(torch.stack([loss["loss"] for loss in losses]).mean())

    return step, f"megatron-core's GPTModel, {'Transformer Engine' if engine else 'local'} spec"


def _core_config(model: ModelConfig, *, engine: bool) -> TransformerConfig:
    return TransformerConfig(
        num_layers=model.num_layers,
        hidden_size=model.hidden_size,
        ffn_hidden_size=model.ffn_hidden_size,
        num_attention_heads=model.num_attention_heads,
        num_query_groups=model.query_groups,
        kv_channels=model.head_width,
        normalization="RMSNorm",
        gated_linear_unit=True,
        activation_func=silu,
        add_bias_linear=False,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        bf16=True,
        params_dtype=torch.bfloat16,
        pipeline_dtype=torch.bfloat16,
        transformer_impl="transformer_engine" if engine else "local",
        apply_rope_fusion=engine,
        bias_activation_fusion=engine,
        bias_dropout_fusion=engine,
        masked_softmax_fusion=engine,
        cross_entropy_loss_fusion=engine,
        cuda_graph_scope=[],
        gradient_accumulation_fusion=engine,
    )


def _core_optimizer(network: DistributedDataParallel, lr: float, clip_grad: float) -> MegatronOptimizer:
    return get_megatron_optimizer(
        OptimizerConfig(
            optimizer="adam",
            lr=lr,
            clip_grad=clip_grad,
            bf16=True,
            params_dtype=torch.bfloat16,
            use_distributed_optimizer=True,
        ),
        [network],
    )


def _core_forward(batches: Iterator[tuple[torch.Tensor, torch.Tensor]], network: Any) -> tuple[torch.Tensor, Any]:
    tokens, labels = next(batches)
    places = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)
    return network(tokens, places, None, labels=labels), partial(_mean)


def _mean(losses: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    loss = losses.float().mean()
    return loss, {"loss": loss.detach().clone()}  # core divides the loss itself, in place
