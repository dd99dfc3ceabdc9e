"""What the planner knows of a model: the blocks that a layer is made of, and how many of each there are.

Wider than `ModelConfig`: published measurements include GPT-style, latent-attention and hybrid state-space models that
Orthant does not train. Matrix products only are counted, as in `model.counts`.
"""

from __future__ import annotations

from dataclasses import dataclass

from model.config import ModelConfig


@dataclass(frozen=True)
class LatentAttention:
    """Multi-head latent attention (arXiv 2405.04434): widths of what queries, keys and values are squeezed through."""

    query_rank: int
    key_value_rank: int
    plain_width: int
    rotary_width: int
    value_width: int


@dataclass(frozen=True)
class Architecture:
    """One model.

    Attributes:
        name: for people.
        hidden_size: width of the residual stream.
        vocab_size: rows of the embedding.
        layers: what a pipeline cuts.
        attention_layers: layers with attention; the rest of `layers` has none (state-space hybrids).
        heads, query_groups, head_width: of attention.
        dense_layers: layers with one feed-forward block of `ffn_hidden_size`, gated (three matrices) or not (two).
        moe_layers: layers with `experts` blocks of `expert_ffn_hidden_size`, of which each token takes `topk`.
        shared_ffn_hidden_size: block beside the experts that every token takes; 0 for none.
        expert_width: what experts read and write where it is not `hidden_size` (latent experts); 0: hidden_size.
        state_layers: state-space layers of inner width `state_width`.
        window: tokens that each query sees in `windowed_layers` of the attention layers.
        tied: one matrix for embedding and output layer.
        attention_biases, head_norms: whether queries, keys and values have biases; queries and keys norms per head.
        extra_output_layers: output layers beside the first (multi-token prediction), each with one more layer.
    """

    name: str
    hidden_size: int
    vocab_size: int
    layers: int
    attention_layers: int
    heads: int
    query_groups: int
    head_width: int
    dense_layers: int
    ffn_hidden_size: int
    gated: bool = True
    moe_layers: int = 0
    experts: int = 1
    topk: int = 1
    expert_ffn_hidden_size: int = 0
    shared_ffn_hidden_size: int = 0
    expert_width: int = 0
    state_layers: int = 0
    state_width: int = 0
    window: int = 0
    windowed_layers: int = 0
    tied: bool = False
    extra_output_layers: int = 0
    latent: LatentAttention | None = None
    attention_biases: bool = False
    head_norms: bool = False

    @property
    def query_width(self) -> int:
        """Channels of all query heads."""
        return self.heads * self.head_width

    @property
    def attention_matrices(self) -> list[tuple[int, int, bool]]:
        """(inputs, outputs, whether cut over tensor-parallel ranks) of attention's matrices."""
        hidden = self.hidden_size
        if self.latent is None:
            keys = self.query_groups * self.head_width
            return [(hidden, self.query_width + 2 * keys, True), (self.query_width, hidden, True)]
        latent = self.latent
        return [
            (hidden, latent.query_rank, False),
            (latent.query_rank, self.heads * (latent.plain_width + latent.rotary_width), True),
            (hidden, latent.key_value_rank + latent.rotary_width, False),
            (latent.key_value_rank, self.heads * (latent.plain_width + latent.value_width), True),
            (self.heads * latent.value_width, hidden, True),
        ]

    @property
    def block_matrices(self) -> list[tuple[int, int]]:
        """(inputs, outputs) of the dense feed-forward block."""
        return _block(self.hidden_size, self.ffn_hidden_size, self.gated)

    @property
    def expert_matrices(self) -> list[tuple[int, int]]:
        """(inputs, outputs) of one expert."""
        return _block(self.expert_width or self.hidden_size, self.expert_ffn_hidden_size, self.gated)

    @property
    def always_matrices(self) -> list[tuple[int, int]]:
        """(inputs, outputs) of what every token takes in a layer with experts: router, shared block, squeezing."""
        found = [(self.hidden_size, self.experts)]
        if self.shared_ffn_hidden_size:
            found += _block(self.hidden_size, self.shared_ffn_hidden_size, self.gated)
        if self.expert_width:
            found += [(self.hidden_size, self.expert_width), (self.expert_width, self.hidden_size)]
        return found

    @property
    def state_matrices(self) -> list[tuple[int, int]]:
        """(inputs, outputs) of one state-space layer (Mamba-2: gate, input, B, C, step in; output back)."""
        return [(self.hidden_size, 2 * self.state_width + self.state_width // 2), (self.state_width, self.hidden_size)]

    @property
    def attention_parameters(self) -> int:
        """Of one layer."""
        return sum(inputs * outputs for inputs, outputs, _ in self.attention_matrices)

    @property
    def expert_parameters(self) -> int:
        """Of all experts of one layer."""
        return self.experts * _size(self.expert_matrices)

    @property
    def output_layers(self) -> int:
        """Times that logits are computed."""
        return 1 + self.extra_output_layers

    def dense_parameters(self) -> float:
        """Parameters of all layers that no expert-parallel rank shares out (norms included)."""
        return (
            self.attention_layers * self.attention_parameters
            + self.dense_layers * _size(self.block_matrices)
            + self.moe_layers * _size(self.always_matrices)
            + self.state_layers * _size(self.state_matrices)
            + self.attention_layers * self.bias_parameters
            + self.norm_parameters
        )

    @property
    def bias_parameters(self) -> int:
        """Of queries, keys and values of one layer."""
        return (self.heads + 2 * self.query_groups) * self.head_width if self.attention_biases else 0

    @property
    def norm_parameters(self) -> int:
        """Of all layers."""
        heads = 2 * self.head_width * self.attention_layers if self.head_norms else 0
        return 2 * self.layers * self.hidden_size + heads

    def embedding_parameters(self) -> int:
        """Of one of embedding and output layer."""
        return self.vocab_size * self.hidden_size

    def parameters(self) -> float:
        """All of them."""
        matrices = 1 if self.tied else 2
        experts = self.moe_layers * self.expert_parameters
        return self.dense_parameters() + experts + matrices * self.embedding_parameters() + self.hidden_size

    def flops_per_token(self, seq_length: int, *, causal: bool = True) -> float:
        """Forward and backward, without recomputation; attention over half of the pairs (`causal`) or over all."""
        matrices = (
            self.attention_layers * self.attention_parameters
            + self.dense_layers * _size(self.block_matrices)
            + self.moe_layers * (_size(self.always_matrices) + self.topk * _size(self.expert_matrices))
            + self.state_layers * _size(self.state_matrices)
            + self.output_layers * self.embedding_parameters()
        )
        return 3 * (2 * matrices + self.attention_flops_per_token(seq_length, causal=causal))

    def attention_flops_per_token(self, seq_length: int, *, causal: bool = True) -> float:
        """Forward, scores and weighted sum, all layers."""
        width = self.query_width
        if self.latent is not None:
            width = self.heads * (self.latent.plain_width + self.latent.rotary_width + self.latent.value_width) // 2
        seen = seq_length / (2 if causal else 1)
        whole = (self.attention_layers - self.windowed_layers) * seen
        cut = self.windowed_layers * min(seen, self.window)
        return 4 * width * (whole + cut)


def from_model_config(config: ModelConfig, vocab_size: int) -> Architecture:
    """The planner's view of an architecture that Orthant trains; `vocab_size` with the rows that pad it."""
    experts = config.num_experts
    return Architecture(
        name=config.preset or f"{config.num_layers} layers of {config.hidden_size}",
        hidden_size=config.hidden_size,
        vocab_size=vocab_size,
        layers=config.num_layers,
        attention_layers=config.num_layers,
        heads=config.num_attention_heads,
        query_groups=config.query_groups,
        head_width=config.head_width,
        dense_layers=0 if experts else config.num_layers,
        ffn_hidden_size=config.ffn_hidden_size,
        moe_layers=config.num_layers if experts else 0,
        experts=experts or 1,
        topk=config.moe_router_topk if experts else 1,
        expert_ffn_hidden_size=config.block_width if experts else 0,
        window=config.window_size or 0,
        windowed_layers=config.num_layers if config.window_size else 0,
        tied=config.share_embeddings_and_output_weights,
        attention_biases=config.add_qkv_bias,
        head_norms=config.qk_layernorm,
    )


def _block(width: int, inner: int, gated: bool) -> list[tuple[int, int]]:
    return [(width, (2 if gated else 1) * inner), (inner, width)]


def _size(matrices: list[tuple[int, int]]) -> int:
    return sum(inputs * outputs for inputs, outputs in matrices)
