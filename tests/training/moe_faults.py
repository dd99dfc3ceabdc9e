"""Faults of mixtures of experts, put into a run inside the rank processes. Each takes itself out again."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any
from unittest.mock import patch

import torch
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler
from megatron.core.transformer.moe.router import TopKRouter

import model.global_tensors
import model.initialization
import model.router
import training.state
from model.decoder import Decoder
from model.router import Router

MOE_FAULTS: dict[str, Callable[[], AbstractContextManager[Any]]] = {}


def fault(function: Callable[[], Iterator[None]]) -> Callable[[], Iterator[None]]:
    """Enter a generator that patches, yields and undoes under its name."""
    MOE_FAULTS[function.__name__] = contextmanager(function)
    return function


@fault
def load_balancing_scaled_as_in_core() -> Iterator[None]:
    """megatron-core 0.16.1 itself, without a padding mask: times the tokens of one tensor- or context-parallel rank."""

    def without_mask(self: Any, probs: Any, scores: Any, chosen: Any, with_padding_mask: bool) -> Any:
        return TopKRouter._apply_aux_loss(self, probs, scores, chosen)

    with patch.object(Router, "_apply_aux_loss", without_mask):
        yield


@fault
def z_loss_scaled_as_in_core() -> Iterator[None]:
    """megatron-core 0.16.1 itself: divided by tensor- and context-parallel ranks once too often."""
    with patch.object(Router, "apply_z_loss", TopKRouter.apply_z_loss):
        yield


@fault
def router_losses_divided_by_micro_batches() -> Iterator[None]:
    """By those of this replica, as if the main loss were a mean over each of them."""
    own = 8 // torch.distributed.get_world_size()  # for layouts of replicas only: groups are not there yet
    correct = MoEAuxLossAutoScaler.set_loss_scale

    def divided(scale: torch.Tensor) -> None:
        correct(scale / own)

    with patch.object(MoEAuxLossAutoScaler, "set_loss_scale", staticmethod(divided)):
        yield
    MoEAuxLossAutoScaler.main_loss_backward_scale = None


@fault
def micro_batches_balanced_alike() -> Iterator[None]:
    """Each counts as one of 8, however few of its tokens count. The same at every layout."""
    correct = MoEAuxLossAutoScaler.apply
    per_micro_batch = 16.0  # about the tokens that count on average

    def apply_once(
        self: Any, probs: torch.Tensor, scores: torch.Tensor, chosen: torch.Tensor, *_: Any, **__: Any
    ) -> Any:
        tokens = chosen.sum() / self.topk
        share = chosen.sum(dim=0) / chosen.sum()
        balance = self.num_experts * (scores.sum(dim=0) * share).sum() / tokens * per_micro_batch
        return correct(probs, self.get_aux_loss_coeff("aux_loss") * balance)

    with patch.object(Router, "_apply_aux_loss", apply_once):
        yield


@fault
def masked_tokens_balanced_too() -> Iterator[None]:
    with patch.object(Decoder, "_not_counted", lambda self, loss_mask: None):
        yield


@fault
def balanced_over_one_rank_alone() -> Iterator[None]:
    """Shares of the tokens of one tensor-parallel rank in place of the micro-batch's."""
    with patch.object(model.router, "reduce_from_tensor_model_parallel_region", lambda counts, group: counts):
        yield


@fault
def router_gradients_not_summed() -> Iterator[None]:
    """Over tensor-parallel ranks, which route different tokens."""
    correct = Router.__init__

    def unmarked(self: Any, *args: Any, **kwargs: Any) -> None:
        correct(self, *args, **kwargs)
        self.weight.sequence_parallel = False

    with patch.object(Router, "__init__", unmarked):
        yield


@fault
def expert_gradients_reduced_over_all_replicas() -> Iterator[None]:
    """Also over those that hold other experts."""
    correct = DistributedDataParallel.finish_grad_sync

    def finish(self: DistributedDataParallel, **options: Any) -> None:
        for group in self.expert_parallel_bucket_groups:
            group.data_parallel_group = parallel_state.get_data_parallel_group(with_context_parallel=True)
        correct(self, **options)

    with patch.object(DistributedDataParallel, "finish_grad_sync", finish):
        yield


@fault
def expert_gradients_not_reduced() -> Iterator[None]:
    correct = DistributedDataParallel.finish_grad_sync

    def finish(self: DistributedDataParallel, **options: Any) -> None:
        groups, self.expert_parallel_bucket_groups = self.expert_parallel_bucket_groups, []
        correct(self, **options)
        self.expert_parallel_bucket_groups = groups

    with patch.object(DistributedDataParallel, "finish_grad_sync", finish):
        yield


@fault
def experts_initialised_by_local_index() -> Iterator[None]:
    """Every expert-parallel rank draws the weights of the first one's experts."""
    initialize, name = vars(training.state)["initialize"], model.global_tensors._name

    def by_local_index(chunks: list[Any], config: Any, *rest: Any) -> None:
        local = config.num_experts // parallel_state.get_expert_model_parallel_world_size()

        def named(key: str, indices: tuple[int, ...]) -> str:
            return name(key, (*indices[:1], *(index % local for index in indices[1:])))

        with patch.object(model.global_tensors, "_name", named):
            initialize(chunks, config, *rest)

    with patch.object(training.state, "initialize", by_local_index):
        yield
