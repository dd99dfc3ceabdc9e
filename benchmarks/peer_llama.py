"""Hugging Face's Llama in a plain torch loop: the peer of benchmarks that measure training."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch

from model.config import ModelConfig
from training.config import OptimizerConfig
from training.whole_model import WholeTensors


class PeerLlama:
    """LlamaForCausalLM with sdpa, AdamW(fused=True) and clip_grad_norm_; bf16 is autocast over fp32 weights."""

    def __init__(self, model: ModelConfig, vocab_size: int, optimizer: OptimizerConfig, precision: str) -> None:
        self.network = _network(model, vocab_size)
        self._clip, self._bf16 = optimizer.clip_grad, precision == "bf16"
        matrices = [weight for weight in self.network.parameters() if weight.ndim > 1]
        vectors = [weight for weight in self.network.parameters() if weight.ndim == 1]
        self._optimizer = torch.optim.AdamW(
            [{"params": matrices, "weight_decay": optimizer.weight_decay}, {"params": vectors, "weight_decay": 0.0}],
            lr=optimizer.lr,
            betas=(optimizer.adam_beta1, optimizer.adam_beta2),
            eps=optimizer.adam_eps,
            fused=True,
        )

    def loss(self, tokens: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Nats a token; `labels` are already those of the next token."""
        with torch.autocast("cpu", torch.bfloat16) if self._bf16 else nullcontext():
            loss: torch.Tensor = self.network(input_ids=tokens, labels=labels, shift_labels=labels).loss
        return loss

    def step(self, tokens: torch.Tensor, labels: torch.Tensor) -> float:
        """One optimizer step; the loss before it."""
        self._optimizer.zero_grad()
        loss = self.loss(tokens, labels)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.network.parameters(), self._clip)
        self._optimizer.step()
        return float(loss.detach())

    @torch.no_grad()
    def evaluate(self, tokens: torch.Tensor, labels: torch.Tensor) -> float:
        """The loss, and nothing for a step."""
        return float(self.loss(tokens, labels))

    @torch.no_grad()
    def take_weights(self, ours: WholeTensors, model: ModelConfig) -> None:
        """Copy the whole model's weights, by our names, into the peer's."""
        theirs = dict(self.network.named_parameters())
        for name, tensor in under_their_names(ours, model).items():
            theirs.pop(name).copy_(tensor)
        if theirs:
            raise AssertionError(f"weights of the peer that were not set: {sorted(theirs)}")


def _network(model: ModelConfig, vocab_size: int) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        **their_sizes(model, vocab_size),
        head_dim=model.head_width,
        rope_parameters={"rope_type": "default", "rope_theta": model.rotary_base},
        tie_word_embeddings=False,
        use_cache=False,
        attn_implementation="sdpa",
    )
    return LlamaForCausalLM(config).float().train()


def their_sizes(model: ModelConfig, vocab_size: int) -> dict[str, Any]:
    """The model's sizes by Hugging Face's names."""
    return {
        "vocab_size": vocab_size,
        "hidden_size": model.hidden_size,
        "intermediate_size": model.ffn_hidden_size,
        "num_hidden_layers": model.num_layers,
        "num_attention_heads": model.num_attention_heads,
        "num_key_value_heads": model.query_groups,
        "max_position_embeddings": model.max_position_embeddings,
        "rms_norm_eps": model.layernorm_epsilon,
    }


def under_their_names(ours: dict[str, torch.Tensor], model: ModelConfig) -> dict[str, torch.Tensor]:
    """The whole model's weights by Hugging Face's names: queries, keys and values apart, gate and up apart."""
    theirs = {
        "model.embed_tokens.weight": ours["embedding.word_embeddings.weight"],
        "model.norm.weight": ours["decoder.final_layernorm.weight"],
        "lm_head.weight": ours["output_layer.weight"],
    }
    width, groups = model.head_width, model.query_groups
    queries = model.num_attention_heads // groups * width
    for layer in range(model.num_layers):
        here, there = f"decoder.layers.{layer}.", f"model.layers.{layer}."
        by_group = ours[f"{here}self_attention.linear_qkv.weight"].view(groups, queries + 2 * width, -1)
        parts = by_group.split([queries, width, width], dim=1)
        for letter, part in zip("qkv", parts, strict=True):
            theirs[f"{there}self_attn.{letter}_proj.weight"] = part.reshape(-1, model.hidden_size)
        theirs[f"{there}self_attn.o_proj.weight"] = ours[f"{here}self_attention.linear_proj.weight"]
        gate, up = ours[f"{here}mlp.linear_fc1.weight"].chunk(2)
        theirs[f"{there}mlp.gate_proj.weight"], theirs[f"{there}mlp.up_proj.weight"] = gate, up
        theirs[f"{there}mlp.down_proj.weight"] = ours[f"{here}mlp.linear_fc2.weight"]
        theirs[f"{there}input_layernorm.weight"] = ours[f"{here}self_attention.linear_qkv.layer_norm_weight"]
        theirs[f"{there}post_attention_layernorm.weight"] = ours[f"{here}mlp.linear_fc1.layer_norm_weight"]
    return theirs
