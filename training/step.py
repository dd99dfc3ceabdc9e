"""Forward and backward over the micro-batches of a step, through core's pipeline schedules."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from megatron.core.pipeline_parallel import get_forward_backward_func

from model.dropout_streams import seed_streams
from model.router import take_router_sums
from parallel.groups import sum_over_all_ranks, sum_over_batch_and_show_all_stages
from parallel.platform import current_platform
from training.batch import DeviceBatch
from training.objective import BatchShape, NextToken, Objective

__all__ = ["BatchLoss", "BatchShape", "run_batches"]

NEXT_TOKEN = NextToken()


@dataclass(frozen=True)
class BatchLoss:
    """Over all tokens of a global batch that count; equal on every rank.

    Attributes:
        mean: nats a token.
        tokens: how many counted.
        load_balancing: the routers' loss, not weighted, mean over layers and tokens: 1 where all experts are used
            alike. None without it, and where nothing is trained.
        router_z: the same of their z-loss.
        further: means of what the objective sums up beside the loss.
    """

    mean: float
    tokens: int
    load_balancing: float | None = None
    router_z: float | None = None
    further: Mapping[str, float] = field(default_factory=dict)


def run_batches(
    wrapped: list[Any],
    batches: list[Iterator[DeviceBatch]],
    shape: BatchShape,
    *,
    forward_only: bool,
    dropout_seed: int = 0,
    objective: Objective = NEXT_TOKEN,
) -> BatchLoss:
    """Run one global batch; without `forward_only` gradients end reduced, divided by the batch's tokens.

    Args:
        wrapped: this rank's model chunks.
        batches: an iterator over the micro-batches of this replica, one for each chunk.
        dropout_seed: with a micro-batch's number it gives the streams that dropout draws from.
        objective: what is minimised.
    """
    schedule = get_forward_backward_func()
    with current_platform().device_rng():
        losses = schedule(
            forward_step_func=partial(_forward_step, dropout_seed, objective),
            data_iterator=batches if len(batches) > 1 else batches[0],
            model=wrapped if len(wrapped) > 1 else wrapped[0],
            num_microbatches=shape.micro_batches,
            seq_length=shape.seq_length,
            micro_batch_size=shape.micro_batch_size,
            forward_only=forward_only,
        )
    sums = 2 + len(objective.further)  # loss, tokens, and what else the objective counts
    counted = torch.zeros(sums, dtype=torch.float64, device=torch.cuda.current_device())
    for loss in losses:
        counted += loss
    total, tokens, *others = sum_over_batch_and_show_all_stages(counted).tolist()
    balance, router_z = (None, None) if forward_only else _router_losses(wrapped, tokens)
    means = [value / tokens if tokens else 0.0 for value in (total, *others)]
    further = dict(zip(objective.further, means[1:], strict=True))
    return BatchLoss(means[0], int(tokens), balance, router_z, further)


def _router_losses(wrapped: list[Any], tokens: float) -> tuple[float | None, float | None]:
    """What routers summed up in the batch, as means over layers and tokens; None for those that are off."""
    sums = take_router_sums(wrapped)
    if sums is None:
        return None, None
    core = wrapped[0].config
    # Every token is in one rank's sums: tensor-parallel ranks share them out (sequence parallelism).
    whole = sum_over_all_ranks(sums.to(torch.cuda.current_device())) / (max(1.0, tokens) * core.num_layers)
    balance, router_z = whole.tolist()
    return balance if core.moe_aux_loss_coeff > 0 else None, router_z if core.moe_z_loss_coeff is not None else None


def _forward_step(
    dropout_seed: int, objective: Objective, batches: Iterator[DeviceBatch], chunk: Any
) -> tuple[torch.Tensor, Any]:
    batch = next(batches)
    seed_streams(dropout_seed, batch.number)
    return objective.forward(chunk, batch)
