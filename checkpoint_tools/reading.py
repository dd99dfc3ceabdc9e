"""What is said where the disk does not give what a checkpoint should hold."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from foundation.errors import WorkError


@contextmanager
def unreadable_named(path: Path) -> Iterator[None]:
    """Inside the block an error of the disk names the file that could not be read, `path` where it does not itself.

    Raises:
        WorkError: it could not.
    """
    try:
        yield
    except OSError as error:
        raise WorkError(
            f"{error.filename or path} cannot be read: {error.strerror or error}",
            cure="correct its permissions, or use another copy of the checkpoint",
        ) from error
