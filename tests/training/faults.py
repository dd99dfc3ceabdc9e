"""Faults put into a run on purpose, inside the rank processes. Each takes itself out again.

What they break is what parallel training is most easily wrong in; `test_faults_are_seen` shows that each is seen.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from types import ModuleType
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel
from megatron.core.distributed import finalize_model_grads as core_finalize
from megatron.core.packed_seq_params import PackedSeqParams

import model.decoder
import model.global_tensors
import model.initialization
import model.kernels.attention
import model.kernels.norm
import training.batch
import training.objective
import training.parity
import training.state
import training.whole_model
from model.decoder import Decoder
from parallel.layout import ParallelLayout
from tests.training.parity_cases import UnevenBatches, run_case
from training.parity import ParityRecord

Fault = Callable[[], AbstractContextManager[Any]]
FAULTS: dict[str, Fault] = {}


def fault(function: Callable[[], Iterator[None]]) -> Callable[[], Iterator[None]]:
    """Enter a generator that patches, yields and undoes under its name."""
    FAULTS[function.__name__] = contextmanager(function)
    return function


def run_with(name: str | None, layout: ParallelLayout, case: dict[str, Any]) -> ParityRecord | None:
    """A cell of the parity tests with the fault `name` in it, or without one. On the ranks of a pool."""
    with FAULTS[name]() if name is not None else ExitStack():
        return run_case(layout=layout, **case)


def _found_in(module: ModuleType, name: str) -> Any:
    """What `module` imported as `name`: there it has to be replaced."""
    return getattr(module, name)


@fault
def loss_normalised_per_micro_batch() -> Iterator[None]:
    """The mean over each micro-batch, then over micro-batches: those with few tokens weigh too much."""
    correct = training.objective._masked_sum

    def mean(mask: torch.Tensor, losses: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        total, tokens, shown = correct(mask, losses)
        return total / tokens, torch.ones_like(tokens), shown

    with patch.object(training.objective, "_masked_sum", mean):
        yield


@fault
def loss_mask_ignored() -> Iterator[None]:
    correct = training.objective._masked_sum
    with patch.object(training.objective, "_masked_sum", lambda mask, losses: correct(torch.ones_like(mask), losses)):
        yield


@fault
def tokens_not_counted_over_replicas() -> Iterator[None]:
    """Each replica divides by its own tokens. Without overlap the reduction has happened by then."""

    def finalize(chunks: list[Any], num_tokens: torch.Tensor, **groups: Any) -> None:
        core_finalize(chunks, None, **groups)
        for chunk in chunks:
            chunk.scale_gradients(1.0 / num_tokens)

    with _finalized_by(finalize):
        yield


@fault
def tokens_counted_over_the_wrong_group() -> Iterator[None]:
    """Over tensor-parallel ranks too, which hold the same tokens."""

    def finalize(chunks: list[Any], num_tokens: torch.Tensor, **groups: Any) -> None:
        dist.all_reduce(num_tokens, group=parallel_state.get_tensor_model_parallel_group())
        core_finalize(chunks, num_tokens, **groups)

    with _finalized_by(finalize):
        yield


@contextmanager
def _finalized_by(finalize: Callable[..., None]) -> Iterator[None]:
    correct = _found_in(training.state, "wrap_in_data_parallel")

    def wrap(chunks: list[Any], core: Any, layout: ParallelLayout) -> Any:
        wrapped = correct(chunks, core, layout)
        core.finalize_model_grads_func = finalize
        return wrapped

    with patch.object(training.state, "wrap_in_data_parallel", wrap):
        yield


@fault
def sequence_parallel_norms_not_summed() -> Iterator[None]:
    correct = model.kernels.norm.RMSNorm.__init__

    def unmarked(self: Any, *args: Any, **kwargs: Any) -> None:
        correct(self, *args, **kwargs)
        self.weight.sequence_parallel = False

    with patch.object(model.kernels.norm.RMSNorm, "__init__", unmarked):
        yield


@fault
def qk_norms_not_summed() -> Iterator[None]:
    with _core_skips("_allreduce_non_tensor_model_parallel_grads"):
        yield


@fault
def tied_embeddings_not_summed() -> Iterator[None]:
    with _core_skips("_allreduce_word_embedding_grads"):
        yield


@contextmanager
def _core_skips(name: str) -> Iterator[None]:
    # patch by the function's own namespace: in core.distributed the module's name means the function
    with patch.dict(core_finalize.__globals__, {name: lambda *args, **kwargs: None}):
        yield


@fault
def attention_sees_the_future() -> Iterator[None]:
    correct = _found_in(model.kernels.attention, "scaled_dot_product_attention")

    def uncausal(*args: Any, **kwargs: Any) -> Any:
        return correct(*args, **(kwargs | {"is_causal": False}))

    with patch.object(model.kernels.attention, "scaled_dot_product_attention", uncausal):
        yield


@fault
def window_ignored() -> Iterator[None]:
    correct = model.kernels.attention.TorchAttention.__init__

    def whole(self: Any, *args: Any, **kwargs: Any) -> None:
        correct(self, *args, **kwargs)
        self.window = None

    with patch.object(model.kernels.attention.TorchAttention, "__init__", whole):
        yield


@fault
def document_borders_ignored() -> Iterator[None]:
    """Positions restart, attention does not."""
    correct = training.batch._packed

    def one_document(lengths: tuple[int, ...], device: torch.device) -> PackedSeqParams:
        return correct((sum(lengths),), device)

    with patch.object(training.batch, "_packed", one_document):
        yield


@fault
def positions_not_reset_on_later_stages() -> Iterator[None]:
    correct = Decoder.forward

    def forward(self: Decoder, tokens: torch.Tensor, position_ids: torch.Tensor | None = None, **rest: Any) -> Any:
        return correct(self, tokens, position_ids if self.pre_process else None, **rest)

    with patch.object(Decoder, "forward", forward):
        yield


@fault
def padding_takes_probability() -> Iterator[None]:
    """As in core's own loss."""
    correct = _found_in(model.decoder, "vocab_parallel_cross_entropy")

    def over_all_rows(logits: torch.Tensor, labels: torch.Tensor, vocab_size: int, group: Any) -> Any:
        return correct(logits, labels, logits.shape[-1] * group.size(), group)

    with patch.object(model.decoder, "vocab_parallel_cross_entropy", over_all_rows):
        yield


@fault
def padding_takes_probability_unchecked() -> Iterator[None]:
    """So that the loss itself has to show it."""
    with FAULTS["padding_takes_probability"](), _padding_unchecked():
        yield


@contextmanager
def _padding_unchecked() -> Iterator[None]:
    """Without the check that gradients of padding are zero, which stops a run before anything is compared."""

    def cut(name: str, tensor: torch.Tensor, vocab_size: int) -> torch.Tensor:
        return tensor[:vocab_size] if name in model.initialization.VOCABULARY_TENSORS else tensor

    with patch.object(training.whole_model, "_without_padding", cut):
        yield


@fault
def gate_and_up_cut_as_one() -> Iterator[None]:
    """Rank r takes rows r, r+1, ... of [gate; up] in one piece, as of any other matrix."""
    correct = model.global_tensors.parts_of

    def contiguous(entry: Any, tensor: torch.Tensor) -> list[Any]:
        parts = correct(entry, tensor)
        if "linear_fc1.weight" not in entry.key or len(parts) == 1:
            return parts
        rank, rows = parallel_state.get_tensor_model_parallel_rank(), parts[0].data.shape[0]
        for number, part in enumerate(parts):
            *stacked, _, column = part.global_offset
            part.global_offset = (*stacked, (2 * rank + number) * rows, column)
        return parts

    with patch.object(model.global_tensors, "parts_of", contiguous):
        yield


@fault
def weights_seeded_by_rank() -> Iterator[None]:
    correct = model.initialization._stream_key
    rank = dist.get_rank()
    with patch.object(model.initialization, "_stream_key", lambda name, seed: correct(name, seed + rank)):
        yield


@fault
def gradients_not_reduced_over_replicas() -> Iterator[None]:
    with patch.object(DistributedDataParallel, "finish_grad_sync", lambda self, **_: None):
        yield


@fault
def buckets_never_sent() -> Iterator[None]:
    """With overlap: gradients stay where they are, as if every micro-batch were not the last."""
    with (
        patch.object(DistributedDataParallel, "start_grad_sync", lambda self, **_: None),
        patch.object(DistributedDataParallel, "finish_grad_sync", lambda self, **_: None),
    ):
        yield


@fault
def gradients_scattered_over_the_wrong_group() -> Iterator[None]:
    """ZeRO's reduce-scatter over tensor-parallel ranks in place of replicas, both being two."""
    correct = DistributedDataParallel.finish_grad_sync

    def finish(self: DistributedDataParallel, **options: Any) -> None:
        for group in self.bucket_groups:
            group.intra_distributed_optimizer_instance_group = parallel_state.get_tensor_model_parallel_group()
        correct(self, **options)

    with patch.object(DistributedDataParallel, "finish_grad_sync", finish), _padding_unchecked():
        yield


@fault
def updated_shards_not_gathered() -> Iterator[None]:
    """ZeRO: each replica goes on with old weights outside its own shard."""
    with patch.object(DistributedDataParallel, "start_param_sync", lambda self, *_, **__: None):
        yield


@fault
def norm_counts_tensor_rank_0_only() -> Iterator[None]:
    """What core does to weights that it did not initialise itself: they lack the mark of tensor parallelism."""
    correct = _found_in(training.state, "build_optimizer")

    def unmarked(config: Any, wrapped: list[Any], *rest: Any) -> Any:
        for chunk in wrapped:
            for parameter in chunk.parameters():
                parameter.tensor_model_parallel = False
        return correct(config, wrapped, *rest)

    with patch.object(training.state, "build_optimizer", unmarked):
        yield


@fault
def replicas_read_the_same() -> Iterator[None]:
    correct = UnevenBatches.__call__
    with patch.object(UnevenBatches, "__call__", lambda self, step, rank, ranks: correct(self, step, 0, ranks)):
        yield


@fault
def decay_on_norms_and_biases() -> Iterator[None]:
    """Core leaves `wd_mult` to whoever schedules. The same at every layout: only a reference of torch's shows it."""
    correct = _found_in(training.parity, "set_learning_rate")

    def everywhere(optimizer: Any, rate: float, weight_decay: float) -> None:
        correct(optimizer, rate, weight_decay)
        for group in optimizer.param_groups:
            group["weight_decay"] = weight_decay

    with patch.object(training.parity, "set_learning_rate", everywhere):
        yield
