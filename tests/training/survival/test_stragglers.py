"""Ranks slower than their equals are named, and only those."""

from __future__ import annotations

import pytest

from tests.ranks import RankPool
from training.survival.comparison import Comparison
from training.survival.config import StragglerConfig
from training.survival.pulse import Pulse
from training.survival.stragglers import Pace, SlowRank, slow_ranks


def slow(*seconds: float, stages: tuple[int, ...] = ()) -> list[int]:
    of = stages or (0,) * len(seconds)
    paces = [Pace(rank, f"n{rank}", of[rank], value) for rank, value in enumerate(seconds)]
    return [found.pace.rank for found in slow_ranks(paces, 1.3)]


def test_slow_ranks_slowest_first() -> None:
    assert slow(1.0, 1.1, 0.9, 1.0) == []
    assert slow(1.0, 1.5, 0.9, 2.0) == [3, 1]
    assert slow(1.0, 1.4) == [1]
    assert slow(1.0) == []


def test_ranks_are_compared_within_their_stage() -> None:
    assert slow(1.0, 1.0, 2.0, 2.0, stages=(0, 0, 1, 1)) == []
    assert slow(1.0, 1.0, 2.0, 3.0, stages=(0, 0, 1, 1)) == [3]


def test_a_rank_alone_in_its_stage_is_compared_with_all() -> None:
    assert slow(1.0, 2.0, 1.0, 1.0, stages=(0, 1, 2, 3)) == [1]


def test_a_slow_rank_says_by_how_much() -> None:
    text = SlowRank(Pace(3, "n2", 0, 0.5), 2.0).render()
    assert text.startswith("rank 3 on n2 computes 0.500 s a step, 2.00")


def compared() -> list[tuple[int, list[int], list[float]]]:
    """Two ranks of 4 steps; rank 1 computes twice as long, rank 0 waits half of its time."""
    import torch.distributed as dist

    rank, told, now = dist.get_rank(), [], 0.0
    pulse = Pulse(lambda: now)  # of its own: which rank the machine holds up is not what is tested
    compare = Comparison(
        StragglerConfig(interval=2),
        pulse,
        lambda: 0.5 if rank == 0 else 1.0,
        f"n{rank}",
        0,
        lambda step, paces, found: told.append(
            (step, [one.pace.rank for one in found], [pace.seconds for pace in paces])
        ),
    )
    for step in range(1, 5):
        pulse.mark("forward and backward", step)
        now += 0.05
        pulse.mark("agreement")
        compare(step)
    return told


def test_ranks_tell_each_other(ranks: RankPool) -> None:
    first, second = ranks.run(2, compared)
    assert [(step, slow) for step, slow, _ in first] == [(2, [1]), (4, [1])] and second == []
    assert first[1][2] == pytest.approx([0.025, 0.05])
