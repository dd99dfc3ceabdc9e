"""What a step leaves behind, and the form in which watchers of a run get it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from training.guards import Verdict


@dataclass(frozen=True)
class StepRecord:
    """One line of metrics.jsonl.

    `step`, `loss`, `grad_norm`, `lr` and `tokens` are the same, bit for bit, in a run that was killed and resumed at
    the same layout; the rest is measured.
    """

    step: int
    """Optimizer steps done, this one included."""
    loss: float
    """Nats a token over the global batch."""
    grad_norm: float
    """Before clipping."""
    lr: float
    tokens: int
    """Read since the run began."""
    tokens_per_second: float
    step_seconds: float
    mfu: float | None
    """Attention counted over the causal half; None where the hardware's peak is unknown."""
    mfu_full_attention: float | None
    validation_loss: float | None
    guard: str | None
    """What a guard did and why; None for a usual step."""
    memory_gib: float | None = None
    """Of rank 0: at most during the step on its GPU; of its whole process on a CPU."""
    load_balancing_loss: float | None = None
    """Of a mixture's routers, before its weight, mean over layers and tokens: 1 where all experts are used alike."""
    router_z_loss: float | None = None
    """The same of their z-loss."""
    further: Mapping[str, float] = field(default_factory=dict)
    """Means that the objective counts beside the loss, such as a reward model's accuracy."""

    def values(self) -> dict[str, Any]:
        """For JSON: keys that hold nothing this time are left out, but for the MFU ("n/a" has to be visible).

        A number that is not finite becomes None: JSON has no NaN, and `guard` says what it was.
        """
        optional = ("validation_loss", "guard", "memory_gib", "load_balancing_loss", "router_z_loss")
        left_out = {name for name in optional if getattr(self, name) is None}
        own = {name: getattr(self, name) for name in self.__dataclass_fields__ if name not in {*left_out, "further"}}
        return {name: _finite(value) for name, value in {**own, **self.further}.items()}


class Watcher(Protocol):
    """Sees a run from rank 0: metrics files, progress, loggers. Never changes it."""

    def begin(self, first_step: int, last_step: int) -> None:
        """The run starts or resumes; the next record is of `first_step`."""

    def step_done(self, record: StepRecord) -> None:
        """A step was applied or skipped."""

    def rolled_back(self, to_step: int) -> None:
        """The state is again that after `to_step` steps."""

    def event(self, text: str) -> None:
        """Something a person should know: a guard's verdict, a checkpoint."""

    def end(self) -> None:
        """The run is over."""


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


def describe(verdict: Verdict) -> str | None:
    """A verdict for a record."""
    return None if verdict.action == "use" else f"{verdict.action}: {verdict.reason}"
