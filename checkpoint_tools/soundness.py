"""Is a checkpoint whole: every file, every tensor, and every byte that something holds it to."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from checkpoint_tools.catalog import Catalog, cover_fault, state_fault
from checkpoint_tools.formats.detect import find_checkpoint, open_checkpoint
from checkpoint_tools.inspection import hashes_of
from checkpoint_tools.manifest import MANIFEST, damage, read_manifest
from checkpoint_tools.verify import hash_tensors
from checkpoint_tools.workers import Progress, no_progress, run_parts, usual_processes
from foundation.errors import WorkError


@dataclass(frozen=True)
class Soundness:
    """What was found.

    Attributes:
        folder: that was looked at.
        faults: everything wrong.
        held_to: "tensors" or "files" by their hashes; "none": names, shapes, sizes and copies only.
    """

    folder: Path
    faults: tuple[str, ...]
    held_to: str


def check(
    path: Path, vocab_size: int | None = None, processes: int | None = None, progress: Progress = no_progress
) -> Soundness:
    """Read all of a checkpoint and hold it to what it should be.

    Raises:
        RequestError: there is no checkpoint, or one of a family that is not known.
    """
    folder = find_checkpoint(path)
    faults = file_faults(folder, processes, progress)
    if faults:
        return Soundness(folder, tuple(faults), "files")
    try:
        catalog = open_checkpoint(folder, vocab_size)
        for name, tensor in catalog.tensors.items():
            fault = cover_fault(tensor)
            if fault is not None:
                faults.append(f"{name}: {fault}")
        lacking = state_fault(catalog)
        faults += [lacking] if lacking is not None else []
        held_to = hashes_of(catalog)
        if not faults and not (held_to == "files" and _read_already(catalog)):
            found = hash_tensors(catalog, processes, progress)
            faults += [
                f"{name} does not have the values that were written (xxh3_128 differs)"
                for name, recorded in catalog.recorded.items()
                if found.get(name) != recorded
            ]
    except WorkError as error:
        return Soundness(folder, (str(error),), "none")
    return Soundness(folder, tuple(faults), held_to)


def _read_already(catalog: Catalog) -> bool:
    """Whether all of it was read when files were held to their hashes, and nothing is there twice to be compared."""
    hashed = read_manifest(catalog.folder).files
    tensors = catalog.tensors.values()
    return all(piece.file in hashed for tensor in tensors for piece in tensor.pieces) and not any(
        tensor.replicas for tensor in tensors
    )


def file_faults(folder: Path, processes: int | None, progress: Progress = no_progress) -> list[str]:
    """What the hashes of the manifest say, where there is one."""
    if not (folder / MANIFEST).is_file():
        return []
    try:
        files = list(read_manifest(folder).files.items())
    except WorkError as error:
        return [str(error)]
    total = sum(record.bytes for _, record in files)
    faults: list[str] = []
    done = 0

    def work(numbers: Iterator[int]) -> Iterator[tuple[int, str | None]]:
        for number in numbers:
            yield number, damage(folder, *files[number])

    for number, fault in run_parts(work, range(len(files)), processes or usual_processes(len(files))):
        faults += [fault] if fault is not None else []
        done += files[number][1].bytes
        progress(done, total)
    return sorted(faults)
