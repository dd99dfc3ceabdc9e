"""Our training step for benchmarks.gpu."""

from __future__ import annotations

from typing import Any
from unittest.mock import patch

import torch

from launch.config import RunConfig
from parallel.layout import ParallelLayout
from training.batch import DeviceBatch
from training.optimizer import apply_gradients, gradient_norm, set_learning_rate
from training.state import build_state
from training.step import BatchShape, run_batches


@torch.no_grad()
def drawn_on_device(chunks: list[Any], *_: Any) -> None:
    """Weights of the usual size, drawn where they lie: ours, the same at every layout, would take a minute a case."""
    for chunk in chunks:
        for parameter in chunk.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0.0, 0.02)
            else:
                parameter.fill_(1.0)


def our_side(config: RunConfig) -> tuple[Any, str]:
    """A step as the trainer makes it, and the kernels in words."""
    training, optimizer = config.training, config.optimizer
    with patch("training.state.initialize", drawn_on_device):
        state = build_state(config.model, ParallelLayout(), training, optimizer, config.model.vocab_size or 1)

    def step(batches: list[tuple[torch.Tensor, torch.Tensor]]) -> float:
        for chunk in state.wrapped:
            chunk.zero_grad_buffer()
        state.optimizer.zero_grad()
        set_learning_rate(state.optimizer, optimizer.lr, optimizer.weight_decay)
        local = [
            DeviceBatch(tokens, labels, torch.ones(tokens.shape, device=tokens.device), None, None, number)
            for number, (tokens, labels) in enumerate(batches)
        ]
        shape = BatchShape.of(len(local), training.micro_batch_size, training.seq_length, packed=False)
        loss = run_batches(state.wrapped, [iter(local)], shape, forward_only=False)
        apply_gradients(state.optimizer, gradient_norm(state.optimizer), optimizer.clip_grad)
        return loss.mean

    return step, state.kernels.describe()
