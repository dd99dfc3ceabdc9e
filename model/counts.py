"""Parameters and floating-point operations of a decoder, exact, from its config alone."""

from __future__ import annotations

from typing import Literal

from model.config import ModelConfig

Convention = Literal["causal", "full"]
"""causal: attention counted over the half of query-key pairs that the causal mask leaves. full: over all pairs."""

TRAINING_PASSES = 3
"""Forward once, backward twice that: once for the gradient of the input, once for that of the weight."""


def embedding_parameters(config: ModelConfig, vocab_size: int) -> int:
    """Parameters of the embedding and, where it has a matrix of its own, of the output layer."""
    matrices = 1 if config.share_embeddings_and_output_weights else 2
    return matrices * vocab_size * config.hidden_size


def layer_matrix_parameters(config: ModelConfig, *, active: bool = False) -> int:
    """Parameters of one layer's matrices: query, key, value, output; router; gate, up, down of every expert.

    Args:
        config: the architecture.
        active: count only the experts that one token goes to.
    """
    queries = config.num_attention_heads * config.head_width
    keys = config.query_groups * config.head_width
    attention = config.hidden_size * (2 * queries + 2 * keys)
    block = 3 * config.hidden_size * config.block_width
    if config.num_experts is None:
        return attention + block
    router = config.hidden_size * config.num_experts
    return attention + router + block * (config.moe_router_topk if active else config.num_experts)


def layer_parameters(config: ModelConfig, *, active: bool = False) -> int:
    """Parameters of one layer: matrices, norms, and the biases of query, key and value where it has them."""
    count = layer_matrix_parameters(config, active=active) + 2 * config.hidden_size
    if config.add_qkv_bias:
        count += (config.num_attention_heads + 2 * config.query_groups) * config.head_width
    if config.qk_layernorm:
        count += 2 * config.head_width
    return count


def parameter_count(config: ModelConfig, vocab_size: int | None = None) -> int:
    """All parameters, without padding of the vocabulary.

    Args:
        config: the architecture.
        vocab_size: true vocabulary; None takes `config.vocab_size`.

    Raises:
        ValueError: neither names a vocabulary.
    """
    return _all_parameters(config, vocab_size, active=False)


def active_parameter_count(config: ModelConfig, vocab_size: int | None = None) -> int:
    """The parameters that take part in one token: all but the experts that it does not go to.

    Args and errors are those of `parameter_count`, whose value this is for a model without experts.
    """
    return _all_parameters(config, vocab_size, active=True)


def _all_parameters(config: ModelConfig, vocab_size: int | None, *, active: bool) -> int:
    layers = config.num_layers * layer_parameters(config, active=active)
    return embedding_parameters(config, _vocabulary(config, vocab_size)) + layers + config.hidden_size


def attended_tokens(config: ModelConfig, seq_length: int, convention: Convention) -> float:
    """Keys that a query meets on average over a sequence of `seq_length`, the sliding window counted.

    "full" is all `seq_length` keys, or the window's. "causal" is half of the sequence, the count that Megatron-LM
    and the papers use (the diagonal, half a token, is left out), less what the window cuts off.
    """
    window = seq_length if config.window_size is None else min(config.window_size, seq_length)
    if convention == "full":
        return float(window)
    return window * (seq_length - window / 2) / seq_length


def flops_per_token(
    config: ModelConfig, seq_length: int, convention: Convention = "causal", vocab_size: int | None = None
) -> float:
    """Floating-point operations of training on one token: forward and backward, without recomputation.

    Matrix products only, a multiplication and an addition each: layers, output layer, attention scores and their
    weighted sum (arXiv 2104.04473, appendix). The embedding is a look-up and counts nothing; of the experts only those
    that a token goes to count.

    Args:
        config: the architecture.
        seq_length: tokens in one sequence.
        convention: how attention counts.
        vocab_size: true vocabulary; None takes `config.vocab_size`.

    Raises:
        ValueError: neither names a vocabulary, or `convention` is unknown.
    """
    if convention not in ("causal", "full"):
        raise ValueError(f"convention is 'causal' or 'full', not {convention!r}")
    queries = config.num_attention_heads * config.head_width
    attention = 2 * 2 * queries * attended_tokens(config, seq_length, convention)
    output = 2 * _vocabulary(config, vocab_size) * config.hidden_size
    forward = config.num_layers * (2 * layer_matrix_parameters(config, active=True) + attention) + output
    return TRAINING_PASSES * forward


def _vocabulary(config: ModelConfig, vocab_size: int | None) -> int:
    vocabulary = config.vocab_size if vocab_size is None else vocab_size
    if vocabulary is None:
        raise ValueError("model.vocab_size is not set: give vocab_size (the tokenizer's)")
    return vocabulary
