"""manifest.json: what a checkpoint holds, readable without loading it."""

from __future__ import annotations

import hashlib
from pathlib import Path, PurePosixPath
from typing import Any, Literal

import xxhash
from pydantic import Field, ValidationError, field_validator

from foundation.errors import WorkError
from foundation.section import Section
from model.config import ModelConfig

MANIFEST = "manifest.json"
TOKENIZER = "tokenizer"
"""Folder of the tokenizer's files in a distributed checkpoint: it talks without the run it came from."""
FORMAT_VERSION = 1

HashKind = Literal["sha256", "xxh3_128"]


class FileRecord(Section):
    """One file of a checkpoint: its size and one hash of its contents."""

    bytes: int
    sha256: str | None = None
    xxh3_128: str | None = None
    """What the converter records: it takes a thirtieth of the time and shows damage as well, though not malice."""


class ScoreNormalisation(Section):
    """Mean and standard deviation of a reward model's scores over the answers that it was trained on."""

    mean: float
    std: float
    answers: int
    """How many they were taken over."""


class Manifest(Section):
    """The checkpoint's own description. Holds no layout: `saved_at` is for people."""

    format_version: int = FORMAT_VERSION
    step: int
    """Optimizer steps done."""
    tokens: int
    """Tokens read until then."""
    model: ModelConfig
    precision: str
    """fp32, bf16 or fp8, in which it was trained: bf16 and fp8 hold fp32 master weights beside the weights. Of a
    converted model: the type of its weights, which may be fp16 or fp64."""
    vocab_size: int
    """True vocabulary; tensors may have rows beyond it that mean nothing."""
    padded_vocab_size: int
    tokenizer_path: str = ""
    """Where the tokenizer lay; its files are in the checkpoint too. Empty: converted from a model without one."""
    tokenizer_hash: str = ""
    eod_id: int | None = None
    """The token that ends a document, None where no tokenizer says."""
    data_fingerprint: str = ""
    """Of the prepared corpus and the data order: a run resumes only on the same. Empty: never trained here."""
    guards: dict[str, Any] = Field(default_factory=dict)
    """State of the training guards."""
    head: Literal["tokens", "score"] = "tokens"
    """score: a reward model or a critic, whose last layer gives a number for every token."""
    score: ScoreNormalisation | None = None
    """Of a reward model, once its training is done."""
    ppo: dict[str, Any] = Field(default_factory=dict)
    """State of a PPO run beside its models: the penalty's coefficient, tokens."""
    chat_template: str = ""
    """Jinja that conversations were rendered with; empty: none was."""
    saved_at: dict[str, Any] = Field(default_factory=dict)
    """Layout, libraries and time of writing, for people."""
    files: dict[str, FileRecord] = Field(default_factory=dict)
    """Every file but this one, by its path below the checkpoint."""

    @field_validator("files")
    @classmethod
    def _below_the_checkpoint(cls, files: dict[str, FileRecord]) -> dict[str, FileRecord]:
        for name in files:
            path = PurePosixPath(name)
            if not name or "\0" in name or path.is_absolute() or ".." in path.parts:
                raise ValueError(f"{name!r} is no file below the checkpoint")
        return files


def read_manifest(checkpoint: Path) -> Manifest:
    """The manifest of `checkpoint`.

    Raises:
        WorkError: there is none, it cannot be read, or it is not one of ours.
    """
    path = checkpoint / MANIFEST
    try:
        return Manifest.model_validate_json(path.read_bytes())
    except FileNotFoundError as error:
        raise WorkError(
            f"{checkpoint} is no checkpoint: it has no {MANIFEST}",
            cure="name a folder RUN/checkpoints/step_NNNNNNNN, or the run's folder",
        ) from error
    except OSError as error:
        raise WorkError(f"{path} cannot be read: {error.strerror}", cure="correct its permissions") from error
    except (ValidationError, ValueError) as error:
        raise WorkError(f"{path} is damaged: {error}", cure="use another checkpoint of the run") from error


def record_file(path: Path, kind: HashKind = "sha256") -> FileRecord:
    """Size and hash of a file."""
    return FileRecord.model_validate({"bytes": path.stat().st_size, kind: _hash(path, kind)})


def damage(checkpoint: Path, name: str, record: FileRecord) -> str | None:
    """What is wrong with file `name`, None when nothing is."""
    try:
        return _damage(checkpoint / name, record)
    except OSError as error:
        return f"{checkpoint / name} cannot be read: {error.strerror or error}"


def _damage(path: Path, record: FileRecord) -> str | None:
    if not path.is_file():
        return f"{path} is missing"
    if path.stat().st_size != record.bytes:
        return f"{path} has {path.stat().st_size} bytes, not {record.bytes}"
    if record.sha256 is None and record.xxh3_128 is None:
        return f"{path} has no hash in {MANIFEST}"
    kind: HashKind = "sha256" if record.sha256 is not None else "xxh3_128"
    if _hash(path, kind) != getattr(record, kind):
        return f"{path} does not have the contents that were written ({kind} differs)"
    return None


def _hash(path: Path, kind: HashKind) -> str:
    make: Any = xxhash.xxh3_128 if kind == "xxh3_128" else hashlib.sha256
    with path.open("rb") as handle:
        return str(hashlib.file_digest(handle, make).hexdigest())
