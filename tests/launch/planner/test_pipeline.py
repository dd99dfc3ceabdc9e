"""The simulated schedule against what is known of it in closed form."""

from __future__ import annotations

import pytest

from launch.planner.pipeline import _simulate, chunks_in_flight, makespan, stage_order
from launch.planner.step_time import step_time
from launch.planner.table import understand


@pytest.mark.parametrize(("stages", "batches"), [(2, 2), (4, 4), (4, 32), (8, 11), (8, 64)])
def test_1f1b_waits_for_stages_minus_one_micro_batches(stages: int, batches: int) -> None:
    costs = (1.0,) * stages
    assert makespan(stages, 1, batches, costs, 2 / 3) == pytest.approx(batches + stages - 1)


@pytest.mark.parametrize(("stages", "chunks", "batches"), [(2, 2, 4), (4, 2, 8), (4, 5, 16), (8, 4, 32)])
def test_interleaving_divides_the_bubble_by_its_chunks(stages: int, chunks: int, batches: int) -> None:
    """arXiv 2104.04473, section 2.2.2."""
    length = makespan(stages, chunks, batches, (1.0,) * stages, 2 / 3)
    assert length == pytest.approx(batches + (stages - 1) / chunks, rel=0.02)


@pytest.mark.parametrize("costs", [(1.0, 1.0, 1.0, 1.4), (1.2, 1.0, 1.0, 1.0), (1.0, 1.3, 1.0, 1.1)])
@pytest.mark.parametrize("chunks", [1, 2])
def test_what_is_not_simulated_repeats(costs: tuple[float, ...], chunks: int) -> None:
    whole = _simulate(4, chunks, 48, costs, 2 / 3)
    assert makespan(4, chunks, 48, costs, 2 / 3) == pytest.approx(whole, rel=0.01)


def test_a_slow_last_stage_sets_the_pace() -> None:
    even, slow = makespan(4, 1, 64, (1.0,) * 4, 2 / 3), makespan(4, 1, 64, (1.0, 1.0, 1.0, 1.5), 2 / 3)
    assert slow > 1.4 * even


@pytest.mark.parametrize(("stages", "chunks", "batches"), [(4, 1, 3), (4, 1, 9), (4, 2, 8), (2, 3, 4)])
def test_each_stage_does_everything_once_and_holds_what_is_said(stages: int, chunks: int, batches: int) -> None:
    for stage in range(stages):
        order = stage_order(stages, chunks, batches, stage)
        assert sorted(order) == sorted((f, c, b) for f in (True, False) for c in range(chunks) for b in range(batches))
        held = most = 0
        for forward, _, _ in order:
            held += 1 if forward else -1
            most = max(most, held)
        assert most == chunks_in_flight(stages, chunks, batches, stage)


@pytest.mark.parametrize("layers", [12, 13, 14, 15])
@pytest.mark.parametrize(
    ("hidden", "vocab"), [("256", "8192"), ("256", "262144"), ("4096", "32000"), ("4096", "262144")]
)
def test_a_step_is_as_slow_as_its_slowest_stage(layers: int, hidden: str, vocab: str) -> None:
    """By time: a small model's output layer takes few launches for its operations, a large one's many bytes."""
    row = {"model": "a llama", "gpu": "h100", "tp": "1", "pp": "4", "dp": "2", "mbs": "1", "gbs": "64", "seq": "2048"}
    job = understand(row | {"layers": str(layers), "hidden": hidden, "vocab": vocab}).job
    found = step_time(job)
    stages = [job.layers_of(stage) * job.pp / layers * found.layers.total for stage in range(job.pp)]
    stages[-1] += found.logits
    assert found.computing == pytest.approx(found.micro_batches * max(stages), rel=1e-3)
    parts = (found.computing, found.bubble, found.transfers, found.data_parallel, found.optimizer, found.fixed)
    assert sum(parts) <= found.total * (1 + 1e-9)
