"""What a test sees when ranks fail."""

from __future__ import annotations

import pickle
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

LOG_LINES = 40


@dataclass(frozen=True)
class Failure:
    """How one rank failed."""

    rank: int
    at: float
    """time.monotonic() of the failure, in a death when it was noticed; the first is the likely cause of the others."""
    headline: str
    detail: str
    log: Path
    exception: bytes | None = None
    died: bool = False

    def render(self) -> str:
        """Headline, traceback or stacks, and the last lines that the rank wrote."""
        parts = [f"--- rank {self.rank} {self.headline}", self.detail.rstrip()]
        written = self.log.read_text(errors="replace").splitlines() if self.log.exists() else []
        if written:
            parts.append(f"--- rank {self.rank}: last lines of stdout and stderr ({self.log})")
            parts.extend(written[-LOG_LINES:])
        return "\n".join(part for part in parts if part)


class RankFailure(Exception):
    """At least one rank raised, died or hung.

    Attributes:
        failures: one for each rank that failed, first cause first.
    """

    def __init__(self, what: str, failures: Sequence[Failure]) -> None:
        # Ranks raise because another one died, never the reverse, and a death is noticed later than they raise.
        self.failures = sorted(failures, key=lambda failure: (not failure.died, failure.at))
        super().__init__("\n".join([what, *(failure.render() for failure in self.failures)]))

    @property
    def first(self) -> BaseException | None:
        """The exception of the first rank that failed; None where it died, hung, or its exception can't be pickled."""
        exception = self.failures[0].exception
        if exception is None:
            return None
        found = pickle.loads(exception)
        return found if isinstance(found, BaseException) else None


class RankTimeout(RankFailure):
    """Ranks were still at work when the time was over and no rank had failed before."""
