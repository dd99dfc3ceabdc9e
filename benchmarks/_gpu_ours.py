"""Our training step for benchmarks.gpu."""

from __future__ import annotations

from typing import Any

import torch

from launch.config import RunConfig
from parallel.layout import ParallelLayout
from training.batch import DeviceBatch
from training.optimizer import apply_gradients, gradient_norm, set_learning_rate
from training.state import build_state
from training.step import BatchShape, run_batches


def our_side(config: RunConfig) -> tuple[Any, str]:
    """A step as the trainer makes it, and the kernels in words."""
    training, optimizer = config.training, config.optimizer
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
