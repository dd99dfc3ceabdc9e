"""Which of the formats a path holds."""

from __future__ import annotations

from pathlib import Path

from checkpoint_tools.catalog import Catalog, Format
from checkpoint_tools.formats.detect_names import TRACKER
from checkpoint_tools.formats.distributed import METADATA, read_distributed
from checkpoint_tools.formats.hugging_face import CONFIG, read_hugging_face
from checkpoint_tools.formats.megatron import read_megatron
from checkpoint_tools.manifest import MANIFEST
from checkpoint_tools.reading import unreadable_named
from checkpoint_tools.record import RECORD
from foundation.errors import RequestError, WorkError


def open_checkpoint(path: Path, vocab_size: int | None = None) -> Catalog:
    """The catalog of whatever lies at `path`: a checkpoint, a run's folder, or Megatron-LM's folder of iterations.

    Args:
        vocab_size: the true vocabulary, where nothing in the checkpoint says it.

    Raises:
        RequestError: there is no checkpoint, or one that is not converted.
        WorkError: it is damaged, or cannot be read.
    """
    folder = find_checkpoint(path)
    with unreadable_named(folder):
        kind = _format_of(folder)
        if kind is None:
            raise WorkError(
                f"{folder} is a part of a checkpoint: it has {_trace(folder)}, and neither {METADATA} nor {CONFIG} nor "
                "mp_rank_* folders",
                cure="use another copy of the checkpoint",
            )
        if kind == "hf":
            return read_hugging_face(folder)
        if kind == "distributed":
            return read_distributed(folder, vocab_size)
        return read_megatron(folder, vocab_size)


def _format_of(folder: Path) -> Format | None:
    """The format of what lies in `folder`, None where what is needed to read it is not there."""
    if (folder / METADATA).is_file():
        return "distributed"
    if (folder / CONFIG).is_file():
        return "hf"
    return "megatron" if any(folder.glob("mp_rank_*")) else None


def _trace(folder: Path) -> str | None:
    """A file by which a folder that is not whole is still known as one of ours."""
    files = (*(folder / name for name in (MANIFEST, RECORD)), *sorted(folder.glob("*.distcp")))
    return next((path.name for path in files if path.is_file()), None)


def find_checkpoint(path: Path) -> Path:
    """The folder that holds the files.

    Raises:
        RequestError: there is none, or none that may be looked into.
    """
    try:
        return _found(path)
    except OSError as error:
        raise RequestError(
            f"{path} cannot be looked into: {error.strerror or error}",
            rule="a checkpoint is a folder that you may read",
            cure="correct its permissions, or name another one",
        ) from error


def _found(path: Path) -> Path:
    if not path.is_dir():
        what = "is no folder" if path.exists() else "is not there"
        raise RequestError(
            f"{path} {what}",
            rule="a checkpoint is a folder",
            cure="the folder of a checkpoint, or of a run that has saved (run.folder)",
        )
    for folder in (path, *_newest(path)):
        if _format_of(folder) is not None or _trace(folder) is not None:
            return folder
    raise RequestError(
        f"{path} holds no checkpoint that is known",
        rule="hf: config.json and safetensors; distributed: .metadata and .distcp files; megatron: mp_rank_* folders",
        cure="the folder of a checkpoint itself, or of a run that has saved (run.folder)",
    )


def _newest(path: Path) -> list[Path]:
    """Where a run of ours or of Megatron-LM keeps its newest checkpoint."""
    found: list[Path] = []
    for folder in (path / "checkpoints", path):
        if (folder / "latest").is_file():
            found.append(folder / _line(folder / "latest"))
    if (path / TRACKER).is_file():
        said = _line(path / TRACKER)
        found.append(path / (f"iter_{said.zfill(7)}" if said.isdecimal() else said))
    return [folder for folder in found if folder.is_dir()]


def _line(path: Path) -> str:
    """What a file of one line says; what is no text names no folder."""
    return path.read_text(errors="replace").strip()
