"""Save and load a run's state. Every function here is collective: all ranks call it together."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch.distributed as dist

from checkpoint_tools.manifest import MANIFEST, TOKENIZER, FileRecord, Manifest, damage, read_manifest, record_file
from data.tokenizer import tokenizer_files
from foundation.errors import WorkError
from foundation.files import flush_folder, write_text
from training.checkpoint.agreement import all_agree, attempt, from_everyone, from_rank_0
from training.checkpoint.folder import CheckpointFolder
from training.checkpoint.forked import Forked
from training.checkpoint.tensors import plan_tensors, read_tensors
from training.checkpoint.writing import Plan, Written
from training.config import CheckpointConfig
from training.state import TrainingState

Report = Callable[[str], None]

SPARE_BYTES = 64 << 20
"""Beside the tensors: metadata, the tokenizer, and what a filesystem needs for itself."""


@dataclass(frozen=True)
class Begun:
    """A checkpoint that a fork of every rank is writing.

    Attributes:
        manifest: what it will say, without the files.
        plan: what this rank writes.
        writer: its fork.
    """

    manifest: Manifest
    plan: Plan
    writer: Forked

    def is_written(self) -> bool:
        """Whether the forks of all ranks have ended. Collective."""
        return all_agree(self.writer.done())


@dataclass(frozen=True)
class CheckpointStore:
    """The checkpoints of one run.

    Attributes:
        folder: where they lie, on a filesystem that all ranks see.
        config: what is kept.
        report: takes lines for people, called on rank 0.
    """

    folder: CheckpointFolder
    config: CheckpointConfig
    report: Report

    def save(self, state: TrainingState, manifest: Manifest) -> Path:
        """Write a checkpoint; it takes its name when every file lies on the disk, `latest` moves last.

        Raises:
            WorkError: the disk has no room for it or can't be written; the checkpoints before it are as they were.
        """
        plan = self._planned(state, manifest)
        return self._finish(plan, manifest, plan.write)

    def begin(self, state: TrainingState, manifest: Manifest) -> Begun:
        """As `save`, while training goes on: the state may change as soon as this returns.

        A fork keeps the state as it is now; memory grows by what training changes of it until the fork is done.
        """
        plan = self._planned(state, manifest)
        writers: list[Forked] = []
        from_everyone(lambda: writers.append(plan.write_in_background()))
        return Begun(manifest, plan, writers[0])

    def finish(self, begun: Begun) -> Path:
        """Wait for what was begun and give it its name."""
        return self._finish(begun.plan, begun.manifest, begun.writer.result)

    def _planned(self, state: TrainingState, manifest: Manifest) -> Plan:
        unfinished = self.folder.unfinished(manifest.step)
        from_rank_0(lambda: str(self.folder.begin(manifest.step)))
        from_rank_0(lambda: _refuse_full_disk(unfinished, 0))  # core's plan writes a file already
        plan = plan_tensors(state, unfinished)
        needed = sum(from_everyone(plan.bytes))
        from_rank_0(lambda: _refuse_full_disk(unfinished, needed))
        return plan

    def _finish(self, plan: Plan, manifest: Manifest, written: Callable[[], Written]) -> Path:
        unfinished = self.folder.unfinished(manifest.step)
        records: dict[str, FileRecord] = {}
        own = Written({}, {})

        def write() -> dict[str, FileRecord]:
            nonlocal own
            own = written()
            return own.files

        for files in from_everyone(write):
            records |= files
        _, unwritten = attempt(lambda: plan.finish(own))
        if unwritten is not None:
            raise unwritten

        def name() -> None:
            _copy_tokenizer(manifest, unfinished)
            for path in _files(unfinished):
                if path.name not in records:
                    _flush(path)
                    records[str(path.relative_to(unfinished))] = record_file(path, "xxh3_128")
            ordered = dict(sorted(records.items()))
            text = manifest.model_copy(update={"files": ordered}).model_dump_json(indent=2)
            write_text(unfinished / MANIFEST, text + "\n")
            flush_folder(unfinished)
            self.folder.finish(manifest.step)
            self.folder.remove_superseded(self.config, manifest.step)

        from_rank_0(name)
        return self.folder.of_step(manifest.step)

    def newest_good(self) -> tuple[Path, Manifest] | None:
        """The newest checkpoint whose files are what was written; damaged ones are named and set aside.

        Raises:
            WorkError: there are checkpoints and every one is damaged.
        """
        steps: list[int] = from_rank_0(self.folder.restored_steps)
        damaged: list[int] = []
        for step in steps:
            checkpoint = self.folder.of_step(step)
            manifest, found = _verify(checkpoint)
            if manifest is not None and not found:
                if damaged:
                    from_rank_0(partial(self.folder.set_aside, damaged, step))
                return checkpoint, manifest
            damaged.append(step)
            if dist.get_rank() == 0:
                self.report(f"checkpoint {checkpoint.name} is passed over: {'; '.join(found)}")
        if steps:
            raise WorkError(
                f"none of the {len(steps)} checkpoints is whole",
                where=str(self.folder.path),
                cure="restore one from a backup, or start anew in another run.folder",
            )
        return None

    def verified(self, step: int) -> Manifest:
        """The manifest of the checkpoint after `step` steps, whose files are what was written.

        Raises:
            WorkError: it is not there, or damaged.
        """
        checkpoint = self.folder.of_step(step)
        manifest, found = _verify(checkpoint)
        if manifest is None or found:
            raise WorkError(
                f"checkpoint {checkpoint.name} is needed and not whole: {'; '.join(found)}",
                where=str(self.folder.path),
                cure="restore it from a backup, or start anew in another run.folder",
            )
        return manifest

    def load(self, state: TrainingState, checkpoint: Path) -> None:
        """Read `checkpoint` into `state`."""
        read_tensors(state, checkpoint)


def _refuse_full_disk(folder: Path, needed: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < needed + SPARE_BYTES:
        shutil.rmtree(folder)
        least = f"{'' if needed else 'more than '}{(needed + SPARE_BYTES) / 1e9:.2f} GB"
        raise WorkError(
            f"a checkpoint needs {least} and the disk has {free / 1e9:.2f} GB left",
            where=str(folder.parent),
            cure="free some space, or keep fewer checkpoints (checkpoint.keep_last), then run again: it resumes",
        )


def _copy_tokenizer(manifest: Manifest, checkpoint: Path) -> None:
    (checkpoint / TOKENIZER).mkdir()
    for path in tokenizer_files(Path(manifest.tokenizer_path)):
        shutil.copyfile(path, checkpoint / TOKENIZER / path.name)
    flush_folder(checkpoint / TOKENIZER)


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _verify(checkpoint: Path) -> tuple[Manifest | None, list[str]]:
    """The manifest and everything wrong with the files; ranks share the reading."""
    try:
        manifest = read_manifest(checkpoint)
        own = list(manifest.files.items())[dist.get_rank() :: dist.get_world_size()]
        found = [wrong for name, record in own if (wrong := damage(checkpoint, name, record))]
    except WorkError as error:
        manifest, found = None, [error.what]
    everywhere: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everywhere, found)
    return manifest, sorted({wrong for part in everywhere for wrong in part})


def _files(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()]
