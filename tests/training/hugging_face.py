"""Transformers' models as an independent reference: their weights under our names, and a training loop in plain torch.

Nothing here uses the code under test. Imported by rank processes for `run_from`; transformers is imported only where
a reference is built.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch

from data.batches import MicroBatch
from model.config import ModelConfig
from model.core_config import core_config
from model.decoder import Decoder, build_decoder_chunks
from model.global_tensors import global_slices
from model.kernels.choice import TORCH
from parallel.groups import ProcessGroups
from parallel.layout import ParallelLayout
from tests.training.faults import FAULTS
from tests.training.moe_faults import MOE_FAULTS
from tests.training.parity_cases import STEPS, VOCAB_SIZE, UnevenBatches, sections
from training.parity import ParityRecord, record_run

Tensors = dict[str, torch.Tensor]
WARMUP, TRAIN_STEPS, PEAK = 2, 20, 3e-3
"""Of `parity_cases.sections`."""


def hugging_face_config(model: ModelConfig, family: str, rope: dict[str, Any] | None) -> Any:
    """The transformers config of `family` that means what `model` means."""
    import transformers

    fields: dict[str, Any] = {
        "num_hidden_layers": model.num_layers,
        "hidden_size": model.hidden_size,
        "intermediate_size": model.ffn_hidden_size,
        "num_attention_heads": model.num_attention_heads,
        "num_key_value_heads": model.query_groups,
        "head_dim": model.head_width,
        "vocab_size": VOCAB_SIZE,
        "max_position_embeddings": model.max_position_embeddings,
        "rms_norm_eps": model.layernorm_epsilon,
        "rope_parameters": {"rope_theta": model.rotary_base, **(rope or {"rope_type": "default"})},
        "tie_word_embeddings": model.share_embeddings_and_output_weights,
        "attn_implementation": "eager",
        "pad_token_id": None,
        "bos_token_id": None,
        "eos_token_id": None,
    }
    if model.window_size is not None:
        fields["sliding_window"] = model.window_size
    if model.num_experts is not None:
        fields |= {
            "num_local_experts": model.num_experts,
            "num_experts": model.num_experts,
            "num_experts_per_tok": model.moe_router_topk,
            "moe_intermediate_size": model.block_width,
            "norm_topk_prob": not model.moe_router_pre_softmax,
            "experts_implementation": "eager",
        }
    return getattr(transformers, f"{family}Config")(**fields)


def fresh_reference(model: ModelConfig, family: str, rope: dict[str, Any] | None = None) -> Any:
    """A transformers model with every parameter drawn: norms around 1, biases around 0, neither equal to them."""
    import transformers

    torch.manual_seed(5)
    reference = getattr(transformers, f"{family}ForCausalLM")(hugging_face_config(model, family, rope)).float()
    with torch.no_grad():
        for name, parameter in reference.named_parameters():
            parameter.normal_(0.0, 0.1)
            if name.endswith("norm.weight"):
                parameter.add_(1.0)
    return reference


def under_our_names(theirs: Tensors, model: ModelConfig) -> Tensors:
    """Tensors of transformers (weights or their gradients) as tensors of the whole model by our global names."""
    ours = {
        "embedding.word_embeddings.weight": theirs["model.embed_tokens.weight"],
        "decoder.final_layernorm.weight": theirs["model.norm.weight"],
    }
    if not model.share_embeddings_and_output_weights:
        ours["output_layer.weight"] = theirs["lm_head.weight"]
    for layer in range(model.num_layers):
        there, here = f"model.layers.{layer}.", f"decoder.layers.{layer}."
        attention, mlp = f"{here}self_attention.", f"{here}mlp."
        ours |= {
            f"{attention}linear_qkv.layer_norm_weight": theirs[f"{there}input_layernorm.weight"],
            f"{attention}linear_qkv.weight": _by_group(theirs, f"{there}self_attn.", "weight", model),
            f"{attention}linear_proj.weight": theirs[f"{there}self_attn.o_proj.weight"],
        }
        norm = theirs[f"{there}post_attention_layernorm.weight"]
        if model.num_experts is None:
            gate_and_up = [theirs[f"{there}mlp.gate_proj.weight"], theirs[f"{there}mlp.up_proj.weight"]]
            ours[f"{mlp}linear_fc1.layer_norm_weight"] = norm
            ours[f"{mlp}linear_fc1.weight"] = torch.cat(gate_and_up)
            ours[f"{mlp}linear_fc2.weight"] = theirs[f"{there}mlp.down_proj.weight"]
        else:
            ours[f"{here}pre_mlp_layernorm.weight"] = norm
            ours[f"{mlp}router.weight"] = theirs[f"{there}mlp.gate.weight"]
            for expert in range(model.num_experts):
                one = f"{mlp}experts.local_experts.{expert}."
                ours[f"{one}linear_fc1.weight"] = theirs[f"{there}mlp.experts.gate_up_proj"][expert]
                ours[f"{one}linear_fc2.weight"] = theirs[f"{there}mlp.experts.down_proj"][expert]
        if model.add_qkv_bias:
            ours[f"{attention}linear_qkv.bias"] = _by_group(theirs, f"{there}self_attn.", "bias", model)
        if model.qk_layernorm:
            for one in ("q", "k"):
                ours[f"{attention}{one}_layernorm.weight"] = theirs[f"{there}self_attn.{one}_norm.weight"]
    return ours


def _by_group(theirs: Tensors, prefix: str, what: str, model: ModelConfig) -> torch.Tensor:
    """Rows in the order: queries of group 0, its key, its value, queries of group 1 ..."""
    rows = []
    q, k, v = (theirs[f"{prefix}{one}_proj.{what}"].split(model.head_width) for one in "qkv")
    share = model.num_attention_heads // model.query_groups
    for group in range(model.query_groups):
        rows += [*q[group * share : (group + 1) * share], k[group], v[group]]
    return torch.cat(rows)


def _load(chunks: list[Decoder], weights: Tensors) -> None:
    with torch.no_grad():
        for part in global_slices(list(chunks)):
            part.tensor.copy_(weights[part.name][part.index])


def run_from(weights: Tensors, model: ModelConfig, fault: str | None = None) -> ParityRecord | None:
    """Our training from `weights`, on one rank of a pool."""
    with (FAULTS | MOE_FAULTS)[fault]() if fault is not None else nullcontext():
        return record_run(
            model,
            ParallelLayout(),
            sections(),
            VOCAB_SIZE,
            UnevenBatches(),
            STEPS,
            prepare=lambda chunks: _load(chunks, weights),
        )


def our_logits(weights: Tensors, model: ModelConfig, tokens: torch.Tensor) -> torch.Tensor:
    """Our logits [b, s, VOCAB_SIZE] of `tokens` [b, s], on one rank of a pool."""
    layout = ParallelLayout()
    with ProcessGroups(layout, seed=0), torch.no_grad():
        core = core_config(model, layout, "fp32", TORCH)
        chunks = build_decoder_chunks(model, core, layout, VOCAB_SIZE, TORCH)
        _load(chunks, weights)
        logits: torch.Tensor = chunks[0].eval()(tokens=tokens)
    return logits.clone()


def train_in_plain_torch(reference: Any, model: ModelConfig) -> ParityRecord:
    """Train `reference` in place, the way any script of torch's would: AdamW, clipping, warmup and cosine."""
    vectors = [parameter for parameter in reference.parameters() if parameter.ndim == 1]
    matrices = [parameter for parameter in reference.parameters() if parameter.ndim > 1]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}],
        lr=PEAK,
        betas=(0.9, 0.95),
        eps=1e-6,
    )
    losses, norms, gradients = [], [], {}
    for step in range(STEPS):
        optimizer.zero_grad()
        losses.append(_backward(reference, list(UnevenBatches()(step, 0, 1)), model))
        if step == 0:
            found = {name: parameter.grad.clone() for name, parameter in reference.named_parameters()}
            gradients = under_our_names(found, model)
        norms.append(float(torch.nn.utils.clip_grad_norm_(reference.parameters(), 1.0)))
        for group in optimizer.param_groups:
            group["lr"] = _rate(step)
        optimizer.step()
    weights = under_our_names({name: parameter.detach() for name, parameter in reference.named_parameters()}, model)
    return ParityRecord(tuple(losses), tuple(norms), gradients, weights)


def _backward(reference: Any, batches: Iterable[MicroBatch], model: ModelConfig) -> float:
    """Gradients of the mean loss over all tokens of `batches` that count and of its routers' losses; returns the mean
    without those."""
    batches = list(batches)
    tokens = sum(float(batch.loss_mask.sum()) for batch in batches)
    total = 0.0
    for batch in batches:
        counts = torch.from_numpy(batch.loss_mask).flatten()
        with _router_logits(reference) as of_layers:
            logits = reference(input_ids=torch.from_numpy(batch.tokens)).logits
        each = torch.nn.functional.cross_entropy(
            logits.flatten(0, 1), torch.from_numpy(batch.labels).flatten(), reduction="none"
        )
        loss = (each * counts).sum() / tokens
        routers = sum(_router_losses(one[counts > 0], model) for one in of_layers)
        # Means over a micro-batch, weighted by its tokens.
        (loss + routers * (counts.sum() / tokens)).backward()
        total += float(loss.detach())
    return total


@contextmanager
def _router_logits(reference: Any) -> Iterator[list[torch.Tensor]]:
    """[tokens, experts] of every layer that has a router, while the block runs `reference` once."""
    seen: list[torch.Tensor] = []

    def keep(router: Any, inputs: tuple[torch.Tensor], _output: Any) -> None:
        seen.append(torch.nn.functional.linear(inputs[0].flatten(0, -2), router.weight))

    gates = [module for name, module in reference.named_modules() if name.endswith(".mlp.gate")]
    hooks = [gate.register_forward_hook(keep) for gate in gates]
    yield seen
    for hook in hooks:
        hook.remove()


def _router_losses(logits: torch.Tensor, model: ModelConfig) -> torch.Tensor:
    """Load balancing (arXiv 2101.03961, with several choices a token) and z-loss (arXiv 2202.08906), as means over the
    tokens of `logits` [tokens, experts]."""
    probabilities = logits.softmax(dim=-1)
    choices = torch.zeros_like(logits).scatter(1, logits.topk(model.moe_router_topk, dim=-1).indices, 1.0)
    share = choices.mean(dim=0) / model.moe_router_topk
    balance = logits.shape[1] * (share * probabilities.mean(dim=0)).sum()
    z = logits.logsumexp(dim=-1).square().mean()
    return model.moe_aux_loss_coeff * balance + (model.moe_z_loss_coeff or 0.0) * z


def _rate(step: int) -> float:
    """Linear over the warmup, then half a cosine down to 0."""
    if step < WARMUP:
        return PEAK * (step + 1) / (WARMUP + 1)
    return PEAK * 0.5 * (1 + math.cos(math.pi * (step - WARMUP) / (TRAIN_STEPS - WARMUP)))
