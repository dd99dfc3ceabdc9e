"""Verdicts on steps, limits, and what a checkpoint keeps of them."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest

from foundation.errors import WorkError
from training.config import GuardConfig
from training.guards import Guards

BAD = [(math.nan, 1.0, "loss is nan"), (math.inf, 1.0, "loss is inf"), (-math.inf, 1.0, "loss is -inf"),
       (2.0, math.nan, "gradient norm is nan"), (2.0, math.inf, "gradient norm is inf")]  # fmt: skip


def guards(**fields: Any) -> Guards:
    return Guards(GuardConfig.model_validate({"spike_window": 4, "spike_factor": 2.0} | fields))


def feed(judge: Guards, *losses: float) -> list[str]:
    return [judge.judge(step, loss, 1.0).action for step, loss in enumerate(losses, 1)]


@pytest.mark.parametrize("action", ["stop", "skip", "rollback"])
@pytest.mark.parametrize(("loss", "norm", "reason"), BAD)
def test_values_that_are_not_finite(action: str, loss: float, norm: float, reason: str) -> None:
    verdict = guards(on_nan=action, on_spike="warn").judge(3, loss, norm)
    assert (verdict.action, verdict.reason, verdict.not_finite) == (action, reason, True)


def test_a_usual_step_is_used() -> None:
    verdict = guards().judge(1, 2.0, 1e9)
    assert (verdict.action, verdict.reason, verdict.not_finite) == ("use", "", False)


@pytest.mark.parametrize("action", ["warn", "stop", "skip", "rollback"])
def test_a_spike_is_above_the_median_of_recent_losses(action: str) -> None:
    judge = guards(on_spike=action)
    assert feed(judge, 3.0, 1.0, 1.0, 1.0) == ["use"] * 4
    assert judge.judge(5, 2.0, 1.0).action == "use"  # not above twice the median
    verdict = judge.judge(6, 2.01, 1.0)
    assert verdict.action == action and not verdict.not_finite
    assert "2.0100" in verdict.reason and "1.0000" in verdict.reason


def test_no_spike_before_the_window_is_full() -> None:
    assert feed(guards(on_spike="stop"), 1.0, 1.0, 1.0, 100.0) == ["use"] * 4


def test_the_window_moves_and_skipped_losses_stay_out() -> None:
    judge = guards(on_spike="skip", max_skips=100)
    assert feed(judge, 8.0, 8.0, 8.0, 8.0, 1.0, 1.0, 1.0, 1.0) == ["use"] * 8
    assert feed(judge, 7.0, 7.0, 7.0, 7.0, 7.0) == ["skip"] * 5  # else the spikes would become the median
    warned = guards(on_spike="warn")
    assert feed(warned, 1.0, 1.0, 1.0, 1.0, 7.0, 7.0, 7.0, 7.0) == ["use"] * 4 + ["warn"] * 2 + ["use"] * 2


def test_skips_in_a_row_are_limited() -> None:
    judge = guards(on_nan="skip", max_skips=2)
    assert feed(judge, math.nan, math.nan, 1.0, math.nan, math.nan) == ["skip", "skip", "use", "skip", "skip"]
    with pytest.raises(WorkError, match="skip number 3: loss is nan") as caught:
        judge.judge(6, math.nan, 1.0)
    assert "guards.max_skips = 2" in str(caught.value)


def test_a_rollback_that_does_not_help_is_followed_by_a_skip() -> None:
    judge = guards(on_nan="rollback")
    state = judge.state()
    assert judge.judge(5, math.nan, 1.0).action == "rollback"
    judge.restore(state)
    again = judge.judge(5, math.nan, 1.0)
    assert again.action == "skip" and "again after a rollback" in again.reason and again.not_finite
    assert judge.judge(6, math.nan, 1.0).action == "rollback"  # another step: another try


def test_rollbacks_are_limited_over_the_whole_run() -> None:
    judge = guards(on_nan="rollback", max_rollbacks=2)
    state = judge.state()
    for step in (5, 9):
        assert judge.judge(step, math.nan, 1.0).action == "rollback"
        judge.restore(state)
        assert judge.judge(step, 1.0, 1.0).action == "use"
    with pytest.raises(WorkError, match="rollback number 3") as caught:
        judge.judge(12, math.inf, 1.0)
    assert "guards.max_rollbacks = 2" in str(caught.value)


def test_no_rollback_or_skip_allowed() -> None:
    with pytest.raises(WorkError, match="rollback number 1"):
        guards(on_nan="rollback", max_rollbacks=0).judge(1, math.nan, 1.0)
    with pytest.raises(WorkError, match="skip number 1"):
        guards(on_nan="skip", max_skips=0).judge(1, math.nan, 1.0)


def test_state_goes_through_json_and_restores_the_judgement() -> None:
    first = guards(on_spike="skip", max_skips=1)
    feed(first, 1.0, 1.0, 1.0, 1.0, 9.0)
    second = guards(on_spike="skip", max_skips=1)
    second.restore(json.loads(json.dumps(first.state())))
    assert second.state() == first.state()
    with pytest.raises(WorkError, match="skip number 2"):
        second.judge(6, 9.0, 1.0)


def test_a_checkpoint_without_guards_begins_anew() -> None:
    judge = guards(on_spike="stop")
    feed(judge, 1.0, 1.0, 1.0, 1.0)
    judge.restore({})
    assert judge.judge(5, 9.0, 1.0).action == "use"
