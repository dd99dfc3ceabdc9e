"""The sections `watchdog`, `preflight` and `stragglers`."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from foundation.section import Section

Seconds = Annotated[float, Field(strict=True, ge=1, allow_inf_nan=False)]
Floor = Annotated[float, Field(strict=True, ge=0, allow_inf_nan=False)]


class WatchdogConfig(Section):
    """Ends a run in which no rank gets on, and says which rank the others wait for."""

    enabled: Annotated[bool, Field(strict=True)] = True
    """Watch the run."""

    timeout_seconds: Seconds = 600.0
    """A rank that has not begun another micro-batch, update or evaluation for so long, while no rank gets on, hangs."""

    slow_timeout_seconds: Seconds = 3600.0
    """The same for building the model, loading and saving, which take as long as the disk does."""

    @property
    def heartbeat_seconds(self) -> float:
        """Between two heartbeats of a rank: a file of a few hundred bytes on the run's file system."""
        return min(15.0, max(0.25, self.timeout_seconds / 20))

    @property
    def silence_seconds(self) -> float:
        """A rank without a heartbeat for so long is silent: stopped, dead, or cut off."""
        return max(3.0, 4 * self.heartbeat_seconds)


class PreflightConfig(Section):
    """A look at every node before the first step: a bad one is named, not met in the middle of the run."""

    nodes: Literal["several", "always", "never"] = "several"
    """When to look: where the run has several nodes, always, or never."""

    timeout_seconds: Seconds = 300.0
    """How long all ranks may take to start."""

    max_clock_skew_seconds: Floor = 10.0
    """How far a node's clock may be from that of rank 0's node."""

    min_bandwidth_gb_per_second: Floor = 0.01
    """What every node has to send to the next one over a single connection. 0: not measured. Set it near what your
    network carries, to find a bad cable."""

    min_free_gib: Floor = 1.0
    """Free space that every node has to see in the run's folder."""


class StragglerConfig(Section):
    """Ranks that compute slower than their equals."""

    interval: Annotated[int, Field(strict=True, ge=1)] | None = 100
    """Steps between two comparisons. None: no comparison."""

    factor: Annotated[float, Field(strict=True, gt=1, allow_inf_nan=False)] = 1.3
    """A slow rank computes this many times as long as the median of the others of its pipeline stage."""
