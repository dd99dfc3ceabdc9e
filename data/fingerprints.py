"""Content hashes of source files, remembered while the files stay as they are."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from data.indexed import bin_path, idx_path
from data.manifest import manifest_path, read_manifest
from foundation.errors import WorkError
from foundation.files import write_text

# A file that changed this shortly before it was hashed may change again without a new time stamp.
_SETTLED_NS = 2_000_000_000


class ContentHashes:
    """sha256 of files. A file is read again unless its size, its times and its inode are those of the last reading.

    Args:
        memory: JSON file that keeps the hashes between runs; one that is missing or damaged is begun anew.
    """

    def __init__(self, memory: Path) -> None:
        self._memory = memory
        self._known: dict[str, list[Any]] = {}
        if memory.is_file():
            try:
                known = json.loads(memory.read_text(encoding="utf-8"))
                self._known = known if isinstance(known, dict) else {}
            except ValueError:  # only costs reading the files again
                self._known = {}

    def of(self, path: Path) -> str:
        """sha256 of the file's content, in hexadecimal."""
        path = path.resolve()
        identity = file_identity(path)
        known = self._known.get(str(path))
        if known is not None and known[:-1] == identity:
            return str(known[-1])
        begun = time.time_ns()
        with open(path, "rb") as handle:
            digest = hashlib.file_digest(handle, "sha256").hexdigest()
        # File times are the file server's, `begun` is ours: where the clocks differ the file is just read again.
        if file_identity(path) == identity and max(identity[1], identity[2]) + _SETTLED_NS < begun:
            self._known[str(path)] = [*identity, digest]
        else:
            self._known.pop(str(path), None)
        return digest

    def save(self) -> None:
        """Keep the hashes for the next run."""
        write_text(self._memory, json.dumps(self._known, indent=1) + "\n")


def token_file_content(prefix: Path, hashes: ContentHashes) -> str:
    """Hash of what is in a token file's .bin and .idx.

    The .bin may hold terabytes. Its hash is the manifest's where nobody touched the .bin since the manifest was
    written; else it is read.

    Raises:
        WorkError: the .bin was rewritten after its manifest.
    """
    data, manifest = bin_path(prefix), read_manifest(prefix)
    if manifest is None:
        return combined([hashes.of(data), hashes.of(idx_path(prefix))])
    # ctime: nobody can set it back. The manifest is written after the .bin, so equal times say nothing.
    untouched = data.stat().st_ctime_ns < manifest_path(prefix).stat().st_ctime_ns
    if not (untouched and data.stat().st_size == manifest.bin_bytes) and hashes.of(data) != manifest.bin_sha256:
        raise WorkError(
            f"{data} is not what its manifest says: it was rewritten",
            where=str(prefix),
            cure=f"write it again with `orthant data tokenize`, or remove {manifest_path(prefix)} if it is right",
        )
    return combined([manifest.bin_sha256, hashes.of(idx_path(prefix))])


def file_identity(path: Path) -> list[int]:
    """Size, time of the last change of the content and of the inode (which nobody can set back), and the inode."""
    stat = path.stat()
    return [stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino]


def combined(parts: Iterable[str]) -> str:
    """sha256 over strings, in their order, each with its length."""
    digest = hashlib.sha256()
    for part in parts:
        data = part.encode("utf-8", errors="surrogateescape")
        digest.update(f"{len(data)}:".encode())
        digest.update(data)
    return digest.hexdigest()
