"""When each role was at work."""

from __future__ import annotations

import json
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


class Timeline:
    """Spans of work of the roles at one rank.

    Args:
        path: a .jsonl that takes one line a span; None: only sums are kept.
    """

    def __init__(self, path: Path | None = None) -> None:
        self._path, self._lines = path, list[str]()
        self._seconds: dict[str, float] = defaultdict(float)
        self.iteration = 0

    @contextmanager
    def busy(self, role: str, what: str) -> Iterator[None]:
        """`role` does `what` within the block."""
        begun = time.time()
        try:
            yield
        finally:
            ended = time.time()
            self._seconds[role] += ended - begun
            if self._path is not None:
                span = {"role": role, "what": what, "iteration": self.iteration, "begin": begun, "end": ended}
                self._lines.append(json.dumps(span) + "\n")

    def taken(self) -> dict[str, float]:
        """Seconds of each role since the last call; spans go into the file."""
        found = dict(self._seconds)
        self._seconds.clear()
        if self._path is not None and self._lines:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with self._path.open("a") as handle:
                handle.writelines(self._lines)
            self._lines.clear()
        return found
