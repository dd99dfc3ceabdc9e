"""Everything that one rank trains with: its part of the model, gradients, optimizer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from megatron.core.optimizer import MegatronOptimizer

from model.config import ModelConfig
from model.core_config import Recompute, core_config
from model.decoder import Decoder, Head, build_decoder_chunks
from model.initialization import initialize
from model.kernels.choice import KernelChoice, where_sharded
from model.kernels.provider import kernels_here
from model.parameter_rows import ChunkRows
from parallel.data_parallel import WrappedChunk, wrap_in_data_parallel
from parallel.layout import ParallelLayout
from parallel.tensor_overlap import make_user_buffers
from training.config import OptimizerConfig, TrainingConfig
from training.optimizer import build_optimizer


@dataclass(frozen=True)
class TrainingState:
    """One rank's part of the run.

    Attributes:
        core: core's TransformerConfig.
        chunks: this stage's decoders, not wrapped.
        wrapped: the same, inside core's data parallelism.
        optimizer: core's, over all chunks.
        layout: the grid.
        vocab_size: the true vocabulary.
        kernels: the library of each operation.
        rows: where the rows of each chunk's parameters lie in the whole model; empty without ZeRO.
    """

    core: Any
    chunks: list[Decoder]
    wrapped: list[WrappedChunk]
    optimizer: MegatronOptimizer
    layout: ParallelLayout
    vocab_size: int
    kernels: KernelChoice
    rows: tuple[ChunkRows, ...] = ()


def build_state(
    model: ModelConfig,
    layout: ParallelLayout,
    training: TrainingConfig,
    optimizer: OptimizerConfig,
    vocab_size: int,
    prepare: Callable[[list[Decoder]], None] = lambda _: None,
    head: Head = "tokens",
    excluded_tokens: frozenset[int] = frozenset(),
) -> TrainingState:
    """Build and initialise; process groups have to be there. The function is the same at every layout.

    `prepare` may change the initial weights before the optimizer copies them. `head` and `excluded_tokens` are
    Decoder's.
    """
    kernels = kernels_here(model)
    if layout.fully_sharded:
        kernels = where_sharded(kernels, model)
    recompute = Recompute(training.recompute_granularity, training.recompute_num_layers)
    make_user_buffers(
        layout,
        tokens=training.seq_length * training.micro_batch_size // layout.cp,
        hidden_size=model.hidden_size,
        fp8=training.precision == "fp8",
        bf16=training.precision != "fp8" or training.fp8.first_last_layers_bf16,
    )
    core = core_config(model, layout, training.precision, kernels, recompute, training.fp8)
    chunks = build_decoder_chunks(model, core, layout, vocab_size, kernels, head, excluded_tokens)
    initialize(chunks, model, vocab_size, training.seed)
    prepare(chunks)
    rows = tuple(ChunkRows.of(chunk) for chunk in chunks) if layout.zero_stage else ()
    wrapped = wrap_in_data_parallel(chunks, core, layout)
    return TrainingState(
        core=core,
        chunks=chunks,
        wrapped=wrapped,
        optimizer=build_optimizer(optimizer, wrapped, core, layout),
        layout=layout,
        vocab_size=vocab_size,
        kernels=kernels,
        rows=rows,
    )
