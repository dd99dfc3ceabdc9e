"""Save and load a run's state. Every function here is collective: all ranks call it together."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist

from checkpoint_tools.manifest import MANIFEST, FileRecord, Manifest, damage, read_manifest, record_file
from data.tokenizer import tokenizer_files
from foundation.errors import WorkError
from foundation.files import flush_folder, write_text
from training.checkpoint.folder import CheckpointFolder
from training.checkpoint.tensors import read_tensors, write_tensors
from training.config import CheckpointConfig
from training.state import TrainingState

Report = Callable[[str], None]

TOKENIZER = "tokenizer"
"""Folder of the tokenizer's files in a checkpoint: a checkpoint talks without the run it came from."""


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
        """Write a checkpoint; it takes its name when every file lies on the disk, `latest` moves last."""
        step = manifest.step
        unfinished = self.folder.unfinished(step)
        _on_rank_0(lambda: self.folder.begin(step))
        write_tensors(state, unfinished)
        _on_rank_0(lambda: _copy_tokenizer(Path(manifest.tokenizer_path), unfinished))
        records = _record_files(unfinished)

        def finish() -> None:
            text = manifest.model_copy(update={"files": records}).model_dump_json(indent=2)
            write_text(unfinished / MANIFEST, text + "\n")
            flush_folder(unfinished)
            self.folder.finish(step)
            self.folder.remove_superseded(self.config)

        _on_rank_0(finish)
        return self.folder.of_step(step)

    def newest_good(self) -> tuple[Path, Manifest] | None:
        """The newest checkpoint whose files are what was written; damaged ones are named and passed over.

        Raises:
            WorkError: there are checkpoints and every one is damaged.
        """
        steps: list[int] = _from_rank_0(self.folder.steps)
        for step in steps:
            checkpoint = self.folder.of_step(step)
            manifest, found = _verify(checkpoint)
            if manifest is not None and not found:
                return checkpoint, manifest
            if dist.get_rank() == 0:
                self.report(f"checkpoint {checkpoint.name} is passed over: {'; '.join(found)}")
        if steps:
            raise WorkError(
                f"none of the {len(steps)} checkpoints is whole",
                where=str(self.folder.path),
                cure="restore one from a backup, or start anew in another run.folder",
            )
        return None

    def load(self, state: TrainingState, checkpoint: Path) -> None:
        """Read `checkpoint` into `state`."""
        read_tensors(state, checkpoint)


def _copy_tokenizer(source: Path, checkpoint: Path) -> None:
    (checkpoint / TOKENIZER).mkdir()
    for path in tokenizer_files(source):
        shutil.copyfile(path, checkpoint / TOKENIZER / path.name)


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


def _record_files(folder: Path) -> dict[str, FileRecord]:
    """Hash every file below `folder`; ranks share the reading."""
    names: list[str] = _from_rank_0(lambda: sorted(str(path.relative_to(folder)) for path in _files(folder)))
    own = {name: record_file(folder / name) for name in names[dist.get_rank() :: dist.get_world_size()]}
    everywhere: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everywhere, own)
    return {name: record for part in everywhere for name, record in part.items()}


def _files(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()]


def _on_rank_0(work: Callable[[], Any]) -> None:
    """Do `work` on rank 0 while the others wait; its error is raised on every rank."""
    _from_rank_0(work)


def _from_rank_0(ask: Callable[[], Any]) -> Any:
    """What `ask` returns on rank 0, on every rank; an error there ends all with the same message."""
    answer: list[Any] = [None, None]
    if dist.get_rank() == 0:
        try:
            answer[0] = ask()
        except OSError as error:
            answer[1] = WorkError(str(error), cure="free the disk or mend the folder's permissions, then run again")
        except WorkError as error:
            answer[1] = error
    dist.broadcast_object_list(answer, src=0)
    if answer[1] is not None:
        raise answer[1]
    return answer[0]
