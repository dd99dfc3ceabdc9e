"""Convert a checkpoint: plan it whole, copy it part by part, read it back, give it its name."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from checkpoint_tools.architectures.identity import Identity
from checkpoint_tools.average import check_same_model, mean_rows
from checkpoint_tools.beside import check_tokenizer, write_beside
from checkpoint_tools.catalog import Catalog, Format
from checkpoint_tools.copying import DonePart, SourceTensors, copy_parts, make_files, still_there
from checkpoint_tools.formats.detect import open_checkpoint
from checkpoint_tools.journal import Unfinished
from checkpoint_tools.planning import Form, fingerprint, plan
from checkpoint_tools.record import RECORD, ConversionRecord, read_record
from checkpoint_tools.rows import CatalogRows, Rows
from checkpoint_tools.soundness import file_faults
from checkpoint_tools.target import Target
from checkpoint_tools.verify import Difference, verify_copy
from checkpoint_tools.workers import Progress, no_progress, run_parts, usual_processes
from foundation.errors import RequestError, WorkError

Say = Callable[[str], None]


@dataclass(frozen=True)
class Manner:
    """How a conversion is done, whatever is converted.

    Attributes:
        resume: go on with an unfinished one.
        verify: read everything back and compare; files of a source that have hashes are held to them before.
        processes: None takes what the machine has.
        vocab_size: the true vocabulary, where nothing in the source says it.
    """

    resume: bool = False
    verify: Literal["checksums", "none"] = "checksums"
    processes: int | None = None
    vocab_size: int | None = None


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


def say_nothing(_line: str) -> None:
    """For who does not want to know."""


def convert(
    source: Path,
    target: Path,
    form: Form,
    manner: Manner = Manner(),
    say: Say = say_nothing,
    progress: Progress = no_progress,
) -> Report:
    """Convert the checkpoint at `source` into the new folder `target`.

    Raises:
        RequestError: it can't be done as asked; nothing was written.
        WorkError: it failed; what is done is kept for `resume`.
        Difference: what was written is not what was read.
    """
    catalog = open_checkpoint(source, manner.vocab_size)
    work = _Work([catalog], catalog, lambda: CatalogRows(catalog), target, plan(catalog, form), manner)
    return _carry_out(work, say, progress)


def average(
    sources: Sequence[Path],
    target: Path,
    form: Form,
    manner: Manner = Manner(),
    say: Say = say_nothing,
    progress: Progress = no_progress,
) -> Report:
    """Write the mean of the weights of `sources` into the new folder `target`, in the dtypes of the first.

    Raises:
        RequestError, WorkError, Difference: as `convert`.
    """
    if len(sources) < 2:
        raise RequestError("a mean is taken over two checkpoints or more", cure="name more than one")
    catalogs = [open_checkpoint(source, manner.vocab_size) for source in sources]
    check_same_model(catalogs)
    first = catalogs[0]
    notes = ("a mean has no optimizer state",) if first.optimizer_state else ()
    mean = replace(first, tensors=first.weights, recorded={}, notes=(*first.notes, *notes))
    work = _Work(catalogs, mean, lambda: mean_rows(catalogs), target, plan(mean, form), manner)
    return _carry_out(work, say, progress)


@dataclass(frozen=True)
class _Work:
    """A conversion that is planned.

    Attributes:
        sources: all that is read.
        catalog: what they make: the only one, or the mean.
        rows: gives its rows.
    """

    sources: list[Catalog]
    catalog: Catalog
    rows: Callable[[], AbstractContextManager[Rows]]
    folder: Path
    target: Target
    manner: Manner

    @property
    def sizes(self) -> list[int]:
        """Bytes of each part."""
        return [sum(self.target.tensors[name].bytes for name in part) for part in self.target.parts]


def _carry_out(work: _Work, say: Say, progress: Progress) -> Report:
    unfinished = Unfinished(work.folder, say)
    try:
        return _carried_out(work, unfinished, say, progress)
    except OSError as error:
        raise _failed(error, work.folder) from error
    finally:
        unfinished.let_go()


def _carried_out(work: _Work, unfinished: Unfinished, say: Say, progress: Progress) -> Report:
    for note in (*work.catalog.notes, *work.target.notes):
        say(note)
    planned = fingerprint(work.sources, work.target)
    finished = _finished(work)
    if finished is not None:
        _refuse_another(work, finished, planned)
        if work.manner.verify == "checksums":
            _verify_finished(work, finished, progress)
        say(f"{work.folder} is there already, of the same source: nothing to do")
        return _report(work, len(work.target.parts))
    _refuse_what_is_there(work)
    check_tokenizer(work.catalog, work.target)
    if work.manner.verify == "checksums":
        _refuse_damaged(work)
    _check_space(unfinished.folder, work.target)
    done = still_there(work.target, unfinished.folder, unfinished.begin(planned, resume=work.manner.resume))
    resumed = len(done)
    if resumed:
        say(f"{resumed} of {len(work.target.parts)} parts are there from an earlier run")
    unfinished.remove_all_but({file.name for file in work.target.files})
    make_files(work.target, unfinished.folder)
    _copy(work, unfinished, done, progress)
    write_beside(work.catalog, work.target, unfinished.folder, done, planned)
    if work.manner.verify == "checksums":
        _verify(work, unfinished, done, progress)
    unfinished.finish()
    return _report(work, resumed)


def _copy(work: _Work, unfinished: Unfinished, done: dict[int, DonePart], progress: Progress) -> None:
    """Copy the parts that are not done, and write down each that is."""
    tensors = SourceTensors(work.catalog.tensors, work.rows, work.catalog.recorded, str(work.catalog.folder))
    sizes = work.sizes
    left = [number for number in range(len(sizes)) if number not in done]
    ready = sum(sizes[number] for number in done)
    processes = work.manner.processes or usual_processes(len(left))
    copied = run_parts(lambda numbers: copy_parts(tensors, work.target, unfinished.folder, numbers), left, processes)
    for part in copied:
        unfinished.done(part)
        done[part.number] = part
        ready += sizes[part.number]
        progress(ready, sum(sizes))


def _verify(work: _Work, unfinished: Unfinished, done: dict[int, DonePart], progress: Progress) -> None:
    hashes = {name: digest for part in done.values() for name, digest in part.hashes.items()}
    try:
        verify_copy(open_checkpoint(unfinished.folder), hashes, work.manner.processes, progress)
    except Difference:
        unfinished.forget()
        raise


def _finished(work: _Work) -> ConversionRecord | None:
    """What an earlier conversion to this folder that came to its end wrote down, where `resume` is to look for it."""
    beside = work.folder / work.target.beside
    return read_record(beside) if work.manner.resume and (beside / RECORD).is_file() else None


def _refuse_another(work: _Work, record: ConversionRecord, planned: str) -> None:
    """Refuse to take a finished conversion for this one where anything that decides what is written differs."""
    if record.plan == planned:
        return
    target = work.target
    dtypes = {name: tensor.dtype for name, tensor in record.tensors.items()}
    pairs = {
        "format": (record.format, target.format),
        "source": (record.source, work.catalog.folder.resolve().name),
        "layout": (record.layout, target.layout),
        "architecture": (record.architecture, work.catalog.identity.architecture.name),
        "tensors": (len(dtypes), len(target.tensors)),
    }
    other = [f"{what}: {there}, not {asked}" for what, (there, asked) in pairs.items() if there != asked]
    other += [
        f"dtype of {name}: {dtypes[name]}, not {tensor.dtype.name}"
        for name, tensor in target.tensors.items()
        if name in dtypes and dtypes[name] != tensor.dtype.name
    ][:1]
    unsaid = "it does not say of which files" if record.plan is None else "the source's files, by place, size or time"
    raise RequestError(
        f"{work.folder} is there already, of another conversion; what differs: {'; '.join(other) or unsaid}",
        rule="--resume takes a finished conversion for done where source, dtype and layout are the same",
        cure=f"name another folder, or remove {work.folder}",
    )


def _verify_finished(work: _Work, record: ConversionRecord, progress: Progress) -> None:
    """Read a finished conversion back as a fresh one is."""
    faults = file_faults(work.folder, work.manner.processes)
    if faults:
        raise Difference(f"{work.folder} is damaged: {faults[0]}\n  do: remove it, and convert again")
    verify_copy(open_checkpoint(work.folder), record.hashes(), work.manner.processes, progress)


def _refuse_what_is_there(work: _Work) -> None:
    target = work.folder
    if os.path.realpath(target) in [os.path.realpath(source.folder) for source in work.sources]:
        raise RequestError(f"{target} is the source itself", rule="the target is another folder", cure=f"{target}-new")
    if target.name in ("", "..") or target.is_symlink() or target.is_mount():
        raise RequestError(
            f"{target} cannot be the name of a new folder",
            rule="the target is written under another name beside it and then takes its own: no link, no mount point",
            cure=f"another name, or {target / work.catalog.folder.resolve().name} where {target} is a folder",
        )
    nearest = next(place for place in target.absolute().parents if place.exists())
    if not nearest.is_dir():
        raise RequestError(f"{nearest} is no folder", rule=f"{target} lies in one", cure="name a folder elsewhere")
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise RequestError(
            f"{target} is there already",
            rule="a conversion writes a new folder and overwrites nothing",
            cure=f"name another folder, or remove {target}",
        )


def _refuse_damaged(work: _Work) -> None:
    """Files that have hashes in a manifest are held to them; hashes of tensors are looked at while copying."""
    for source in work.sources:
        faults = [] if source.recorded else file_faults(source.folder, work.manner.processes)
        if faults:
            raise WorkError(
                f"{source.folder} is damaged: {faults[0]}" + (f", and {len(faults) - 1} more" if faults[1:] else ""),
                cure="use another checkpoint of the run, or another copy of this one",
            )


def _check_space(folder: Path, target: Target) -> None:
    """Refuse to begin what the disk has no room for; what an earlier run wrote is there already."""
    there = next(place for place in (folder, *folder.absolute().parents) if place.exists())
    facts = os.statvfs(there)
    used = sum(path.stat().st_blocks * 512 for path in folder.rglob("*") if path.is_file())
    free, needed = facts.f_bavail * facts.f_frsize, target.bytes - used
    if needed > free:
        raise WorkError(
            f"the disk has {free / 1e9:.2f} GB free, and {needed / 1e9:.2f} GB are to be written",
            where=str(folder.parent),
            cure="free the difference, or name a folder on another disk",
        )


def _failed(error: OSError, folder: Path) -> WorkError:
    cure = "correct the folder's permissions, or name another one"
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        cure = "free disk space and repeat the command with --resume: it goes on from what is done"
    return WorkError(f"the conversion failed: {error}", where=str(folder), cure=cure)


def _report(work: _Work, resumed: int) -> Report:
    identity: Identity = work.catalog.identity
    return Report(
        source_format=work.catalog.format,
        architecture=identity.architecture.name,
        bytes=sum(work.sizes),
        tensors=len(work.target.tensors),
        parts=len(work.target.parts),
        resumed=resumed,
        verified=work.manner.verify == "checksums",
        notes=(*work.catalog.notes, *work.target.notes),
    )
