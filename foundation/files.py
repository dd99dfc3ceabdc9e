"""Files appear whole or not at all: temporary name, flush to disk, rename."""

from __future__ import annotations

import errno
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from foundation.errors import RequestError, WorkError

DEVICES = Path("/dev")


def flush_folder(folder: Path) -> None:
    """Make a rename inside `folder` survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def whole_file(path: Path, mode: str = "wb") -> Iterator[IO[Any]]:
    """Open `path` for writing under a temporary name; it takes its own when the block ends without error.

    Raises:
        OSError: `path` is there and is no regular file (a folder, a device, a pipe), or cannot be written.
    """
    reason = _irreplaceable(path)
    if reason is not None:
        raise OSError(errno.EINVAL, f"not replaced: it is {reason}", str(path))
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = _temporary(path.parent, path)
    try:
        with open(temporary, mode, encoding=None if "b" in mode else "utf-8") as handle:
            yield handle
            handle.flush()
            os.fsync(handle.fileno())
        os.replace(temporary, path)
        flush_folder(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write `text` to `path` whole, in UTF-8."""
    with whole_file(path, "w") as handle:
        handle.write(text)


@contextmanager
def failures_named(path: Path) -> Iterator[None]:
    """Inside the block an error of the disk names `path`: that of a write to an open file says neither which nor where.

    Raises:
        WorkError: the disk is full, or the file cannot be written.
    """
    try:
        yield
    except OSError as error:
        raise WorkError(
            f"{path} cannot be written: {error.strerror or error}",
            where=str(path),
            cure="free disk space or correct permissions, and run the same command again",
        ) from error


def refuse_unwritable(path: Path, option: str) -> None:
    """Ask before the work whether `whole_file` could write `path`, which `option` names. No folder is made.

    Raises:
        RequestError: it could not.
    """
    try:
        reason = _irreplaceable(path)
        nearest = next(place for place in path.absolute().parents if place.exists())
        if reason is None:
            tried = _temporary(nearest, path)
            with open(tried, "xb"):
                tried.unlink()
    except OSError as error:
        reason = f"no place for a file ({error.strerror})"
    if reason is not None:
        raise RequestError(
            f"{option} {path} cannot be written: it is {reason}",
            rule="a new file, or one to be replaced, in a folder that can be made",
            cure=f"{option} a file below the current folder",
        )


def _irreplaceable(path: Path) -> str | None:
    """What `path` is, where that is something that no file should take the place of."""
    if path.is_dir():
        return "a folder"
    # /dev/stdout is a link to whatever standard output is, perhaps a file: the link is what would be replaced.
    if path.parent.absolute() == DEVICES or (path.exists() and not path.is_file()):
        return "a device or a pipe"
    return None


def _temporary(folder: Path, path: Path) -> Path:
    # Random, not the process id: on a shared filesystem the same id runs on several nodes.
    return folder / f".{path.name}.{secrets.token_hex(8)}.tmp"
