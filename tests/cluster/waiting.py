"""Waiting with an end, and what is said when it comes."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

POLL_SECONDS = 0.2
PATIENCE = 240.0
"""Seconds for what takes a few on a machine that has nothing else to do; costs nothing where it happens."""

Found = TypeVar("Found")


class ClusterError(Exception):
    """Something that the cluster was asked for did not happen."""


def wait_until(
    what: str,
    look: Callable[[], Found | None],
    seconds: float = PATIENCE,
    otherwise: Callable[[], object] = lambda: "",
) -> Found:
    """The first value of `look` that is neither None nor False.

    Raises:
        ClusterError: there is none within `seconds`; says `what` was waited for and what `otherwise` returns.
    """
    end = time.monotonic() + seconds
    while True:
        found = look()
        if found is not None and found is not False:
            return found
        if time.monotonic() > end:
            raise ClusterError(f"not within {seconds:g} s: {what}\n{otherwise()}")
        time.sleep(POLL_SECONDS)
