"""The `model` section: the architecture of a decoder, independent of how it is spread over ranks."""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from foundation.errors import ConfigError
from foundation.section import Section
from model.presets import preset_fields

Size = Annotated[int, Field(strict=True, ge=1)]
Flag = Annotated[bool, Field(strict=True)]
Positive = Annotated[float, Field(strict=True, gt=0, allow_inf_nan=False)]
Probability = Annotated[float, Field(strict=True, ge=0, lt=1)]
RETUNED = frozenset(
    {
        *("preset", "kernels", "kernel_overrides", "hidden_dropout", "attention_dropout", "moe_token_dispatcher_type"),
        *("moe_router_load_balancing_type", "moe_aux_loss_coeff", "moe_z_loss_coeff"),
    }
)
"""Fields of the model that may change between runs: they change how it learns or computes, not what it is."""

Coefficient = Annotated[float, Field(strict=True, ge=0, allow_inf_nan=False)]


class RopeScaling(Section):
    """How rotary frequencies are stretched beyond the length that the model was first trained on."""

    kind: Literal["linear", "llama3", "yarn"] = Field(examples=["llama3"])
    """linear: all frequencies divided by factor (arXiv 2306.15595). llama3: low frequencies only, blended
    (arXiv 2407.21783). yarn: by band, with attention scaled (arXiv 2309.00071)."""

    factor: Annotated[float, Field(strict=True, ge=1, allow_inf_nan=False)] = Field(examples=[8.0])
    """How many times longer than the original length, 1 or more."""

    low_freq_factor: Positive = 1.0
    """llama3: wavelengths above original length / this are fully stretched."""

    high_freq_factor: Positive = 4.0
    """llama3: wavelengths below original length / this stay as they are."""

    original_max_position_embeddings: Size | None = None
    """Tokens that the model was first trained on. llama3 and yarn need it."""

    beta_fast: Positive = 32.0
    """yarn: rotations within the original length above which a frequency stays as it is."""

    beta_slow: Positive = 1.0
    """yarn: rotations within the original length below which a frequency is fully stretched."""

    mscale: Positive | None = None
    """yarn: numerator of the attention scale (0.1 mscale ln factor + 1). None: 1 where mscale_all_dim is None too."""

    mscale_all_dim: Positive | None = None
    """yarn: denominator of the attention scale, the same formula. None: none."""

    attention_factor: Positive | None = None
    """yarn: the attention scale itself, in place of the one computed. None: computed."""

    @model_validator(mode="after")
    def _keep_the_rules(self) -> Self:
        _low_frequencies_below_high(self)
        _yarn_slow_below_fast(self)
        _original_length_is_known(self)
        return self


Kernel = Literal["transformer_engine", "apex", "torch"] | None


class KernelOverrides(Section):
    """The library of single operations, over what `model.kernels` chooses. None: as chosen."""

    linear: Literal["transformer_engine", "torch"] | None = None
    """Matrix products of the layers."""

    norm: Kernel = None
    """RMSNorm; one module with the product behind it where both are transformer_engine's."""

    attention: Literal["transformer_engine", "torch"] | None = None
    """Scores, softmax and weighted sum. torch: its fused attention, on a GPU cuDNN's or flash."""

    rope: Literal["transformer_engine", "torch"] | None = None
    """Rotary position embeddings."""

    swiglu: Literal["transformer_engine", "torch"] | None = None
    """silu(gate) * up. torch: compiled on a GPU."""

    cross_entropy: Literal["torch"] | None = None
    """The loss. Only torch's leaves out entries that pad the vocabulary."""

    adam: Kernel = None
    """The optimizer's update."""

    l2norm: Kernel = None
    """The norm of all gradients."""

    weight_gradient: Kernel = None
    """Adds a weight's gradient into its sum inside the matrix product. On a CPU nobody does unless torch is asked."""


class ModelConfig(Section):
    """A Llama-family decoder: RMSNorm, rotary embeddings, grouped-query attention, SwiGLU or a mixture of them.

    With `preset`, that architecture's fields are filled in and the ones given beside it override them.
    """

    preset: str | None = None
    """A published architecture that fills in the fields not given here; `orthant model` lists them."""

    num_layers: Size = Field(examples=[32])
    """Decoder layers."""

    hidden_size: Size = Field(examples=[4096])
    """Width of the residual stream."""

    ffn_hidden_size: Size = Field(examples=[14336])
    """Inner width of the feed-forward block (of gate and of up, each); of an expert's where moe_ffn_hidden_size is
    None."""

    num_attention_heads: Size = Field(examples=[32])
    """Query heads."""

    num_query_groups: Size | None = None
    """Key/value heads, each shared by num_attention_heads / num_query_groups query heads. None: one per query head."""

    kv_channels: Size | None = None
    """Width of one head. None: hidden_size / num_attention_heads."""

    vocab_size: Size | None = None
    """The true vocabulary: rows of the embedding that stand for a token. None: the tokenizer's."""

    make_vocab_size_divisible_by: Size = 128
    """The embedding gets rows that stand for nothing until their number is divisible by this and by the
    tensor-parallel ranks."""

    max_position_embeddings: Size = 4096
    """The longest sequence, in tokens."""

    rotary_base: Annotated[float, Field(strict=True, gt=1, allow_inf_nan=False)] = 10000.0
    """Base of the rotary frequencies (theta)."""

    rope_scaling: RopeScaling | None = None
    """Stretching of the rotary frequencies. None: none."""

    layernorm_epsilon: Positive = 1e-5
    """Added to the mean square in RMSNorm."""

    qk_layernorm: Flag = False
    """RMSNorm over each query and key head before the rotation (Qwen 3)."""

    add_qkv_bias: Flag = False
    """A bias in the query, key and value projections (Qwen 2.5)."""

    share_embeddings_and_output_weights: Flag = False
    """One matrix for the embedding and the output layer."""

    window_size: Size | None = None
    """Sliding window: tokens that each query sees, itself included. None: all before it."""

    num_experts: Size | None = None
    """Feed-forward blocks of every layer, of which a router chooses some for each token (Mixtral, Qwen 3 MoE).
    None: one block, no router. No token is ever dropped: experts have no capacity limit."""

    moe_router_topk: Size = 2
    """Experts that each token goes to."""

    moe_ffn_hidden_size: Size | None = None
    """Inner width of an expert. None: ffn_hidden_size."""

    moe_router_pre_softmax: Flag = False
    """false: softmax over the logits of the chosen experts, whose weights add up to 1 (Mixtral; Qwen 3 MoE, which
    renormalises). true: softmax over all experts, and the chosen keep their part of it (OLMoE)."""

    moe_router_load_balancing_type: Literal["aux_loss", "none"] = "aux_loss"
    """aux_loss: a loss that pushes towards equal use of the experts (arXiv 2101.03961), for each layer and micro-batch
    over the tokens that count in its loss. It is num_experts x the sum over experts of (share of choices) x (mean
    probability): 1 where all are used alike."""

    moe_aux_loss_coeff: Coefficient = 0.0
    """Weight of that loss, added for every layer to the mean loss of a token. 0: off."""

    moe_z_loss_coeff: Positive | None = None
    """Weight of the mean over tokens of logsumexp(router logits) squared (arXiv 2202.08906), added for every layer.
    None: off."""

    moe_token_dispatcher_type: Literal["alltoall", "allgather"] = "alltoall"
    """How tokens travel to their experts: each to the ranks that need it, or all to all ranks."""

    init_method_std: Positive = 0.02
    """Standard deviation of initial weights; output projections get it divided by sqrt(2 x num_layers)."""

    hidden_dropout: Probability = 0.0
    """Dropout on the residual stream."""

    attention_dropout: Probability = 0.0
    """Dropout on attention weights."""

    kernels: Literal["auto", "torch", "transformer_engine"] = "auto"
    """What computes the layers. auto: for each operation the first of transformer_engine, apex and torch that is
    installed and has it, on a GPU; torch on a CPU. `orthant doctor` shows what that is here."""

    kernel_overrides: KernelOverrides = KernelOverrides()
    """Another library for single operations."""

    @model_validator(mode="before")
    @classmethod
    def _fill_from_preset(cls, given: Any) -> Any:
        if not isinstance(given, dict) or given.get("preset") is None:
            return given
        return over_preset(given)

    @model_validator(mode="after")
    def _keep_the_rules(self) -> Self:
        _heads_divisible_by_query_groups(self)
        _hidden_divisible_by_heads_without_kv_channels(self)
        _head_width_even_for_rotary(self)
        _expert_fields_need_experts(self)
        if self.num_experts is not None:
            _topk_at_most_experts(self, self.num_experts)
            _one_expert_keeps_its_probability(self)
            _balancing_has_a_kind(self)
        return self

    @classmethod
    def from_preset(cls, name: str, **fields: Any) -> Self:
        """The architecture `name` with `fields` in place of its own.

        Raises:
            ConfigError: no such preset, or a rule of this section is broken.
        """
        return cls.model_validate({"preset": name, **fields})

    @property
    def query_groups(self) -> int:
        """Key/value heads, resolved."""
        return self.num_attention_heads if self.num_query_groups is None else self.num_query_groups

    @property
    def head_width(self) -> int:
        """Width of one head (core's kv_channels), resolved."""
        return self.hidden_size // self.num_attention_heads if self.kv_channels is None else self.kv_channels

    @property
    def block_width(self) -> int:
        """Inner width of one feed-forward block: of an expert, or of the only block."""
        if self.num_experts is None or self.moe_ffn_hidden_size is None:
            return self.ffn_hidden_size
        return self.moe_ffn_hidden_size

    def padded_vocab_size(self, vocab_size: int, tensor_model_parallel_size: int) -> int:
        """Rows of the embedding for a true vocabulary of `vocab_size`.

        The least multiple of make_vocab_size_divisible_by and of the tensor-parallel ranks both. (Megatron-LM takes
        the product of the two, so there the embedding's shape changes with nearly every layout; the least common
        multiple is the same for all layouts of 1, 2, 4 ... 128 ranks at the default of 128.)
        """
        multiple = math.lcm(self.make_vocab_size_divisible_by, tensor_model_parallel_size)
        return -(-vocab_size // multiple) * multiple


def over_preset(given: dict[str, Any]) -> dict[str, Any]:
    """`given` laid over the fields of the preset that it names; `rope_scaling` of the same kind is laid over too.

    Raises:
        ConfigError: no such preset.
    """
    fields = preset_fields(given["preset"])
    merged = fields | given
    below, above = fields.get("rope_scaling"), given.get("rope_scaling")
    if isinstance(below, dict) and isinstance(above, dict) and above.get("kind", below["kind"]) == below["kind"]:
        merged["rope_scaling"] = below | above
    return merged


def _low_frequencies_below_high(scaling: RopeScaling) -> None:
    if scaling.kind == "llama3" and scaling.low_freq_factor >= scaling.high_freq_factor:
        raise ConfigError(
            "model.rope_scaling.low_freq_factor",
            scaling.low_freq_factor,
            rule=f"is below model.rope_scaling.high_freq_factor {scaling.high_freq_factor}",
            cure=f"model.rope_scaling.low_freq_factor={scaling.high_freq_factor / 4}",
        )


def _yarn_slow_below_fast(scaling: RopeScaling) -> None:
    if scaling.kind == "yarn" and scaling.beta_slow >= scaling.beta_fast:
        raise ConfigError(
            "model.rope_scaling.beta_slow",
            scaling.beta_slow,
            rule=f"is below model.rope_scaling.beta_fast {scaling.beta_fast}",
            cure=f"model.rope_scaling.beta_slow={scaling.beta_fast / 32}",
        )


def _original_length_is_known(scaling: RopeScaling) -> None:
    if scaling.kind in ("llama3", "yarn") and scaling.original_max_position_embeddings is None:
        raise ConfigError(
            "model.rope_scaling.original_max_position_embeddings",
            None,
            rule=f"is needed by kind {scaling.kind}: the tokens that the model was first trained on",
            cure="model.rope_scaling.original_max_position_embeddings=8192 (Llama 3's)",
        )


def _heads_divisible_by_query_groups(config: ModelConfig) -> None:
    heads, groups = config.num_attention_heads, config.query_groups
    if heads % groups:
        largest = max(size for size in range(1, min(groups, heads) + 1) if heads % size == 0)
        raise ConfigError(
            "model.num_query_groups",
            groups,
            rule=f"divides model.num_attention_heads {heads}",
            cure=f"model.num_query_groups={largest}",
        )


def _hidden_divisible_by_heads_without_kv_channels(config: ModelConfig) -> None:
    hidden, heads = config.hidden_size, config.num_attention_heads
    if config.kv_channels is None and hidden % heads:
        raise ConfigError(
            "model.hidden_size",
            hidden,
            rule=f"is divisible by model.num_attention_heads {heads} where model.kv_channels is not given",
            cure=f"model.hidden_size={-(-hidden // (2 * heads)) * 2 * heads}",
        )


def _head_width_even_for_rotary(config: ModelConfig) -> None:
    width = config.head_width
    if width % 2 == 0:
        return
    rule = f"gives heads of {width} channels, and rotary embeddings turn channels in pairs: an even number"
    if config.kv_channels is not None:
        raise ConfigError("model.kv_channels", width, rule=rule, cure=f"model.kv_channels={width + 1}")
    heads = config.num_attention_heads
    raise ConfigError(
        "model.hidden_size",
        config.hidden_size,
        rule=f"over model.num_attention_heads {heads} {rule}",
        cure=f"model.hidden_size={heads * (width + 1)}",
    )


def _expert_fields_need_experts(config: ModelConfig) -> None:
    """A field of the mixture that would change nothing."""
    if config.num_experts is not None:
        return
    for name, field in ModelConfig.model_fields.items():
        value = getattr(config, name)
        if name.startswith("moe_") and value != field.default:
            raise ConfigError(
                f"model.{name}",
                value,
                rule="belongs to a mixture of experts, and model.num_experts is not set",
                cure=f"model.num_experts=8, or no model.{name}",
            )


def _topk_at_most_experts(config: ModelConfig, experts: int) -> None:
    if config.moe_router_topk > experts:
        raise ConfigError(
            "model.moe_router_topk",
            config.moe_router_topk,
            rule=f"is at most model.num_experts {experts}",
            cure=f"model.moe_router_topk={min(2, experts)}",
        )


def _one_expert_keeps_its_probability(config: ModelConfig) -> None:
    if config.moe_router_topk == 1 and not config.moe_router_pre_softmax:
        raise ConfigError(
            "model.moe_router_topk",
            1,
            rule="with model.moe_router_pre_softmax false gives every chosen expert the weight 1, whatever the router "
            "says: it would not learn",
            cure="model.moe_router_pre_softmax=true, or model.moe_router_topk=2",
        )


def _balancing_has_a_kind(config: ModelConfig) -> None:
    if config.moe_router_load_balancing_type == "none" and config.moe_aux_loss_coeff > 0:
        raise ConfigError(
            "model.moe_aux_loss_coeff",
            config.moe_aux_loss_coeff,
            rule="weighs a loss that model.moe_router_load_balancing_type none leaves out",
            cure="model.moe_aux_loss_coeff=0.0, or model.moe_router_load_balancing_type=aux_loss",
        )
