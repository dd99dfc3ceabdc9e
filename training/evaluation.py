"""Loss on held-out data."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from training.batch import DeviceBatch
from training.state import TrainingState
from training.step import BatchShape, run_batches


def validation_loss(
    state: TrainingState, batches_of: Callable[[int], Iterator[DeviceBatch]], shape: BatchShape, global_batches: int
) -> float:
    """Nats a token over the first `global_batches` batches of the held-out data; the same ones every time. Collective.

    Args:
        batches_of: this replica's micro-batches of a global batch.
    """
    for chunk in state.wrapped:
        chunk.eval()
    total, tokens = 0.0, 0
    for batch in range(global_batches):
        loss = run_batches(state.wrapped, [batches_of(batch) for _ in state.wrapped], shape, forward_only=True)
        total += loss.mean * loss.tokens
        tokens += loss.tokens
    for chunk in state.wrapped:
        chunk.train()
    return total / max(1, tokens)
