"""Writing what core planned to write: at once, or in a fork while training goes on.

Core's own asynchronous save starts three processes a rank and a fourth that carries messages and outlives a killed
rank. Here one fork writes, hashes what it wrote, and dies with its rank.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from queue import Queue, SimpleQueue
from typing import Any

from megatron.core.dist_checkpointing.strategies.async_utils import AsyncRequest
from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync

from checkpoint_tools.manifest import FileRecord, record_file
from training.checkpoint.forked import Forked


@dataclass(frozen=True)
class Written:
    """What a rank wrote.

    Attributes:
        results: of core's writer, by bucket.
        files: records of the files, by name.
    """

    results: dict[int, Any]
    files: dict[str, FileRecord]


@dataclass(frozen=True)
class Plan:
    """What this rank has to write, in host memory or still on the device."""

    request: AsyncRequest

    def bytes(self) -> int:
        """Of all tensors that this rank writes."""
        return sum(tensor.nbytes for _, _, (_, tensors) in self._buckets() for _, tensor in tensors)

    def write(self) -> Written:
        """Write now.

        Raises:
            OSError: the disk is full, or a folder can't be written.
        """
        return _write(self.request, self._staged())

    def write_in_background(self) -> Forked:
        """Copy to the host what lies on the device, and write in a fork; its result is a `Written`."""
        staged = self._staged()
        return Forked(lambda: _write(self.request, staged))

    def finish(self, written: Written) -> None:
        """Write the metadata of all ranks' files. Collective; every rank has written."""
        if self.request.async_fn is not None:
            self.request.async_fn_args[2].put(written.results)
        for finish in self.request.finalize_fns:
            finish()

    def _buckets(self) -> list[Any]:
        return list(self.request.async_fn_args[1]) if self.request.async_fn is not None else []

    def _staged(self) -> list[Any]:
        return list(self.request.preload_fn()) if self.request.async_fn is not None else []


def _write(request: AsyncRequest, buckets: list[Any]) -> Written:
    """Write every bucket to its file, flushed to the disk.

    Args:
        request: core's, whose function knows how tensors are transformed.
        buckets: (path, name, (bytes, tensors)), staged in host memory.
    """
    written = Written({}, {})
    for number, bucket in enumerate(buckets):
        transforms, _ = request.async_fn.args
        outcome: SimpleQueue[Any] = SimpleQueue()
        count: Queue[int] = Queue()
        count.put(number)
        FileSystemWriterAsync.write_preloaded_data(transforms, number, bucket, outcome, count, use_fsync=True)
        _, results = outcome.get()
        if isinstance(results, Exception):  # torch's writer calls a full disk a RuntimeError
            raise OSError(f"{bucket[0]} could not be written: {results}") from results
        written.results[number] = results
        written.files[bucket[1]] = record_file(Path(bucket[0]), "xxh3_128")
    return written
