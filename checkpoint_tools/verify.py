"""Read a checkpoint back, tensor by tensor, and hold it to hashes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import xxhash

from checkpoint_tools.catalog import Catalog
from checkpoint_tools.rows import CatalogRows, Scratch, bytes_of, rows_per_block
from checkpoint_tools.target import in_parts
from checkpoint_tools.workers import Progress, no_progress, run_parts, usual_processes
from foundation.errors import OrthantError


class Difference(OrthantError):
    """A check ran and found a difference."""

    exit_code = 3


def hash_tensors(catalog: Catalog, processes: int | None = None, progress: Progress = no_progress) -> dict[str, str]:
    """xxh3_128 of every tensor's bytes, row-major, by canonical name.

    Raises:
        WorkError: a file ends too early, or copies of a tensor differ.
    """
    parts = in_parts(catalog.tensors.values())
    total = sum(tensor.bytes for tensor in catalog.tensors.values())
    hashes: dict[str, str] = {}
    done = 0

    def work(numbers: Iterator[int]) -> Iterator[dict[str, str]]:
        with CatalogRows(catalog) as rows:
            for number in numbers:
                yield {name: hash_of(catalog, rows, name) for name in parts[number]}

    for found in run_parts(work, range(len(parts)), processes or usual_processes(len(parts))):
        hashes |= found
        done += sum(catalog.tensors[name].bytes for name in found)
        progress(done, total)
    return hashes


def hash_of(catalog: Catalog, rows: CatalogRows, name: str) -> str:
    """xxh3_128 of one tensor's bytes."""
    tensor = catalog.tensors[name]
    digest, scratch = xxhash.xxh3_128(), Scratch()
    step = rows_per_block(tensor)
    for start in range(0, tensor.rows, step):
        block = scratch.block(min(step, tensor.rows - start), tensor.columns, tensor.dtype)
        rows.fill(name, start, block)
        digest.update(bytes_of(block))
    return str(digest.hexdigest())


def verify_copy(
    written: Catalog,
    hashes: Mapping[str, str],
    processes: int | None = None,
    progress: Progress = no_progress,
) -> None:
    """Read what was written through its own format and compare.

    Args:
        hashes: what every tensor has to have.

    Raises:
        Difference: a tensor is missing, or differs.
    """
    if set(written.tensors) != set(hashes):
        raise Difference(f"tensors differ: {sorted(set(written.tensors) ^ set(hashes))[:5]}")
    found = hash_tensors(written, processes, progress)
    wrong = [name for name in hashes if found[name] != hashes[name]]
    if wrong:
        raise Difference(
            f"{len(wrong)} of {len(hashes)} tensors do not read back as they were written: {', '.join(wrong[:5])}\n"
            f"  where: {written.folder}\n  do: check the disk, and convert again"
        )
