"""What looks at single steps of a run, on every rank."""

from __future__ import annotations

from typing import Protocol


class Observer(Protocol):
    """Called around each step, forward to update, on every rank alike. Never changes what is computed."""

    def begin(self, step: int) -> None:
        """`step`, counted from 1, is next."""

    def end(self, step: int) -> None:
        """`step` is done, applied or not."""
