"""The plan of a cleaning: which pieces of which files make up each shard. It follows from the request alone."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from data.clean.settings import CleanSettings, fingerprint
from data.documents import damaged
from data.sources import Source, SourceFile
from foundation.errors import RequestError, WorkError
from foundation.files import write_text

FORMAT = "orthant.clean.1"
_COMPRESSED_WEIGHT = 4
_SHARD_FILES = 1000


@dataclass(frozen=True)
class Piece:
    """A part of a file that one shard reads: bytes of a plain .jsonl, row groups of a .parquet, rows of a saved
    dataset; other files are read whole (begin 0, end 0)."""

    file: int
    """Number of the file within the plan."""
    begin: int
    end: int


@dataclass(frozen=True)
class Plan:
    """What is done, written beside the work before it begins."""

    settings: dict[str, Any]
    sources: tuple[str, ...]
    """As a person named them."""
    files: tuple[tuple[str, str, int, int], ...]
    """Path, kind, bytes, time of the last change in nanoseconds."""
    shards: tuple[tuple[Piece, ...], ...]

    def file(self, number: int) -> SourceFile:
        """A file of the plan."""
        path, kind = self.files[number][:2]
        return SourceFile(Path(path), kind)  # type: ignore[arg-type]

    @property
    def fingerprint(self) -> str:
        """Of all that decides the result."""
        return fingerprint(self.to_json())

    def to_json(self) -> dict[str, Any]:
        """As it stands in the plan's file."""
        return {
            "format": FORMAT,
            "settings": self.settings,
            "sources": list(self.sources),
            "files": [list(file) for file in self.files],
            "shards": [[[piece.file, piece.begin, piece.end] for piece in shard] for shard in self.shards],
        }

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Plan:
        """Back from `to_json`."""
        return cls(
            values["settings"],
            tuple(values["sources"]),
            tuple((path, kind, size, time) for path, kind, size, time in values["files"]),
            tuple(tuple(Piece(*piece) for piece in shard) for shard in values["shards"]),
        )


def make_plan(sources: Sequence[Source], settings: CleanSettings) -> Plan:
    """Cut the files of the sources into shards of about `settings.shard_bytes`, in their order."""
    files = [file for source in sources for file in source.files]
    _check_names(files, settings)
    seen: set[Path] = set()
    for file in files:
        real = file.path.resolve()
        if real in seen:
            raise RequestError(
                f"{file.path} is named twice",
                rule="a file is read once: each of its documents would count as a duplicate",
                cure="name it, or the folder that holds it, once",
            )
        seen.add(real)
    shards: list[tuple[Piece, ...]] = []
    held: list[Piece] = []
    weight = 0
    for number, file in enumerate(files):
        for piece, size in _pieces(number, file, settings.shard_bytes):
            if held and (weight + size > settings.shard_bytes or len(held) == _SHARD_FILES):
                shards.append(tuple(held))
                held, weight = [], 0
            held.append(piece)
            weight += size
    if held:
        shards.append(tuple(held))
    values = settings.to_json()
    if settings.near is not None:
        # Half of the work by one version and half by another would compare signatures that cannot be compared.
        values["near"]["rensa"] = version("rensa")
    return Plan(values, tuple(source.name for source in sources), _identities(files), tuple(shards))


def _check_names(files: Sequence[SourceFile], settings: CleanSettings) -> None:
    """Names go into the plan, the lists and the report, which are UTF-8."""
    models = [model.path for model in (settings.language, settings.quality) if model is not None]
    for name in [settings.text_key, *map(str, models), *(str(file.path) for file in files)]:
        try:
            name.encode()
        except UnicodeEncodeError as problem:
            raise RequestError(
                f"the name {name!r} is not UTF-8",
                rule="the lists and the report name every file, and they are UTF-8",
                cure="rename it",
            ) from problem


def _identities(files: Sequence[SourceFile]) -> tuple[tuple[str, str, int, int], ...]:
    found = []
    for file in files:
        stats = [part.stat() for part in file.parts()]
        newest = max((stat.st_mtime_ns for stat in stats), default=0)
        found.append((str(file.path), file.kind, sum(stat.st_size for stat in stats), newest))
    return tuple(found)


def _pieces(number: int, file: SourceFile, shard_bytes: int) -> Iterator[tuple[Piece, int]]:
    """Pieces of a file, each with the bytes of text that it may hold."""
    size = file.byte_count()
    if file.kind == "jsonl" and file.path.name.lower().endswith(".jsonl"):
        for begin in range(0, max(size, 1), shard_bytes):
            end = min(begin + shard_bytes, size)
            yield Piece(number, begin, end), end - begin
    elif file.kind == "parquet":
        yield from _row_groups(number, file.path, shard_bytes)
    elif file.kind == "saved_dataset":
        rows = _saved_rows(file.path)
        step = max(1, rows * shard_bytes // max(size, 1))
        for begin in range(0, rows, step):
            end = min(begin + step, rows)
            yield Piece(number, begin, end), size * (end - begin) // rows
    else:
        compressed = file.path.suffix.lower() in (".gz", ".zst")
        yield Piece(number, 0, 0), size * (_COMPRESSED_WEIGHT if compressed else 1)


def _row_groups(number: int, path: Path, shard_bytes: int) -> Iterator[tuple[Piece, int]]:
    from pyarrow import ArrowException
    from pyarrow.parquet import ParquetFile

    try:
        with ParquetFile(path) as file:
            sizes = [file.metadata.row_group(group).total_byte_size for group in range(file.num_row_groups)]
    except (ArrowException, OSError) as problem:
        raise damaged(path, problem) from problem
    begin = held = 0
    for group, size in enumerate(sizes):
        if held and held + size > shard_bytes:
            yield Piece(number, begin, group), held
            begin, held = group, 0
        held += size
    yield Piece(number, begin, len(sizes)), held


def _saved_rows(path: Path) -> int:
    from datasets import load_from_disk

    return len(load_from_disk(str(path)))


def plan_path(out: Path) -> Path:
    """Where the plan lies while the work goes on."""
    return work_folder(out) / "plan.json"


def work_folder(out: Path) -> Path:
    """Everything that is not a result. Hidden, so that who reads OUT as a source does not read it."""
    return out / ".work"


def read_plan(out: Path) -> Plan | None:
    """The plan of the work that was begun in `out`; None where there is none.

    Raises:
        WorkError: it is damaged or of another version.
    """
    path = plan_path(out)
    if not path.is_file():
        return None
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        if values["format"] != FORMAT:
            raise ValueError("another format")
        return Plan.from_json(values)
    except (ValueError, KeyError, TypeError) as problem:
        raise WorkError(
            f"not a plan of `orthant data clean` ({problem})", where=str(path), cure="start again with --restart"
        ) from problem


def write_plan(plan: Plan, out: Path) -> None:
    """Keep the plan; written by several tasks of a Slurm array at once it is the same each time."""
    write_text(plan_path(out), json.dumps(plan.to_json(), ensure_ascii=False) + "\n")
