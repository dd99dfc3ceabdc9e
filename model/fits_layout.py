"""Whether an architecture can be cut along a parallel layout. Pure arithmetic: nothing is built, torch is not imported.

Each rule is what megatron-core asserts somewhere in the building of layers, or gets wrong without saying so; here it is
said before any process starts, with a value that works.
"""

from __future__ import annotations

from foundation.errors import ConfigError
from model.config import ModelConfig
from parallel.layout import ParallelLayout


def check_model_fits_layout(model: ModelConfig, layout: ParallelLayout) -> None:
    """Refuse an architecture that `layout` cannot cut.

    Raises:
        ConfigError: names the field, the rule with its numbers and a value that works.
    """
    heads_divide_over_tensor_ranks(model, layout)
    query_groups_meet_tensor_ranks(model, layout)
    ffn_divides_over_tensor_ranks(model, layout)
    experts_divide_over_expert_ranks(model, layout)
    experts_over_tensor_ranks_need_sequence_parallel(model, layout)
    layout.stage_layers(model.num_layers)


def check_sequence_fits_layout(
    layout: ParallelLayout, *, seq_length: int, micro_batch_size: int = 1, packed: bool = False
) -> None:
    """Refuse a sequence that `layout` cannot cut.

    Args:
        layout: the grid.
        seq_length: tokens in one sequence.
        micro_batch_size: sequences in one forward pass.
        packed: whether a micro-batch is laid out as one row of all its tokens, as a document mask needs.

    Raises:
        ConfigError: names the field, the rule with its numbers and a value that works.
    """
    if layout.cp > 1:
        sequence_divides_over_context_ranks(layout, seq_length)
    elif layout.sequence_parallel:
        sequence_divides_over_tensor_ranks(layout, seq_length, micro_batch_size, packed)


def heads_divide_over_tensor_ranks(model: ModelConfig, layout: ParallelLayout) -> None:
    """Every tensor-parallel rank holds the same number of whole heads."""
    if model.num_attention_heads % layout.tp:
        raise _tensor_error(model, layout, f"divides model.num_attention_heads {model.num_attention_heads}")


def query_groups_meet_tensor_ranks(model: ModelConfig, layout: ParallelLayout) -> None:
    """Every rank holds whole key/value heads, or the same number of ranks shares each of them."""
    groups = model.query_groups
    if groups % layout.tp and layout.tp % groups:
        raise _tensor_error(model, layout, f"divides model.num_query_groups {groups}, or is a multiple of it")


def ffn_divides_over_tensor_ranks(model: ModelConfig, layout: ParallelLayout) -> None:
    """Every tensor-parallel rank holds the same number of feed-forward columns, of each expert where there are some."""
    if model.block_width % layout.tp:
        raise _tensor_error(model, layout, f"divides model.{_width_field(model)} {model.block_width}")


def experts_divide_over_expert_ranks(model: ModelConfig, layout: ParallelLayout) -> None:
    """Every expert-parallel rank holds the same number of whole experts (or its tensor-parallel part of each)."""
    experts, ranks = model.num_experts, layout.ep
    if ranks == 1:
        return
    if experts is None:
        raise ConfigError(
            "parallel.expert_model_parallel_size",
            ranks,
            rule="shares out experts, and this model has none: model.num_experts is not set",
            cure="parallel.expert_model_parallel_size=1",
        )
    if experts % ranks:
        works = max(size for size in range(1, ranks) if experts % size == 0 and layout.cp * layout.dp % size == 0)
        raise ConfigError(
            "parallel.expert_model_parallel_size",
            ranks,
            rule=f"divides model.num_experts {experts}",
            cure=f"parallel.expert_model_parallel_size={works}",
        )


def experts_over_tensor_ranks_need_sequence_parallel(model: ModelConfig, layout: ParallelLayout) -> None:
    """Tensor-parallel ranks route different tokens: with all of them on each, every expert would compute them twice."""
    if model.num_experts is not None and layout.tp > 1 and not layout.sequence_parallel:
        raise ConfigError(
            "parallel.sequence_parallel",
            False,
            rule=f"is true for a mixture of experts over {layout.tp} tensor-parallel ranks, which share out the tokens "
            "that they route",
            cure="parallel.sequence_parallel=true, or parallel.tensor_model_parallel_size=1",
        )


def sequence_divides_over_tensor_ranks(
    layout: ParallelLayout, seq_length: int, micro_batch_size: int, packed: bool
) -> None:
    """Sequence parallelism gives every tensor-parallel rank the same number of tokens of a row."""
    tokens = seq_length * (micro_batch_size if packed else 1)
    if tokens % layout.tp == 0:
        return
    shown = f"{micro_batch_size} x {seq_length} = {tokens} tokens" if packed else f"{seq_length} tokens"
    nearest = max(1, round(seq_length / layout.tp)) * layout.tp
    raise ConfigError(
        "training.seq_length",
        seq_length,
        rule=f"gives rows that parallel.tensor_model_parallel_size {layout.tp} divides under "
        f"parallel.sequence_parallel; a row has {shown}",
        cure=f"training.seq_length={nearest}, or parallel.sequence_parallel=false",
    )


def sequence_divides_over_context_ranks(layout: ParallelLayout, seq_length: int) -> None:
    """Every context-parallel rank holds two chunks of equal length, which sequence parallelism cuts further."""
    pieces = 2 * layout.cp * (layout.tp if layout.sequence_parallel else 1)
    if seq_length % pieces == 0:
        return
    shown = f"2 x parallel.context_parallel_size {layout.cp}"
    if layout.sequence_parallel:
        shown += f" x parallel.tensor_model_parallel_size {layout.tp} (parallel.sequence_parallel)"
    nearest = max(1, round(seq_length / pieces)) * pieces
    raise ConfigError(
        "training.seq_length",
        seq_length,
        rule=f"is divisible by {shown} = {pieces}",
        cure=f"training.seq_length={nearest}",
    )


def whole_sequences_where_attention_is_cut(model: ModelConfig, layout: ParallelLayout, *, packed: bool) -> None:
    """Context-parallel ranks share causal attention over whole sequences, and no other kind."""
    if layout.cp == 1:
        return
    for field, value, asked, cure in (
        ("model.window_size", model.window_size, model.window_size is not None, "model.window_size=null"),
        ("data.document_mask", packed, packed, "data.document_mask=false"),
        ("model.attention_dropout", model.attention_dropout, model.attention_dropout > 0, "model.attention_dropout=0"),
    ):
        if asked:
            raise ConfigError(
                field,
                value,
                rule=f"does not go with parallel.context_parallel_size {layout.cp}: the ring of blocks is causal over "
                "whole sequences, without dropout",
                cure=f"{cure}, or parallel.context_parallel_size=1",
            )


def fp8_sizes_are_multiples(
    model: ModelConfig, layout: ParallelLayout, *, seq_length: int, micro_batch_size: int, multiple_of: int
) -> None:
    """Every side of the FP8 matrix products of one rank is a multiple of `multiple_of` (others are refused there)."""
    tokens = seq_length * micro_batch_size // (layout.tp * layout.cp if layout.sequence_parallel else layout.cp)
    # A multiple for the whole model that makes each rank's share one.
    shares = multiple_of * layout.tp
    queries = model.num_attention_heads * model.head_width
    keys = model.query_groups * model.head_width
    sides = (
        ("model.hidden_size", model.hidden_size, multiple_of, "the residual stream"),
        (f"model.{_width_field(model)}", model.block_width, shares, "the feed-forward columns"),
        ("model.kv_channels", queries, shares, "the query channels"),
        ("model.kv_channels", keys, multiple_of * min(layout.tp, model.query_groups), "the key channels"),
        ("training.seq_length", tokens, multiple_of, "the tokens of one rank"),
    )
    for field, size, multiple, what in sides:
        if size % multiple:
            raise ConfigError(
                field,
                {"training.seq_length": seq_length, "model.kv_channels": model.head_width}.get(field, size),
                rule=f"makes {what} ({size}) a multiple of {multiple} under training.precision fp8",
                cure=f"training.precision=bf16, or sizes that are multiples of {multiple}",
            )


def _tensor_error(model: ModelConfig, layout: ParallelLayout, rule: str) -> ConfigError:
    works = max(size for size in range(1, layout.tp) if _tensor_size_works(model, size))
    cure = f"parallel.tensor_model_parallel_size={works}"
    if works == 1 and layout.sequence_parallel:
        cure += " with parallel.sequence_parallel=false"
    return ConfigError("parallel.tensor_model_parallel_size", layout.tp, rule=rule, cure=cure)


def _tensor_size_works(model: ModelConfig, size: int) -> bool:
    groups = model.query_groups
    over_groups = groups % size == 0 or size % groups == 0
    return model.num_attention_heads % size == 0 and over_groups and model.block_width % size == 0


def _width_field(model: ModelConfig) -> str:
    """The field that `block_width` comes from."""
    own = model.num_experts is not None and model.moe_ffn_hidden_size is not None
    return "moe_ffn_hidden_size" if own else "ffn_hidden_size"
