"""Convert a checkpoint: plan it whole, copy it part by part, read it back, give it its name."""

from __future__ import annotations

import errno
import hashlib
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from checkpoint_tools.architectures.identity import Identity
from checkpoint_tools.beside import write_beside
from checkpoint_tools.catalog import Catalog, Format, cover_fault
from checkpoint_tools.copying import DonePart, SourceTensors, copy_parts, make_files
from checkpoint_tools.dtypes import DType
from checkpoint_tools.formats.detect import open_checkpoint
from checkpoint_tools.formats.distributed_target import plan_distributed
from checkpoint_tools.formats.hugging_face import plan_hugging_face
from checkpoint_tools.formats.megatron_target import plan_megatron
from checkpoint_tools.formats.rank_cuts import RankGrid
from checkpoint_tools.journal import Unfinished
from checkpoint_tools.record import RECORD, read_record
from checkpoint_tools.rows import CatalogRows
from checkpoint_tools.target import Target
from checkpoint_tools.verify import Difference, verify_copy
from checkpoint_tools.workers import Progress, no_progress, run_parts, usual_processes
from foundation.errors import RequestError, WorkError

Say = Callable[[str], None]


@dataclass(frozen=True)
class Request:
    """What is asked for.

    Attributes:
        source: a checkpoint of any format.
        target: a folder that is not there yet.
        to: the format to write.
        tp, pp, vpp, ep: the layout of rank files; 1 in the other formats.
        local_names: rank files for core's local layers instead of Transformer Engine's.
        dtype: of the weights; None keeps each tensor's.
        vocab_size: the true vocabulary, where nothing in the source says it.
        resume: go on with an unfinished conversion.
        verify: read everything back and compare.
        processes: None takes what the machine has.
    """

    source: Path
    target: Path
    to: Format
    tp: int = 1
    pp: int = 1
    vpp: int = 1
    ep: int = 1
    local_names: bool = False
    dtype: DType | None = None
    vocab_size: int | None = None
    resume: bool = False
    verify: Literal["checksums", "none"] = "checksums"
    processes: int | None = None


@dataclass(frozen=True)
class Report:
    """What was done.

    Attributes:
        bytes: of the tensors.
        tensors: how many, of the whole model.
        resumed: parts that an earlier run had copied.
        notes: what was left aside.
    """

    source_format: Format
    architecture: str
    bytes: int
    tensors: int
    parts: int
    resumed: int
    verified: bool
    notes: tuple[str, ...]


def convert(request: Request, say: Say = lambda _: None, progress: Progress = no_progress) -> Report:
    """Do what is asked for.

    Raises:
        RequestError: it can't be done as asked; nothing was written.
        WorkError: it failed; what is done is kept for `resume`.
        Difference: what was written is not what was read.
    """
    source = open_checkpoint(request.source, request.vocab_size)
    target = plan(source, request)
    check_plan(source, target)
    finished = _finished_already(request, source, target)
    notes = (*source.notes, *target.notes)
    for note in notes:
        say(note)
    if finished:
        say(f"{request.target} is there already, of the same source: nothing to do")
        return _report(source, target, len(target.parts), request, notes)
    unfinished = Unfinished(request.target)
    _refuse_what_is_there(request)
    try:
        done = unfinished.begin(_fingerprint(source, target), resume=request.resume)
        resumed = len(done)
        _check_space(unfinished.folder, target, resumed)
        if resumed:
            say(f"{resumed} of {len(target.parts)} parts are there from an earlier run")
        make_files(target, unfinished.folder)
        for part in _copied(source, target, unfinished.folder, done, request, progress):
            unfinished.done(part)
            done[part.number] = part
        write_beside(source, target, unfinished.folder, done)
        if request.verify == "checksums":
            hashes = {name: digest for part in done.values() for name, digest in part.hashes.items()}
            try:
                verify_copy(open_checkpoint(unfinished.folder), hashes, request.processes, progress)
            except Difference:
                unfinished.forget()
                raise
        unfinished.finish()
    except OSError as error:
        raise _failed(error, request) from error
    return _report(source, target, resumed, request, notes)


def plan(source: Catalog, request: Request) -> Target:
    """Lay out the target.

    Raises:
        RequestError: the layout does not go with the model, or the dtype with the format.
    """
    dtypes = {name: request.dtype or tensor.dtype for name, tensor in source.weights.items()}
    dtypes |= {name: tensor.dtype for name, tensor in source.optimizer_state.items()}
    if request.to == "hf":
        return plan_hugging_face(source, dtypes)
    if request.to == "megatron":
        grid = RankGrid(request.tp, request.pp, request.vpp, request.ep, request.local_names)
        return plan_megatron(source, dtypes, grid)
    return plan_distributed(source, dtypes)


def check_plan(source: Catalog, target: Target) -> None:
    """Hold the plan to what has to be true before a byte is written.

    Raises:
        WorkError: a tensor of the source is not all there.
        AssertionError: a defect of ours.
    """
    for name, tensor in source.tensors.items():
        fault = cover_fault(tensor)
        if fault is not None:
            raise WorkError(
                f"{name} is not whole: {fault}", where=str(source.folder), cure="use another copy of the checkpoint"
            )
    written = [name for part in target.parts for name in part]
    if len(set(written)) != len(written) or set(written) != set(target.tensors):
        raise AssertionError("a tensor of the target is written twice or never")
    if not set(source.weights) <= set(target.tensors) <= set(source.tensors):
        raise AssertionError("source and target do not hold the same tensors")
    sizes = {file.name: file.size for file in target.files}
    for name, tensor in target.tensors.items():
        fault = cover_fault(tensor)
        if fault is not None or tensor.shape != source.tensors[name].shape:
            raise AssertionError(f"{name} is planned wrong: {fault or tensor.shape}")
        for piece in (*tensor.pieces, *tensor.replicas):
            if piece.offset + piece.rows * piece.columns * tensor.dtype.size > sizes[piece.file]:
                raise AssertionError(f"{name} is planned beyond the end of {piece.file}")


def _copied(
    source: Catalog, target: Target, folder: Path, done: dict[int, DonePart], request: Request, progress: Progress
) -> Iterator[DonePart]:
    tensors = SourceTensors(source.tensors, lambda: CatalogRows(source), source.recorded, str(source.folder))
    sizes = [sum(target.tensors[name].bytes for name in part) for part in target.parts]
    left = [number for number in range(len(target.parts)) if number not in done]
    total, ready = sum(sizes), sum(sizes[number] for number in done)
    processes = request.processes or usual_processes(len(left))
    for part in run_parts(lambda numbers: copy_parts(tensors, target, folder, numbers), left, processes):
        ready += sizes[part.number]
        progress(ready, total)
        yield part


def _fingerprint(source: Catalog, target: Target) -> str:
    """Of everything that decides what is written."""
    digest = hashlib.sha256()
    for path in sorted(source.folder.iterdir()):
        if path.is_file():
            facts = path.stat()
            digest.update(f"{path.name} {facts.st_size} {facts.st_mtime_ns}\n".encode())
    for file in target.files:
        digest.update(f"{file.name} {file.size} {file.literals!r}\n".encode())
    digest.update(repr((target.format, target.parts, target.tensors)).encode())
    return digest.hexdigest()


def _finished_already(request: Request, source: Catalog, target: Target) -> bool:
    """Whether an earlier run of the same conversion came to its end: then `resume` has nothing to do."""
    if not request.resume or not (request.target / target.beside / RECORD).is_file():
        return False
    record = read_record(request.target / target.beside)
    there = None if record is None else (record.format, record.source, record.layout)
    return there == (request.to, source.folder.resolve().name, target.layout)


def _refuse_what_is_there(request: Request) -> None:
    target = request.target
    if target.resolve() == request.source.resolve():
        raise RequestError(f"{target} is the source itself", rule="the target is another folder", cure=f"{target}-new")
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise RequestError(
            f"{target} is there already",
            rule="a conversion writes a new folder and overwrites nothing",
            cure=f"name another folder, or remove {target}",
        )


def _check_space(folder: Path, target: Target, resumed: int) -> None:
    """Refuse to begin what the disk has no room for."""
    facts = os.statvfs(folder)
    used = sum(path.stat().st_blocks * 512 for path in folder.rglob("*") if path.is_file()) if resumed else 0
    free, needed = facts.f_bavail * facts.f_frsize, target.bytes - used
    if needed > free:
        raise WorkError(
            f"the disk has {free / 1e9:.2f} GB free, and {needed / 1e9:.2f} GB are to be written",
            where=str(folder.parent),
            cure="free the difference, or name a folder on another disk",
        )


def _failed(error: OSError, request: Request) -> WorkError:
    cure = "correct the folder's permissions, or name another one"
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        cure = "free disk space and repeat the command with --resume: it goes on from what is done"
    return WorkError(f"the conversion failed: {error}", where=str(request.target), cure=cure)


def _report(source: Catalog, target: Target, resumed: int, request: Request, notes: tuple[str, ...]) -> Report:
    identity: Identity = source.identity
    return Report(
        source_format=source.format,
        architecture=identity.architecture.name,
        bytes=sum(tensor.bytes for tensor in target.tensors.values()),
        tensors=len(target.tensors),
        parts=len(target.parts),
        resumed=resumed,
        verified=request.verify == "checksums",
        notes=notes,
    )
