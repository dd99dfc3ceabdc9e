"""The section `profile`."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BeforeValidator, Field

from foundation.errors import ConfigError
from foundation.section import Section


def _as_text(value: Any) -> Any:
    """YAML reads one number as a number."""
    return str(value) if isinstance(value, int) and not isinstance(value, bool) else value


Steps = Annotated[str, BeforeValidator(_as_text), Field(pattern=r"^[1-9][0-9]*(-[1-9][0-9]*)?$")]
Ranks = Annotated[str, BeforeValidator(_as_text), Field(pattern=r"^[0-9]+(-[0-9]+)?(,[0-9]+(-[0-9]+)?)*$")]


class ProfileConfig(Section):
    """Where the time of chosen steps goes. Off by default, and then nothing is recorded."""

    steps: Steps | None = Field(default=None, examples=["10-12"])
    """Steps under torch's profiler, one or a range: a trace that Perfetto opens, what allocated memory, and a table of
    operations and exposed communication in RUN/profile. They run slower for it."""

    ranks: Ranks = "0"
    """Ranks that are profiled: numbers and ranges, separated by commas."""

    timeline: Steps | None = Field(default=None, examples=["20-22"])
    """Steps whose pipeline `orthant report` draws, from the times at which every stage's forward and backward passes
    began and ended. Costs microseconds a micro-batch."""

    network: Annotated[bool, Field(strict=True)] = False
    """Before the first step measure the latency and bandwidth of every pair of nodes, and all-reduce by size."""

    def profiled_steps(self) -> range:
        """Steps under the profiler; none where there are none."""
        return _range("profile.steps", self.steps)

    def timeline_steps(self) -> range:
        """Steps whose timeline is recorded."""
        return _range("profile.timeline", self.timeline)

    def profiled_ranks(self) -> frozenset[int]:
        """Ranks under the profiler."""
        return frozenset(rank for part in self.ranks.split(",") for rank in _range("profile.ranks", part))


def check_profile(profile: ProfileConfig, train_steps: int) -> None:
    """Every step that is to be recorded is one of the run.

    Raises:
        ConfigError: one is not, or a range runs backwards.
    """
    for field, value, steps in (
        ("profile.steps", profile.steps, profile.profiled_steps()),
        ("profile.timeline", profile.timeline, profile.timeline_steps()),
    ):
        if steps and steps[-1] > train_steps:
            raise ConfigError(
                field,
                value,
                rule=f"names steps of the run: 1 to training.train_steps {train_steps}",
                cure=f"{field}={max(1, train_steps - 2)}-{train_steps}",
            )
    profile.profiled_ranks()


def check_ranks(profile: ProfileConfig, world_size: int) -> None:
    """Every rank that is to be profiled is there.

    Raises:
        ConfigError: one is not.
    """
    missing = [rank for rank in profile.profiled_ranks() if rank >= world_size]
    if profile.steps is not None and missing:
        raise ConfigError(
            "profile.ranks",
            profile.ranks,
            rule=f"names ranks of the run, which has {world_size}: 0 to {world_size - 1}",
            cure="profile.ranks=0",
        )


def _range(field: str, text: str | None) -> range:
    if text is None:
        return range(0)
    first, _, last = text.partition("-")
    found = range(int(first), int(last or first) + 1)
    if not found:
        raise ConfigError(field, text, rule="runs upwards", cure=f"{field}={last}-{first}")
    return found
