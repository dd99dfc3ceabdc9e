"""Loss on held-out data."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from training.batch import DeviceBatch
from training.objective import BatchShape, Objective
from training.state import TrainingState
from training.step import NEXT_TOKEN, BatchLoss, run_batches


def validation_loss(
    state: TrainingState,
    batches_of: Callable[[int], Iterator[DeviceBatch]],
    shape: BatchShape,
    global_batches: int,
    objective: Objective = NEXT_TOKEN,
) -> BatchLoss:
    """Means over the first `global_batches` batches of the held-out data; the same ones every time. Collective.

    Args:
        batches_of: this replica's micro-batches of a global batch.
    """
    for chunk in state.wrapped:
        chunk.eval()
    losses = [
        run_batches(
            state.wrapped, [batches_of(batch) for _ in state.wrapped], shape, forward_only=True, objective=objective
        )
        for batch in range(global_batches)
    ]
    for chunk in state.wrapped:
        chunk.train()
    tokens = sum(loss.tokens for loss in losses)
    further = {
        name: sum(loss.further[name] * loss.tokens for loss in losses) / max(1, tokens) for name in objective.further
    }
    return BatchLoss(sum(loss.mean * loss.tokens for loss in losses) / max(1, tokens), tokens, further=further)
