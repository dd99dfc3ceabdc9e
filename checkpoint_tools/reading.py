"""Opening files, and what is said where the disk does not give what a checkpoint should hold."""

from __future__ import annotations

import os
import resource
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


HEADROOM = 64
"""Files that may still be opened when the limit is raised: whoever else opens one does not know how."""


def opened(path: Path, flags: int) -> int:
    """A descriptor of the file at `path`.

    A checkpoint has a file for each of its ranks, of which there may be thousands, and the usual limit is 1,024 at a
    time: where it is near, it is raised to what this process is allowed.

    Raises:
        OSError: it cannot be opened.
    """
    descriptor = os.open(path, flags)
    usual, allowed = resource.getrlimit(resource.RLIMIT_NOFILE)
    if usual != resource.RLIM_INFINITY and descriptor + HEADROOM > usual:
        resource.setrlimit(resource.RLIMIT_NOFILE, (allowed, allowed))
    return descriptor
