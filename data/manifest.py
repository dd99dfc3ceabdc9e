"""PREFIX.json: what a token file holds and where it came from."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from foundation.errors import WorkError

FORMAT = "orthant.tokens.1"

_LARGEST_VOCABULARY = 1 << 31
"""Of tokens that fit into int32."""
_TYPES: dict[str, tuple[type, ...]] = {
    "int": (int,), "float": (int, float), "str": (str,), "str | None": (str, type(None)),
}  # fmt: skip
"""What JSON may hold for a field, by its annotation."""


@dataclass(frozen=True)
class SourceFileRecord:
    """A file that was read."""

    path: str
    bytes: int
    sha256: tuple[str, ...]
    """Of the file; of its parts of `shard_bytes` bytes where it was read in several."""


@dataclass(frozen=True)
class SourceRecord:
    """What was read from one source."""

    name: str
    documents: int
    """Documents read from it into this token file."""
    bad_lines: int
    """Lines or rows that hold no document; the first of them are listed when they are met."""
    files: tuple[SourceFileRecord, ...] = ()
    """What it was made of, in order."""


@dataclass(frozen=True)
class Manifest:
    """The manifest of a token file. The same corpus and tokenizer give the same bytes: it holds no times."""

    documents: int
    """Documents, empty ones included."""
    sequences: int
    """Documents that hold tokens."""
    tokens: int
    """End-of-document tokens included."""
    dtype: str
    """uint16 or int32."""
    vocab_size: int
    eod_id: int
    tokenizer_hash: str
    """sha256 of the tokenizer's file."""
    unigram_entropy: float
    """Entropy of the token frequencies in nats a token: the loss of the best model that knows frequencies only."""
    bin_bytes: int
    bin_sha256: str
    idx_sha256: str
    sources: tuple[SourceRecord, ...] = ()
    view_of: str | None = None
    """Set where the .bin is a link to another token file's, of which the .idx names a part of the documents."""

    def to_json(self) -> str:
        """As it stands in PREFIX.json; in ASCII, since names of files may be no UTF-8."""
        return json.dumps({"format": FORMAT, **dataclasses.asdict(self)}, indent=2) + "\n"

    @classmethod
    def from_json(cls, text: str | bytes, where: str) -> Manifest:
        """Read a manifest.

        Raises:
            WorkError: it is damaged or of another format.
        """
        try:
            values: dict[str, Any] = json.loads(text)
            if values.pop("format") != FORMAT:
                raise ValueError("another format")
            values["sources"] = tuple(map(_source_record, values["sources"]))
            manifest = cls(**values)
            _refuse_other_types(manifest)
            if not 1 <= manifest.vocab_size <= _LARGEST_VOCABULARY:
                raise ValueError(f"vocab_size is {manifest.vocab_size}")
            return manifest
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as problem:
            raise WorkError(
                f"not a manifest of a token file ({problem})",
                where=where,
                cure="write the corpus again with `orthant data tokenize`",
            ) from problem


def manifest_path(prefix: Path) -> Path:
    """PREFIX.json."""
    return Path(f"{prefix}.json")


def read_manifest(prefix: Path) -> Manifest | None:
    """The manifest of a token file; None where there is none (Megatron's own tools write none)."""
    path = manifest_path(prefix)
    if not path.is_file():
        return None
    return Manifest.from_json(path.read_bytes(), where=str(path))


def _source_record(values: dict[str, Any]) -> SourceRecord:
    files = tuple(
        SourceFileRecord(each["path"], each["bytes"], tuple(each["sha256"])) for each in values.pop("files", ())
    )
    record = SourceRecord(files=files, **values)
    _refuse_other_types(record)
    for file in files:
        _refuse_other_types(file)
    return record


def _refuse_other_types(record: Manifest | SourceRecord | SourceFileRecord) -> None:
    """A TypeError where an edited file gives a field another type; tuples are made by whoever reads them."""
    for field in dataclasses.fields(record):
        allowed, value = _TYPES.get(str(field.type)), getattr(record, field.name)
        if allowed is not None and (isinstance(value, bool) or not isinstance(value, allowed)):
            raise TypeError(f"{field.name} is {json.dumps(value)}, not {field.type}")
