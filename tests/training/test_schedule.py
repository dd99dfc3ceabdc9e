"""The learning rate over steps: values worked out by hand, ends, continuity."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import pytest

from training.config import TrainingSections
from training.schedule import learning_rate

PEAK = 8e-4


def sections(steps: int = 100, **schedule: Any) -> TrainingSections:
    return TrainingSections.model_validate(
        {
            "training": {"train_steps": steps, "global_batch_size": 8, "seq_length": 32},
            "optimizer": {"lr": PEAK},
            "schedule": schedule,
        }
    )


def rates(given: TrainingSections, steps: int | None = None) -> list[float]:
    return [learning_rate(step, given) for step in range(steps or given.training.train_steps + 20)]


@pytest.mark.parametrize("kind", ["cosine", "linear", "wsd", "constant"])
def test_warm_up_climbs_evenly_and_peaks_at_its_end(kind: str) -> None:
    found = rates(sections(kind=kind, warmup_steps=4))
    assert found[:5] == pytest.approx([PEAK * share for share in (0.2, 0.4, 0.6, 0.8, 1.0)], rel=1e-12)


def test_cosine() -> None:
    given = sections(kind="cosine", warmup_steps=20, min_lr=PEAK / 8)
    low = PEAK / 8
    known = {20: 1.0, 40: (1 + math.sqrt(0.5)) / 2, 60: 0.5, 80: (1 - math.sqrt(0.5)) / 2, 100: 0.0, 119: 0.0}
    for step, share in known.items():
        assert learning_rate(step, given) == pytest.approx(low + (PEAK - low) * share, rel=1e-12), step


def test_linear() -> None:
    given = sections(kind="linear", warmup_steps=20)
    for step, share in {20: 1.0, 40: 0.75, 60: 0.5, 99: 1 / 80, 100: 0.0, 119: 0.0}.items():
        assert learning_rate(step, given) == pytest.approx(PEAK * share, rel=1e-12, abs=1e-18), step


def test_decay_steps_end_before_training_does() -> None:
    given = sections(kind="linear", decay_steps=50, min_lr=1e-4)
    assert learning_rate(25, given) == pytest.approx(1e-4 + (PEAK - 1e-4) / 2)
    assert [learning_rate(step, given) for step in (50, 51, 99)] == pytest.approx([1e-4] * 3, rel=1e-12)


def test_wsd_is_flat_then_falls() -> None:
    given = sections(kind="wsd", warmup_steps=10, wsd_decay_steps=20, min_lr=1e-4)
    found = rates(given)
    assert set(found[10:81]) == {PEAK}
    assert found[90] == pytest.approx((PEAK + 1e-4) / 2) and found[100] == pytest.approx(1e-4)
    falls = [earlier - later for earlier, later in pairwise(found[80:101])]
    assert falls == pytest.approx([(PEAK - 1e-4) / 20] * 20, rel=1e-9)


def test_wsd_falls_over_a_tenth_unless_told() -> None:
    found = rates(sections(kind="wsd"))
    assert found[90] == PEAK and found[91] < PEAK


def test_a_fall_of_one_step() -> None:
    given = sections(kind="wsd", wsd_decay_steps=1, min_lr=1e-4)
    assert [learning_rate(step, given) for step in (98, 99, 100)] == pytest.approx([PEAK, PEAK, 1e-4], rel=1e-12)
    given = sections(kind="linear", warmup_steps=99, min_lr=1e-4)
    assert [learning_rate(step, given) for step in (99, 100)] == pytest.approx([PEAK, 1e-4], rel=1e-12)


def test_constant() -> None:
    assert set(rates(sections(kind="constant", min_lr=1e-5))) == {PEAK}


@pytest.mark.parametrize("kind", ["cosine", "linear", "wsd"])
def test_no_jumps_and_never_below_the_minimum(kind: str) -> None:
    given = sections(2000, kind=kind, warmup_steps=100, min_lr=5e-5)
    found = rates(given, 2100)
    assert max(abs(later - earlier) for earlier, later in pairwise(found)) < PEAK / 99
    assert min(found[100:]) >= 5e-5 and max(found) == PEAK and found[-1] == pytest.approx(5e-5)
    assert found[0] > 0


def test_a_longer_run_of_a_fixed_decay_begins_alike() -> None:
    """The rate depends on the step alone, so a run that is continued past its end does not change its past."""
    short, long = (rates(sections(steps, kind="cosine", decay_steps=100), 100) for steps in (100, 300))
    assert short == long
