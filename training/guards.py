"""Whether a step's result may be used: a loss or gradient norm that is not finite, or a sudden spike."""

from __future__ import annotations

import math
import statistics
from collections import deque
from dataclasses import dataclass, replace
from typing import Any, Literal

from foundation.errors import WorkError
from training.config import GuardConfig

Action = Literal["use", "warn", "skip", "rollback", "stop"]


@dataclass(frozen=True)
class Verdict:
    """What to do with a step, and why."""

    action: Action
    reason: str = ""
    not_finite: bool = False


class Guards:
    """Judges steps; the same figures give the same verdict on every rank, so no rank has to ask another."""

    def __init__(self, config: GuardConfig) -> None:
        self._config = config
        self._good_losses: deque[float] = deque(maxlen=config.spike_window)
        self._skips_in_a_row = 0
        self._rollbacks = 0
        self._rolled_back_at: int | None = None

    def judge(self, step: int, loss: float, grad_norm: float) -> Verdict:
        """The verdict on the step that would be number `step`.

        A rollback reads the same data again, because most bad values come from hardware and do not come back. A step
        that goes wrong again after its rollback is skipped.

        Raises:
            WorkError: more rollbacks or skips in a row than the config allows.
        """
        verdict = self._look(loss, grad_norm)
        if verdict.action == "rollback" and self._rolled_back_at == step:
            verdict = replace(verdict, action="skip", reason=f"{verdict.reason} (again after a rollback)")
        if verdict.action == "rollback":
            self._rollbacks += 1
            self._rolled_back_at = step
            self._limit("rollback", self._rollbacks, "max_rollbacks", self._config.max_rollbacks, verdict.reason)
        self._skips_in_a_row = self._skips_in_a_row + 1 if verdict.action == "skip" else 0
        self._limit("skip", self._skips_in_a_row, "max_skips", self._config.max_skips, verdict.reason)
        if verdict.action in ("use", "warn"):
            self._good_losses.append(loss)
        return verdict

    def _look(self, loss: float, grad_norm: float) -> Verdict:
        for name, value in (("loss", loss), ("gradient norm", grad_norm)):
            if not math.isfinite(value):
                return Verdict(self._config.on_nan, f"{name} is {value}", not_finite=True)
        if len(self._good_losses) == self._config.spike_window:
            usual = statistics.median(self._good_losses)
            if loss > self._config.spike_factor * usual:
                reason = f"loss {loss:.4f} is above {self._config.spike_factor:g} x {usual:.4f}, the recent median"
                return Verdict(self._config.on_spike, reason)
        return Verdict("use")

    def _limit(self, kind: str, count: int, field: str, limit: int, reason: str) -> None:
        if count > limit:
            raise WorkError(
                f"the run stops at {kind} number {count}: {reason}",
                where=f"guards.{field} = {limit}",
                cure="look at the data and the learning rate around this step, or raise the limit",
            )

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        return {"good_losses": list(self._good_losses), "skips_in_a_row": self._skips_in_a_row}

    def restore(self, state: dict[str, Any]) -> None:
        """Continue from `state`. Rollbacks are counted over the process, not over the checkpoints they return to."""
        self._good_losses = deque(state.get("good_losses", []), maxlen=self._config.spike_window)
        self._skips_in_a_row = int(state.get("skips_in_a_row", 0))
