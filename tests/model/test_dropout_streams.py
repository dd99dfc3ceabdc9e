"""Streams of dropout in the two forms that core keeps them in; what they draw is held against one rank elsewhere."""

from __future__ import annotations

import pytest
import torch
from megatron.core.tensor_parallel.random import CudaRNGStatesTracker

from model import dropout_streams
from model.dropout_streams import seed_streams
from parallel.platform import current_platform

NAME = "model-parallel-rng"


@pytest.fixture
def tracker(monkeypatch: pytest.MonkeyPatch) -> CudaRNGStatesTracker:
    tracker = CudaRNGStatesTracker()
    monkeypatch.setattr(dropout_streams, "get_cuda_rng_tracker", lambda: tracker)
    for name in ("get_tensor_model_parallel_rank", "get_context_parallel_rank"):
        monkeypatch.setattr(dropout_streams, name, lambda: 0)
    return tracker


def test_streams_of_graphs_stay_the_objects_that_graphs_draw_from(tracker: CudaRNGStatesTracker) -> None:
    """Core hands them to torch's graphsafe_set_state, which takes a generator and no tensor."""
    generator = torch.Generator()
    with current_platform().device_rng():
        tracker.set_states({NAME: torch.cuda.get_rng_state()})
        seed_streams(7, 3)
        torch.cuda.set_rng_state(tracker.get_states()[NAME])
        drawn = torch.rand(4)
        tracker.set_states({NAME: generator})
        seed_streams(7, 3)
    assert tracker.get_states()[NAME] is generator
    assert torch.equal(torch.rand(4, generator=generator), drawn)
