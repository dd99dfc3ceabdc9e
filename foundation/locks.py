"""Locks on files, which end with the process that holds them, and file systems that have none."""

from __future__ import annotations

import errno
import fcntl
from pathlib import Path
from typing import IO, Any, Literal

NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)
"""What file systems say that have no locks: NFS without lockd, Lustre mounted without flock, some of FUSE."""

Reach = Literal["machines", "processes"]
"""POSIX locks are those that network file systems pass on; they end when a process closes any handle of the file."""


class NoLocksError(Exception):
    """The file system has no locks: whoever works there has to say so, and goes on without."""

    def __init__(self, folder: Path, reason: str) -> None:
        self.folder, self.reason = folder, reason
        super().__init__(f"{folder}: this file system has no locks ({reason})")

    def warning(self, others: str, harm: str) -> str:
        """A line for people: see to it that no `others` do `harm`."""
        return f"{self}; see to it that {others} at the same time: {harm}"


def take(handle: IO[Any] | int, path: Path, reach: Reach = "machines", *, wait: bool = False) -> bool:
    """Lock an open file for this process alone; False: another holds it, and this one does not wait.

    Args:
        path: of the file, for people.

    Raises:
        NoLocksError: the file system has none.
        OSError: the disk failed.
    """
    lock = fcntl.lockf if reach == "machines" else fcntl.flock
    try:
        lock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except OSError as error:
        if error.errno in NO_LOCKS:
            raise NoLocksError(path.parent, error.strerror or str(error)) from error
        if not wait and error.errno in (errno.EACCES, errno.EAGAIN):
            return False
        raise
    return True
