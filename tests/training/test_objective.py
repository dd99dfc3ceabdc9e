"""What a micro-batch's loss is a sum of, and the shapes that pipelines are told."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from data.batches import MicroBatch
from training.objective import BatchShape, NextToken


def test_the_loss_is_a_sum_over_tokens_that_count_with_their_number() -> None:
    losses = torch.tensor([[1.0, 2.0, 4.0], [8.0, 16.0, 32.0]], requires_grad=True)
    mask = torch.tensor([[1.0, 0.0, 1.0], [0.0, 0.0, 1.0]])
    batch: Any = SimpleNamespace(tokens=1, position_ids=2, labels=3, packed_seq_params=4, loss_mask=mask)

    def stage(**given: Any) -> torch.Tensor:
        assert given == vars(batch)
        return losses

    output, loss = NextToken().forward(stage, batch)
    total, count, shown = loss(output)
    assert (float(total), int(count), shown.tolist()) == (37.0, 3, [37.0, 3.0])
    assert count.dtype == torch.int and shown.dtype == torch.float64 and not shown.requires_grad
    total.backward()
    assert losses.grad is not None and torch.equal(losses.grad, mask)
    assert NextToken().further == ()


def test_a_micro_batch_comes_with_its_share_of_the_context() -> None:
    rows = np.arange(16).reshape(2, 8)
    batch = MicroBatch(rows, rows + 1, np.ones((2, 8), np.float32), np.tile(np.arange(8), (2, 1)), None)
    whole = NextToken().to_device(batch, torch.device("cpu"), 0, 1)
    assert whole.tokens.tolist() == rows.tolist() and whole.position_ids is None
    share = NextToken().to_device(batch, torch.device("cpu"), 1, 2)
    assert share.labels.tolist() == [[3, 4, 5, 6], [11, 12, 13, 14]] and share.position_ids is not None


def test_packed_rows_travel_as_one_long_row() -> None:
    assert NextToken().shape(3, 2, 16) == BatchShape(3, 2, 16) == BatchShape.of(3, 2, 16, packed=False)
    assert NextToken(packed=True).shape(3, 2, 16) == BatchShape(3, 1, 32)
    assert BatchShape(3, 2, 16).tokens == BatchShape(3, 1, 32).tokens == 96
