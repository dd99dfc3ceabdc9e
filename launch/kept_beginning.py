"""What a run keeps of what it began with: enough to go on where that was moved or deleted.

RUN/beginning holds a manifest and a tokenizer, and no weights: those of a run that resumes are in its own checkpoints.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from pydantic import ValidationError

from checkpoint_tools.manifest import MANIFEST, TOKENIZER, Manifest, read_manifest
from data.tokenizer import tokenizer_files
from foundation.errors import ConfigError, WorkError
from foundation.files import flush_folder, whole_file, write_text
from foundation.section import Section
from training.checkpoint.folder import CheckpointFolder

FIELD = "init.checkpoint"
FOLDER = "beginning"
RECORD = "beginning.json"


class Beginning(Section):
    """What a run begins with, or began with."""

    named: str
    """What init.checkpoint says."""
    checkpoint: Path
    """Where the weights lie; lay, where the run has a checkpoint of its own: then they are not looked for."""
    manifest: Manifest
    """Of `checkpoint`."""
    tokenizer: Path | None
    """The folder with its tokenizer, None where it has none."""

    @classmethod
    def of(cls, named: Path, checkpoint: Path) -> Beginning:
        """That lies at `checkpoint`.

        Raises:
            WorkError: its manifest cannot be read.
        """
        folder = checkpoint / TOKENIZER
        manifest = read_manifest(checkpoint).model_copy(update={"files": {}})
        tokenizer = folder if folder.is_dir() else None
        return cls(named=str(named), checkpoint=checkpoint, manifest=manifest, tokenizer=tokenizer)


def kept_beginning(folder: Path, named: Path) -> Beginning | None:
    """What the run in `folder` began with, None where it has no checkpoint yet, or nothing says.

    Args:
        named: what init.checkpoint says now.

    Raises:
        ConfigError: it said something else when the run began.
        WorkError: what was kept is damaged.
    """
    kept = _read(folder) if CheckpointFolder(folder / "checkpoints").has_saved() else None
    if kept is not None and os.path.realpath(named) != os.path.realpath(kept.named):
        raise ConfigError(
            FIELD,
            str(named),
            rule=f"is what the run in {folder} began with, {kept.named}: it goes on with weights that came from there",
            cure=f"{FIELD}={kept.named}, which need not be there any more, or another run.folder",
        )
    return kept


def kept_tokenizer(folder: Path) -> Path | None:
    """The folder with the tokenizer that a run which resumes has kept."""
    kept = folder / FOLDER / TOKENIZER
    return kept if CheckpointFolder(folder / "checkpoints").has_saved() and kept.is_dir() else None


def keep(begun: Beginning, folder: Path, tokenizer: Path) -> Beginning:
    """`begun` as it is found in the run's `folder` from now on; written where it is not there yet.

    Args:
        tokenizer: file or folder with the run's tokenizer.
    """
    here = folder / FOLDER
    kept = begun.model_copy(update={"tokenizer": here / TOKENIZER})
    if _read(folder) == kept:
        return kept
    (here / RECORD).unlink(missing_ok=True)  # it is the last to appear: what it is of lies beside it then
    files = tokenizer_files(tokenizer)  # those of a run that resumes may be the kept ones themselves
    for path in files:
        with path.open("rb") as source, whole_file(here / TOKENIZER / path.name) as target:
            shutil.copyfileobj(source, target)
    for other in {*(here / TOKENIZER).iterdir()} - {here / TOKENIZER / path.name for path in files}:
        other.unlink()
    flush_folder(here)
    write_text(here / RECORD, kept.model_dump_json(indent=2) + "\n")
    return kept


def _read(folder: Path) -> Beginning | None:
    path = folder / FOLDER / RECORD
    try:
        kept = Beginning.model_validate_json(path.read_bytes())
        return _where_it_lies(kept, folder)
    except FileNotFoundError:
        return None
    except (ValidationError, ValueError) as error:
        raise WorkError(
            f"{path} is damaged: {error}", cure=f"remove it: the next start needs {FIELD} once more, and writes it anew"
        ) from error


def _where_it_lies(kept: Beginning, folder: Path) -> Beginning:
    """`kept` with the places that it has now: the run may have been moved, and RUN/init with it."""
    moved = {"tokenizer": folder / FOLDER / TOKENIZER}
    if kept.tokenizer is not None and not (kept.checkpoint / MANIFEST).is_file():
        before = kept.tokenizer.parent.parent
        inside = kept.checkpoint.relative_to(before) if kept.checkpoint.is_relative_to(before) else None
        if inside is not None and (folder / inside / MANIFEST).is_file():
            moved["checkpoint"] = folder / inside
    return kept.model_copy(update=moved)
